"""The judge without a model: rules about words. Exact, free, always the same, and blind to meaning.

qa      Yes/no references: the first word of the prediction that says yes or no decides. Options: the letter that the
        prediction names, or the option's words. Other references: right if the prediction holds the reference's words
        in a row. Articles are ignored, and small numbers are digits. For "a dog", "the dog runs" and "not a dog" are
        right, "puppy" is wrong. The score is token F1, times five.
others  Token F1 between prediction and reference on the task's scale. It sees no order (temporal), no theme (context)
        and no contradiction. Of a consistency pair, the worse of the two. It gives figures where no model can run; do
        not compare it with a model's.
"""

from collections import Counter
from collections.abc import Sequence

from ..judge.outside import Case, Verdict
from ..judge.outside.prompts import SCALES
from .items import words_of, yes_or_no
from .options import label_of, named_in

ARTICLES = ("a", "an", "the")
NUMBERS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}


class Rules:
    """Judges by the rules above."""

    id = "rules:words-and-token-f1@3"  # another number when a rule changes

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict for each case, in order; there is never a problem."""
        return [_judge(case) for case in cases]


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as multisets; 0 where either has none."""
    said, asked = Counter(normal(prediction)), Counter(normal(reference))
    common = sum((said & asked).values())
    return 2 * common / (said.total() + asked.total()) if common else 0.0


def normal(text: str) -> list[str]:
    """Lower-case words without articles, small numbers as digits."""
    return [NUMBERS.get(word, word) for word in words_of(text) if word not in ARTICLES]


def _judge(case: Case) -> Verdict:
    scale = SCALES[case.task]
    said = case.prediction if isinstance(case.prediction, tuple) else (case.prediction,)
    share = min(token_f1(prediction, case.reference) for prediction in said)
    if case.task == "qa":
        right, only = right_by_words(case.prediction, case.reference)
        return Verdict(case.id, right, 5.0 * (right if only else share), "", None)
    score = scale.low + share * (scale.high - scale.low)
    return Verdict(case.id, None if scale.right is None else score >= scale.right, score, "", None)


def right_by_words(prediction: str, reference: str) -> tuple[bool, bool]:
    """(whether it is right, whether it can only be right or wrong)."""
    asked, said = normal(reference), normal(prediction)
    if asked in (["yes"], ["no"]):
        return yes_or_no(prediction) == (asked == ["yes"]), True
    if option := label_of(reference):
        if named := named_in(prediction):
            return named == option[0], True
        asked = normal(option[1])
    runs = (said[start : start + len(asked)] for start in range(len(said) - len(asked) + 1))
    return bool(asked) and any(run == asked for run in runs), bool(option)
