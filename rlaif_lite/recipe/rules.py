"""The section of a recipe that lists the rewards which a program checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, Strict

from .sections import Section

SOLVED = ("choice", "match", "number", "relative", "rouge", "wer", "iou")  # rules that read the record's solution
NAMES = (*SOLVED, "format", "length")  # any other rule is a `module:function`


class Rule(Section):
    """One reward function, with its weight."""

    rule: str = Field(
        pattern=rf"^({'|'.join(NAMES)}|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description=f"{' | '.join(NAMES)} | your own `module:function` (record, answer, token ids, video seconds)",
    )
    weight: float = Field(1.0, description="times the function's value")
    task: str | None = Field(None, description="for records of this `task` only; null: all")
    tokens: Annotated[tuple[int, int], Strict(False)] | None = Field(
        None, description="length: fewest and most tokens of an answer, its end included"
    )


class Rules(Section):
    """Rewards by rules; an answer's score is their weighted sum."""

    rewards: Annotated[tuple[Rule, ...], Strict(False)] = Field((), description="the reward functions")
    on_error: Literal["stop", "zero"] = Field(
        "stop", description="an exception in a function of your own: stop, or score 0 and count it"
    )

    @property
    def own(self) -> tuple[str, ...]:
        """The user's functions."""
        return tuple(dict.fromkeys(rule.rule for rule in self.rewards if ":" in rule.rule))


def rule_checks(rules: Rules, used: bool) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of a list of rules; `used`: whether the run learns from it."""
    if used and not any(rule.weight for rule in rules.rewards):
        yield (
            "ppo.rules.rewards",
            "has no rule with a weight, but ppo.feedback is rules. List one, such as [{rule: choice}].",
        )
    for i, rule in enumerate(rules.rewards):
        key = f"ppo.rules.rewards[{i}]"
        if (rule.rule == "length") != (rule.tokens is not None):
            yield (
                f"{key}.tokens",
                "is the window of the rule `length`. Give both, such as {rule: length, tokens: [16, 64]}.",
            )
        elif rule.tokens is not None and not 0 < rule.tokens[0] <= rule.tokens[1]:
            yield f"{key}.tokens", f"is {list(rule.tokens)}. Give the fewest and the most tokens, from 1."
    seen: set[tuple] = set()
    for i, rule in enumerate(rules.rewards):
        if (rule.rule, rule.task) in seen:
            yield f"ppo.rules.rewards[{i}]", f"lists {rule.rule} again for the same task. Add the weights in one entry."
        seen.add((rule.rule, rule.task))
