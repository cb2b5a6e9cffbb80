"""The synthetic world: what is seeded, what is said, and how what is said is held against the truth."""

import json
import random
from collections import Counter

import decord
import numpy as np
import pytest

from rlaif_lite.data.records import from_json
from rlaif_lite.data.world import WorldConfig, WorldSplits, facts_of, question_records, render, write_video, write_world
from rlaif_lite.data.world_text import (
    KINDS,
    ORDINALS,
    Noise,
    caption,
    claim,
    corrupt,
    describe,
    garbled,
    narrative,
    pair,
    score,
    truth,
    verdicts,
)
from rlaif_lite.errors import DataError
from rlaif_lite.rl.rules import CHECKS

FACTS = {"events": [["red", "circle", "left"], ["blue", "square", "up"], ["green", "cross", "grows"]], "star": "yellow"}
NO_STAR = {**FACTS, "star": None}
TEXT = "first a red circle left . then a blue square up . finally a green cross grows . also a yellow star ."


def test_texts():
    assert describe(FACTS) == TEXT
    assert describe(NO_STAR) == TEXT.removesuffix(" also a yellow star .")
    assert caption(FACTS, 1) == "a blue square up and a yellow star ."
    assert narrative(NO_STAR, random.Random(0), error=0.0) == describe(NO_STAR)
    assert narrative(FACTS, random.Random(0), error=0.0).startswith(
        "first a red circle left and a yellow star . then a blue square up and"
    )


@pytest.mark.parametrize(
    ("text", "facts", "expected"),
    [
        # correct, wrong, total, mentions, hallucinated, malformed
        (TEXT, FACTS, (10, 0, 10, 4, 0, 0)),
        (TEXT, NO_STAR, (9, 1, 9, 4, 1, 0)),
        ("", FACTS, (0, 0, 10, 0, 0, 0)),
        ("first a red circle right .", FACTS, (2, 1, 10, 1, 0, 0)),  # wrong motion: the object is there
        ("first a blue square up .", FACTS, (0, 3, 10, 1, 0, 0)),  # an object of another time is no hallucination
        ("first a white square up .", FACTS, (0, 3, 10, 1, 1, 0)),
        ("first a red circle left . first a red circle left .", FACTS, (3, 3, 10, 1, 0, 1)),  # repeated
        (
            "first red circle left . then a blue square up",
            FACTS,
            (3, 3, 10, 1, 0, 1),
        ),  # malformed; no full stop at the end
        ("also a red star .", FACTS, (0, 1, 10, 1, 1, 0)),
        ("also a yellow star . also a yellow star .", FACTS, (1, 1, 10, 2, 0, 0)),
    ],
)
def test_truth_by_hand(text, facts, expected):
    assert truth(text, facts) == expected
    assert score(text, facts) == expected[0] - expected[1]


def test_verdicts_stand_at_attribute_words():
    labels = verdicts("first a red square left . also a red star .", FACTS)
    assert labels == ["-", "-", "yes", "no", "yes", "-", "-", "-", "no", "-", "-"]
    twice = verdicts("also a yellow star . also a yellow star .", FACTS)
    assert twice == ["-", "-", "yes", "-", "-", "-", "-", "no", "-", "-"]  # saying it again is wrong


def test_a_malformed_sentence_supports_nothing():
    """Every attribute word of a sentence that stumbles is "no"; a repeated event costs what `score` takes off."""
    labels = verdicts("first a red circle circle left . then a blue square up .", FACTS)
    assert labels == ["-", "-", "no", "no", "no", "no", "-", "-", "-", "yes", "yes", "yes", "-"]
    rng = random.Random(0)
    kinds = set()
    for _ in range(300):
        text = garbled(TEXT, rng)
        held, labels = truth(text, FACTS), verdicts(text, FACTS)
        assert len(labels) == len(text.split()) and labels.count("yes") == held.correct
        twice_star = text.count("also a yellow star .") == 2
        assert held.malformed == (0 if twice_star else 1), text
        if text.count("first a red circle left .") == 2:
            assert labels.count("yes") - labels.count("no") == score(text, FACTS) == 7
        kinds.add(text)
    assert len(kinds) > 60


def test_verdicts_sum_to_the_score():
    rng = random.Random(0)
    for index in range(200):
        facts = facts_of(100, "test", index)
        text = describe(corrupt(facts, rng))
        labels = verdicts(text, facts)
        assert len(labels) == len(text.split())
        assert labels.count("yes") - labels.count("no") == score(text, facts)


def test_corruption_rates():
    """Against the closed form: an attribute changes with p * (1 - chance to draw the truth again)."""
    rng, facts, trials = random.Random(0), NO_STAR, 4000
    noise = Noise(attribute=0.2, prior=0.7, false_star=0.55, omit_star=0.3)
    drawn = [corrupt(facts, rng, noise) for _ in range(trials)]
    green_kept = np.mean([d["events"][2][0] == "green" for d in drawn])
    assert green_kept == pytest.approx(1 - 0.2 * (1 - 0.3 / 6), abs=0.03)
    red_kept = np.mean([d["events"][0][0] == "red" for d in drawn])
    assert red_kept == pytest.approx(1 - 0.2 * 0.3 * 5 / 6, abs=0.02)
    assert np.mean([d["star"] is not None for d in drawn]) == pytest.approx(0.55, abs=0.03)
    yellow = np.mean([d["star"] == "yellow" for d in drawn if d["star"]])
    assert yellow == pytest.approx(0.7 + 0.3 / 6, abs=0.03)
    assert np.mean([corrupt(FACTS, rng, noise)["star"] is None for _ in range(trials)]) == pytest.approx(0.3, abs=0.03)
    assert corrupt(FACTS, rng, Noise(0.0, 0.0, 0.0, 0.0)) == FACTS


def test_claims_are_true_as_often_as_they_say():
    rng, true = random.Random(0), 0
    for index in range(1000):
        facts = facts_of(100, "test", index)
        text, is_true = claim(facts, rng)
        words = text.removeprefix("claim : ").removesuffix(" ?")
        if words.startswith("also") or " a " in words:
            assert is_true == (words in describe(facts))
        else:
            ordinal, value = words.split()
            kind = next(number for number, pool in enumerate(KINDS.values()) if value in pool)
            sentence = describe(facts).split(" . ")[["first", "then", "finally"].index(ordinal)]
            assert is_true == (value == sentence.split()[2 + kind])
        true += is_true
    assert 420 < true < 560


def test_pair_margin():
    facts = facts_of(100, "test", 3)
    for seed in range(50):
        a, b, margin = pair(facts, random.Random(seed), ties=0.0)
        assert a != b and margin == score(a, facts) - score(b, facts) != 0


def test_a_video_is_a_function_of_seed_split_and_index(tmp_path):
    write_video(tmp_path / "a.mp4", 100, "sft", 7)
    write_video(tmp_path / "b.mp4", 100, "sft", 7)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    for other in ((101, "sft", 7), (100, "rl", 7), (100, "sft", 8)):
        write_video(tmp_path / "c.mp4", *other)
        assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()


def test_mp4_round_trip(tmp_path):
    """24 frames come back through decord; the star and the object have their colours where they were drawn."""
    facts = {
        "events": [["red", "square", "left"], ["blue", "circle", "right"], ["green", "circle", "up"]],
        "star": "white",
    }
    config = WorldConfig(noise=5.0, dropout=0.0)
    frames, placed = render(facts, np.random.default_rng(0), config)
    from rlaif_lite.data.world import encode

    encode(tmp_path / "v.mp4", frames, config)
    reader = decord.VideoReader(str(tmp_path / "v.mp4"))
    assert len(reader) == 24 and reader.get_avg_fps() == pytest.approx(8)
    back = reader.get_batch(range(24)).asnumpy()
    for frame, channel in ((0, 0), (8, 2), (16, 1)):
        _, x, y, _ = placed[frame].round().astype(int)
        pixel = back[frame, y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
        assert pixel.argmax() == channel and pixel.max() > 150
    x_of = placed[:8, 1]
    assert x_of[0] - x_of[-1] > 12  # "left" moves to the left
    corners = [back[3][y - 2 : y + 3, x - 2 : x + 3].mean() for y in (8, 56) for x in (8, 56)]
    assert sum(corner > 180 for corner in corners) == 1


def test_dropout_hides_objects():
    """In a share of the frames, and then nothing is drawn."""
    facts, small = facts_of(100, "sft", 0), WorldConfig(size=16, noise=0.0, dropout=0.33)
    drawn = [render(facts, np.random.default_rng(i), small) for i in range(200)]
    visible = np.concatenate([placed[:, 0] for _, placed in drawn]) > 0
    assert visible.mean() == pytest.approx(0.67, abs=0.03)  # 4,800 frames: standard deviation .007
    plain = np.concatenate([np.ptp(frames, axis=(1, 2, 3)) for frames, _ in drawn]) == 0
    assert plain[~visible].all()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    seen = []
    folder = write_world(
        tmp_path_factory.mktemp("world"),
        WorldSplits(6, 2, 2, 2),
        100,
        workers=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (12, 12)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_world_files(world):
    easy, hard = lines(world / "sft_easy.jsonl"), lines(world / "sft_hard.jsonl")
    assert len(hard) == 6 and len(easy) == 6 * 11
    for name in ("preference", "rl", "test"):
        for number, record in enumerate(lines(world / f"{name}.jsonl")):
            assert record["facts"] == facts_of(100, name, number)
            assert [m["role"] for m in record["messages"]] == ["user"]
            assert (world / record["video"]).is_file()
    assert [r["video"] for r in lines(world / "policy_init.jsonl")] == [r["video"] for r in lines(world / "rl.jsonl")]
    assert not any("facts" in record for record in easy + hard)
    videos = {
        name: {r["video"] for r in lines(world / f"{name}.jsonl")} for name in ("sft_hard", "preference", "rl", "test")
    }
    assert sum(map(len, videos.values())) == len(set.union(*videos.values()))


def right_answer(question: str, facts) -> str:
    """The answer to a question that rules check, from the facts."""
    words = question.removeprefix("<video> ").split()
    if words[0] == "how":  # how many red ?
        return " ".join("-" for event in facts["events"] if words[2] in event) or "no"
    if words[0] == "is":  # is a red circle left then a blue square up ?
        return "yes" if facts["events"].index(words[2:5]) < facts["events"].index(words[7:10]) else "no"
    return facts["events"][ORDINALS.index(words[4])][list(KINDS).index(words[3])]  # what is the colour then ?


def test_questions_that_rules_check_have_the_right_solutions(world):
    """Every solution follows from the facts; the option's word is one of two; what SFT learns has careless answers."""
    rule, tasks, answers = {"choice": "choice", "count": "match", "order": "match"}, Counter(), Counter()
    for split in ("rl", "test"):
        for index in range(300):
            facts = facts_of(100, split, index)
            for found in question_records(f"{split}/{index:05d}", "v.mp4", facts, learnt=False):
                record = from_json(found, "made up")
                assert record.solution == right_answer(record.messages[0].content, facts)
                assert CHECKS[rule[record.task]].value(f"{record.solution} .", record) == 1
                assert len(record.options) == (2 if record.task == "choice" else 0) and record.facts is None
                tasks[record.task] += 1
                answers[record.task, record.solution] += 1
    assert tasks["choice"] == tasks["count"] == 600 and tasks["order"] > 570
    assert abs(answers["order", "yes"] / tasks["order"] - 0.5) < 0.06
    assert max(answers["count", solution] for solution in ("no", "-", "- -", "- - -")) < 0.7 * 600
    learnt = lines(world / "sft_questions.jsonl")
    assert 12 <= len(learnt) <= 18 and all(len(r["messages"]) == 2 and "solution" not in r for r in learnt)
    assert lines(world / "test_questions.jsonl")[0]["task"] == "choice"


def test_check_records_carry_a_verdict_for_every_word(world):
    checks = [record for record in lines(world / "sft_easy.jsonl") if "verdicts" in record]
    assert len(checks) == 12
    for record in checks:
        answer = record["messages"][-1]["content"]
        facts = facts_of(100, "sft", int(record["id"].split("/")[1]))
        ends = [end for end, _ in record["verdicts"]]
        words = [answer[start:end].strip() for start, end in zip([0, *ends], ends, strict=False)]
        assert words == answer.split() and ends[-1] == len(answer)
        assert [label for _, label in record["verdicts"]] == verdicts(answer, facts)


def test_pair_records_name_the_better_answer(world):
    pairs = [record for record in lines(world / "sft_easy.jsonl") if record["id"].endswith("/pair")]
    for record in pairs:
        facts = facts_of(100, "sft", int(record["id"].split("/")[1]))
        _, a, b, closing = record["messages"][0]["content"].split(" <|> ")
        a, b = a.removeprefix("response A : "), b.removeprefix("response B : ")
        assert closing == "better ?"
        assert record["messages"][1]["content"] == ("A" if score(a, facts) > score(b, facts) else "B")


def test_a_world_is_completed_and_never_mixed(world, tmp_path):
    folder = write_world(tmp_path, WorldSplits(2, 1, 1, 1), 100)
    (folder / "world.json").rename(folder / "world.part.json")  # as an interruption leaves it
    gone = folder / "videos/sft/00001.mp4"
    before = gone.read_bytes()
    gone.unlink()
    write_world(folder, WorldSplits(2, 1, 1, 1), 100)
    assert (
        gone.read_bytes() == before == (world / "videos/sft/00001.mp4").read_bytes()
    )  # and a small world is part of a larger one
    with pytest.raises(DataError, match="another world"):
        write_world(folder, WorldSplits(2, 1, 1, 1), 101)
