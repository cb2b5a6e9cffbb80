"""Benchmarks: the authors' files, what is counted of an answer, and a role put to them for real, on a random base."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import benchmark_files as files
from core import shake, small_recipe, video_of
from rlaif_lite import cli
from rlaif_lite.benchmarks import hallucination, questions, ranking
from rlaif_lite.benchmarks.answer import Examinee
from rlaif_lite.benchmarks.catalogue import BENCHMARKS
from rlaif_lite.benchmarks.items import Item, Objects, find_videos, mentions, words_of, yes_or_no
from rlaif_lite.benchmarks.results import figures, table
from rlaif_lite.data.records import Message
from rlaif_lite.data.world_text import COLOURS, describe
from rlaif_lite.errors import DataError
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.model.text import encode_answer
from rlaif_lite.recipe import Lora, dump_yaml, load_recipe

VIDEOS = files.facts(6)
FIRST = VIDEOS[0][1]


# ---------------------------------------------------------------------------------------------------- files as shipped


def test_questions_are_read(tmp_path):
    (generic,) = {len(questions.load_generic(files.generic(tmp_path, VIDEOS)))}
    assert generic == len(VIDEOS)
    item = questions.load_generic(files.temporal(tmp_path, VIDEOS))[1]
    assert item[:4] == ("1", "00001", ("what is the shape then ?",), f"{VIDEOS[1][1]['events'][1][1]} .")
    item = questions.load_consistency(files.consistency(tmp_path, VIDEOS))[0]
    assert item.questions == ("what is the colour first ?", "first what is the colour ?")
    one, two = (questions.load_qa(write(tmp_path, VIDEOS)) for write in (files.qa, files.qa_two))
    assert one == two and len(one) == 3 * len(VIDEOS)  # the answers stood in another order
    assert one[4][:5] == ("v_00001_1", "00001", ("what is the shape first ?",), VIDEOS[1][1]["events"][0][1], "1")


def test_ids_that_repeat_are_told_apart(tmp_path):
    rows = [{"video_name": "a", "question_id": 7, "question": "q", "answer": answer} for answer in ("x", "y")]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    assert [(i.id, i.reference) for i in questions.load_qa([tmp_path / "qa.json"])] == [("7", "x"), ("7#2", "y")]


def test_captions_and_classes_are_read(tmp_path):
    expected = [(name, describe(facts)) for name, facts in VIDEOS]
    for write in (files.retrieval, files.msrvtt_json):
        assert [(i.video, i.reference) for i in ranking.load_captions(write(tmp_path, VIDEOS))] == expected
    english = ranking.load_captions(files.msvd_csv(tmp_path, VIDEOS))
    assert [(i.video, i.reference) for i in english] == [(f"{name}_1_9", said) for name, said in expected]
    listed = ranking.load_captions(files.msvd_lines(tmp_path, VIDEOS))
    assert len(listed) == 2 * 5 and listed[0].reference == expected[0][1] and listed[-1].video == "00004"

    item = ranking.load_actions(files.ucf101(tmp_path, VIDEOS))[0]
    assert (item.video, item.reference) == (f"{FIRST['events'][0][0].title()}/00000.avi", FIRST["events"][0][0])
    assert item.among == tuple(sorted(COLOURS))  # all of classInd.txt, not those of the test videos alone
    tested = ranking.load_actions(
        files.hmdb51(tmp_path / "hmdb", VIDEOS) if (tmp_path / "hmdb").mkdir() is None else []
    )
    assert sorted((i.video, i.reference) for i in tested) == [(f"{n}.avi", f["events"][0][1]) for n, f in VIDEOS]
    assert ranking.words_of_class("ApplyEyeMakeup") == ranking.words_of_class("apply_eye_makeup") == "apply eye makeup"


def test_hallucination_files_are_read(tmp_path):
    pope = hallucination.load_pope(files.pope(tmp_path, VIDEOS))
    assert len(pope) == 24 and pope[0].video == "00000.mp4" and {i.reference for i in pope} == {"yes", "no"}
    amber = hallucination.load_amber(files.amber(tmp_path, VIDEOS)[::-1])  # files in any order
    assert amber[0].group == "generative" and set(amber[0].objects.present) == set(files.things(FIRST))
    assert amber[-1].group.startswith("discriminative") and amber[-1].objects is None
    objhal = hallucination.load_objhal(files.objhal(tmp_path, VIDEOS))
    shapes = {shape for _, shape, _ in FIRST["events"]}
    assert set().union(*objhal[0].objects.present.values()) == shapes and objhal[0].video == "00000.mp4"
    assert ("box" in objhal[0].objects.present) == ("square" in shapes)
    assert hallucination.load_objhal(files.objhal_inside(tmp_path, VIDEOS, b"picture"))[0].picture is not None
    mmhal = hallucination.load_mmhal(files.mmhal(tmp_path, VIDEOS))[1]
    assert (mmhal.video, mmhal.group, mmhal.reference) == ("00000.jpg", "shape", FIRST["events"][0][1])
    assert mmhal.context == ", ".join(files.things(FIRST))


WRONG = [
    (
        "pope",
        [("p.json", [{"video_name": "a", "Q": "q", "A": "a"}])],
        "entry 0: found the keys video_name, Q, A; no question_id",
    ),
    (
        "pope",
        [("p.json", [{"question_id": 1, "image": "a", "text": "q", "label": "maybe"}])],
        "entry 0: `label` is 'maybe'",
    ),
    ("pope", [("p.json", [{"question_id": 1, "text": "q", "label": "yes"}])], "names neither `image` nor `video`"),
    ("pope", [("a.json", [{}]), ("b.json", [{}])], "2 files were given"),
    ("videochatgpt", [("g.json", [{"video_name": "a", "Q": None, "A": "a"}])], "`Q` is None, expected a text"),
    ("videochatgpt", [("g.json", ["a"])], "entry 0: found a str, expected the list of {video_name, Q, A}"),
    ("videochatgpt-consistency", [("g.json", [{"video_name": "a", "Q": "q", "A": "a"}])], "no Q1, Q2"),
    (
        "msvd-qa",
        [
            ("q.json", [{"video_name": "a", "question_id": 1, "question": "q"}]),
            ("a.json", [{"question_id": 2, "answer": "x"}]),
        ],
        "question 1 has no answer in",
    ),
    ("amber", [("q.json", [{"id": 1, "image": "a", "query": "q"}])], "There are no annotations"),
    (
        "amber",
        [
            ("q.json", [{"id": 1, "image": "a", "query": "q"}]),
            ("n.json", [{"id": 2, "type": "generative", "truth": []}]),
        ],
        "query 1 has no annotation",
    ),
    (
        "amber",
        [
            ("q.json", [{"id": 1, "image": "a", "query": "q"}]),
            ("n.json", [{"id": 1, "type": "generative", "truth": ["dog"]}]),
        ],
        "annotation 1: `hallu` is None, expected",
    ),
    ("objhal", [("p.jsonl", [{"image_id": 1, "question": "q"}])], "There are no objects"),
    (
        "objhal",
        [("o.jsonl", [{"image_id": 1, "objects": ["cat"]}, {"image_id": 2}])],
        "entry 1: `objects` is None, expected",
    ),
    (
        "objhal",
        [("p.jsonl", [{"image_id": 1, "question": "q"}]), ("o.jsonl", [{"image_id": 2, "objects": ["cat"]}])],
        "picture 1 is in no list of objects",
    ),
    ("mmhal", [("m.json", [{"question": "q", "gt_answer": "a"}])], "no question_type, image_content, image_id"),
    ("msvd-retrieval", [("c.pkl", [])], "is a pickle, which can run any code"),
    ("msvd-retrieval", [("c.json", [{"video": 1}])], "found the keys video"),
    ("msrvtt-retrieval", [("c.csv", "a,b\n1,2\n")], "found the columns"),
    ("msrvtt-retrieval", [("c.csv", "video_id,sentence\na,b\nc\n")], "line 3: it has no video_id or no sentence"),
    ("msrvtt-retrieval", [("c.csv", b"video_id,sentence\na,\xff\n")], "it cannot be read as CSV"),
    ("objhal", [("synonyms.txt", b"caf\xe9\n")], "it cannot be read as text"),
    ("ucf101", [("testlist01.txt", "what is this\n")], "lines such as 'what is this' were found"),
    ("ucf101", [("testlist01.txt", "Run/v_a.avi\n"), ("classInd.txt", "1 Walk\n")], "The class 'run' of a test video"),
    ("hmdb51", [("run_test_split1.txt", "a.avi 1\n")], "There are no test videos"),
]


@pytest.mark.parametrize(("name", "content", "said"), WRONG, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(WRONG)])
def test_another_shape_is_refused(tmp_path, name, content, said):
    paths = []
    for file, what in content:
        paths.append(tmp_path / file)
        shaped = what if isinstance(what, (str, bytes)) else json.dumps(what)
        paths[-1].write_bytes(shaped.encode() if isinstance(shaped, str) else shaped)
    with pytest.raises(DataError) as error:
        BENCHMARKS[name].load(paths)
    assert said in str(error.value) and (str(tmp_path) in str(error.value) or "xpected" in str(error.value))


def test_videos_are_found_by_name(tmp_path):
    for file in (
        "deep/er/one.webm",
        "v_two.mkv",
        "Class/three.avi",
        "frames/four/frame_1.jpg",
        "five.txt",
        "six/note.txt",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    names = ["one", "two", "Class/three.avi", "three.mp4", "four", "five", "six", "v_one"]
    found, missing = find_videos(names, tmp_path)
    assert {name: str(Path(path).relative_to(tmp_path)) for name, path in found.items()} == {
        "one": "deep/er/one.webm",
        "two": "v_two.mkv",
        "Class/three.avi": "Class/three.avi",
        "three.mp4": "Class/three.avi",
        "four": "frames/four",
        "v_one": "deep/er/one.webm",
    }
    assert missing == ["five", "six"]
    (tmp_path / "one.mp4").touch()
    with pytest.raises(DataError, match="Two videos are called one"):
        find_videos(["one"], tmp_path)
    with pytest.raises(DataError, match="There is no folder"):
        find_videos(["one"], tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------- what is counted


def test_words_of_answers():
    vocabulary = frozenset(["dog", "fire truck", "truck", "berry", "leaf", "bus", "glass"])
    said = "Two dogs, a fire truck and TRUCKS; berries on leaves. Buses? A glass of glasses."
    assert mentions(words_of(said), vocabulary) == [
        "dog",
        "fire truck",
        "truck",
        "berry",
        "leaf",
        "bus",
        "glass",
        "glass",
    ]
    answers = [
        "Yes, it is.",
        "No.",
        "There isn't one",
        "It is not there, yes?",
        "A dog.",
        "Nothing yesterday",
        "It isn’t.",
    ]
    assert [yes_or_no(answer) for answer in answers] == [True, False, False, False, None, None, False]


def row(answer: str, **more) -> dict:
    return {"answers": [answer], "lengths": [4], "stopped": [True], **more}


def total(tally, items_and_rows) -> dict[str, float]:
    return {
        name: found["value"]
        for name, found in figures([(str(n), tally(item, row)) for n, (item, row) in enumerate(items_and_rows)]).items()
    }


def test_polling_by_hand():
    """3 of 5 right. Yes was said three times, rightly twice; two of three true ones were found; one said neither."""
    polled = [("yes", "Yes."), ("yes", "yes it is"), ("no", "yes"), ("no", "no"), ("yes", "perhaps")]
    pairs = [(Item(str(n), "v", ("q",), label), row(said)) for n, (label, said) in enumerate(polled)]
    found = total(hallucination.tally_pope, pairs)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "yes_share": 3 / 5,
            "neither_share": 1 / 5,
        }
    )
    found = total(
        hallucination.tally_amber, pairs
    )  # AMBER asks about the answer no: said once, rightly; two were right
    assert (found["disc_precision"], found["disc_recall"]) == (1, 1 / 2)
    assert found["disc_f1"] == pytest.approx(2 / 3)


def test_chair_by_hand():
    """Named: dog, grass, cat, frisbee, people (harmless). Invented: cat (expected to be), frisbee."""
    words = frozenset(["dog", "puppy", "grass", "cat", "frisbee", "people", "tree"])
    dog, grass, tree, cat, bird = (frozenset([name]) for name in ("dog", "grass", "tree", "cat", "bird"))
    objects = Objects(
        {"dog": dog, "puppy": dog, "grass": grass, "tree": tree},
        {"cat": cat, "bird": bird},
        words,
        frozenset(["people"]),
    )
    item = Item("1", "v", ("q",), "", "generative", objects=objects)
    said = "A dog on the grass with cats, people and a frisbee; nobody else."
    found = total(hallucination.tally_amber, [(item, row(said)), (item._replace(id="2"), row("A puppy, dogs."))])
    assert found == {"chair": 2 / 7, "cover": 3 / 6, "hal": 1 / 2, "cog": 1 / 4}

    item = item._replace(objects=objects._replace(harmless=frozenset()))
    pairs = [(item, row(said)), (item, row("A dog, a dog, a puppy.")), (item, row("Nothing to be seen."))]
    found = total(hallucination.tally_objhal, pairs)  # each word once per answer; the last names no object
    assert found == {"chair_response": 1 / 2, "chair_mention": 3 / 7, "recall": 3 / 9}


def test_a_word_may_stand_for_several_objects(tmp_path):
    """A man is a person: "a person" covers one of the two objects, "a man" both, as in AMBER's script."""
    written = {
        "q": [{"id": 1, "image": "a", "query": "q"}],
        "n": [{"id": 1, "type": "generative", "truth": ["man", "person"], "hallu": ["boy", "child"]}],
        "r": [{"person": ["man"], "man": [], "child": ["boy"], "boy": []}],
    }
    for name, what in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    (item,) = hallucination.load_amber([tmp_path / f"{name}.json" for name in written])
    found = [hallucination.tally_amber(item, row(said)) for said in ("A person.", "A man.", "A boy.", "A child.")]
    assert [each["cover"] for each in found] == [(1, 2), (2, 2), (0, 2), (0, 2)]
    assert [each["cog"] for each in found] == [(0, 2), (0, 2), (2, 2), (1, 2)]


def verdict(correct=None, score=None, problem=None) -> dict:
    return {"correct": correct, "score": score, "raw": "", "problem": problem}


def test_verdicts_that_cannot_be_read_are_counted_apart():
    item = Item("1", "v", ("q",), "a")
    of_qa = [verdict(True, 4.0), verdict(False, 1.0), verdict(problem="nonsense")]
    found = total(questions.tally, [(item, row("a", verdicts={"qa": each})) for each in of_qa])
    assert found == {"accuracy": 1 / 2, "qa_score": 5 / 2, "unparsable": 1 / 3}
    axes = {"correctness": verdict(score=4.0), "detail": verdict(problem="nonsense"), "context": verdict(score=2.0)}
    found = total(questions.tally, [(item, row("a", verdicts=axes))])
    assert found == {"correctness_score": 4, "detail_score": None, "context_score": 2, "unparsable": 1 / 3}
    rated = [verdict(score=6.0), verdict(score=3.0), verdict(score=2.0), verdict(problem="nonsense")]
    found = total(hallucination.tally_mmhal, [(item, row("a", verdicts={"mmhal": each})) for each in rated])
    assert found == {"rating": 11 / 3, "hallucination": 1 / 3, "unparsable": 1 / 4}


def test_intervals_resample_videos():
    """200 videos asked once, or the same ones asked ten times with the same outcome: no more is known."""
    rng = np.random.default_rng(0)
    outcome = rng.random(200) < 0.3
    once = figures([(str(n), {"m": (float(x), 1.0)}) for n, x in enumerate(outcome)])["m"]
    often = figures([(str(n), {"m": (float(x), 1.0)}) for n, x in enumerate(outcome) for _ in range(10)])["m"]
    assert {**often, "items": 200} == pytest.approx(once)
    share = outcome.mean()
    spread = 1.96 * math.sqrt(share * (1 - share) / 200)
    assert once["high"] - once["low"] == pytest.approx(2 * spread, rel=0.1) and once["low"] < share < once["high"]


def test_a_table_has_one_judge():
    def result(who, judge, benchmark="msvd-qa", kind="answers"):
        metrics = {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9}}
        return {"who": who, "judge": judge, "benchmark": benchmark, "kind": kind, "metrics": metrics, "items": 9}

    rules, unjudged = result("a:sft", "rules@1"), result("a:sft", None, "pope")
    shown = table([rules, result("a:policy", "rules@1"), unjudged, result("a:sft", "own", "claims", "claims")])
    assert "| msvd-qa | accuracy | 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |" in shown
    assert "| pope | accuracy | 0.500 [0.400, 0.600] |  |" in shown and "Judge: rules@1" in shown
    with pytest.raises(DataError, match="come from 2 judges:\n  rules@1  .*\n  rules@2 .*msrvtt-qa of a:sft"):
        table([rules, unjudged, result("a:sft", "rules@2", "msrvtt-qa")])
    with pytest.raises(DataError, match="two results of a:sft for msvd-qa"):
        table([rules, rules])


# ------------------------------------------------------------------------------------------------ scores of texts


def test_texts_score_as_one_forward_each_says(load):
    """Branches in one row against a row per text and a softmax of the logits in float64."""
    base = load(quantization="none")
    roles, video = Roles(base, Lora(rank=4, alpha=8.0)), video_of(base, 8)
    prompt = encode_prompt(base, [Message("user", "<video> describe the video")], video)
    texts = [
        encode_answer(base, prompt.opening, text)
        for text in ("first a red circle left .", "yes", "then a blue square up . a .")
    ]
    with roles.use("base") as role:
        found = ranking.score_texts(role, prompt, texts)
        for ids, score in zip(texts, found, strict=True):
            with torch.no_grad():
                hidden_SD = role.hidden(collate(base, [prompt.extend(ids)]))[0]
            logits_TV = (hidden_SD[-len(ids) - 1 : -1].double() @ base.head_weight_VD.double().T) + base.ban_bias_V
            logp_T = logits_TV.log_softmax(-1)[range(len(ids)), ids]
            assert score == pytest.approx(logp_T.mean().item(), abs=1e-5)
    assert ranking.rank([0.1, 0.3, 0.3, 0.2], 1) == 2 and ranking.rank([0.1, 0.3], 0) == 2  # ties count against


def test_texts_are_scored_in_several_forwards_when_they_are_many(load, monkeypatch):
    base = load(quantization="none")
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    prompt = encode_prompt(base, [Message("user", "describe the video")], None)
    texts = [encode_answer(base, prompt.opening, f"a {colour} star .") for colour in COLOURS]
    with roles.use("base") as role:
        together = ranking.score_texts(role, prompt, texts)
        monkeypatch.setattr(ranking, "TOGETHER", 11)  # two texts of five tokens each
        assert ranking.score_texts(role, prompt, texts) == pytest.approx(together, abs=1e-5)
    assert [len(chunk) for chunk in ranking._chunks(texts, 11)] == [2, 2, 2]


# ------------------------------------------------------------------------------------------------ for real, on a run


@pytest.fixture(scope="module")
def run_dir(checkpoint, load, tmp_path_factory) -> Path:
    """A run folder with an SFT role and a policy that differ."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = small_recipe(checkpoint, folder)
    roles = Roles(load(), recipe.model.lora)
    for seed, role in enumerate(("sft", "policy")):
        roles.add(role, seed=seed)
        shake(roles, role, seed)
        roles.save(role, Path(recipe.output) / "adapters" / role)
    (Path(recipe.output) / "recipe.yaml").write_text(dump_yaml(recipe))
    return Path(recipe.output)


@pytest.fixture(scope="module")
def videos(world) -> Path:
    return world / "videos" / "test"


def bench(*args) -> str:
    result = CliRunner().invoke(cli.app, ["bench", *map(str, args)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def results(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "items.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in lines]


def test_a_part_of_a_video_is_shown(run_dir, videos, tmp_path):
    examinee = Examinee(run_dir, "sft")
    name, spans = "00000.mp4", [(0.0, 1.0), (2.0, 3.0)]
    examinee.look({name: str(videos / name)}, tmp_path / "videos.json", [(name, span) for span in spans])
    views = examinee.views(name)
    assert set(views) == {"video", "0-1s", "2-3s"}
    assert views["0-1s"].time_T.max() <= 1 and views["2-3s"].time_T.min() >= 2  # of 3 seconds
    asked = {"video": name, "question": "which ?", "candidates": ["red", "blue"], "answer": "red"}
    parts = [asked | {"start": start, "end": end} for start, end in spans]
    (tmp_path / "action_sequence.json").write_text(json.dumps([*parts, asked]))
    bench(
        run_dir,
        "mvbench",
        tmp_path / "action_sequence.json",
        "--videos",
        videos,
        "--role",
        "sft",
        "--out",
        tmp_path / "o",
    )
    found, rows = results(tmp_path / "o")
    assert (
        found["items"] == 3
        and len({row["seen"] for row in map(json.loads, (tmp_path / "o" / "answers.jsonl").open())}) == 1
    )
    parts_KD = [examinee.prompt("q", name, view).features_KD for view in ("0-1s", "2-3s")]
    assert len(rows) == 3 and not torch.equal(*parts_KD)


def test_from_the_command_line(run_dir, videos, tmp_path):
    """A video that is missing and one that is broken, a stop in the middle, another judge, other settings, a table."""
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "00003.mp4").write_bytes(b"no video")
    (tmp_path / "videos" / "00005.mp4").unlink()
    asked, out = files.write("msvd-qa", tmp_path / "files", VIDEOS), tmp_path / "out"
    command = ("msvd-qa", *asked, "--videos", tmp_path / "videos", "--judge", "rules", "--role", "sft", "--out", out)
    said = bench(run_dir, *command)
    found, items = results(out)
    assert (found["items"], found["videos"], found["judge"]) == (12, 4, "rules:words-and-token-f1@3")
    assert found["missing"] == ["00005"] and list(found["broken"]) == ["00003"]
    assert (found["missing_items"], found["broken_items"]) == (3, 3)
    assert "1 videos missing, 3 items left out: 00005" in said and "1 videos broken, 3 items left out: 00003" in said
    assert set(found["groups"]) == {"0", "1", "2"}
    right = [item["reference"] in item["answers"][0].split() for item in items]
    assert [item["verdicts"]["qa"]["correct"] for item in items] == right
    assert found["metrics"]["accuracy"]["value"] == sum(right) / 12
    assert found["metrics"]["length"]["value"] == sum(item["lengths"][0] for item in items) / 12
    assert found["metrics"]["stop_rate"]["value"] == sum(item["stopped"][0] for item in items) / 12

    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    kept = lines[0].replace('"answers": ["', '"answers": ["kept ')
    (out / "answers.jsonl").write_text(kept + "".join(lines[1:7]) + lines[7][:9])  # killed within the eighth line
    bench(run_dir, *command)
    again = results(out)[1]
    assert again[0]["answers"][0].startswith("kept ") and again[1:] == items[1:]  # what was there was not made anew

    shutil.copy(videos / "00004.mp4", tmp_path / "videos" / "00000.mp4")  # the same name, another video
    bench(run_dir, *command)
    other = results(out)[1]
    assert not other[0]["answers"][0].startswith("kept ") and other[3:] == items[3:]
    shutil.copy(videos / "00000.mp4", tmp_path / "videos" / "00000.mp4")
    bench(run_dir, *command)
    assert results(out)[1] == items

    refused = CliRunner().invoke(cli.app, ["bench", str(run_dir), *map(str, command), "--max-new-tokens", "3"])
    assert refused.exit_code == 2 and "max_new_tokens was 8, is 3" in refused.stderr
    bench(run_dir, *command[:-3], "policy", "--out", tmp_path / "policy", "--limit", "5")
    of_policy = results(tmp_path / "policy")[1]
    assert len(of_policy) == 5 and [i["answers"] for i in of_policy] != [i["answers"] for i in items[:5]]
    by_words = ("--judge", "local", "--judge-words")
    bench(run_dir, *command[:-6], *by_words, "--role", "policy", "--out", tmp_path / "words", "--limit", "5")
    found, items = results(tmp_path / "words")
    assert found["judge"].startswith("local:base") and [i["answers"] for i in items] == [
        i["answers"] for i in of_policy
    ]
    shown = bench("--table", out, tmp_path / "policy")
    assert shown.splitlines()[0] == f"| benchmark | metric | {run_dir}:sft | {run_dir}:policy |"
    result = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(result | {"judge": "another"}))
    refused = CliRunner().invoke(cli.app, ["bench", "--table", str(out), str(tmp_path / "policy")])
    assert refused.exit_code == 2 and "come from 2 judges" in refused.stderr


REQUESTS = {
    "retrieval": "describe the video",
    "ucf101": "what is the colour first ?",
    "hmdb51": "what is the shape first ?",
}
COUNTED = {
    "videochatgpt": 6,
    "pope": 24,
    "amber": 12,
    "objhal": 6,
    "mmhal": 12,
    "msrvtt-retrieval": 6,
    "ucf101": 6,
    "hmdb51": 6,
    "claims": 6,
    "videochatgpt-temporal": 6,
    "videochatgpt-consistency": 6,
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_benchmark_runs(run_dir, videos, tmp_path, name):
    request = REQUESTS.get(name.removeprefix("msrvtt-"))
    more = ["--prompt", request] if request else []
    asked = files.write(name, tmp_path / "files", VIDEOS)
    bench(run_dir, name, *asked, "--videos", videos, "--judge", "rules", *more, "--out", tmp_path / "out")
    found, items = results(tmp_path / "out")
    assert len(items) == COUNTED[name] and not found["missing"] and not found["broken"]
    assert (found["judge"] is not None) == bool(BENCHMARKS[name].tasks or name == "claims")
    for metric, figure in found["metrics"].items():
        parts = [item["counts"][metric] for item in items if metric in item["counts"]]
        part, whole = (sum(column) for column in zip(*parts, strict=True))
        assert figure["value"] == (pytest.approx(part / whole) if whole else None)
    ranked = name in ("msrvtt-retrieval", "ucf101", "hmdb51")
    assert ("length" in found["metrics"]) != ranked
    if name == "msrvtt-retrieval":
        scores = [json.loads(line)["scores"] for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
        for number, item in enumerate(items):  # of the caption's column, the place of its own video
            column = [line[number] for line in scores]
            assert item["rank"] == 1 + sorted(column, reverse=True).index(column[number])
    if name == "claims":
        assert all(set(item["claims"]) == {"true", "true_elsewhere", "said", "said_by_itself"} for item in items)


def test_a_claim_audit_has_one_judge(run_dir, videos, tmp_path):
    """What the judge was told makes it another one, whose verdicts are not put beside those that are there."""
    shutil.copytree(run_dir, tmp_path / "run")
    asked, out = files.write("claims", tmp_path / "files", VIDEOS[:2]), tmp_path / "out"
    command = (tmp_path / "run", "claims", *asked, "--videos", videos, "--role", "sft", "--out", out)
    bench(*command)
    lines = (out / "claims.jsonl").read_bytes()
    for change in ("context.max_new_tokens=4", "preference.claims.prompt='<video> {context} said :'"):
        recipe = load_recipe(run_dir / "recipe.yaml", [change])
        (tmp_path / "run" / "recipe.yaml").write_text(dump_yaml(recipe))
        refused = CliRunner().invoke(cli.app, ["bench", *map(str, command)])
        assert refused.exit_code == 2 and "judge was claims/" in refused.stderr
    assert (out / "claims.jsonl").read_bytes() == lines


def test_a_plain_base_and_pictures_inside_the_file(checkpoint, tmp_path):
    """A recipe instead of a run; the picture stands in the file, base64."""
    small_recipe(checkpoint, tmp_path)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    asked = files.objhal_inside(tmp_path, VIDEOS[:2], (tmp_path / "red.png").read_bytes())
    recipe, out = tmp_path / "test.yaml", tmp_path / "out"
    text = recipe.read_text() + f"\noutput: {tmp_path / 'run'}\n"
    recipe.write_text(text.replace("model:\n", f"model:\n  base: {checkpoint}\n"))
    bench(recipe, "objhal", *asked, "--videos", tmp_path, "--role", "base", "--out", out)
    found, items = results(out)
    assert found["who"].endswith("test.yaml:base") and len(items) == 2 and not found["missing"]
    assert len(list((out / "pictures").iterdir())) == 2
    refused = CliRunner().invoke(cli.app, ["bench", str(recipe), "objhal", str(asked[0]), "--videos", str(tmp_path)])
    assert refused.exit_code == 2 and "has no role policy. It has base." in refused.stderr


def test_what_is_asked_wrongly(run_dir, tmp_path):
    def refused(*args):
        result = CliRunner().invoke(cli.app, ["bench", *map(str, args)])
        assert result.exit_code == 2
        return result.stderr

    (tmp_path / "a.json").write_text("[]")
    assert "Did you mean msvd-qa?" in refused(run_dir, "msvd_qa", tmp_path / "a.json", "--videos", tmp_path)
    assert "There is no file" in refused(run_dir, "pope", tmp_path / "b.json", "--videos", tmp_path)
    assert "it holds no entries" in refused(run_dir, "pope", tmp_path / "a.json", "--videos", tmp_path)
    assert "is not a run folder" in refused(tmp_path, "pope", tmp_path / "a.json", "--videos", tmp_path)
    assert "Give a run" in refused(run_dir, "pope")
    asked = (run_dir, "msvd-qa", *files.qa(tmp_path, VIDEOS), "--videos", tmp_path, "--role", "sft")
    assert "An endpoint serves several models" in refused(*asked, "--judge", "http://localhost:1/v1")
    assert "There is no judge gpt" in refused(*asked, "--judge", "gpt")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "gpt2"}')
    by_words = (*asked, "--out", tmp_path / "never", "--judge-words")
    assert "is a text model" in refused(*by_words, "--judge-model", tmp_path / "text")
    assert "--judge-words is for a local judge; the judge is rules." in refused(*by_words, "--judge", "rules")
    assert not (tmp_path / "never").exists()  # refused before any answer was made
    pope = files.pope(tmp_path, VIDEOS)[0]
    assert "None of the 6 videos is under" in refused(run_dir, "pope", pope, "--videos", tmp_path)
    assert "holds no finished benchmark" in refused("--table", tmp_path)
    listed = CliRunner().invoke(cli.app, ["bench", "--list"]).stdout
    assert all(name in listed for name in BENCHMARKS)
