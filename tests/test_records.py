"""Readers on a fixture of every format, what they say about malformed data, and that a prompt never loses its video."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_lite.data.readers import read_records, split_by_answer_length, with_videos
from rlaif_lite.data.records import Message, Record, from_json, to_json
from rlaif_lite.errors import DataError

FRAMES = ["v_abc/frame_00.jpg", "v_abc/frame_01.jpg"]
ASKED = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "A man runs."}]
ASKED_BY_ROLE = [{"role": "human", "value": "<image>\nWhat happens?"}, {"role": "gpt", "value": "A man runs."}]
QUESTION = "<video>\nWhat happens?"


def write(folder, *objects, name="data.json"):
    """The objects as a file: a list for .json, lines for .jsonl."""
    path = folder / name
    lines = [json.dumps(found) for found in objects]
    path.write_text("\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]")
    return path


def read_one(folder, found, **options):
    read = read_records(write(folder, found), **options)
    assert len(read.records) == 1
    return read.format, read.records[0]


# ---- formats


@pytest.mark.parametrize("conversations", [ASKED, ASKED_BY_ROLE])
def test_released_sft(tmp_path, conversations):
    found = {"id": "7", "src_data": "vidchatgpt", "conversations": conversations, "images": FRAMES}
    format, record = read_one(tmp_path, found, video_root="/videos")
    assert format == "vlm-rlaif-sft" and record.id == "7" and record.source == "data.json#0"
    assert record.video == ("/videos/v_abc/frame_00.jpg", "/videos/v_abc/frame_01.jpg")
    assert record.prompt == (Message("user", QUESTION),) and record.answer == "A man runs."


@pytest.mark.parametrize("preference, better", [(1, "He runs."), (2, "He sits."), ("1", "He runs."), ("2", "He sits.")])
def test_released_preference(tmp_path, preference, better):
    outputs = {"output_1": {"from": "gpt", "value": "He runs."}, "output_2": {"from": "gpt", "value": "He sits."}}
    found = {"id": 3, "conversations": ASKED, "images": FRAMES, **outputs, "preference": preference}
    format, record = read_one(tmp_path, found)
    assert format == "vlm-rlaif-preference" and {record.chosen, record.rejected} == {"He runs.", "He sits."}
    assert record.chosen == better and record.messages == record.prompt == (Message("user", QUESTION),)


@pytest.mark.parametrize("speaker", ["from", "role"])
@pytest.mark.parametrize("name", ["SFT_short", "SFT_long", "PPO_init", "RM_13b_v1_dataset_39k", "RL_data"])
def test_the_five_released_files_load_in_both_spellings(tmp_path, name, speaker):
    """Fifty frames a video below `videos/`, several turns, the mark behind the question as in half of LLaVA's data."""
    turns = ["What happens?\n<image>", "A man runs.", "And then?", "He sits."]
    found = {"images": [f"anet_vidchatgpt_50frames/v_a/{i:02d}.jpg" for i in range(50)], "src_data": "anet"}
    found["conversations"] = [{speaker: ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    found |= {"uid": 7, "caption_type": 1, "length_bonus": 1.0} if name == "RL_data" else {"id": "7"}
    if name.startswith("RM"):
        first, second = ({speaker: "gpt", "value": text} for text in ("He sits down.", "No."))
        found |= {"output_1": first, "output_2": second, "preference": 2}
    path = write(tmp_path, found, {**found, "id": "8"} if "id" in found else {**found, "uid": 8}, name=f"{name}.json")
    read = read_records(path, video_root="/videos")
    record = read.records[0]
    assert [r.id for r in read.records] == ["7", "8"] and len(record.video) == 50
    assert record.video[49] == "/videos/anet_vidchatgpt_50frames/v_a/49.jpg"
    assert record.prompt[0] == Message("user", QUESTION)
    rest = [Message("assistant", "A man runs."), Message("user", "And then?")]
    if name == "RL_data":
        assert read.format == "vlm-rlaif-rl" and record.prompt == (Message("user", QUESTION),)
    elif name.startswith("RM"):
        assert read.format == "vlm-rlaif-preference" and list(record.messages) == [Message("user", QUESTION), *rest]
        assert (record.chosen, record.rejected) == ("No.", "He sits down.")
    else:
        assert read.format == "vlm-rlaif-sft" and record.answer == "He sits."
        assert list(record.prompt) == [Message("user", QUESTION), *rest]


def test_released_rl_uses_the_first_two_turns(tmp_path):
    more = [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "He sits."}]
    format, record = read_one(tmp_path, {"uid": 12, "images": FRAMES, "conversations": ASKED + more, "caption_type": 3})
    assert format == "vlm-rlaif-rl" and record.id == "12" and record.prompt == (Message("user", QUESTION),)
    assert (record.caption_type, record.length_bonus, record.captions) == (3, None, ())


def test_what_llava_rlhf_knows_of_a_record(tmp_path):
    known = {"caption_type": 6, "length_bonus": 0.5, "captions": ["A man runs.", "It rains."]}
    _, record = read_one(tmp_path, {"uid": 1, "images": FRAMES, "conversations": ASKED, **known})
    assert (record.caption_type, record.length_bonus) == (6, 0.5) and record.captions == ("A man runs.", "It rains.")
    again = from_json(to_json(record), "again")
    assert replace(again, source=record.source) == record
    for key, value in (("caption_type", "6"), ("length_bonus", True), ("captions", "A man."), ("captions", [1])):
        with pytest.raises(DataError, match=f"`{key}` is"):
            read_one(tmp_path, {"uid": 1, "images": FRAMES, "conversations": ASKED, key: value})


def test_llava(tmp_path):
    format, record = read_one(tmp_path, {"id": "a", "video": "a.mp4", "conversations": ASKED})
    assert format == "llava" and record.video == str(tmp_path / "a.mp4") and record.prompt[0].content == QUESTION
    _, still = read_one(tmp_path, {"id": "a", "image": "a.jpg", "conversations": ASKED}, video_root="/r")
    assert still.video == ("/r/a.jpg",)
    _, text = read_one(tmp_path, {"id": "a", "conversations": [{"from": "human", "value": "Hi"}, ASKED[1]]})
    assert text.video is None and text.prompt == (Message("user", "Hi"),)


def test_a_missing_mark_is_set_before_the_first_question(tmp_path):
    turns = [{"from": "human", "value": "What happens?"}, ASKED[1]]
    assert read_one(tmp_path, {"id": "a", "video": "a.mp4", "conversations": turns})[1].prompt[0].content == QUESTION


def test_sharegpt(tmp_path):
    turns = [{"from": "human", "value": "<video>What happens?"}]
    found = {"conversations": turns, "videos": ["a.mp4"], "system": "Be brief."}
    found |= {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "no"}}
    format, record = read_one(tmp_path, found)
    assert format == "sharegpt" and (record.chosen, record.rejected) == ("yes", "no")
    assert record.prompt == (Message("system", "Be brief."), Message("user", "<video>What happens?"))


def test_trl_messages(tmp_path):
    parts = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "He runs."}]}
    found = {"messages": [{"role": "user", "content": parts}, answer], "videos": ["a.mp4"]}
    format, record = read_one(tmp_path, found)
    assert format == "trl-messages" and record.answer == "He runs."
    assert record.prompt[0].content == "<video>What happens?"


def test_trl_preference_as_texts_and_as_messages(tmp_path):
    format, record = read_one(tmp_path, {"prompt": "Sky?", "chosen": "blue", "rejected": "green"})
    assert format == "trl-preference" and record.prompt == (Message("user", "Sky?"),) and record.chosen == "blue"
    turn = {"role": "assistant", "content": "blue"}, {"role": "assistant", "content": "green"}
    found = {"prompt": [{"role": "user", "content": "Sky?"}], "chosen": [turn[0]], "rejected": [turn[1]]}
    _, record = read_one(tmp_path, {**found, "video": "a.mp4"})
    assert (record.chosen, record.rejected) == ("blue", "green") and record.prompt[0].content == "<video>\nSky?"


def test_trl_prompt_and_completion(tmp_path):
    format, record = read_one(tmp_path, {"prompt": "Sky?", "completion": "blue"})
    assert format == "trl-prompt" and record.answer == "blue"


def test_our_own_records_survive_writing_and_reading(tmp_path):
    turns = (Message("system", "s"), Message("user", "<video> q"), Message("assistant", "a red one ."))
    records = [
        Record("0", "/v/a.mp4", turns, clip=2, clips=4, verdicts=((5, "yes"), (11, "-")), facts={"star": None, "n": 3}),
        Record("1", ("/v/0.jpg", "/v/1.jpg"), turns[:2], chosen="x", rejected="y"),
        Record("2", None, (Message("user", "q"),)),
    ]
    read = read_records(write(tmp_path, *map(to_json, records), name="data.jsonl"))
    assert read.format == "record"
    assert [to_json(record) for record in read.records] == [to_json(record) for record in records]
    assert read.records[0].verdicts == records[0].verdicts and read.records[1].video == records[1].video
    assert read.records[2].source == "data.jsonl#2"


def test_the_prompt_ends_with_the_last_question():
    turns = tuple(Message(role, str(i)) for i, role in enumerate(["user", "assistant", "user"]))
    assert Record("", None, turns).prompt == turns and Record("", None, turns).answer is None
    assert Record("", None, turns[:2]).prompt == turns[:1] and Record("", None, turns[:2]).answer == "1"


# ---- what is wrong, and where

GOOD = {"id": "0", "conversations": ASKED, "images": FRAMES}
BOTH = {"output_1": {"from": "gpt", "value": "x"}, "output_2": {"from": "gpt", "value": "y"}}


@pytest.mark.parametrize(
    "good, bad, says",
    [
        (GOOD, {**GOOD, "images": []}, "`images` is not a list of frame paths"),
        (GOOD, {**GOOD, "conversations": []}, "`conversations` is \\[\\], expected a list of turns"),
        (GOOD, {**GOOD, "conversations": [{"from": "bot", "value": "x"}]}, "turn 0 is from 'bot'"),
        (GOOD, {**GOOD, "conversations": [{"from": "human"}]}, "turn 0 has no text"),
        (GOOD, {**GOOD, "conversations": [ASKED[0], ASKED[0]]}, "turn 1 .* is from the user, expected the assistant"),
        (GOOD, {**GOOD, "conversations": ASKED[1:]}, "is from the assistant, expected the user"),
        (GOOD, {**GOOD, "conversations": [{"from": "human", "value": "<image><image>"}]}, "2 <video> in the text"),
        (GOOD, {"id": "1", "conversations": ASKED, "video": "a.mp4"}, "looks like llava, .* vlm-rlaif-sft"),
        (GOOD, {"ID": "1"}, "fit no format"),
        (GOOD, ["x"], "expected an object, found list"),
        ({**GOOD, **BOTH, "preference": 1}, {**GOOD, **BOTH, "preference": 3}, "`preference` is 3, expected 1 or 2"),
        ({**GOOD, **BOTH, "preference": 1}, {**GOOD, **BOTH}, "`preference` is missing"),
        ({**GOOD, **BOTH, "preference": 1}, {**GOOD, **BOTH, "output_2": 5, "preference": 1}, "`output_2` is 5"),
        ({"conversations": ASKED, "videos": ["a"]}, {"conversations": ASKED, "videos": ["a", "b"]}, "has 2 entries"),
        ({"conversations": ASKED, "video": "a"}, {"conversations": ASKED}, "the record has no video"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_index(tmp_path, good, bad, says):
    path = write(tmp_path, good, good, bad)
    with pytest.raises(DataError, match=f"data.json, record 2: .*{says}"):
        read_records(path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"vido": "a"}, "unknown key `vido`; did you mean `video`"),
        ({"clip": "2"}, "`clip` is '2', expected a clip number"),
        ({"clip": True}, "`clip` is True"),
        ({"clip": -1}, "numbered from 0"),
        ({"clip": 3, "clips": 3}, "`clips` is 3, so `clip` is a number below that; it is 3"),
        ({"clips": 3}, "it is None"),
        ({"verdicts": [[99, "yes"]]}, "a verdict ends at character 99"),
        ({"verdicts": [3]}, "verdicts \\[offset, word\\]"),
        ({"chosen": "x"}, "`chosen` and `rejected` come together"),
        ({"messages": [{"role": "user", "content": "no mark"}]}, "0 <video> in the text"),
        ({"messages": []}, "no user turn"),
        ({"video": 3}, "`video` is 3"),
        ({"video": []}, "its video is empty"),
    ],
)
def test_our_own_records_are_checked_strictly(change, says):
    good = {"id": "1", "video": "a.mp4", "messages": [{"role": "user", "content": "<video> q"}]}
    from_json(good, "f#0")
    with pytest.raises(DataError, match=f"f#0: .*{says}"):
        from_json({**good, **change}, "f#0")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "holds no records"),
        ("[]", "holds no records"),
        ('[{"id": 1', "record 0, line 1: it is not JSON"),
        ("not json", "record 0, line 1: it is not JSON"),
    ],
)
def test_files_that_are_not_data(tmp_path, text, says):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_records(path)


def test_a_file_cut_short_is_said(tmp_path):
    path = write(tmp_path, GOOD, GOOD)
    for keep in (-1, -3, len(json.dumps(GOOD)) + 1, len(json.dumps(GOOD)) + 3):
        cut = tmp_path / "cut.json"
        cut.write_text(path.read_text()[:keep])
        with pytest.raises(DataError, match="cut.json.*(cut short|not JSON)"):
            read_records(cut)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / "none.json")


# ---- videos


def test_names_of_videos_are_looked_up(tmp_path):
    root = tmp_path / "videos"
    (root / "v_one").mkdir(parents=True)
    (root / "v_one" / "0.jpg").touch()
    for name in ("two.mp4", "v_three.webm", "four.mkv", "v_five.avi"):
        (root / name).touch()
    (tmp_path / "beside.mp4").touch()
    expected = {
        "v_one": "videos/v_one",
        "one": "videos/v_one",
        "one.mp4": "videos/v_one",
        "two": "videos/two.mp4",
        "v_two": "videos/two.mp4",
        "three": "videos/v_three.webm",
        "four": "videos/four.mkv",
        "v_five": "videos/v_five.avi",
        "five.mp4": "videos/v_five.avi",
        "beside.mp4": "beside.mp4",
        "gone": "videos/gone",
    }
    path = write(tmp_path, *({"id": name, "video": name, "conversations": ASKED} for name in expected))
    records = read_records(path, video_root=root).records
    assert {record.id: record.video for record in records} == {k: str(tmp_path / v) for k, v in expected.items()}
    assert [record.id for record in with_videos(records)[1]] == ["gone"]


def test_a_video_with_a_missing_frame_or_an_empty_folder_is_missing(tmp_path):
    for name in ("a", "b", "empty"):
        (tmp_path / name).mkdir()
    for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg"):
        (tmp_path / name).touch()
    turns = (Message("user", "<video>"),)
    whole = Record("whole", (f"{tmp_path}/a/0.jpg", f"{tmp_path}/a/1.jpg"), turns)
    broken = Record("broken", (f"{tmp_path}/b/0.jpg", f"{tmp_path}/b/1.jpg"), turns)
    folder, empty = Record("folder", f"{tmp_path}/a/", turns), Record("empty", f"{tmp_path}/empty", turns)
    text = Record("text", None, (Message("user", "q"),))
    assert with_videos([whole, broken, folder, empty, text]) == ([whole, folder, text], [broken, empty])


def test_equal_frame_lists_are_one_object(tmp_path):
    records = read_records(write(tmp_path, GOOD, GOOD)).records
    assert records[0].video is records[1].video


# ---- curriculum and filtering


def test_split_by_answer_length(tmp_path):
    def record(words):
        return Record(str(words), None, (Message("user", "q"), Message("assistant", "w " * words)))

    easy, hard = split_by_answer_length([record(n) for n in (1, 5, 20, 21, 3, 200)], max_easy_words=20)
    assert [r.id for r in easy] == ["1", "5", "20", "3"] and [r.id for r in hard] == ["21", "200"]
    with pytest.raises(DataError, match="f#9: it has no answer"):
        split_by_answer_length([Record("", None, (Message("user", "q"),), source="f#9")], 20)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(1, 40)), min_size=1, max_size=25))
def test_no_filter_parts_a_prompt_from_its_video(tmp_path_factory, rows):
    """The release's worst bug: over-long prompts were dropped from one list and not from the other."""
    folder = tmp_path_factory.mktemp("aligned")
    released = []
    for i, (video, exists, words) in enumerate(rows):
        name = f"v{video}_{'there' if exists else 'gone'}"
        if exists:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "0.jpg").touch()
        # the prompt and the answer both tell which video and which row they belong to
        turns = [f"<image>\n{name} row{i} " + "long " * words, f"{name} row{i} " + "word " * words]
        turns = [{"from": role, "value": text} for role, text in zip(("human", "gpt"), turns, strict=True)]
        released.append({"uid": i, "images": [f"{name}/0.jpg"], "conversations": turns})
    kept, missing = with_videos(read_records(write(folder, *released)).records)
    short = [record for record in kept if len(record.prompt[0].content.split()) <= 25]
    easy, hard = split_by_answer_length(short, max_easy_words=10)
    expected = [i for i, (_, exists, words) in enumerate(rows) if exists and 3 + words <= 25]
    assert sorted(int(record.id) for record in easy + hard) == expected
    assert len(missing) == sum(not exists for _, exists, _ in rows)
    for record in easy + hard + missing:
        name = record.video[0].split("/")[-2]
        assert f"{name} row{record.id} " in record.prompt[0].content
        assert record.answer.startswith(f"{name} row{record.id} ")
        assert record.source == f"data.json#{record.id}"
