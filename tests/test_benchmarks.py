"""Benchmarks: the authors' files, what is counted of an answer, and a role put to them for real, on a random base."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark_files as files
from core import video_of
from rlaif_lite.benchmarks import hallucination, questions, ranking
from rlaif_lite.benchmarks.catalogue import BENCHMARKS
from rlaif_lite.benchmarks.items import Item, Objects, find_videos, mentions, words_of, yes_or_no
from rlaif_lite.benchmarks.results import figures, table
from rlaif_lite.data.records import Message
from rlaif_lite.data.world_text import COLOURS, describe
from rlaif_lite.errors import DataError
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.model.text import encode_answer
from rlaif_lite.recipe import Lora

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
