"""Decoding files good and bad, and the feature cache. Every frame carries its number, so a wrong frame shows.

The number is written as eight vertical bars, the lowest bit on the left.
"""

import json
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from rlaif_lite.errors import VideoError
from rlaif_lite.video import readers
from rlaif_lite.video.cache import FeatureRecord, FeatureStore, feature_key, read_index, write_index
from rlaif_lite.video.decode import View, decode, decode_views, indices_between, open_video, sample_indices
from rlaif_lite.video.digest import video_digest

CLOSED = {"x264-params": "bframes=2:keyint=12:min-keyint=12:scenecut=0"}
OPEN = {"x264-params": "bframes=3:keyint=12:min-keyint=12:scenecut=0:open-gop=1"}


def numbered(number: int, size: int = 64) -> np.ndarray:
    bars = [255 * (number >> bit & 1) for bit in range(8)]
    return np.repeat(np.tile(np.array(bars, np.uint8), (size, 1)), size // 8, axis=1)[..., None].repeat(3, 2)


def number_of(rgb_HWC: np.ndarray) -> int:
    height, width, _ = rgb_HWC.shape
    return sum(int(rgb_HWC[height // 2, (2 * bit + 1) * width // 16, 0] > 127) << bit for bit in range(8))


def numbers(frames) -> list[int]:
    return [number_of(rgb_HWC) for rgb_HWC in frames.rgb_THWC]


class Pipe:
    """A file that cannot go back to complete its header."""

    def __init__(self):
        self.data = b""

    def write(self, block) -> int:
        self.data += block
        return len(block)


def make(path, frames=60, codec="libx264", options=CLOSED, times=None, **container):
    """A video of numbered frames at 10 per second, or shown at `times` (seconds)."""
    with av.open(path if isinstance(path, Pipe) else str(path), "w", **container) as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """60 frames, six seconds, a key frame every twelve."""
    return make(tmp_path_factory.mktemp("video") / "clip.mp4")


# ---- sampling


def test_sampling_by_hand():
    assert sample_indices(24, View(6)).tolist() == [2, 6, 10, 14, 18, 22]
    assert sample_indices(24, View(6, 1, 3)).tolist() == [8, 10, 11, 12, 14, 15]
    assert sample_indices(3, View(6)).tolist() == [0, 0, 1, 1, 2, 2]
    assert sample_indices(10, View(1)).tolist() == [5]
    time_N = np.arange(24) / 8
    assert indices_between(time_N, View(4, seconds=(1.0, 1.9))).tolist() == [9, 11, 13, 15]  # frames 8 to 15
    assert indices_between(time_N, View(2, seconds=(2.5, 99.0))).tolist() == [21, 23]
    assert indices_between(time_N, View(2, seconds=(50.0, 60.0))).tolist() == [23, 23]  # behind the last
    assert indices_between(time_N, View(1, seconds=(1.01, 1.02))).tolist() == [9]  # between two frames
    assert indices_between(time_N, View(6)).tolist() == sample_indices(24, View(6)).tolist()


def test_clips_cover_the_video_once_and_are_never_empty():
    for frames in range(1, 40):
        for clips in range(1, 8):
            parts = [sample_indices(frames, View(400, k, clips)) for k in range(clips)]
            assert all(part.min() >= 0 and part.max() < frames for part in parts)
            if frames >= clips:
                assert np.concatenate([np.unique(part) for part in parts]).tolist() == list(range(frames))


@pytest.mark.parametrize(
    "name, codec, options",
    [("a.mp4", "libx264", CLOSED), ("a.mkv", "libx264", CLOSED), ("a.webm", "libvpx", {}), ("a.avi", "mpeg4", {})],
)
def test_frames_and_times(tmp_path, name, codec, options):
    frames = decode(make(tmp_path / name, codec=codec, options=options), count=6)
    assert numbers(frames) == [5, 15, 25, 35, 45, 55] and frames.timed
    assert (frames.source, frames.reason) == ("decord", "")
    assert np.allclose(frames.time_T, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5], atol=1e-3)
    assert frames.time_T.dtype == np.float64 and frames.rgb_THWC.dtype == np.uint8
    assert frames.duration == pytest.approx(6.0, abs=0.01)


def test_one_open_serves_whole_video_and_clips(clip, monkeypatch):
    opened = []
    original = readers.decord.VideoReader
    monkeypatch.setattr(readers.decord, "VideoReader", lambda *a, **k: opened.append(a) or original(*a, **k))
    found = decode_views(clip, {"video": View(6), **{f"clip{k}": View(4, k, 3) for k in range(3)}})
    assert {name: numbers(frames) for name, frames in found.items()} == {
        "video": [5, 15, 25, 35, 45, 55],
        "clip0": [2, 7, 12, 17],
        "clip1": [22, 27, 32, 37],
        "clip2": [42, 47, 52, 57],
    }
    assert len(opened) == 1
    assert numbers(decode(clip, count=4, clip=1, clips=3)) == [22, 27, 32, 37]


def test_a_size_is_height_and_width_and_both_decoders_scale_alike(clip, monkeypatch):
    frames = decode(clip, count=4, size=(16, 32))
    assert frames.rgb_THWC.shape == (4, 16, 32, 3) and numbers(frames) == [7, 22, 37, 52]
    monkeypatch.setattr(readers, "decord", None)
    alone = decode(clip, count=4, size=(16, 32))
    assert alone.source == "pyav" and np.array_equal(alone.rgb_THWC, frames.rgb_THWC)
    assert np.allclose(alone.time_T, frames.time_T, rtol=1e-12)


def test_variable_frame_rate_gives_true_times(tmp_path):
    times = np.cumsum([0] + [0.04] * 30 + [0.5] * 9)
    frames = decode(make(tmp_path / "a.mp4", 40, times=times), count=8)
    assert numbers(frames) == [2, 7, 12, 17, 22, 27, 32, 37] and frames.source == "decord"
    assert np.allclose(frames.time_T, times[[2, 7, 12, 17, 22, 27, 32, 37]], atol=2e-3)


def test_one_frame(tmp_path):
    path = make(tmp_path / "a.mp4", 1)
    found = decode_views(path, {"video": View(4), "clip2": View(2, 2, 3)})
    assert numbers(found["video"]) == [0] * 4 and numbers(found["clip2"]) == [0, 0]
    assert found["video"].time_T.tolist() == [0.0] * 4 and found["video"].duration == pytest.approx(0.1)


def test_what_a_video_is_without_decoding_it(clip):
    video = open_video(clip)
    assert (len(video.time_N), *video.shape, video.source, video.reason) == (60, 64, 64, "decord", "")
    assert video.duration == pytest.approx(6.0)


# ---- where decord is silently wrong


def stream_copy(source, target, start: float):
    """Cut without encoding, as `ffmpeg -ss START -c copy` does: the container hides the frames before START."""
    with av.open(str(source)) as given, av.open(str(target), "w") as out:
        stream = given.streams.video[0]
        copied = out.add_stream_from_template(stream)
        offset = int(start / stream.time_base)
        given.seek(offset, stream=stream)
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copied
                out.mux(packet)
    return target


def assert_pyav_is_right(path, expected, why):
    found = decode_views(path, {"some": View(5), "all": View(len(expected))})
    assert numbers(found["all"]) == expected and found["all"].source == "pyav" and why in found["all"].reason
    assert numbers(found["some"]) == [expected[i] for i in sample_indices(len(expected), View(5))]
    assert np.allclose(found["all"].time_T, np.arange(len(expected)) / 10, atol=2e-3)


def test_a_stream_copied_cut(clip, tmp_path):
    path = stream_copy(clip, tmp_path / "cut.mp4", 1.7)
    assert len(readers.decord.VideoReader(str(path))) == 48  # five frames too many: what this is about
    assert_pyav_is_right(path, list(range(17, 60)), "an edit list hides 5 frames")


def test_mpeg_ts(tmp_path):
    path = make(tmp_path / "a.ts", options={"g": "12", "bf": "2"}, format="mpegts")
    assert_pyav_is_right(path, list(range(60)), "cannot be trusted with mpegts")


def test_open_groups_of_pictures(tmp_path):
    path = make(tmp_path / "a.mp4", options=OPEN)
    wrong = readers.decord.VideoReader(str(path)).get_batch([25, 37, 50]).asnumpy()
    assert [number_of(rgb) for rgb in wrong] != [25, 37, 50]
    assert_pyav_is_right(path, list(range(60)), "open groups of pictures")


def test_a_frame_count_that_is_not_the_containers(tmp_path):
    """A recording that was never finished; decord takes its header at its word and aborts the process."""
    pipe = Pipe()
    make(pipe, 20, "mpeg4", {"g": "12"}, format="avi")
    path = tmp_path / "a.avi"
    path.write_bytes(pipe.data)
    assert_pyav_is_right(path, list(range(20)), "its header promises")


def test_what_decord_refuses_goes_to_pyav(clip, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error reading")

    monkeypatch.setattr(readers.decord, "VideoReader", refuse)
    assert_pyav_is_right(clip, list(range(60)), "Error reading")


def test_decord_failing_on_a_frame_goes_to_pyav(clip, monkeypatch):
    class Breaks(readers.decord.VideoReader):
        def get_batch(self, _):
            raise RuntimeError("avcodec_send_packet")

    monkeypatch.setattr(readers.decord, "VideoReader", Breaks)
    frames = decode(clip, count=4)
    assert numbers(frames) == [7, 22, 37, 52] and frames.source == "pyav"


def test_rotation(clip, tmp_path, monkeypatch):
    """A phone held upright: the container says turn it clockwise; the lowest bit, on the left, goes to the top."""
    data = bytearray(clip.read_bytes())
    matrix = data.find(b"tkhd") + 44
    assert struct.unpack(">9i", data[matrix : matrix + 36])[0] == 1 << 16
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    path = tmp_path / "upright.mp4"
    path.write_bytes(data)
    by_decord = decode(path, count=4, size=(64, 32))
    monkeypatch.setattr(readers, "decord", None)
    by_pyav = decode(path, count=4, size=(64, 32))
    for frames in (by_decord, by_pyav):
        assert frames.rgb_THWC.shape == (4, 64, 32, 3)
        assert [number_of(rgb.transpose(1, 0, 2)) for rgb in frames.rgb_THWC] == [7, 22, 37, 52]
    assert by_pyav.source == "pyav"


def test_gif(tmp_path):
    images = [Image.fromarray(numbered(i)) for i in range(8)]
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 100, 400, 400, 100, 100, 100, 100])
    frames = decode(path, count=8)
    assert numbers(frames) == list(range(8)) and np.allclose(frames.time_T, [0, 0.1, 0.2, 0.6, 1.0, 1.1, 1.2, 1.3])


# ---- frames as images


def test_a_folder_of_frames_in_natural_order_and_a_list(tmp_path):
    paths = []
    for i in range(12):
        paths.append(tmp_path / f"frame_{i}.png")  # frame_10 sorts before frame_2 as text
        Image.fromarray(numbered(i)).save(paths[-1])
    (tmp_path / "notes.txt").write_text("no frame")
    frames = decode(tmp_path, count=6, size=(32, 48))
    assert numbers(frames) == [1, 3, 5, 7, 9, 11] and frames.rgb_THWC.shape == (6, 32, 48, 3)
    assert frames.source == "images" and not frames.timed and frames.time_T.tolist() == [1, 3, 5, 7, 9, 11]
    assert numbers(decode(tuple(map(str, paths[:4])), count=2)) == [1, 3]
    assert numbers(decode(paths[7], count=2)) == [7, 7]


def test_bad_frames_are_named(tmp_path):
    with pytest.raises(VideoError, match="holds no frames"):
        decode(tmp_path, count=2)
    good, bad = tmp_path / "0.jpg", tmp_path / "1.jpg"
    Image.fromarray(numbered(3)).save(good)
    bad.write_bytes(good.read_bytes()[:300])
    with pytest.raises(VideoError, match="1.jpg: the frame cannot be read .*(?i:truncated)"):
        decode(tmp_path, count=2)
    Image.fromarray(numbered(3, 32)).save(bad)
    with pytest.raises(VideoError, match="1.jpg: its size is \\(32, 32\\)"):
        decode(tmp_path, count=2)
    with pytest.raises(VideoError, match="2.jpg"):
        decode((str(good), str(tmp_path / "2.jpg")), count=2)


# ---- files that are no whole video


def test_missing_empty_and_foreign_files(tmp_path, clip):
    with pytest.raises(VideoError, match="none.mp4: there is no such file"):
        decode(tmp_path / "none.mp4", count=2)
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"")
    with pytest.raises(VideoError, match="bad.mp4: the file is empty"):
        decode(path, count=2)
    for content in (b"this is no video\n" * 50, os.urandom(5000), json.dumps({"a": 1}).encode()):
        path.write_bytes(content)
        with pytest.raises(VideoError, match="bad.mp4: it"):
            decode(path, count=2)
    Image.fromarray(numbered(1)).save(tmp_path / "a.png")
    path.write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(VideoError, match="the extension is wrong"):
        decode(path, count=2)
    path.write_bytes(clip.read_bytes())
    path = path.rename(tmp_path / "really_mp4.webm")  # the content decides, not the name
    assert numbers(decode(path, count=2)) == [15, 45]


def test_audio_only(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        out.mux(stream.encode(sound))
        out.mux(stream.encode())
    with pytest.raises(VideoError, match="a.mp4: it has no video stream, only audio"):
        open_video(path)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.8])
def test_truncated(tmp_path, name, codec, share):
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = make(tmp_path / name, codec=codec, options={"g": "12"}, container_options=options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(VideoError, match=f"{name}: it (is cut short|is not a video|has no)"):
        decode(path, count=6)


def test_truncated_within_the_last_frame(tmp_path):
    path = make(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(VideoError, match="a.mp4: it is cut short"):
        decode(path, count=6)


def test_truncated_without_an_index_at_the_front(clip, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clip.read_bytes()[:-600])
    with pytest.raises(VideoError, match="a.mp4: it is not a video that can be read \\(End of file\\)"):
        open_video(path)


def test_views_that_name_no_frames_are_a_mistake_of_ours(clip):
    for view in (View(0), View(4, 3, 3), View(4, -1, 3)):
        with pytest.raises(ValueError, match="does not name frames"):
            decode_views(clip, {"v": view})


# ---- the cache


def views(seed: int = 0, tokens: int = 6) -> dict[str, FeatureRecord]:
    random = torch.Generator().manual_seed(seed)
    out = {}
    for name, frames in (("video", 3), ("clip0", 2)):
        features_KD = torch.randn(tokens, 8, generator=random).bfloat16()
        time_T = torch.arange(frames, dtype=torch.float64) / 3
        place_CK, frame_K = torch.arange(tokens)[None] * 2, torch.arange(tokens) // 2
        out[name] = FeatureRecord(
            features_KD, place_CK, frame_K, time_T, torch.tensor([tokens]), torch.tensor([12]), 12, frames, 1.5
        )
    out["clip0"] = out["clip0"]._replace(deepstack_LKD=torch.randn(2, tokens, 8, generator=random).bfloat16())
    return out


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].tensors().keys() == expected[name].tensors().keys()
        for part, tensor in expected[name].tensors().items():
            assert (
                torch.equal(found[name].tensors()[part], tensor) and found[name].tensors()[part].dtype == tensor.dtype
            )
        assert found[name][6:9] == expected[name][6:9]  # the numbers


def test_what_is_put_comes_back(tmp_path):
    store = FeatureStore(tmp_path)
    assert not store.has("k") and store.get("k") is None
    store.put("k", views(), {"video": "a.mp4"})
    assert store.has("k")
    assert_same(store.get("k"), views())
    assert_same(FeatureStore(tmp_path).get("k"), views())
    store.put("k", views(1))
    assert_same(store.get("k"), views(1))  # not what memory held


def test_a_write_that_dies_leaves_nothing_or_the_old_file(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    store.put("old", views())
    monkeypatch.setattr("rlaif_lite.video.cache.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for key in ("old", "new"):
        with pytest.raises(KeyboardInterrupt):
            store.put(key, views(1))
    fresh = FeatureStore(tmp_path)
    assert_same(fresh.get("old"), views())
    assert not fresh.has("new") and fresh.get("new") is None
    assert not list(tmp_path.glob(".*.tmp"))
    old, young = (tmp_path / f".{name}.safetensors.999999999.tmp" for name in ("old", "young"))
    for path in (old, young):  # of a writer that was killed, and had no time to remove them
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    FeatureStore(tmp_path)
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "empty", "other"])
def test_a_damaged_file_counts_as_absent_and_is_said(tmp_path, damage, caplog):
    store = FeatureStore(tmp_path)
    store.put("k", views())
    store.put("other", views(1))
    path = store.path("k")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "header":
        data[20] ^= 0xFF
    path.write_bytes({"cut": data[:-7], "empty": b"", "other": store.path("other").read_bytes()}.get(damage, data))
    fresh = FeatureStore(tmp_path)
    assert fresh.get("k") is None and "is damaged" in caplog.text and str(path) in caplog.text
    assert not fresh.has("k")
    fresh.put("k", views(2))
    assert_same(fresh.get("k"), views(2))


def test_memory_is_bounded_and_the_last_used_stay(tmp_path):
    size = sum(tensor.nbytes for view in views().values() for tensor in view.tensors().values())
    store = FeatureStore(tmp_path, memory_bytes=2 * size)
    for key in "abc":
        store.put(key, views())
    for key in "aba":
        store.get(key)
    first = store.get("a")
    assert store.get("a") is first
    store.get("c")  # pushes out b
    assert store.get("a") is first
    assert list(store._held) == ["c", "a"] and store._held_bytes == 2 * size
    tiny = FeatureStore(tmp_path, memory_bytes=size - 1)
    assert_same(tiny.get("a"), views())
    assert not tiny._held


def test_the_key_depends_on_everything_that_decides_the_features(clip, tmp_path):
    common = {
        "video": video_digest(str(clip)),
        "views": {"video": View(6)},
        "processor": {"size": 32, "mean": [0.5]},
        "tower": "base:00",
        "chain": [{"evs": 0.5}],
        "dtype": "float32",
    }
    changes = {
        "video": video_digest(str(make(tmp_path / "other.mp4", 59))),
        "views": {"video": View(7)},
        "processor": {"size": 32, "mean": [0.4]},
        "tower": "base:01",
        "chain": [],
        "dtype": "bfloat16",
    }
    keys = [feature_key(**common)] + [feature_key(**{**common, name: value}) for name, value in changes.items()]
    assert len(set(keys)) == len(keys) and feature_key(**common) == keys[0]


def test_digests_of_frames_follow_content_and_order(tmp_path):
    for name, content in (("0.jpg", b"a"), ("1.jpg", b"b"), ("2.jpg", b"a")):
        (tmp_path / name).write_bytes(content)
    zero, one, two = (str(tmp_path / f"{i}.jpg") for i in range(3))
    assert video_digest((zero, one)) == video_digest((two, one)) != video_digest((one, zero))
    assert video_digest(str(tmp_path)) == video_digest((zero, one, two))
    with pytest.raises(VideoError, match="gone.mp4: there is no such file"):
        video_digest(str(tmp_path / "gone.mp4"))


def test_index(tmp_path):
    path = tmp_path / "index.json"
    assert read_index(path) == {}
    keys = {"/v/a.mp4": "k1", "b.mp4": "k2"}
    write_index(path, keys)
    assert read_index(path) == keys and os.listdir(tmp_path) == ["index.json"]
