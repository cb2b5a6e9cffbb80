"""The judge without a model, worked by hand."""

import pytest

from rlaif_lite.benchmarks.rule_judge import Rules, token_f1
from rlaif_lite.judge.outside import Case


def verdict(task: str, reference: str, prediction: str | tuple[str, str]):
    question = ("what ?", "what then ?") if task == "consistency" else "what ?"
    (found,) = Rules().judge([Case("1", task, question, reference, prediction, "seen")])
    assert found.id == "1" and found.problem is None
    return found


@pytest.mark.parametrize(
    ("reference", "prediction", "right"),
    [
        ("dog", "It is a dog.", True),
        ("the big dog", "A big dog runs", True),
        ("dog", "a hotdog", False),
        ("puppy", "a dog", False),
        ("two", "There are 2 men", True),
        ("dog cat", "cat dog", False),
        ("dog", "", False),
        ("?", "anything", False),
        ("yes", "Yes, it does.", True),
        ("yes", "It does not", False),
        ("no", "There isn't one, yes?", True),
        ("no", "a dog", False),
        ("B", "B", True),
        ("(B)", "b", False),
        ("B", "(B) a cat", True),
        ("B. a cat", "The answer is (B)", True),
        ("B", "A. yes", False),
        ("B. a cat", "a cat", True),
        ("B", "A dog, a cat", False),
        ("A dog", "a dog", True),
    ],
)
def test_qa(reference, prediction, right):
    assert verdict("qa", reference, prediction).correct is right


def test_scores():
    assert token_f1("the red dog runs", "a red cat") == pytest.approx(2 * 1 / (3 + 2))
    assert token_f1("dog dog", "dog") == pytest.approx(2 * 1 / 3)  # a word counts as often as it is there
    assert token_f1("", "dog") == token_f1("dog", "") == 0
    assert verdict("qa", "yes", "yes").score == 5 and verdict("qa", "yes", "no").score == 0
    assert verdict("qa", "red cat", "the red dog runs")[1:3] == (False, pytest.approx(5 * 0.4))
    assert verdict("detail", "red cat", "the red dog runs")[1:3] == (None, pytest.approx(2.0))
    assert verdict("consistency", "red cat", ("red cat", "the red dog runs")).score == pytest.approx(2.0)
    assert verdict("mmhal", "red cat", "red cat")[1:3] == (True, 6)
    assert verdict("mmhal", "red cat", "the red dog runs")[1:3] == (False, pytest.approx(2.4))
    assert verdict("caption", "red cat", "the red dog runs")[1:3] == (False, pytest.approx(2.6))
    assert verdict("caption", "red cat", "a blue dog").score == 1
