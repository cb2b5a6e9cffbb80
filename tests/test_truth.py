"""The one place that says what is true of an answer: the world, annotated facts, a user's function."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

from core import record, small_recipe
from rlaif_lite import pipeline
from rlaif_lite.data import world_text
from rlaif_lite.data.truth import Counts, Truth, words_of
from rlaif_lite.errors import DataError, RecipeError
from rlaif_lite.files import read_jsonl
from rlaif_lite.recipe import check_files, load_recipe

ROOT = Path(__file__).parent.parent
PARK = record("<video> what ?", facts={"objects": ["dog", "frisbee"], "events": ["a dog catches a frisbee"]})
STREET = record("<video> what ?", facts={"objects": ["car", "hot dog"], "events": ["a man paints the car"]})
BOTH = Truth([PARK, STREET])


def said(truth: Truth, answer: str, of=PARK) -> tuple[Counts, list[str]]:
    finding = truth.of(answer, of)
    return finding.counts, [answer[start:end] for start, end in finding.wrong_words]


# ---- annotated facts


@pytest.mark.parametrize(
    ("answer", "counts", "wrong"),
    [
        ("A dog catches the frisbee.", (3, 0, 3, 2, 0), []),
        ("DOGS near FRISBEES!", (2, 0, 3, 2, 0), []),
        ("A dog. A dog. A dog.", (1, 0, 3, 1, 0), []),  # every fact counts once
        ("A dog and two cars.", (1, 1, 3, 2, 1), ["cars"]),
        ("A hot dog.", (0, 1, 3, 1, 1), ["hot dog"]),  # the longest name, not the dog in it
        ("A dog; the frisbee is what somebody catches.", (2, 0, 3, 2, 0), []),  # the event's words in two sentences
        ("The man paints a car with a dog.", (1, 2, 3, 2, 1), ["man", "paints", "car"]),
        ("Somebody plays the piano.", (0, 0, 3, 0, 0), []),  # in nobody's facts: not seen, as in CHAIR
        ("", (0, 0, 3, 0, 0), []),
    ],
)
def test_annotated_objects_and_events_are_found_by_their_words(answer, counts, wrong):
    found, spans = said(BOTH, answer)
    assert found == (*counts, None) and spans == wrong


def test_statements_alone_count_as_what_is_mentioned():
    one = record("<video> q", facts={"statements": ["The door is red.", "A cat sleeps on the sofa"]})
    other = record("<video> q", facts={"statements": ["The door is blue"]})
    truth = Truth([one, other])
    assert said(truth, "A sofa on which a cat sleeps. The door is blue.", one) == ((1, 1, 2, 2, 1, None), ["blue"])
    assert said(truth, "The red door.", one)[0] == (1, 0, 2, 1, 0, None)


def test_synonyms_by_file(tmp_path):
    (tmp_path / "synonyms.txt").write_text("dog, puppy, hound\ncar, automobile\nbench, park bench\n")
    truth = Truth([PARK], synonyms=str(tmp_path / "synonyms.txt"))
    assert said(truth, "A puppy catches a frisbee.") == ((3, 0, 3, 2, 0, None), [])
    assert said(truth, "A hound in an automobile on a park bench.") == (
        (1, 2, 3, 3, 2, None),
        ["automobile", "park bench"],
    )
    assert said(Truth([PARK]), "A hound in an automobile.")[0].mentions == 0
    with pytest.raises(DataError, match="`evaluate.synonyms`: .*gone.txt cannot be read"):
        Truth([], synonyms=str(tmp_path / "gone.txt"))


def test_words_of_other_scripts():
    assert words_of("Élan's İki dogs, boxes: 狗跑") == ["élan", "i̇ki", "dog", "box", "狗", "跑"]
    one, other = (record("<video> q", facts={"objects": [name]}) for name in ("собака", "кошка"))
    assert said(Truth([one, other]), "Собака и кошка", one) == ((1, 1, 1, 2, 1, None), ["кошка"])


def test_spans_lie_in_the_answer_as_it_is_written():
    answer = "İİİ a CAR\n\tcars, car"
    counts, wrong = said(BOTH, answer)
    assert wrong == ["CAR", "cars", "car"] and counts.hallucinated == 1


def test_a_fact_scores_what_counting_by_hand_gives():
    """Random facts and answers against a second, slow reading of the rules."""
    rng = random.Random(0)
    names = ["ant", "bee", "cow", "doe", "elk"]
    for _ in range(200):
        mine, theirs = (rng.sample(names, 2) for _ in range(2))
        one, other = (record("<video> q", facts={"objects": listed}) for listed in (mine, theirs))
        answer = " . ".join(rng.choices([*names, "sky"], k=rng.randrange(6)))
        mentioned = set(answer.split()) & {*mine, *theirs}
        right, untrue = mentioned & set(mine), mentioned - set(mine)
        expected = (len(right), len(untrue), 2, len(mentioned), len(untrue), None)
        assert said(Truth([one, other]), answer, one)[0] == expected


# ---- the world


def test_the_world_s_grammar_is_one_of_them():
    facts = {"events": [["red", "circle", "left"], ["blue", "square", "up"], ["green", "cross", "grows"]], "star": None}
    one, answer = record("<video> q", facts=facts), "first a red circle up . also a red star . then then"
    counts, wrong = said(Truth([one]), answer, one)
    assert counts == world_text.truth(answer, facts) and counts.malformed == 1 and wrong == ["up", "red"]
    assert Truth().score(answer, one) == world_text.score(answer, facts)
    assert Truth().describe(one) == world_text.describe(facts)
    assert Truth().of("x", record("<video> q")) is None and Truth().gap(record("q", video=None), "a", "b") is None


# ---- junk


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, "hold nothing"),
        ({"object": ["dog"]}, "hold `object`. Expected lists of texts under objects, events, statements"),
        ({"objects": "dog"}, "objects is 'dog', expected a list of texts"),
        ({"objects": ["dog", ""]}, "expected a list of texts that have words"),
        ({"events": [["red", "circle", "left"]]}, "expected a list of texts"),
        ({"objects": [], "events": []}, "list nothing"),
        ({"events": [], "star": None}, "no sheet of the synthetic world"),
        ({"events": [["red", "circle", "sideways"]] * 3, "star": None}, "no sheet of the synthetic world"),
        ({"events": [["red", "circle", "left"]] * 3, "star": 3}, "no sheet of the synthetic world"),
        ({"events": [["red", "circle", ["left"]]] * 3, "star": None}, "no sheet of the synthetic world"),
    ],
)
def test_junk_facts_are_refused_with_their_source(facts, message):
    with pytest.raises(DataError, match=f"made up: `facts`.*{message}"):
        Truth([record("<video> q", facts=facts)])


# ---- the user's function

MINE = """
def exclaim(answer, record):
    if record.id == "<video> skip":
        return None
    if "boom" in answer:
        raise KeyError("no such thing")
    if "odd" in answer:
        return {"correct": 1, "wrong": 0, "total": 1, "colour": 3}
    if "minus" in answer:
        return {"correct": -1, "wrong": 0, "total": 1}
    if "more" in answer:
        return {"correct": 1, "wrong": 2, "total": 1, "hallucinated": 5}
    if "spans" in answer:
        return {"correct": 1, "wrong": 2, "total": 1, "wrong_words": [3]}
    if "text" in answer:
        return "fine"
    return {"correct": answer.count("!"), "wrong": answer.count("?"), "total": 3}

NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_truth", raising=False)
    (tmp_path / "my_truth.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Truth([record("<video> q", facts={"of": "any form"})], function="my_truth:exclaim")


def test_a_function_of_the_user_s_own(mine):
    assert mine.of("! ! ?", record("<video> q")) == (Counts(2, 1, 3, 3, 1, None), [])
    assert mine.of("!", record("<video> skip")) is None and mine.gap(record("<video> q"), "!!", "??") == 4
    assert mine.describe(record("<video> q", facts={"of": "any form"})) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("boom", r"the function failed on the answer 'boom': KeyError\('no such thing'\)"),
        ("odd", "returned `colour`; known are correct, wrong, total, mentions, hallucinated, malformed"),
        ("minus", "returned `correct` -1, expected a whole number"),
        ("more", "5 objects are hallucinated of 3 mentioned"),
        ("spans", r"`wrong_words` is \[3\], expected pairs"),
        ("text", "returned 'fine', expected a dict or None"),
    ],
)
def test_what_goes_wrong_in_it_names_the_record(mine, answer, message):
    with pytest.raises(DataError, match=f"`evaluate.truth: my_truth:exclaim`, made up: .*{message}"):
        mine.of(answer, record("<video> q"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("no_such_module:f", "ModuleNotFoundError"), ("my_truth:gone", "AttributeError"), ("my_truth:NUMBER", "is a int")],
)
def test_a_function_that_cannot_be_loaded_is_refused(mine, name, message):
    with pytest.raises(DataError, match=f"`evaluate.truth: {name}` .*{message}"):
        Truth(function=name)


def test_the_recipe_refuses_other_spellings_and_missing_files(tmp_path):
    with pytest.raises(RecipeError, match="evaluate.truth"):
        load_recipe("tiny", ["evaluate.truth=my_truth.exclaim"])
    with pytest.raises(RecipeError, match="`evaluate.synonyms` .* names gone.txt, which is not a file"):
        check_files(load_recipe("tiny", ["evaluate.synonyms=gone.txt", f"output={tmp_path}"]))


# ---- whole runs

QUICK = ("evaluate.roles=[sft, policy]", "evaluate.temperatures=[]", "preference.compare_pairs=0", "ppo.steps=2")
TRUE_FIGURES = ("precision", "recall", "f1", "hallucination", "mentions", "right", "wrong", "score")


def annotated(world: Path, folder: Path, facts_of) -> list[str]:
    """The world's prompts as LLaVA files with facts of another form -> overrides that name them."""
    overrides = []
    for split in ("preference", "rl", "test"):
        lines = [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]
        found = [
            {
                "id": place,
                "video": str(world / line["video"]),
                "conversations": [{"from": "human", "value": "<video>\ndescribe the video"}],
                "facts": facts_of(line["facts"]),
            }
            for place, line in enumerate(lines)
        ]
        (folder / f"{split}.json").write_text(json.dumps(found))
        overrides.append(f"data.{split}=[{folder / f'{split}.json'}]")
    return overrides


def in_words(facts: dict) -> dict:
    """A sheet of the world as a person would annotate it."""
    star = [f"{facts['star']} star"] if facts["star"] else []
    objects = [f"{colour} {shape}" for colour, shape, _ in facts["events"]]
    return {"objects": [*objects, *star], "events": [" ".join(event) for event in facts["events"]]}


def check_run(summary: dict, folder: Path) -> None:
    """Everything that a run on the world says against the truth, but for its grammar."""
    for mode in ("greedy", "sample"):
        assert {f"{mode}_{name}" for name in TRUE_FIGURES} <= summary["evaluation"]["ppo"].keys()
        assert f"{mode}_malformed" not in summary["evaluation"]["ppo"]
        assert f"{mode}_hallucination" in summary["evaluation_intervals"]["ppo-sft"]
    assert 0 <= summary["preference"]["judge_agreement_with_truth"] <= 1
    assert {"oracle_start", "oracle_end"} <= summary["ppo"].keys()
    steps = [line for line in read_jsonl(folder / "metrics.jsonl") if line["stage"] == "ppo"]
    assert all("rollout/oracle_score" in line for line in steps)
    page = (folder / "report.html").read_text()
    for text in ("Hallucination", "Precision", "Recall", "F1", "Right − wrong", "True score of rollouts", "8 held-out"):
        assert text in page, text
    assert "Malformed" not in page and "no truth is known" not in page


def test_a_run_on_annotated_facts_is_reported_as_one_on_the_world(checkpoint, world, tmp_path):
    own = annotated(world, tmp_path, in_words)
    recipe = small_recipe(checkpoint, tmp_path, *own, *QUICK, f"data.folder={world}")
    summary = pipeline.run(recipe)
    folder = Path(recipe.output)
    check_run(summary, folder)
    rows = read_jsonl(folder / "evaluate" / "ppo.greedy.jsonl")
    records = json.loads((tmp_path / "test.json").read_text())
    truth = Truth(
        [
            record("<video> q", facts=one["facts"])
            for split in ("preference", "rl", "test")
            for one in json.loads((tmp_path / f"{split}.json").read_text())
        ]
    )
    for row, one in zip(rows, records, strict=True):
        assert row["truth"] == truth.of(row["answer"], record("<video> q", facts=one["facts"])).counts._asdict()
    examples = json.loads((folder / "evaluate" / "examples" / "index.json").read_text())
    assert examples[0]["truth"].startswith(", ".join(records[0]["facts"]["objects"]))


def test_the_page_s_example_runs(checkpoint, world, tmp_path, monkeypatch):
    """docs/extending/truth.md: its function, in a whole run; a change of it makes the stages stale that measure."""
    page = (ROOT / "docs" / "extending" / "truth.md").read_text()
    (code,) = re.findall(r"```python title=\"my_truth.py\"\n(.*?)```", page, re.S)
    monkeypatch.delitem(sys.modules, "my_truth", raising=False)
    (tmp_path / "my_truth.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = annotated(world, tmp_path, lambda f: {"answer": f["events"][0][0], "choices": list(world_text.COLOURS)})
    keys = [f"data.folder={world}", "evaluate.truth=my_truth:multiple_choice"]
    with pytest.raises(DataError, match=r"test.json#0|preference.json#0.*`facts` hold `answer`, `choices`"):
        pipeline.run(small_recipe(checkpoint, tmp_path, *own, keys[0]), until="data")
    recipe = small_recipe(checkpoint, tmp_path, *own, *QUICK, *keys)
    summary = pipeline.run(recipe)
    check_run(summary, Path(recipe.output))
    done = json.loads((Path(recipe.output) / "evaluate" / "done.json").read_text())
    assert done["reads"]["code of evaluate.truth"]
