"""Rewards that a program checks: each function by hand, the recipe's list, bad solutions, steps of PPO with them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core import record
from rlaif_lite import pipeline
from rlaif_lite.data.formats import detect, read_object
from rlaif_lite.data.records import to_json
from rlaif_lite.errors import DataError, RecipeError, StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.recipe import Rules, load_recipe
from rlaif_lite.rl.rules import CHECKS, FORMAT, said_in
from rlaif_lite.stages.ppo.rules import RuleReward, accuracy, check_solutions
from rlaif_lite.workspace import Workspace

OPTIONS = ("A. a red dog", "B. a cat", "C. no animal")


def value(rule: str, answer: str, solution: str, options: tuple[str, ...] = ()) -> float:
    return CHECKS[rule].value(said_in(answer), record("q", video=None, solution=solution, options=list(options)))


@pytest.mark.parametrize(
    "answer, solution, want",
    [
        ("<think>A? B?</think><answer>B</answer>", "B", 1),
        ("<answer>A</answer> no: <answer>(B)</answer>", "B", 1),  # the last counts
        ("<answer>B. a cat</answer>", "a cat", 1),
        ("B .", "B. a cat", 1),
        ("A Cat.", "B", 1),
        ("<answer>A</answer>", "B", 0),
        ("B or C", "B", 0),
        ("A dog", "A", 0),  # an article is no letter
        ("D", "B", 0),
        ("", "B", 0),
    ],
)
def test_choice(answer, solution, want):
    assert value("choice", answer, solution, OPTIONS) == want


def test_a_letter_without_a_list_of_options():
    assert value("choice", "<answer>C</answer>", "C") == 1 and value("choice", "c", "C") == 0


@pytest.mark.parametrize(
    "rule, answer, solution, want",
    [
        ("match", "<answer> Yes . </answer>", "yes", 1),
        ("match", "yes yes", "yes", 0),
        ("number", "<answer>1,234.501 m</answer>", "1234.50", 1),
        ("number", "3.02", "3", 0),
        ("number", "3 or 4", "3", 0),
        ("number", "-2e1", "-20", 1),
        ("relative", "80", "100", 0.8),
        ("relative", "-100", "100", 0),
        ("relative", "0.0", "0", 1),
        ("wer", "- .", "- - .", 0.5),
        ("wer", "the cat sat down", "the cat sat", 2 / 3),
        ("wer", "a b c d e", "x", 0),
        ("iou", "<answer>from 2 to 6 seconds</answer>", "4 to 8", 1 / 3),
        ("iou", "2.5 and 4.5", "[2.5, 4.5]", 1),
        ("iou", "9 to 12", "4 to 8", 0),
        ("iou", "6 to 2", "4 to 8", 0),
        ("iou", "never", "4 to 8", 0),
    ],
)
def test_rules_by_hand(rule, answer, solution, want):
    assert value(rule, answer, solution) == pytest.approx(want)


def test_rouge_by_hand():
    """ "the dog ran off" against "the big dog ran": 3 of 4 words, 1 of 3 pairs, "the dog ran" in order."""
    assert value("rouge", "The dog ran off!", "the big dog ran") == pytest.approx((3 / 4 + 1 / 3 + 3 / 4) / 3)
    assert value("rouge", "dog", "dog") == pytest.approx(2 / 3)  # a word has no pairs
    assert value("rouge", "...", "dog") == 0


def test_the_format_is_the_whole_answer():
    assert FORMAT.fullmatch("<think>a\nb</think>\n<answer>B</answer>")
    assert not FORMAT.fullmatch("so <think>a</think><answer>B</answer>") and not FORMAT.fullmatch("<answer>B</answer>")


# ---- the recipe's list


def rules(*rewards: dict, **more) -> Rules:
    return Rules(rewards=rewards, **more)


def brevity(record, answer, ids, seconds):
    """A function of a user's: what it is given is in the value."""
    return len(answer) + 100 * len(ids) + 10_000 * seconds


def fails(record, answer, ids, seconds):
    return 1 / 0


def test_weights_tasks_and_a_function_of_ones_own():
    listed = rules({"rule": "choice", "task": "mc"}, {"rule": "format", "weight": 0.5},
                   {"rule": "length", "tokens": [2, 3]}, {"rule": "test_rules:brevity"})  # fmt: skip
    asked = replace(record("q", video=None, solution="B"), task="mc")
    found = RuleReward(listed).values(asked, "<think></think><answer>B</answer>", [1, 2, 3], 2.0)
    assert [each.value for each in found] == [1.0, 1.0, 1.0, 33 + 300 + 20_000]
    other = RuleReward(listed).values(replace(asked, task="ocr"), "B", [1], 2.0)
    assert [each.value for each in other] == [0.0, 0.0, 1 + 100 + 20_000]


def test_an_exception_names_the_record_and_stops_or_scores_zero(capsys):
    asked = replace(record("q", video=None), source="mine.json#7")
    with pytest.raises(StageError, match=r"test_rules:fails` failed on mine.json#7.*ZeroDivisionError.*on_error: zero"):
        RuleReward(rules({"rule": "test_rules:fails"})).values(asked, "a", [1], None)
    (found,) = RuleReward(rules({"rule": "test_rules:fails"}, on_error="zero")).values(asked, "a", [1], None)
    assert found.value == 0 and "mine.json#7" in found.failed
    with pytest.raises(DataError, match="ppo.rules.rewards: test_rules:nothing` cannot be loaded"):
        RuleReward(rules({"rule": "test_rules:nothing"}))


def test_accuracy_is_of_the_rules_that_read_the_solution():
    listed = rules({"rule": "choice", "weight": 2.0}, {"rule": "format"}, {"rule": "match"})
    assert accuracy(listed, record("q", video=None, solution="B"), "B. a cat") == pytest.approx(2 / 3)
    assert accuracy(listed, record("q", video=None), "B") is None
    assert accuracy(rules(), record("q", video=None, solution="B"), "B") is None
    # a solution that the rule cannot read says nothing of the answer
    assert accuracy(rules({"rule": "number"}), record("q", video=None, solution="many"), "many") is None


@pytest.mark.parametrize(
    "rule, solution, message",
    [
        ("choice", "E", r"the solution 'E' and options .*needs a letter or the text of one of `options`"),
        ("choice", None, "no `solution`"),
        ("number", "many", "the solution 'many'; rule number needs one number"),
        ("iou", "8 to 4", "a span such as `3.5 to 8`"),
        ("rouge", "?!", "a text with words"),
    ],
)
def test_solutions_that_no_rule_can_read_are_counted_and_named(rule, solution, message):
    good = {"choice": "B", "number": "3", "iou": "1 to 2", "rouge": "dog"}[rule]
    records = [
        replace(record("q", video=None, options=list(OPTIONS)), solution=s, source=f"f.json#{i}")
        for i, s in enumerate((good, solution))
    ]
    with pytest.raises(DataError, match=rf"(?s)data.rl: 1 of 2 records.*f.json#1: .*{message}"):
        check_solutions(rules({"rule": rule}), records, "data.rl")
    with pytest.raises(DataError, match="no rule is for its task None"):
        check_solutions(rules({"rule": rule, "task": "mc"}), records[:1], "data.rl")


def test_video_r1_brings_solution_options_and_task():
    given = {"problem": "Which?", "solution": "<answer>B</answer>", "options": ["A. x", "B. y"], "path": "v.mp4",
             "problem_type": "multiple choice", "data_type": "video"}  # fmt: skip
    found, _ = read_object(detect(given), given, "r1.json#0")
    assert (found.solution, found.options, found.task) == ("B", ("A. x", "B. y"), "multiple choice")


@pytest.mark.parametrize(
    "key, message",
    [
        ("[]", "no rule with a weight"),
        ("[{rule: choise}]", "ppo.rules.rewards"),
        ("[{rule: length}]", "window of the rule `length`"),
        ("[{rule: length, tokens: [9, 3]}]", "fewest and the most"),
        ("[{rule: match}, {rule: match, weight: 2}]", "again for the same task"),
    ],
)
def test_lists_that_make_no_sense_are_refused(recipe, key, message):
    with pytest.raises(RecipeError, match=message):
        recipe("ppo.feedback=rules", f"ppo.rules.rewards={key}")


# ---- in a run

GRPO = {"feedback": "rules", "value": "none", "baseline": "group", "group_size": 4, "steps": 2, "kl_coef": 0.0}


def listed(*rewards: str, **more) -> list[str]:
    keys = {**GRPO, **more, "rules.rewards": f"[{', '.join(rewards)}]"}
    return [f"ppo.{key}={value}" for key, value in keys.items()]


def test_a_run_that_learns_from_rules(rerun, tmp_path):
    """Every rule is logged apart, the score is their weighted sum, and the report shows both and the accuracy."""
    keys = listed("{rule: rouge}", "{rule: length, tokens: [1, 4], weight: 0.5}", resample=1, task_std=0.99)
    work = Workspace(rerun())
    for split in ("rl", "test"):
        lines = [to_json(replace(r, solution="first a red circle")) for r in work.records(split)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        keys.append(f"data.{split}=[{tmp_path / split}.jsonl]")
    summary = pipeline.run(rerun(*keys, "evaluate.temperatures=[]"))
    assert not {"preference", "reward"} & set(summary["stages"]) and summary["feedback"] == "rules"
    steps = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    assert len(steps) == 2
    for step in steps:
        want = step["rules/rouge"] + 0.5 * step["rules/length"]
        assert step["objective/scores"] == pytest.approx(want, abs=1e-6) and step["rules/failed"] == 0
    interval = summary["evaluation_intervals"]["ppo-sft"]["sample_accuracy"]
    assert interval["low"] <= interval["delta"] <= interval["high"]
    assert 0 <= summary["evaluation"]["ppo"]["greedy_accuracy"] <= 1
    page = (work.folder / "report.html").read_text(encoding="utf-8")
    assert "Rewards by rule" in page and "Accuracy" in page


def test_a_reward_that_is_the_same_for_all_answers_moves_nothing(rerun, capsys):
    """Momentum, KL and the critic included; health counts the steps."""
    keys = listed("{rule: format}", value="adapter", kl_coef=0.1, stop_penalty=0.0, steps=2)
    recipe = rerun(*keys, "evaluate.roles=[]", "health=warn")
    summary = pipeline.run(recipe)
    assert capsys.readouterr().err.count("All 8 have the same score, 0. All roles stay as they are.") == 2
    assert ("constant_rewards", 2) in [(sign["sign"], sign["steps"]) for sign in summary["health"]]
    work = Workspace(recipe)
    for role in ("reference", "policy"):
        work.load_role(role)
    pairs = zip(work.roles.parameters("reference"), work.roles.parameters("policy"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_unreadable_solutions_stop_the_data_stage(rerun):
    with pytest.raises(DataError, match=r"(?s)8 of 8 records have no solution.*rl.jsonl"):
        pipeline.run(rerun(*listed("{rule: choice}")), until="data")


def test_another_weight_trains_ppo_again_and_nothing_before_it(rerun):
    """The records are checked again. The world, the features and the adapters before PPO stay."""
    recipe = rerun(*listed("{rule: length, tokens: [1, 4]}"))
    pipeline.run(recipe)
    other = ["ppo.rules.rewards=[{rule: length, tokens: [1, 4], weight: 2.0}]"]
    again = pipeline.run(load_recipe(Path(recipe.output) / "recipe.yaml", other))["stages"]
    assert [name for name, stage in again.items() if stage["status"] != "skipped"] == ["data", "ppo", "evaluate"]
