"""Video files as people have them, and long runs that meet bad ones: every bad video is named, all others get done."""

import json
import multiprocessing
import os
import shutil
import signal
import struct
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from core import small_recipe
from rlaif_lite.errors import DataError, VideoError
from rlaif_lite.stages import features
from rlaif_lite.video import workers
from rlaif_lite.video.decode import View, decode, probe
from rlaif_lite.video.workers import decode_all
from rlaif_lite.workspace import Workspace
from test_video import CLOSED, OPEN, assert_pyav_is_right, make, number_of, numbered, numbers, stream_copy

TURNED = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}  # quarter turns clockwise -> the header's matrix


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames, six seconds, a key frame every twelve."""
    return make(tmp_path_factory.mktemp("video") / "clip.mp4")


def with_sound(path, codec: str, options: dict, sound_codec: str, seconds: float):
    """60 numbered frames in six seconds, beside `seconds` of noise."""
    noise = np.random.default_rng(0).normal(0, 0.1, (round(seconds * 50), 1, 960)).astype(np.float32)
    with av.open(str(path), "w") as out:
        video, sound = out.add_stream(codec, rate=10, options=options), out.add_stream(sound_codec, rate=48000)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for i in range(max(60, len(noise) // 5)):
            if i < 60:
                out.mux(video.encode(av.VideoFrame.from_ndarray(numbered(i), format="rgb24")))
            for k in range(5 * i, min(5 * i + 5, len(noise))):
                frame = av.AudioFrame.from_ndarray(noise[k], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, 960 * k, Fraction(1, 48000)
                out.mux(sound.encode(frame))
        out.mux(video.encode())
        out.mux(sound.encode())
    return path


# ---- kinds of files


@pytest.mark.parametrize(
    "name, codec, options, sound",
    [("a.mkv", "libx264", CLOSED, "aac"), ("a.webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}, "libopus")],
)
def test_a_film_with_sound_is_whole_or_cut_short(tmp_path, name, codec, options, sound):
    """Matroska's header speaks of the longest stream, and that may be the sound."""
    for seconds in (9.0, 4.0):
        path = with_sound(tmp_path / name, codec, options, sound, seconds)
        frames = decode(path, count=6)
        assert numbers(frames) == [5, 15, 25, 35, 45, 55] and frames.duration == pytest.approx(6.0, abs=0.02)
    for share in (0.3, 0.9):
        (tmp_path / "cut").write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(VideoError, match="cut: it is cut short; it should last 6.0"):
            decode(tmp_path / "cut", count=6)


def test_a_fragmented_file(tmp_path):
    path = make(tmp_path / "a.mp4", container_options={"movflags": "frag_keyframe+empty_moov"})
    assert numbers(decode(path, count=6)) == [5, 15, 25, 35, 45, 55]
    path.write_bytes(path.read_bytes()[: int(0.9 * path.stat().st_size)])
    with pytest.raises(VideoError, match="a.mp4: it is cut short"):
        decode(path, count=6)


@pytest.mark.parametrize("codec, options", [("libx264", CLOSED), ("mpeg4", {"g": "12"}), ("mpeg2video", {"g": "12"})])
def test_a_broadcast_that_begins_between_key_frames(tmp_path, codec, options):
    """What lacks the frames it was predicted from is left out; MPEG-4's decoder gives it, grey, without error."""
    path = make(tmp_path / "a.ts", codec=codec, options=options)
    path.write_bytes(path.read_bytes()[20 * 188 :])
    left = probe(path).frames
    assert left < 60 and left % 12 == 0
    assert_pyav_is_right(path, list(range(60 - left, 60)), "mpegts")


def test_a_cut_that_begins_between_key_frames(tmp_path):
    path = tmp_path / "a.mkv"
    with (
        av.open(str(make(tmp_path / "b.mkv", codec="mpeg4", options={"g": "12"}))) as given,
        av.open(str(path), "w") as out,
    ):
        copied = out.add_stream_from_template(given.streams.video[0])
        for packet in list(given.demux(video=0))[5:-1]:
            packet.stream = copied
            out.mux(packet)
    assert_pyav_is_right(path, list(range(12, 60)), "it begins between two key frames, 7 frames of it")


def test_times_rise_where_the_container_has_none(tmp_path):
    """AVI keeps no presentation times: the decoder's go back and forth with B-frames."""
    path = make(tmp_path / "a.avi")
    with av.open(str(path)) as container:
        assert (np.diff([frame.time for frame in container.decode(video=0)]) < 0).any()
    assert_pyav_is_right(path, list(range(60)), "decord's timestamps are not the container's")


def test_variable_frame_rate_in_order(tmp_path):
    times = np.cumsum([0] + [0.04] * 30 + [0.5] * 9)
    frames = decode(make(tmp_path / "a.mp4", 40, options=OPEN, times=times), count=8)
    assert numbers(frames) == [2, 7, 12, 17, 22, 27, 32, 37] and frames.source == "pyav"
    assert np.allclose(frames.time_T, times[[2, 7, 12, 17, 22, 27, 32, 37]], atol=2e-3)


@pytest.mark.parametrize("turns", TURNED)
def test_both_decoders_turn_a_film_upright(clip, tmp_path, turns):
    found = []
    for path in (clip, stream_copy(clip, tmp_path / "cut.mp4", 1.7)):
        data = bytearray(path.read_bytes())
        a, b, c, d = (number << 16 for number in TURNED[turns])
        matrix = data.find(b"tkhd") + 44
        data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 64 << 16, 64 << 16, 1 << 30)
        (tmp_path / "turned.mp4").write_bytes(data)
        found.append(decode(tmp_path / "turned.mp4", count=3, size=(64, 32)))
    assert [frames.source for frames in found] == ["decord", "pyav"]
    for frames, expected in zip(found, ([10, 30, 50], [24, 38, 52]), strict=True):
        assert [number_of(np.rot90(rgb_HWC, turns)) for rgb_HWC in frames.rgb_THWC] == expected


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="this build of PyAV cannot write AV1")
def test_a_codec_newer_than_decord(tmp_path):
    assert_pyav_is_right(
        make(tmp_path / "a.mp4", codec="libsvtav1", options={"preset": "12"}), list(range(60)), "decord: "
    )


# ---- worker processes


@pytest.fixture
def stuck(tmp_path):
    """A folder of frames whose only frame is a pipe: opening it takes until somebody writes into it."""
    folder = tmp_path / "stuck"
    folder.mkdir()
    os.mkfifo(folder / "0.png")
    return folder


VIEW = {"v": View(3)}


def test_a_decoder_that_never_comes_back_is_stopped(clip, stuck, tmp_path):
    wanted = {"bad": (str(stuck), VIEW), **{f"good{i}": (str(clip), VIEW) for i in range(3)}}
    wanted["empty"] = (str(tmp_path / "empty.mp4"), VIEW)
    (tmp_path / "empty.mp4").touch()
    found = dict(decode_all(wanted, workers=2, size=(32, 32), limit_s=4.0))
    assert "bad: the decoder was stopped, it was not done after 4 s" in str(found.pop("bad"))
    assert "the file is empty" in str(found.pop("empty"))
    assert sorted(found) == ["good0", "good1", "good2"]
    assert all(numbers(frames["v"]) == [10, 30, 50] for frames in found.values())
    assert not multiprocessing.active_children()


def test_a_crash_costs_one_video(clip, stuck):
    def crash():
        with open(stuck / "0.png", "wb"):  # opens once a process reads
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGSEGV)

    threading.Thread(target=crash, daemon=True).start()
    wanted = {"good0": (str(clip), VIEW), "bad": (str(stuck), VIEW), "good1": (str(clip), VIEW)}
    found = decode_all(wanted, workers=1, size=None)
    assert [(name, isinstance(what, VideoError)) for name, what in found] == [
        ("good0", False),
        ("bad", True),
        ("good1", False),
    ]


def test_what_no_reader_thought_of_is_the_videos_error():
    ((_, found),) = decode_all({"bad": ("a.mp4", {"v": View(3, 0, "2")})}, workers=0, size=None)
    assert isinstance(found, VideoError) and "bad: it cannot be decoded (TypeError: " in str(found)


def test_processes_that_cannot_start_are_said(clip, monkeypatch):
    monkeypatch.setattr(workers, "_serve", os.abort)  # takes no argument
    with pytest.raises(RuntimeError, match=r"ended as it began \(exit code 1\). `features.workers: 0` needs none"):
        list(decode_all({"good": (str(clip), VIEW)}, workers=1, size=None))


# ---- the features stage


@pytest.fixture
def made(checkpoint, world, tmp_path):
    """made(*overrides) -> a run's workspace on a copy of the world, the copy's folder of rl videos."""
    shutil.copytree(world, tmp_path / "world")
    names = ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")
    files = [f"data.{name}=[{tmp_path / 'world' / name}.jsonl]" for name in names]

    def make_run(*overrides: str) -> tuple[Workspace, Path]:
        recipe = small_recipe(checkpoint, tmp_path, "data.world=null", *files, *overrides)
        return Workspace(recipe), tmp_path / "world" / "videos" / "rl"

    return make_run


def spoil(videos: Path, monkeypatch) -> dict[str, str]:
    """Five videos that cannot be used, each in its own way: its name -> the reason. One more has to go to PyAV."""
    (videos / "00000.mp4").unlink()
    (videos / "00000.mp4").symlink_to("gone.mp4")
    (videos / "00001.mp4").write_bytes(b"")
    (videos / "00002.mp4").write_text("no video at all")
    make(videos / "00005.mp4", options=OPEN)
    of_tower = {frames_of(videos / f"0000{i}.mp4"): i for i in (3, 4)}
    encode = features.encode

    def failing(base, frames, chain):
        found, which = encode(base, frames, chain), of_tower.get(frames["video"].rgb_THWC.tobytes())
        if which == 3:
            raise torch.OutOfMemoryError("out of memory")
        return {n: v._replace(features_KD=v.features_KD / 0) for n, v in found.items()} if which == 4 else found

    monkeypatch.setattr(features, "encode", failing)
    reasons = (
        "it cannot be read",
        "the file is empty",
        "it is not a video",
        "the vision tower failed on it (out of memory)",
        "the vision tower failed on it (its features are not all finite)",
    )
    return {f"{i:05d}": reason for i, reason in enumerate(reasons)}


def frames_of(path: Path) -> bytes:
    """What tells a video of the world from the others: the frames that the stage decodes."""
    return decode(path, count=6, size=(32, 32)).rgb_THWC.tobytes()


def test_every_bad_video_is_listed_and_all_others_are_done(made, monkeypatch, capsys):
    work, videos = made()
    reasons = spoil(videos, monkeypatch)
    with pytest.raises(DataError, match="5 of 32 videos cannot be decoded or encoded") as error:
        features.run(work)
    listed = json.loads((work.folder / "features" / "quarantine.json").read_text())
    assert len(listed) == 5 and all(reason in str(error.value) for reason in reasons.values())
    for (name, reason), (video, why) in zip(reasons.items(), listed.items(), strict=True):
        assert video.endswith(f"rl/{name}.mp4") and reason in why
    said = [line for line in capsys.readouterr().err.splitlines() if "PyAV" in line]
    assert len(said) == 1 and "1 of 31 videos" in said[0] and "rl/00005.mp4: it has open groups of pictures" in said[0]
    assert len(list((work.folder / "features" / "cache").glob("*.safetensors"))) == 27

    monkeypatch.undo()  # the tower works again
    summary = features.run(made("data.on_missing=skip")[0])
    assert (summary["videos"], summary["unreadable"]) == (29, 3)


def test_a_tower_that_fails_on_everything_ends_the_run(made, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(features, "encode", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        features.run(made("data.on_missing=skip")[0])


def test_nothing_left_is_an_error_in_any_case(made):
    work, videos = made("data.on_missing=skip")
    for path in videos.parent.rglob("*.mp4"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="32 of 32 videos"):
        features.run(work)
