"""Signs, read from a step's metrics, that a run learns nothing or has lost its way.

Each sign is said once, with what to do. A sign that means that nothing can be learnt ends the run when it holds in
PATIENCE steps in a row and the recipe has `health: stop`. The summary counts the steps of every sign.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from ..errors import StageError
from ..progress import say

PATIENCE = 3  # steps in a row: with few answers one step may be degenerate by chance
FLAT = 1e-8  # rewards nearer to each other than this are the same


class Sign(NamedTuple):
    """Something that the metrics of one step can show."""

    holds: Callable[[Mapping[str, float]], bool]
    hopeless: bool  # no update can learn from such steps
    words: str


SIGNS = {
    "constant_rewards": Sign(
        lambda m: m.get("objective/scores_std", 1.0) <= FLAT,
        True,
        "all answers have the same reward. Check the reward model's accuracy, the judge's prompt, and whether answers "
        "differ (`ppo.temperature`)",
    ),
    "groups_without_signal": Sign(
        lambda m: m.get("objective/flat_groups", 0.0) == 1.0,
        True,
        "in every group all answers have the same reward, so the advantages are zero. Raise `ppo.group_size` or "
        "`ppo.temperature`",
    ),
    "empty_answers": Sign(
        lambda m: m.get("rollout/empty_rate", 0.0) == 1.0,
        True,
        "all answers are empty. Check the SFT adapter and the stop penalty",
    ),
    "endless_answers": Sign(
        lambda m: m.get("rollout/stop_rate", 1.0) == 0.0,
        False,
        "no answer ends before `ppo.max_new_tokens`. Raise it, or train SFT longer",
    ),
    "lost_reference": Sign(
        lambda m: m.get("objective/kl_over_bound", 0.0) > 0.0,
        False,
        "the KL to the reference is above `ppo.kl_bound`. Raise `ppo.kl_coef`, lower `ppo.lr`, or set `ppo.kl_target`",
    ),
    "no_gradient": Sign(
        lambda m: m.get("grad_norm", m.get("policy/grad_norm", 1.0)) == 0.0,
        True,
        "the gradient is exactly zero. Check that targets, pairs or rewards differ",
    ),
    "silent_judge": Sign(
        lambda m: m.get("judge/without_mass", 0.0) > 0.5,
        False,
        "in more than half of its verdicts the judge says neither of its words. Choose words that the model uses "
        "(`preference.claims.yes` and `.no`, `preference.pairwise.choices`), or train it longer in `sft`",
    ),
    "unknown_tokens": Sign(
        lambda m: m.get("unknown_share", 0.0) > 0.2,
        True,
        "more than a fifth of the tokens that it learns from are unknown to the base's tokenizer. Use a base that "
        "knows the language of the answers",
    ),
}


def signs_of(metrics: Mapping[str, float]) -> list[str]:
    """The signs that the metrics of one step show."""
    return [name for name, sign in SIGNS.items() if sign.holds(metrics)]


class Watch:
    """Looks at every step's metrics as they are written."""

    def __init__(self, mode: Literal["warn", "stop"]):
        self.mode = mode
        self._in_a_row: dict[tuple[str, str], int] = {}
        self._said: set[tuple[str, str]] = set()

    def see(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Says what holds in PATIENCE steps in a row, once. Raises StageError where nothing can be learnt."""
        holding = signs_of(metrics)
        for name, sign in SIGNS.items():
            key = (stage, name)
            self._in_a_row[key] = self._in_a_row.get(key, 0) + 1 if name in holding else 0
            if self._in_a_row[key] < PATIENCE:
                continue
            words = f"{stage}: in {PATIENCE} steps in a row up to step {step}, {sign.words}."
            if sign.hopeless and self.mode == "stop":
                raise StageError(f"{words} Nothing can be learnt so; to go on all the same, set `health: warn`.")
            if key not in self._said:
                self._said.add(key)
                say(f"WARNING {words}")


def findings(lines: Iterable[dict]) -> list[dict]:
    """Signs in the lines of `metrics.jsonl`, one entry per stage and sign, in the order in which they came."""
    found: dict[tuple[str, str], dict] = {}
    for line in lines:
        for name in signs_of(line):
            new = {
                "stage": line["stage"],
                "sign": name,
                "first_step": line["step"],
                "steps": 0,
                "words": SIGNS[name].words,
            }
            found.setdefault((line["stage"], name), new)["steps"] += 1
    return list(found.values())


COUNTS = {
    (
        "context",
        "empty_captions",
    ): "a caption has no word and is left out of the narrative. Train longer in `sft`, or raise "
    "`context.max_new_tokens`",
    ("preference", "verdicts_without_mass"): "the judge says neither of its words, so its verdict is noise. See "
    "`silent_judge` in docs/reliability.md",
}


def counted(results: Mapping[str, Mapping]) -> list[dict]:
    """What the results of stages count, as entries like those of `findings`; `first_step` is None."""
    return [
        {"stage": stage, "sign": sign, "first_step": None, "steps": count, "words": words}
        for (stage, sign), words in COUNTS.items()
        if (count := results.get(stage, {}).get(sign))
    ]
