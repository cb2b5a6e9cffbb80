"""Rewards that a program checks, as feedback to PPO: no judge, no reward model (`rl.rules` has the functions).

An answer's score is the weighted sum of the rules that apply to its record. Each rule is logged apart, as the mean
over the answers to which it applies (`rules/<rule>`, with `@task` where a rule is for one task).
"""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import NamedTuple

import torch

from ... import ranks
from ...data.records import Record
from ...data.truth import load_function
from ...errors import DataError, StageError
from ...model.inputs import encode_prompt
from ...model.text import decode_answer
from ...phases import phase
from ...progress import say
from ...recipe import Rule, Rules
from ...rl.advantages import needs_order
from ...rl.rules import CHECKS, FORMAT, said_in
from ...rollout import Trajectory
from ...workspace import Workspace
from .experience import answers_of
from .feedback import Feedback, Taken

KEY = "ppo.rules.rewards"
TAKES = "record, answer, token ids, video seconds"


class Value(NamedTuple):
    """What one rule gives one answer."""

    rule: Rule
    value: float
    failed: str = ""  # what the user's function raised, where the recipe says to score 0


def name_of(rule: Rule) -> str:
    """The rule as logs have it."""
    return rule.rule if rule.task is None else f"{rule.rule}@{rule.task}"


def applying(rules: Rules, record: Record) -> list[Rule]:
    """The rules for a record."""
    return [rule for rule in rules.rewards if rule.task in (None, record.task)]


class RuleReward:
    """The recipe's rules, ready to be asked."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.functions = {name: load_function(name, KEY, TAKES) for name in rules.own}

    def values(self, record: Record, answer: str, ids: Sequence[int], seconds: float | None) -> list[Value]:
        """What each rule that applies gives an answer. `ids`: its tokens, the end included; `seconds`: of the video,
        None without one. Raises StageError where a function of the user's fails and the recipe says stop."""
        said = said_in(answer)
        return [self._value(rule, record, answer, said, ids, seconds) for rule in applying(self.rules, record)]

    def _value(
        self, rule: Rule, record: Record, answer: str, said: str, ids: Sequence[int], seconds: float | None
    ) -> Value:
        if rule.rule in CHECKS:
            return Value(rule, CHECKS[rule.rule].value(said, record))
        if rule.rule == "format":
            return Value(rule, float(FORMAT.fullmatch(answer) is not None))
        if rule.tokens is not None:
            return Value(rule, float(rule.tokens[0] <= len(ids) <= rule.tokens[1]))
        try:
            found = self.functions[rule.rule](record, answer, list(ids), seconds)
            if isinstance(found, bool) or not isfinite(number := float(found)):
                raise TypeError(f"it returned {found!r}, expected a finite float")
        except Exception as error:
            place = f"`{KEY}: {rule.rule}` failed on {record.source or record.key}, answer {answer[:200]!r}: {error!r}."
            if self.rules.on_error == "stop":
                raise StageError(f"{place} `ppo.rules.on_error: zero` scores such answers 0.") from error
            return Value(rule, 0.0, failed=place)
        return Value(rule, number)


def accuracy(rules: Rules, record: Record, answer: str) -> float | None:
    """Weighted mean of the rules that read the solution; None where none can for this record."""
    found = [
        rule
        for rule in applying(rules, record)
        if rule.rule in CHECKS and rule.weight > 0 and CHECKS[rule.rule].readable(record)
    ]
    if not found:
        return None
    said = said_in(answer)
    total = sum(rule.weight * CHECKS[rule.rule].value(said, record) for rule in found)
    return total / sum(rule.weight for rule in found)


def check_solutions(rules: Rules, records: Iterable[Record], key: str) -> None:
    """Raises DataError, with the count and the first records, for solutions that a rule cannot read and for records
    without a rule."""
    bad, total = [], 0
    for record in records:
        total += 1
        found = applying(rules, record)
        if not found:
            bad.append(f"{record.source or record.key}: no rule is for its task {record.task!r}")
        for rule in found:
            check = CHECKS.get(rule.rule)
            if check is not None and not check.readable(record):
                given = "no `solution`" if record.solution is None else f"the solution {record.solution[:80]!r}"
                options = f" and options {list(record.options)!r:.120}" if rule.rule == "choice" else ""
                where = record.source or record.key
                bad.append(f"{where}: {given}{options}; rule {name_of(rule)} needs {check.wants}")
                break
    if bad:
        shown = "\n  ".join(bad[:5])
        raise DataError(
            f"{key}: {len(bad)} of {total} records have no solution that `{KEY}` can read, the first:\n  {shown}\n"
            "Correct or leave out these records, or give the rule a `task` so that it is for other records only."
        )


class RuleFeedback(Feedback):
    """The rules' weighted sum, one score per answer."""

    def __init__(self, work: Workspace):
        super().__init__(work)
        self.reward = RuleReward(work.recipe.ppo.rules)

    def take(self, records: list[Record], answers: list[Trajectory], step: int) -> Taken:

        def ask(own: list[tuple[Record, Trajectory]]) -> list[list[Value]]:
            found = []
            for record, answer in own:
                video = self.work.features(record)
                text = decode_answer(self.work.base(), answer.ids)
                found.append(self.reward.values(record, text, answer.ids, None if video is None else video.duration))
            return found

        values = ranks.spread(list(zip(records, answers, strict=True)), ask)
        for each in (each for found in values for each in found if each.failed):
            say(f"WARNING {each.failed} It scores 0.")
        scores = [sum(each.rule.weight * each.value for each in found) for found in values]
        metrics = metrics_of(values)
        if self.work.recipe.ppo.order_bonus:
            scores, more = self.with_bonus(records, answers, scores, step)
            metrics |= more
        return super().take(records, answers, step)._replace(scores=scores, metrics=metrics)

    def with_bonus(
        self, records: list[Record], answers: list[Trajectory], scores: list[float], step: int
    ) -> tuple[list[float], dict[str, float]]:
        """The scores with T-GRPO's bonus, and what to log of it. Half as many answers are sampled to each video with
        its frames shuffled; nothing is learnt from those."""
        work, section = self.work, self.work.recipe.ppo
        asked, per_prompt = records[:: section.group_size], max(1, section.group_size // 2)
        prompt_of = lambda i: encode_prompt(work.base(), asked[i].prompt, work.features(asked[i], "shuffled"))
        seeds = [work.seed("ppo", "shuffled", step, i) for i in range(len(asked) * per_prompt)]
        with phase("shuffled answers"):
            shuffled = answers_of(work, "policy", len(asked), prompt_of, seeds, per_prompt)
        ordered_B, shuffled_J = (
            torch.tensor([self.accuracy(r, a) for r, a in zip(of, said, strict=True)])
            for of, said in ((records, answers), ([asked[a.prompt] for a in shuffled], shuffled))
        )
        bonus_B = needs_order(ordered_B, shuffled_J, section.group_size)
        metrics = {"order/accuracy": ordered_B.mean().item(), "order/shuffled": shuffled_J.mean().item()}
        metrics["order/bonus"] = bonus_B.float().mean().item()
        return [s + section.order_bonus * b for s, b in zip(scores, bonus_B.tolist(), strict=True)], metrics

    def accuracy(self, record: Record, answer: Trajectory) -> float:
        return accuracy(self.work.recipe.ppo.rules, record, decode_answer(self.work.base(), answer.ids)) or 0.0


def metrics_of(values: list[list[Value]]) -> dict[str, float]:
    """The mean of each rule over the answers to which it applies, and how many values failed."""
    by_rule: dict[str, list[float]] = {}
    for each in (each for found in values for each in found):
        by_rule.setdefault(name_of(each.rule), []).append(each.value)
    failed = sum(bool(each.failed) for found in values for each in found)
    return {f"rules/{name}": sum(found) / len(found) for name, found in by_rule.items()} | {"rules/failed": failed}
