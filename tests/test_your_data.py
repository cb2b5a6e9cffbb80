"""docs/your_data.md is true: every example is read as the format above it. And what is refused on purpose."""

import json
import re
from pathlib import Path

import pytest

from rlaif_lite import data_report
from rlaif_lite.data import formats
from rlaif_lite.data.readers import count_words, read_records, split_by_answer_length
from rlaif_lite.data.records import Message, Record
from rlaif_lite.errors import DataError

PAGE = (Path(__file__).parent.parent / "docs" / "your_data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"### `([\w-]+)`\n.*?```jsonl\n(.*?)```", PAGE, re.DOTALL))
FILES = dict(re.findall(r"```\w+ (\S+)\n(.*?)```", PAGE, re.DOTALL))


def put(folder, text: str, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder, *objects, name: str = "data.jsonl"):
    return read_records(put(folder, "\n".join(map(json.dumps, objects)), name))


def refused(folder, *objects) -> str:
    with pytest.raises(DataError, match="data.jsonl, record ") as error:
        read(folder, *objects)
    return str(error.value)


def texts_in(value) -> list[str]:
    """Every text of a JSON value that is words for a model: not a name, a path or a tag."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    if isinstance(value, dict):
        names = ("from", "role", "who", "type", "id", "idx", "video", "url", "video_url", "path", "images", "image")
        return [text for key, item in value.items() if key not in names for text in texts_in(item)]
    return []


SAID = ("conversations", "conversation", "messages", "prompt", "completion", "query", "response", "history", "system")
SAID += ("instruction", "input", "output", "problem", "process", "question", "answer", "chosen", "rejected", "options")
SAID += ("rejected_response", "output_1", "output_2", "solution")


def words_of(texts) -> list[str]:
    return sorted(re.sub(r"<(video|image)>", " ", " ".join(texts)).split())


# ---- the page


def test_the_page_has_every_format():
    assert set(EXAMPLES) == {"record", *(format.name for format in formats.FORMATS)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_as_its_format_and_no_word_is_lost_or_gained(tmp_path, name):
    found = read_records(put(tmp_path, EXAMPLES[name]))
    assert found.format == name and len(found.records) == 3
    for line, record in zip(EXAMPLES[name].splitlines(), found.records, strict=True):
        given = [text for key, value in json.loads(line).items() if key in SAID for text in texts_in(value)]
        read = [m.content for m in record.messages]
        pair = [record.chosen or "", record.rejected or ""]
        if name == "trl-preference" and "prompt" not in json.loads(line):  # two conversations share their question
            read *= 2
        if name == "vlm-rlaif-preference":  # the stand-in for the outputs
            given = [text for text in given if text != "-"]
        if name == "sharegpt4video":
            given, read = [line.split('"-1", "content": "')[1].split('"')[0]], read[1:]
        if name == "video-r1" and record.options:
            given += ["Options:"]
        if name == "video-r1" and record.answer is None:
            read += [f"<answer>{record.solution}</answer>"]
        assert words_of(read + pair) == words_of(given), (name, line)
        if record.video is not None:
            videos = record.video if isinstance(record.video, tuple) else (record.video,)
            assert all(Path(video).name in line for video in videos)


def test_the_dataset_info_of_the_page_maps_columns_and_tags(tmp_path):
    for name, text in FILES.items():
        put(tmp_path, text, name)
    found = read_records(tmp_path / "mine.jsonl")
    assert found.format.startswith("sharegpt by ") and found.records[0].chosen == "A man runs."
    assert found.records[2].video == str(tmp_path / "c.mp4") and found.records[2].rejected == "No."
    table = read_records(tmp_path / "pairs.csv")
    assert (table.format, table.records[1].rejected) == ("trl-preference", "A cow, or two.")


# ---- tables


def test_parquet_and_folders_of_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads Parquet, and is an extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads Parquet, and is an extra")
    rows = [json.loads(line) for line in EXAMPLES["trl-messages"].splitlines()[:1]] * 3
    rows.append({"messages": [{"role": "user", "content": "Hello"}], "videos": [], "rejected_response": None})
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "train.parquet")
    expected = read(tmp_path, *rows).records
    same = lambda records: [(r.messages, r.chosen, r.rejected, r.video and Path(r.video).name) for r in records]
    assert same(read_records(tmp_path / "train.parquet").records) == same(expected)

    saved = tmp_path / "saved" / "train"  # as `Dataset.save_to_disk` leaves it
    saved.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    put(saved, '{"features": {}}', "dataset_info.json")
    assert same(read_records(saved).records) == same(expected)
    put(saved.parent, '{"splits": ["train"]}', "dataset_dict.json")
    with pytest.raises(DataError, match="holds the splits train. Name one"):
        read_records(saved.parent)
    (tmp_path / "nothing").mkdir()
    put(tmp_path, "not a table", "bad.parquet")
    with pytest.raises(DataError, match="bad.parquet: it cannot be read as parquet"):
        read_records(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="holds no parquet or arrow file"):
        read_records(saved.parent.parent / "nothing")


@pytest.mark.parametrize(
    "text, says",
    [
        ("a,a\n1,2\n", "names a column twice"),
        ("prompt,video\nq,a.mp4,b.mp4\n", "record 0, line 2: the header has 2 columns"),
        ("prompt,videos\nq,\"['a.mp4']\"\n", "the cell `videos` begins as a list but is not JSON"),
        ('prompt,video\n"q,a.mp4\n', "it is not CSV"),
        ("video,question,answer,a0,a1\nv,why,0,rain,kite\n", "`a0` holds options"),
        ("x,y\n1,2\n", "fit no format. Known: record, .*See docs/your_data.md"),
    ],
)
def test_a_csv_that_is_not_understood(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        read_records(put(tmp_path, text, "data.csv"))


# ---- what is refused, and how it is said

Q, A = {"role": "user", "content": "<video>q"}, {"role": "assistant", "content": "a"}
M = {"messages": [Q, A], "videos": ["a.mp4"]}


@pytest.mark.parametrize(
    "found, says",
    [
        ({**M, "label": False}, "`label` is False: the answer is not one to learn from"),
        ({**M, "label": 0}, "`label` is 0"),
        (
            {**M, "videos": ["a.mp4", "b.mp4"]},
            "`videos` has 2 entries; a record has one video. Make one record of each",
        ),
        ({**M, "image": "b.jpg"}, "it has `videos` .* and `image` .*; a record has one video"),
        ({**M, "start": 1.0}, "`start` is 1.0, .*cut the part out"),
        ({**M, "audios": ["a.wav"]}, "`audios` is given, but no model here hears"),
        ({**M, "tools": [{"name": "x"}]}, "`tools` is given"),
        ({**M, "vidoes": "a.mp4"}, "unknown key `vidoes`; did you mean `videos`"),
        ({"messages": M["messages"], "videos": ["https://x.org/a.mp4"]}, "a link and not a path. Download it"),
        ({"messages": M["messages"], "videos": [{"bytes": "AAAA", "path": None}]}, "holds the file's bytes"),
        ({"messages": [{"role": "user", "content": "<audio>q"}, A]}, "`<audio>` is in the text"),
        ({"messages": [{"role": ["user"], "content": "q"}, A]}, r"turn 0 is from \['user'\]"),
        ({"messages": [{"role": "tool", "content": "q"}, A]}, "turn 0 is from 'tool'"),
        ({"messages": [Q, {**A, "loss": False}], "videos": ["a"]}, "turn 1 has `loss`: False"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, A]}, "a text part without its text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, A]},
            "expected the type text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a", "video_start": 1}]}, A]},
            "a video part with `video_start`, .*cut the part out",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}] * 2}, A]},
            "its content has 2 entries",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}, A], "video": "b"},
            "its content names 'a' and `video` names 'b'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}, A]}, "half of a character"),
        ({"conversations": [{"from": "human", "value": "q", "content": "r"}]}, "both `value` and `content`"),
        ({"conversations": [{"from": "human", "value": "q"}], "length_bonus": float("nan")}, "`length_bonus` is nan"),
        (
            {"conversations": [{"from": "human", "value": "<image><image>"}], "image": ["a", "b"]},
            "`image` has 2 entries",
        ),
        ({"conversations": [{"from": "human", "value": "<image>\nq"}], "video": "a\0b"}, "a NUL character"),
        ({"chosen": [Q, A], "rejected": [{"role": "user", "content": "<video>r"}, A], "video": "a"}, "differ before"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, A], "video": "a"}, "`prompt` is not what `chosen`"),
        ({"query": "q", "response": "a", "history": [["q"]]}, r"`history` round 0 is \['q'\]"),
        ({"instruction": "q", "output": ["a", "b"]}, "`output` is .*expected a text"),
        ({"text": "a book"}, "fit no format"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path, found, says):
    assert re.search(says, refused(tmp_path, found), re.DOTALL)


def test_a_single_file_in_a_list_and_an_empty_picture(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    one, none, picture = read(
        tmp_path,
        {"video": ["a.mp4"], "conversations": turns},
        {"image": "", "conversations": turns},
        {"image": "p.jpg", "conversations": turns},
    ).records
    assert (one.video, none.video) == (str(tmp_path / "a.mp4"), None) and picture.video == (str(tmp_path / "p.jpg"),)


def test_messages_with_an_id_and_a_column_more(tmp_path):
    found = read(tmp_path, {"id": "1", "video": "a.mp4", "duration": 3.2, "messages": [Q, A]})
    assert found.format == "trl-messages" and found.ignored == ("duration",) and found.records[0].answer == "a"


@pytest.mark.parametrize(
    "text, says",
    [
        ('[{"prompt": "a"}][{"prompt": "b"}]', "goes on after its list ended with record 0"),
        ('[{"prompt": "a"}] x', "goes on after its list"),
        ('{"prompt": "a", "prompt": "b"}', "record 0: the key `prompt` is there twice"),
        ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "record 0: .*digits"),
    ],
)
def test_damaged_json_is_refused(tmp_path, text, says):
    with pytest.raises(DataError, match=says):
        read_records(put(tmp_path, text))


# ---- words


@pytest.mark.parametrize(
    "text, words",
    [
        ("red . left .", 4),
        ("你好，世界。", 4),
        ("hello你好 world", 4),
        ("Привет, мир", 2),
        ("สวัสดี", 4),
        ("한국어 문장", 2),
        ("", 0),
    ],
)
def test_words_of_any_script(text, words):
    assert count_words(text) == words


def test_a_conversation_is_as_hard_as_its_longest_trained_answer():
    turns = [Message("user", "q"), Message("assistant", "long " * 9), Message("user", "q"), Message("assistant", "no")]
    talk = Record("x", None, tuple(turns))
    chinese = Record("y", None, (Message("user", "q"), Message("assistant", "这个视频里有一个人在街上跑步")))
    assert split_by_answer_length([talk, chinese], 5) == ([], [talk, chinese])
    assert split_by_answer_length([talk], 5, train_on="last") == ([talk], [])


# ---- the command


def test_the_report_says_what_a_file_is(tmp_path, checkpoint):
    path = put(tmp_path, EXAMPLES["llava"])
    said = data_report.report_on([path], None, None, None)
    assert "llava, 3 records" in said and "answer, words: median 2" in said and "keys left out: data_source" in said
    assert "2 records miss their video" in said and "assistant: «A man runs.»" in said

    turns = [("human", "what is the colour first ?"), ("gpt", "red ."), ("human", "shape ?"), ("gpt", "cross .")]
    talk = {"video": "a.mp4", "conversations": [{"from": who, "value": text} for who, text in turns]}
    path = put(tmp_path, json.dumps(talk), "talk.jsonl")
    said = data_report.report_on([path], None, str(checkpoint), None)
    assert "<s><video: 200 tokens>" in said and "<ans>«red . </s>»shape ? <ans>«cross . </s>»" in said
    assert "refused" not in said
    talk["conversations"][-1]["value"] = "a dog"
    said = data_report.report_on([put(tmp_path, json.dumps(talk), "talk.jsonl")], None, str(checkpoint), None)
    assert "unknown to the base or special" in said and "talk.jsonl#0: <unk> in 'a dog'" in said


def test_answers_and_lengths_are_checked_before_training(recipe, tmp_path):
    """In the data stage, with the record; the plan refuses the length too."""
    from rlaif_lite import pipeline
    from rlaif_lite.errors import StageError
    from rlaif_lite.stages import data
    from rlaif_lite.workspace import Workspace

    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "a <pad> dog ."}]
    path = put(tmp_path, json.dumps({"id": "0", "messages": turns}), "own.jsonl")
    work = Workspace(recipe(f"data.sft_easy=[{path}]"))
    with pytest.raises(DataError, match=r"data.sft_easy: 2 of 4 tokens .*\n  own.jsonl#0: <pad>, <unk> in"):
        data.run(work)
    long = recipe("features.frames=200")
    plan = pipeline.make_plan(long)
    assert not plan.fits and "positions (800 of its video" in plan.too_long[0]
    with pytest.raises(StageError, match="max_position_embeddings"):
        pipeline.run(long)


EMPTY = [f"data.{name}=[]" for name in ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")]


def test_a_picture_is_one_frame_and_a_list_of_frames_is_sampled(recipe, tmp_path):
    from rlaif_lite.stages.features import views_of
    from rlaif_lite.workspace import Workspace

    for name in ("p.jpg", "0.jpg", "1.jpg"):
        (tmp_path / name).touch()
    turns = [{"from": "human", "value": "q"}]
    rows = [{"image": "p.jpg", "conversations": turns}, {"video": ["0.jpg", "1.jpg"], "conversations": turns}]
    path = put(tmp_path, "\n".join(map(json.dumps, rows)))
    work = Workspace(recipe(*EMPTY, f"data.test=[{path}]"))
    assert [views["video"].count for _, views in views_of(work).values()] == [1, work.recipe.features.frames]


def test_an_empty_half_of_the_curriculum_is_said_with_the_number_to_change(recipe, tmp_path):
    from rlaif_lite.workspace import Workspace

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a short one"}]
    path = put(tmp_path, json.dumps({"messages": turns}))
    work = Workspace(recipe(*EMPTY, f"data.sft=[{path}]"))
    with pytest.raises(DataError, match="no record is for sft.hard, .*`data.max_easy_words: 20`.*`sft.hard: null`"):
        work.records("sft_easy")
