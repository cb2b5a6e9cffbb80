"""Records and videos keep their identity whatever ids and names the user's files carry."""

import json

import pytest

from core import small_recipe
from rlaif_lite import pipeline
from rlaif_lite.data.readers import read_records
from rlaif_lite.data.records import question_of
from rlaif_lite.data.splits import hold_out_videos, load_splits, name_videos
from rlaif_lite.errors import DataError
from rlaif_lite.exchange import export
from rlaif_lite.files import read_jsonl
from rlaif_lite.recipe import Data, Recipe
from rlaif_lite.report.compare import compare
from rlaif_lite.report.folder import read_run
from rlaif_lite.report.page import example_cards
from rlaif_lite.report.stats import asked
from rlaif_lite.stages.ppo import ranking, rlif
from rlaif_lite.stages.preference import outside_narrative, read_pairs
from rlaif_lite.workspace import Workspace

# ---- names and keys


def test_a_video_has_one_name_and_no_two_share_it():
    frames = tuple(f"/r/f/{i}.jpg" for i in range(3))
    videos = ["/r/a.mp4", "a.mp4", "./a.mp4", "/d/a.mp4", frames, frames[:2] + ("/r/f/x.jpg",)]
    names = name_videos(videos, ["/d", "/r"])
    assert names["/r/a.mp4"] == "a.mp4"
    assert names["a.mp4"] == names["./a.mp4"]  # one file, spelled in two ways
    assert len({names[video] for video in videos}) == 5
    moved = name_videos(tuple(f"/elsewhere{path}" for path in frame) for frame in (frames,))
    assert name_videos([frames], ["/r"]) != moved and names[frames].startswith("f/0.jpg and 2 more")
    there = tuple(frame.replace("/r/", "/elsewhere/") for frame in frames)
    assert list(name_videos([there], ["/elsewhere"]).values()) == list(name_videos([frames], ["/r"]).values())


def test_held_out_are_whole_videos_and_at_least_one():
    items = [(f"v{i % 10}", i) for i in range(40)]
    rest, held = hold_out_videos(items, 0.25, lambda item: item[0], lambda name: int(name[1:]))
    assert {video for video, _ in held} == {"v0", "v1", "v2"} and len(rest) + len(held) == 40
    assert len({video for video, _ in hold_out_videos(items, 1e-6, lambda i: i[0], hash)[1]}) == 1


# ---- a whole run on files whose ids, file names and questions repeat


def repeating(world, folder, split: str) -> list[str]:
    """Two files counted from 0, two folders with the same file names, two questions about each of four videos."""
    lines = [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]
    files = []
    for half, name in enumerate("ab"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        out = []
        for place, found in enumerate(lines[2 * half : 2 * half + 2]):
            copy = folder / name / f"{split}{place}.mp4"
            copy.write_bytes((world / found["video"]).read_bytes())
            for question in ("describe the video", f"what is the colour {('first', 'then')[half]} ?"):
                messages = [{"role": "user", "content": f"<video> {question}"}]
                out.append(found | {"id": str(place), "video": copy.name, "messages": messages})
        path = folder / name / f"{split}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in out))
        files.append(str(path))
    return files


@pytest.fixture(scope="module")
def shared(world, checkpoint, tmp_path_factory):
    """run(name, *overrides) -> the workspace of a finished run on the repeating files."""
    folder = tmp_path_factory.mktemp("repeating")
    own = [f"data.{split}={json.dumps(repeating(world, folder, split))}" for split in ("preference", "rl", "test")]

    def run(name: str, *overrides: str) -> Workspace:
        data = [f"data.folder={world}", f"features.cache={folder / 'cache'}", f"output={folder / 'runs' / name}"]
        quick = [
            "preference.compare_pairs=0",
            "evaluate.roles=[sft, policy]",
            "evaluate.temperatures=[]",
            "ppo.steps=2",
        ]
        recipe = small_recipe(checkpoint, folder, *own, *data, *quick, *overrides)
        pipeline.run(recipe, share=folder / "runs")
        return Workspace(recipe)

    return run


@pytest.fixture(scope="module")
def by_ppo(shared) -> Workspace:
    return shared("ppo")


def test_keys_are_unique_and_ids_stay(by_ppo):
    for split in ("preference", "rl", "test"):
        records = by_ppo.records(split)
        assert [r.key for r in records] == [f"{split}/{place:05d}" for place in range(8)]
        assert len({r.id for r in records}) == 2 and len({by_ppo.name_of(r) for r in records}) == 4
        assert len({(by_ppo.features(r).features_KD.sum().item(), r.prompt) for r in records}) == 8


def test_left_out_records_move_no_key(tmp_path):
    lines = [{"id": "x", "video": f"{i}.mp4", "messages": [{"role": "user", "content": "<video> q"}]} for i in range(3)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "1.mp4").write_bytes(b"x")
    recipe = Recipe(name="t", output=str(tmp_path), data=Data(test=(str(path),), on_missing="skip"))
    assert [r.key for r in load_splits(recipe, tmp_path, lambda path: read_records(path).records).records["test"]] == [
        "test/00001"
    ]
    with pytest.raises(DataError, match="unknown key `key`"):
        path.write_text(json.dumps(lines[1] | {"key": "mine"}) + "\n")
        load_splits(recipe, tmp_path, lambda path: read_records(path).records)


def test_pairs_stay_with_their_prompt_and_video(by_ppo):
    pairs = read_pairs(by_ppo)
    released = json.loads((by_ppo.folder / "preference" / "pairs.json").read_text())
    answers = {
        row["key"]: row["answers"]
        for line in read_jsonl(by_ppo.folder / "preference" / "answers.jsonl")
        for row in line["results"]
    }
    assert len(pairs) == len(released) > 4
    for (record, chosen, rejected), theirs in zip(pairs, released, strict=True):
        assert record.video == theirs["video"]
        assert theirs["conversations"][0]["value"] == f"<video>\n{record.prompt[0].content.removeprefix('<video> ')}"
        assert {chosen, rejected} == {theirs["output_1"]["value"], theirs["output_2"]["value"]}
        assert {chosen, rejected} <= set(answers[record.key])


def rows_match(work: Workspace) -> None:
    of_key = {record.key: record for record in work.records("test")}
    rows = read_run(work.folder).rows
    assert len({row["key"] for row in rows}) == 8
    for row in rows:
        record = of_key[row["key"]]
        assert (row["id"], row["video"]) == (record.id, work.name_of(record))
        assert row["prompt"] == record.prompt[0].content.removeprefix("<video> ")


def test_evaluation_and_report_count_videos(by_ppo):
    rows_match(by_ppo)
    run = read_run(by_ppo.folder)
    assert asked(run.rows)[:2] == (4, 8)
    page = (by_ppo.folder / "report.html").read_text()
    assert "8 questions on 4 held-out videos" in page and "8 held-out videos" not in page
    greedy = {(r["key"], r["role"]): r["answer"] for r in run.rows if r["mode"] == "greedy"}
    cards = example_cards(run)
    for card, example in zip(cards, run.examples, strict=True):
        shown = ["".join(text for text, _ in answer.pieces) for answer in card.answers]
        assert shown == [greedy[example.key, "sft"], greedy[example.key, "ppo"]]


def test_the_same_seed_gives_different_questions_different_draws(by_ppo):
    """A key that repeats would draw the same random numbers for both records."""
    assert len({by_ppo.seed("evaluate", r.key, 0) for r in by_ppo.records("test")}) == 8


def test_export_measures_on_the_record_s_own_answers(by_ppo, monkeypatch):
    seen = []
    monkeypatch.setattr(export, "encode_answer", lambda base, opening, text, end: seen.append(text) or [5, 6, 7])
    greedy = {row["key"]: row["answer"] for row in read_jsonl(by_ppo.folder / "evaluate" / "ppo.greedy.jsonl")}
    section = by_ppo.recipe.model
    export._logits(by_ppo, section, None, greedy)
    assert seen == [greedy[record.key] for record in by_ppo.records("test")[: export.PROMPTS]]


def test_compare_pairs_by_record_and_clusters_by_video(by_ppo, shared):
    other = shared("dpo", "method=dpo", "preference.judge=claims", "dpo.rounds=1", "dpo.steps=2", "dpo.batch_size=4")
    rows_match(other)
    keyed = {record.key: record for record in other.records("preference")}
    for row in read_jsonl(other.folder / "dpo" / "round1" / "pairs.jsonl"):
        answers = {
            r["key"]: r["answers"]
            for line in read_jsonl(other.folder / "dpo" / "round1" / "answers.jsonl")
            for r in line["results"]
        }
        assert row["record"] in keyed and {row["chosen"], row["rejected"]} <= set(answers[row["record"]])
    found = compare(by_ppo.folder, other.folder)
    assert found.videos == {"greedy": 4, "sample": 4}


@pytest.mark.parametrize(
    ("feedback", "door", "overrides"),
    [
        ("ranking", (ranking, "judge_claims"), ("ppo.value=none",)),
        ("interventions", (rlif, "read_claims"), ("ppo.value=none", "ppo.baseline=batch", "ppo.whiten_rewards=false")),
    ],
)
def test_feedback_reads_each_answer_with_its_own_record(shared, monkeypatch, feedback, door, overrides):
    """What the judge is asked about has the video, the question and the narrative of one record."""
    heard, judge = [], getattr(*door)
    monkeypatch.setattr(*door, lambda role, items, *rest: heard.extend(items) or judge(role, items, *rest))
    keys = (f"ppo.feedback={feedback}", "ppo.group_size=2", "ppo.judge_context=true", *overrides)
    work = shared(feedback, *keys, "evaluate.roles=[]")
    told = work.narratives()
    asked_of = {
        (work.features(r).features_KD.sum().item(), question_of(r), told[work.name_of(r)]) for r in work.records("rl")
    }
    assert len(asked_of) == 8 and len(heard) == 16  # eight answers in each of two steps
    assert {(item.video.features_KD.sum().item(), item.question, item.context) for item in heard} <= asked_of


def test_answers_that_name_nothing_of_the_narrative_are_counted(by_ppo):
    one, *_ = by_ppo.records("preference")
    told = {by_ppo.name_of(one): "A dog runs to the sea ."}
    pairs = [(one, "The dogs sleep .", "A cat to the left ."), (one, "", "sea")]
    assert outside_narrative(by_ppo, pairs, told) == 0.5 and outside_narrative(by_ppo, pairs, {}) is None
