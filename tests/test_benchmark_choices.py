"""Options, nouns and words: replies as models write them, and files as authors ship them."""

import base64
import json
import re
import sys
from pathlib import Path

import pytest

from rlaif_lite.benchmarks import choices, hallucination, nouns, questions, vidhalluc
from rlaif_lite.benchmarks.answer import write_pictures
from rlaif_lite.benchmarks.items import Item, find_videos, mentions, words_of
from rlaif_lite.benchmarks.options import label_of, named_in
from rlaif_lite.benchmarks.rule_judge import right_by_words
from rlaif_lite.errors import DataError

REPLIES = {
    "Caption B": "B",
    "Option 2": "B",
    "Sentence A": "A",
    "**B.**": "B",
    "(b) the ball rolls down": "B",
    "b) the ball": "B",
    "Not A. Thus: B": "B",
    "The answer is (B), and not option A.": "B",
    "Option A is wrong. Answer: B": "B",
    "The correct answer is option 3": "C",
    "I think C": "C",
    "A": "A",
    "A. a dog": "A",
    "A dog runs": None,
    "A and B": "B",  # the article may stand for an A; a B stands for nothing else
    "B or C": None,
    "The ball rolls up": None,
    "2": None,  # a count
    "": None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_the_option_that_a_reply_names(reply):
    assert named_in(reply) == REPLIES[reply]


def test_options_as_references():
    assert label_of("B") == ("B", "") and label_of("(B) a dog") == ("B", "a dog")
    assert label_of("Option 2: a dog") == ("B", "a dog") == label_of("Caption B: a dog")
    assert label_of("2") is label_of("a dog") is label_of("b") is None
    for reference in ("B", "B. the ball rolls down", "Option 2: The ball rolls down."):
        assert [right_by_words(reply, reference)[0] for reply in ("Caption B", "The ball rolls up")] == [True, False]
    assert right_by_words("the ball rolls down", "Option 2: The ball rolls down.") == (True, True)


WORDS = {
    "Привет, мир!": ["привет", "мир"],
    "一只狗在跑。": ["一", "只", "狗", "在", "跑"],
    "कुत्ता दौड़ रहा है": ["कुत्ता", "दौड़", "रहा", "है"],
    "الكلب يجري": ["الكلب", "يجري"],
    "Café, naïve": ["café", "naïve"],
    "-5 degrees, not 5": ["-5", "degrees", "not", "5"],
    "−5": ["-5"],
    "3.5 of 1,000": ["3.5", "of", "1000"],
    "2-5 a well-kept dog isn’t": ["2-5", "a", "well-kept", "dog", "isn't"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_any_script(text):
    import unicodedata

    assert words_of(text) == [unicodedata.normalize("NFKC", word) for word in WORDS[text]]
    assert right_by_words(text, text)[0]


def test_a_sign_and_a_fraction_are_part_of_a_number():
    assert not right_by_words("-5", "5")[0] and not right_by_words("5", "-5")[0]
    assert not right_by_words("3.5", "5")[0] and right_by_words("It is -5 today", "-5")[0]
    assert not right_by_words("猫在跑", "狗")[0] and right_by_words("一只狗在跑", "狗")[0]


def test_verbs_are_no_objects():
    """The tagger of AMBER's authors (NLTK's) reads "dog train" as two nouns too, so `train` stays."""
    vocabulary = frozenset(["can", "watch", "train", "bear", "dog", "fire truck"])

    def named(text: str) -> list[str]:
        words, are_nouns = zip(*nouns.tagged(text), strict=True)
        return mentions(words, vocabulary, are_nouns)

    assert named("We can watch the dog train in the park; it can bear the heat.") == ["dog", "train"]
    assert named("A dog can bear the heat while they watch.") == ["dog"]
    assert named("A train and two dogs by the fire truck.") == ["train", "dog", "fire truck"]
    item = hallucination.Item("1", "v", ("q",), "", objects=hallucination.Objects({}, {}, vocabulary, frozenset()))
    assert hallucination.tally_amber(item, {"answers": ["We can watch."]})["hal"] == (0.0, 1.0)
    assert hallucination.tally_amber(item, {"answers": [""]})["chair"] == (0, 0)


def test_without_a_tagger_amber_is_refused_before_any_answer(tmp_path, monkeypatch):
    write = {
        "q": [{"id": 1, "image": "a", "query": "q"}],
        "n": [{"id": 1, "type": "generative", "truth": [], "hallu": []}],
    }
    for name, what in write.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    monkeypatch.setitem(sys.modules, "textblob.taggers", None)
    nouns.tagger.cache_clear()
    with pytest.raises(DataError, match=r"pip install 'rlaif-lite\[amber\]'"):
        hallucination.load_amber([tmp_path / "q.json", tmp_path / "n.json"])
    nouns.tagger.cache_clear()


def test_ambers_relations_are_one_group(tmp_path):
    queries = [{"id": n, "image": "a", "query": "q"} for n in (1, 2)]
    notes = [{"id": 1, "type": "relation", "truth": "no"}, {"id": 2, "type": "discriminative-relation", "truth": "yes"}]
    for name, what in {"q": queries, "n": notes}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(what))
    items = hallucination.load_amber([tmp_path / "q.json", tmp_path / "n.json"])
    assert {item.group for item in items} == {"discriminative-relation"}


def test_popev2_keeps_a_picture_and_its_counterpart_apart(tmp_path):
    rows = [
        {"image_id": 7, "image_name": f"/{folder}/000007.jpg", "query": "Is there a cat?", "label": label}
        for folder, label in (("images", "no"), ("normal_images", "yes"))
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    items = hallucination.load_pope([tmp_path / "annotations.json"])
    assert [(item.video, item.reference) for item in items] == [
        ("images/000007.jpg", "no"),
        ("normal_images/000007.jpg", "yes"),
    ]
    for item in items:
        (tmp_path / item.video).parent.mkdir()
        (tmp_path / item.video).touch()
    found, _ = find_videos([item.video for item in items], tmp_path)
    assert len(set(found.values())) == 2


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path):
    pictures = {name: base64.b64encode(name.encode()).decode() for name in ("x/0", "y/0", "../0")}
    items = [Item(name, name, (), "", picture=content) for name, content in pictures.items()]
    found = write_pictures(items, tmp_path / "inside")
    assert len(set(found.values())) == 3 and len(list((tmp_path / "inside").iterdir())) == 3
    assert all(Path(path).read_bytes() == name.encode() for name, path in found.items())


def test_questions_without_ids_and_as_csv(tmp_path):
    rows = [
        {"video_id": 12, "question": "what is it", "answer": "rope"},
        {"video_id": 13, "question": "how many", "answer": 2},
    ]
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    assert [i[:4] for i in questions.load_qa([tmp_path / "qa.json"])] == [
        ("0", "12", ("what is it",), "rope"),
        ("1", "13", ("how many",), "2"),
    ]
    (tmp_path / "video12.mp4").touch()
    assert find_videos(["12"], tmp_path)[0] == {"12": str(tmp_path / "video12.mp4")}
    (tmp_path / "nextqa.csv").write_text(
        "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        "4010,369,640,480,why does the girl look up,2,0,CW,rain,kite,plane,bird,light\n"
    )
    (item,) = questions.load_qa([tmp_path / "nextqa.csv"])
    assert item[:5] == (
        "4010_0",
        "4010",
        ("why does the girl look up\nA. rain\nB. kite\nC. plane\nD. bird\nE. light",),
        "C. plane",
        "CW",
    )
    (tmp_path / "tgif.csv").write_text(
        "gif_name\tquestion\ta1\ta2\tanswer\tvid_id\tkey\ntumblr_a\twhat ?\trun\tjump\t1\tACTION4\t26\n"
    )
    assert questions.load_qa([tmp_path / "tgif.csv"])[0][:4] == (
        "26",
        "tumblr_a",
        ("what ?\nA. run\nB. jump",),
        "B. jump",
    )
    for text, said in (
        ("question,answer\nq,a\n", "found the keys question, answer"),
        ("video,question,answer,a0\nv,q,7,x\n", "expected the number of an option from 0"),
        ("video,question,answer\nv,q\n", "line 2: its columns are not those of the first line"),
        ("video,question,answer\n", "it holds no rows"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=said):
            questions.load_qa([tmp_path / "bad.csv"])


def test_half_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "qa.json").write_text('[{"video_name": "a", "question": "\\ud800", "answer": "x"}]')
    with pytest.raises(DataError, match="entry 0.*half a surrogate pair"):
        questions.load_qa([tmp_path / "qa.json"])


def row(*answers: str) -> dict:
    return {"answers": list(answers)}


def test_sets_with_a_right_choice(tmp_path):
    def written(name: str, what) -> list:
        (tmp_path / name).write_text(json.dumps(what))
        return [tmp_path / name]

    asked = {"question": "Which?\nOption 1: up\nOption 2: down", "answer": "Option 2: down"}
    (item,) = choices.load_tempcompass(written("caption_matching.json", {"77": {"order": [asked]}}))
    assert (item.id, item.video, item.group) == ("77_order_0", "77", "order")
    assert choices.tally_choice(item, row("Caption B"))["accuracy"] == (1.0, 1.0)
    assert choices.tally_choice(item, row("hm"))["unread_share"] == (1.0, 1.0)

    task = {"video": "a.mp4", "question": "What?", "candidates": ["sit", "run"], "answer": "run"}
    (item,) = choices.load_mvbench(written("action_sequence.json", [task]))
    assert item[:5] == ("action_sequence_0", "a.mp4", ("What?\nA. sit\nB. run",), "B. run", "action_sequence")
    part = task | {"start": 1.5, "end": 4}
    spans = [choices.load_mvbench(written(f"{name}.json", [part]))[0].span for name in ("a", "episodic_reasoning")]
    assert spans == [(1.5, 4.0), (4.5, 12.0)] and item.span is None  # a folder of three frames a second
    with pytest.raises(DataError, match="`start` is 4 and `end` 1.5"):
        choices.load_mvbench(written("m.json", [task | {"start": 4, "end": 1.5}]))
    with pytest.raises(DataError, match="`answer` 'fly' is none of the candidates"):
        choices.load_mvbench(written("m.json", [task | {"answer": "fly"}]))

    half = [
        {"video": name, "question": f"{name}?", "answer": answer}
        for name, answer in (("a.mp4", "yes"), ("b.mp4", "no"))
    ]
    pair = {"basic": half[0], "hallucination": half[1], "type": "subject"}
    (item,) = choices.load_videohallucer(written("semantic_detail.json", [pair]))
    assert (item.questions, item.videos, item.reference) == (("a.mp4?", "b.mp4?"), ("a.mp4", "b.mp4"), "yes/no")
    both, one = (choices.tally_pair(item, row(*said)) for said in (("Yes.", "No."), ("yes", "yes")))
    assert both["overall"] == (1.0, 1.0) and one["overall"] == (0.0, 1.0)
    assert (one["basic"], one["hallucination"], one["yes_share"]) == ((1.0, 1.0), (0.0, 1.0), (2.0, 2.0))
    loose = choices.tally_pair(item, row("There is no doubt: yes.", "I cannot say; no dog"))  # the word anywhere
    assert (loose["overall"], loose["yes_share"]) == ((1.0, 1.0), (0.0, 2.0))
    assert choices.tally_pair(item, row("yesterday", "nobody"))["overall"] == (0.0, 1.0)
    with pytest.raises(DataError, match="`answer` is 'perhaps', expected yes or no"):
        choices.load_videohallucer(written("v.json", [pair | {"basic": half[0] | {"answer": "perhaps"}}]))

    event = {
        "id": "entire_001",
        "questions": [{"question": "q?", "answer": "No."}, {"question": "r?", "answer": "yes"}],
    }
    items = choices.load_eventhallusion(written("entire_questions.json", [event]))
    assert [(i.id, i.reference, i.group) for i in items] == [
        ("entire_001", "no", "entire"),
        ("entire_001#2", "yes", "entire"),
    ]
    said = [choices.tally_beginning(items[0], row(answer)) for answer in ("No.", "Nothing", "Yes", "It is not", "")]
    assert [each["accuracy"][0] for each in said] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [each["unread_share"][0] for each in said] == [0.0, 0.0, 0.0, 1.0, 1.0]
    with pytest.raises(DataError, match="Expected TempCompass"):
        choices.load_tempcompass(written("t.json", {"77": ["q"]}))


VIDHALLUC = {
    "ach_binaryqa.json": {
        "x_1": [
            {"q": "Is a ball thrown?", "a": {"x_clip_1": "Yes", "x_clip_2": "No"}},
            {"q": "Is it wet?", "a": {"x_clip_1": "no"}},
        ]
    },
    "ach_mcq.json": {
        "x_1": {
            "x_clip_1": {
                "Question": "What is done?",
                "Choices": {"A": "throwing", "B": "catching", "C": "sitting", "D": "none"},
                "Correct Answer": "AB",
            }
        }
    },
    "tsh.json": {"0": {"video": "x_0_9", "Question": "Action A: sit. Action B: run. ", "Correct Answer": "BA"}},
    "sth.json": {
        "y_1": {"Scene change": "Yes", "Locations": "from a hall to a field."},
        "y_2": {"Scene change": "No", "Locations": "None"},
    },
}


def test_vidhalluc(tmp_path):
    for name, what in VIDHALLUC.items():
        (tmp_path / name).write_text(json.dumps(what))
    items = vidhalluc.load([tmp_path / name for name in VIDHALLUC])
    assert [(i.id, i.group, i.reference, i.videos) for i in items] == [
        ("binaryqa_x_1_0", "binaryqa", "Yes/No", ("x_clip_1", "x_clip_2")),
        ("binaryqa_x_1_1", "binaryqa", "No", ("x_clip_1",)),
        ("mcq_x_1_x_clip_1", "mcq", "AB", ("x_clip_1",)),
        ("tsh_0", "tsh", "BA", ("x_0_9",)),
        ("sth_y_1", "sth", "Yes", ("y_1",)),
        ("sth_y_2", "sth", "No", ("y_2",)),
    ]
    clips, _, letters, order, change, still = items
    assert clips.questions == ("Is a ball thrown? Only answer with a single word 'Yes' or 'No'.",) * 2
    assert letters.questions[0].endswith("Choices:\nA. throwing\nB. catching\nC. sitting\nD. none")

    def tally(item: Item, *said: str) -> dict:
        return {key: part for key, (part, whole) in vidhalluc.tally(item, row(*said)).items() if whole}

    assert tally(clips, "Yes, it is.", "no") == {"binaryqa": 1.0, "binaryqa_each": 2.0}
    assert tally(clips, "yes", "Yes") == {"binaryqa": 0.0, "binaryqa_each": 1.0}
    assert tally(clips, "Yes it is", "No") == {"binaryqa": 0.0, "binaryqa_each": 1.0}  # more than the one word
    for said, right in (("A, B", 1.0), ("A and B.", 1.0), ("A", 0.0), ("AB", 0.0), ("Throwing", 0.0), ("A B C", 0.0)):
        assert tally(letters, said) == {"mcq": right}, said
    single = letters._replace(reference="B")
    assert tally(single, "They are catching it") == {"mcq": 1.0}  # no letter: the first choice that is said
    for said, named in (
        ("ba", "BA"),
        (" AB ", "AB"),
        ("Action B happens before Action A.", "BA"),
        ("First action A, then action B", "AB"),
        ("Action A occurs after action B", "BA"),
        ("Action B is clearly seen", "B"),
        ("It is not clear", ""),
        ("They run", ""),
    ):
        assert vidhalluc.order_of(said) == named, said
    assert tally(order, "BA") == {"tsh": 1.0} and tally(order, "AB") == {"tsh": 0.0}
    assert tally(change, "Scene change: Yes, Locations: from a to b.") == {"sth_accuracy": 1.0, "sth_recall": 1.0}
    assert tally(still, "Scene change: No, Locations: None") == {"sth_accuracy": 1.0, "sth_specificity": 1.0}
    assert tally(change, "It changes") == {"sth_accuracy": 0.0, "sth_recall": 0.0}


@pytest.mark.parametrize(
    "what, said",
    [
        ({"x": [{"q": "q"}]}, "x, question 0: expected {q, a: {clip: Yes or No}}"),
        ({"x": [{"q": "q", "a": {"c": "maybe"}}]}, "`c` is 'maybe', expected Yes or No"),
        (
            {"x": {"c": {"Question": "q", "Choices": {"A": "a"}, "Correct Answer": "B"}}},
            "x, c: `Correct Answer` is 'B'",
        ),
        ({"x": {"c": 3}}, "expected {Question, Choices, Correct Answer}"),
        ({"x": {"video": "v", "Question": "q", "Correct Answer": "C"}}, "expected AB, BA, A or B"),
        ({"x": "y"}, "found a str. Expected VidHalluc's"),
    ],
)
def test_vidhalluc_in_another_shape_is_refused(what, said, tmp_path):
    (tmp_path / "v.json").write_text(json.dumps(what))
    with pytest.raises(DataError, match=re.escape(said)):
        vidhalluc.load([tmp_path / "v.json"])
