"""The features stage with videos that cannot be used: each is named, and all others are done."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from core import small_recipe
from rlaif_lite.errors import DataError
from rlaif_lite.stages import features
from rlaif_lite.video.decode import decode
from rlaif_lite.workspace import Workspace
from test_video import OPEN, make


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

    def failing(base, frames, *more, **keys):
        found, which = encode(base, frames, *more, **keys), of_tower.get(frames["video"].rgb_THWC.tobytes())
        if which == 3:
            raise torch.OutOfMemoryError("out of memory")
        return {n: v._replace(features_KD=v.features_KD / 0) for n, v in found.items()} if which == 4 else found

    monkeypatch.setattr(features, "encode", failing)
    reasons = (
        "there is no such file",
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
    assert len(said) == 1 and "1 of 30 videos" in said[0] and "rl/00005.mp4: it has open groups of pictures" in said[0]
    assert len(list((work.folder / "features" / "cache").glob("*.safetensors"))) == 27

    monkeypatch.undo()  # the tower works again
    summary = features.run(made("data.on_missing=skip")[0])
    assert (summary["videos"], summary["unreadable"]) == (29, 3)


def test_a_tower_that_fails_on_everything_ends_the_run(made, monkeypatch):
    def broken(*_, **__):
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
