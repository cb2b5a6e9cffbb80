"""What judges are asked, and what is read out of their replies."""

import pytest

from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.prompts import HASHES, SCALES, prompt_of
from rlaif_lite.judge.outside.reading import read, read_word


def case(task: str = "qa", **fields) -> Case:
    pair = task == "consistency"
    given = {
        "question": ("what ?", "what now ?") if pair else "what ?",
        "reference": "a {red} dog",
        "prediction": ("dog", "cat") if pair else "it is a dog",
        "context": "a yard",
    }
    return Case("7", task, **given | fields)


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("task", SCALES)
def test_a_prompt_holds_the_case_the_scale_and_its_hash(task):
    prompt, scale = prompt_of(case(task)), SCALES[task]
    given = case(task)
    parts = [
        given.reference,
        *(x for y in (given.question, given.prediction) for x in ([y] if isinstance(y, str) else y)),
    ]
    assert all(f">{part}<" in prompt.text for part in parts)
    assert ("a yard" in prompt.text) == (task in ("mmhal", "caption", "answer"))
    assert f"from {scale.low} to {scale.high}." in prompt.text and "{{" not in prompt.text
    assert prompt.hash == HASHES[task] and len(set(HASHES.values())) == len(SCALES)
    assert read(case(task), prompt.text).problem is not None  # who repeats the prompt has judged nothing


def test_qa_by_one_word_is_another_prompt():
    word, written = prompt_of(case(), word=True), prompt_of(case())
    assert word.word and not written.word and word.hash != written.hash
    assert not prompt_of(case("detail"), word=True).word


def test_captions_protocol_reads_256_words():
    text = prompt_of(case("caption", prediction=" ".join(f"w{i}" for i in range(300)))).text
    assert "w255</prediction>" in text
    assert "w299</prediction>" in prompt_of(case(prediction=" ".join(f"w{i}" for i in range(300)))).text


@pytest.mark.parametrize(
    "wrong",
    [
        case(question=("a", "b")),
        case("consistency", prediction="one"),
        case("mmhal", context=None),
        case("caption", context=""),
    ],
)
def test_a_case_that_does_not_fit_its_task_is_a_defect_of_the_caller(wrong):
    with pytest.raises(ValueError, match="case 7: "):
        prompt_of(wrong)


# ------------------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    "reply",
    [
        "{'pred': 'yes', 'score': 4}",
        '{"pred": "yes", "score": 4}',
        '```json\n{"score": 4,\n "pred": "yes"}\n```',
        "pred: yes, score: 4",
        "Yes. Score: 4/5",
        '{"pred": true, "score": 4.0}',
        "Sure! {'pred':'YES','score':'4'}.",
        "**Prediction:** yes\n**Score:** 4",
        "<think>a score of 1? pred: no</think>\n{'pred': 'yes', 'score': 4}",
        "{'pred': 'yes', 'score': 4} So the score is 4.",
        "Score (0-5): 4 out of 5; correct = yes",
    ],
)
def test_forms_of_one_verdict(reply):
    verdict = read(case(), reply)
    assert verdict == ("7", True, 4.0, reply, None)


@pytest.mark.parametrize(
    ("task", "reply", "correct", "score"),
    [
        ("qa", "{'pred': 'no', 'score': 0}", False, 0),
        ("correctness", "3", None, 3),
        ("detail", "{'score': 3.5}", None, 3.5),
        ("temporal", "Rating: 5", None, 5),
        ("mmhal", "score: 3", True, 3),
        ("mmhal", "score: 2", False, 2),
        ("mmhal", "6", True, 6),
        ("caption", "Explanation: fine\nScore: 3", True, 3),
        ("caption", "{'score': 2}", False, 2),
        ("consistency", "`5`", None, 5),
    ],
)
def test_what_a_score_means_in_each_task(task, reply, correct, score):
    assert read(case(task), reply)[1:] == (correct, score, reply, None)


@pytest.mark.parametrize(
    ("task", "reply", "problem"),
    [
        ("qa", "", "no score from 0 to 5: the reply is empty"),
        ("qa", "I cannot watch videos.", "no score from 0 to 5: 'I cannot watch videos.'"),
        ("qa", "{'score': 4}", "neither yes nor no"),
        ("qa", "{'pred': 'yes', 'score': 4} or {'pred': 'no', 'score': 4}", "both yes and no"),
        ("qa", "{'pred': 'yes'}", "no score"),
        ("correctness", "{'score': 6}", "the score 6 is outside 0 to 5"),
        ("correctness", "{'score': -1}", "the score -1 is outside"),
        ("mmhal", "{'score': 7}", "outside 0 to 6"),
        ("caption", "{'score': 0}", "outside 1 to 5"),
        ("correctness", "score: 8/10", "out of 10, not of 5"),
        ("correctness", "score: 3, no, score: 4", "several scores, 3, 4"),
        ("correctness", "{'score': True}", "no score"),
        ("correctness", "{'score': NaN}", "no score"),
        ("correctness", "score: 3,5", "no score"),
        ("correctness", "the score is 1-5", "no score"),
        ("correctness", "score: 4th", "no score"),
        ("correctness", "34 dogs", "no score"),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_no_number(task, reply, problem):
    verdict = read(case(task), reply)
    assert (verdict.correct, verdict.score, verdict.raw) == (None, None, reply)
    assert problem in verdict.problem


def test_long_nonsense_is_read_quickly_and_shown_in_short():
    verdict = read(case(), "score " * 50_000 + "(" * 50_000)
    assert verdict.score is None and len(verdict.problem) < 120


def test_one_word():
    assert read_word(case(), " Yes, P(yes) 0.7")[1:3] == (True, None)
    assert read_word(case(), "no")[1:3] == (False, None)
    assert read_word(case(), "nothing").problem == "neither yes nor no: 'nothing'"
