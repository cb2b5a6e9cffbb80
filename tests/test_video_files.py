"""Video files as people have them, and long runs that meet bad ones: every bad video is named, all others get done."""

import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from rlaif_lite.errors import StageError, VideoError
from rlaif_lite.video import readers, workers
from rlaif_lite.video.decode import View, decode, open_video
from rlaif_lite.video.digest import video_digest
from rlaif_lite.video.keyframes import is_intra
from rlaif_lite.video.strip import strips
from rlaif_lite.video.workers import Job, decode_all, decode_one, digest_all, run_all
from test_video import CLOSED, OPEN, assert_pyav_is_right, make, number_of, numbered, numbers, stream_copy

CASES = Path(__file__).parent / "cases"
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
    left = len(open_video(path).time_N)
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


def test_flagged_key_frames_that_are_none():
    """3GP as old phones wrote it: seeking to a flagged frame shows a broken picture. Frame t has its bar at t
    pixels."""
    path = CASES / "h263_false_keyframes.3gp"
    broken = readers.decord.VideoReader(str(path)).get_batch([46, 84]).asnumpy()
    assert [left_edge(rgb) for rgb in broken] != [46, 84]  # what this is about
    frames = decode(path, count=8)
    assert [left_edge(rgb) for rgb in frames.rgb_THWC] == [9, 28, 46, 65, 84, 103, 121, 140]
    assert frames.source == "pyav" and "3 of its flagged key frames are predicted" in frames.reason


def left_edge(rgb_HWC: np.ndarray) -> int:
    return int((rgb_HWC[70, :, 0] > 150).argmax())


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx265"), ("a.avi", "mpeg4"), ("a.ts", "libx264")]
)
def test_only_pictures_that_stand_alone_are_key_frames(tmp_path, name, codec):
    """The bits of every packet against what the decoder says of its picture, for lengths and for start codes."""
    options = {"x265-params": "keyint=12:bframes=0:log-level=0"} if codec == "libx265" else {"g": "12", "bf": "0"}
    path, seen = make(tmp_path / name, codec=codec, options=options), []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size:
                seen.append(is_intra(stream.codec_context.name, bytes(packet), stream.codec_context.extradata))
    with av.open(str(path)) as container:
        assert seen == [frame.key_frame for frame in container.decode(video=0)] and 5 <= sum(seen) <= 8


@pytest.mark.parametrize("matrix, flipped", [((-1, 0, 0, 1), np.fliplr), ((1, 0, 0, -1), np.flipud)])
def test_a_mirrored_display_matrix(clip, tmp_path, matrix, flipped):
    data = bytearray(clip.read_bytes())
    at, (a, b, c, d) = data.find(b"tkhd") + 44, (number << 16 for number in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "mirrored.mp4").write_bytes(data)
    frames = decode(tmp_path / "mirrored.mp4", count=3)
    assert frames.source == "pyav" and "mirrors" in frames.reason
    assert [number_of(flipped(rgb_HWC)) for rgb_HWC in frames.rgb_THWC] == [10, 30, 50]


# ---- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation):
    picture, exif = Image.fromarray(numbered(5)), Image.Exif()
    exif[0x112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"))
    assert np.array_equal(decode([str(tmp_path / "a.jpg")], count=1).rgb_THWC[0], shown)
    assert (number_of(shown) == 5) == (orientation in (1, 4))


def test_deep_grey_is_scaled_and_not_cut(tmp_path):
    ramp = (np.linspace(0, 1, 96)[None].repeat(64, 0) * 65535).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", count=1).rgb_THWC[0, 0, :, 1]
    assert np.array_equal(found, (ramp[0] / 257).round())


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_animated_pictures_have_frames_and_times(tmp_path, suffix):
    images = [Image.fromarray(numbered(i)) for i in range(8)]
    path = tmp_path / f"a.{suffix}"
    delays = [100, 100, 400, 400, 100, 100, 100, 100]
    images[0].save(path, save_all=True, append_images=images[1:], duration=delays, lossless=True)
    frames = decode(path, count=8)
    assert numbers(frames) == list(range(8)) and np.allclose(frames.time_T, [0, 0.1, 0.2, 0.6, 1.0, 1.1, 1.2, 1.3])
    assert frames.timed and frames.duration == pytest.approx(1.4)
    assert numbers(decode(path, count=2, size=(32, 32))) == [2, 6]
    with pytest.raises(VideoError, match="it is an animation. Lists and folders of frames take still"):
        decode([str(path)], count=1)


# ---- untrusted files


def test_formats_that_name_other_files_or_start_programs_are_refused(clip, tmp_path):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    (tmp_path / "page.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    shutil.copy(clip, tmp_path)
    with pytest.raises(VideoError, match="list.mp4: its content is not a video in a format that is read"):
        decode(tmp_path / "list.mp4", count=1)
    with pytest.raises(VideoError, match="page.jpg: the frame cannot be read \\(cannot identify image file"):
        decode(tmp_path / "page.jpg", count=1)


@pytest.mark.parametrize("name", ["pipe.mp4", "pipe.png", "/dev/zero"])
def test_only_regular_files_are_read(tmp_path, name):
    path = tmp_path / name
    if not path.exists():
        os.mkfifo(path)
    for read in (video_digest, lambda path: decode(path, count=1)):
        with pytest.raises(VideoError, match="it is not a regular file"):
            read(str(path))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_a_small_file_of_huge_pictures_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("P", (9000, 9000)).save(path, **({"quality": 1, "method": 0} if suffix == "webp" else {}))
    ((_, found),) = decode_all({"a": (str(path), VIEW)}, workers=1, size=(32, 32))
    assert isinstance(found, VideoError)
    assert "9000 x 9000 pixels, more than `features.max_source_pixels: 67108864`" in str(found)


def test_memory_is_bounded(tmp_path, clip):
    """A PNG of 60,000 x 60,000 pixels in 70 bytes, under a recipe that allows it: 14 GB when read."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    wanted = {"large": (str(path), VIEW), "good": (str(clip), VIEW)}
    found = dict(decode_all(wanted, workers=1, size=(32, 32), frame_limit=2**32))
    assert "large: decoding it takes more than 4 GiB" in str(found["large"])
    assert numbers(found["good"]["v"]) == [10, 30, 50]


# ---- worker processes


VIEW = {"v": View(3)}


@pytest.fixture(scope="module")
def long_film(tmp_path_factory):
    """It takes PyAV about a second, in order: long enough to be interrupted."""
    return make(tmp_path_factory.mktemp("video") / "long.ts", 4000, "mpeg2video", {"g": "12"}, format="mpegts")


def interrupted(films: dict, with_signal: int, times: int):
    """All results, where the worker gets a signal in the middle of the first `times` tries at `bad`."""
    results, out = (
        run_all([Job(name, workers._decode, (film, VIEW, None, 2**26)) for name, film in films.items()], 1, 4.0),
        {},
    )

    def strike():
        struck: set[int] = set()
        while len(struck) < times and "bad" not in out:
            for process in multiprocessing.active_children():
                if process.pid not in struck and busy(process.pid):
                    os.kill(process.pid, with_signal)
                    struck.add(process.pid)
            time.sleep(0.005)

    name, found = next(results)
    out[name] = found
    threading.Thread(target=strike, daemon=True).start()
    out.update(results)
    return out


def busy(pid: int) -> bool:
    """Whether the process has the long film open."""
    folder = Path(f"/proc/{pid}/fd")
    return any("long.ts" in os.readlink(link) for link in folder.iterdir() if link.is_symlink())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_tried_again(clip, long_film, number):
    found = interrupted({"good": str(clip), "bad": str(long_film), "last": str(clip)}, number, times=1)
    assert not any(isinstance(frames, VideoError) for frames in found.values()) and len(found) == 3


def test_two_crashes_cost_one_video(clip, long_film):
    found = interrupted({"good": str(clip), "bad": str(long_film), "last": str(clip)}, signal.SIGSEGV, times=2)
    assert "bad: the decoder crashed on it, twice (SIGSEGV)" in str(found["bad"])
    assert numbers(found["good"]["v"]) == numbers(found["last"]["v"]) == [10, 30, 50]


def test_death_from_outside_is_no_videos_fault(clip, long_film):
    with pytest.raises(StageError, match="killed from outside \\(SIGKILL, twice on bad\\).*no video is set aside"):
        interrupted({"good": str(clip), "bad": str(long_film)}, signal.SIGKILL, times=2)
    assert not multiprocessing.active_children()


def test_a_decoder_that_never_comes_back_is_stopped(clip):
    good = Job("good", workers._decode, (str(clip), VIEW, None, 2**26))
    found = dict(run_all([Job("bad", never, (0.5,)), good], 1))
    assert "bad: the decoder was stopped. It was not done after" in str(found["bad"])
    assert numbers(found["good"]["v"]) == [10, 30, 50] and not multiprocessing.active_children()


def never(report, limit_s):
    report(limit_s)
    signal.pause()


def test_the_time_limit_follows_the_length(clip, long_film):
    short, long = (workers.seconds_for(workers.open_video(str(path))) for path in (clip, long_film))
    pixels = 64 * 64
    assert short == pytest.approx(workers.BASE_S + 60 * pixels / workers.PIXELS_PER_S)
    assert long == pytest.approx(workers.BASE_S + 4000 * pixels / workers.PIXELS_PER_S)


def test_workers_hold_no_torch():
    code = "import sys, rlaif_lite.video.workers; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "av" in loaded and not {"torch", "transformers"} & set(loaded)


def test_workers_do_not_run_the_callers_script_again(clip, tmp_path):
    """A script without `if __name__ == "__main__"` that imports torch: its workers start at once, and without torch."""
    (tmp_path / "script.py").write_text(
        "import sys, torch\nfrom rlaif_lite.video import workers\nfrom script_job import modules\n"
        "((_, found),) = workers.run_all([workers.Job('a', modules, ())], 1)\n"
        "print('torch' in found, 'av' in found)\n"
    )
    (tmp_path / "script_job.py").write_text("import sys\n\n\ndef modules(report):\n    return set(sys.modules)\n")
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=100)
    assert done.stdout == "False True\n", done.stderr


def test_a_codec_that_nothing_reads(clip, tmp_path):
    data = clip.read_bytes().replace(b"avc1", b"zzz9")
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="a.mp4: no decoder reads its video stream"):
        decode(tmp_path / "a.mp4", count=1)


def test_hashing_is_done_in_workers_too(clip, tmp_path):
    found = dict(digest_all({"clip": str(clip), "none": str(tmp_path / "none.mp4")}, 2))
    assert found["clip"] == video_digest(str(clip)) and "there is no such file" in str(found["none"])


def test_what_no_reader_expected_is_the_videos_error(clip):
    ((_, found),) = decode_all({"bad": (str(clip), {"v": View(3, 0, "2")})}, workers=1, size=None)
    assert isinstance(found, VideoError) and "bad: it cannot be decoded (TypeError: " in str(found)
    with pytest.raises(VideoError, match="there is no such file"):
        decode_one("gone.mp4", VIEW, None)


def test_processes_that_cannot_start_are_reported(clip, monkeypatch):
    monkeypatch.setattr(workers, "_serve", os.abort)  # takes no argument
    with pytest.raises(RuntimeError, match=r"ended as it started \(exit code 1\)"):
        list(decode_all({"good": (str(clip), VIEW)}, workers=1, size=None))


@pytest.mark.parametrize("height, width", [(4096, 16), (16, 4096), (96, 128)])
def test_strips_for_the_report_take_any_shape(tmp_path, height, width):
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(6))
    for path in paths:
        Image.new("RGB", (width, height), (0, 200, 0)).save(path)
    ((_, strip),) = strips({"a": paths}, 1, 2**26)
    assert strip.shape[0] == 96 and 6 <= strip.shape[1] <= 6 * 4 * 96 and (strip[..., 1] == 200).all()


# ---- mutated files


def broken(rng: random.Random, data: bytes) -> bytes:
    """A file with bytes flipped, blocks removed, repeated or overwritten, or its end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        at, size = rng.randrange(len(out)), rng.randrange(1, 64)
        kind = rng.randrange(5)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + size]
        elif kind == 2:
            out[at:at] = out[at : at + size]
        elif kind == 3:
            out[at : at + size] = rng.choice([b"\0", b"\xff", rng.randbytes(1)]) * size
        else:
            del out[max(100, at) :]
        out = out or bytearray(b"\0")
    return bytes(out)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutated_videos_get_a_clean_verdict(tmp_path, count):
    """Frames, or one sentence that names the file, in 20 seconds and within the memory limit of a worker."""
    seeds = [make(tmp_path / f"seed{name}", 20, codec=codec, options={"g": "6"}) for name, codec in KINDS.items()]
    images = [Image.fromarray(numbered(i)) for i in range(4)]
    for suffix in ("gif", "webp", "png", "jpg"):
        more = {} if suffix == "jpg" else {"save_all": True, "append_images": images[1:]}
        images[0].save(tmp_path / f"seed.{suffix}", **more)
        seeds.append(tmp_path / f"seed.{suffix}")
    seeds.append(CASES / "h263_false_keyframes.3gp")
    rng, wanted = random.Random(count), {}
    for number in range(count):
        seed = rng.choice(seeds)
        path = tmp_path / f"{number}{seed.suffix}"
        path.write_bytes(broken(rng, seed.read_bytes()))
        wanted[path.name] = (str(path), VIEW)
    began, verdicts = time.monotonic(), 0
    for name, found in decode_all(wanted, workers=2, size=(32, 32)):
        assert time.monotonic() - began < 20, name
        began, verdicts = time.monotonic(), verdicts + 1
        if isinstance(found, VideoError):
            assert name in str(found) and "\n" not in str(found) and "Traceback" not in str(found)
        else:
            assert found["v"].rgb_THWC.shape == (3, 32, 32, 3) and np.isfinite(found["v"].time_T).all()
    assert verdicts == count and not multiprocessing.active_children()


KINDS = {".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".ts": "libx264", ".webm": "libvpx", ".mov": "mpeg4"}


def test_half_the_cores_decode_where_nothing_else_is_asked(monkeypatch):
    for cores, processes in ((1, 1), (2, 1), (5, 2)):
        monkeypatch.setattr(workers.ranks, "cores", lambda cores=cores: cores)
        assert workers.how_many(None) == processes
    assert workers.how_many(3) == 3
