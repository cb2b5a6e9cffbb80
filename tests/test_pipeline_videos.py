"""Videos and their features in a run: those that cannot be read, that come, go and change, and what is cached."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from core import small_recipe
from rlaif_lite import pipeline
from rlaif_lite.errors import DataError, StageError
from rlaif_lite.files import read_jsonl, write_jsonl
from rlaif_lite.stages import sft
from rlaif_lite.workspace import Workspace

# ---- videos that cannot be read


@pytest.fixture
def broken(checkpoint, world, tmp_path):
    """broken(overrides) -> a recipe on a world whose rl video 2 is empty and rl video 3 is gone, files of one's own."""
    shutil.copytree(world, tmp_path / "world")
    videos = sorted((tmp_path / "world" / "videos" / "rl").iterdir())
    videos[2].write_bytes(b"")
    names = ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")
    files = [f"data.{name}=[{tmp_path / 'world' / name}.jsonl]" for name in names]

    def make(*overrides: str, gone: bool = False):
        if gone:
            videos[3].unlink(missing_ok=True)
        return small_recipe(checkpoint, tmp_path, "data.world=null", *files, *overrides)

    return make


def test_unreadable_videos_stop_the_run_every_time(broken):
    """Also the second time: what was found bad once is not silently left out."""
    recipe = broken()
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"(?s)1 of 32 videos cannot be decoded.*rl/00002.mp4.*data.on_missing: skip"
        ):
            pipeline.run(recipe, until="features")


def test_missing_videos_stop_the_run_before_anything_is_done(broken):
    with pytest.raises(DataError, match=r"(?s)data\.\w+: 1 records have a video that is not there.*rl/00003.mp4"):
        pipeline.run(broken(gone=True), until="data")


def test_bad_videos_can_be_skipped_and_are_counted(broken):
    """No record of theirs reaches a stage, and every other keeps its own video."""
    recipe = broken("data.on_missing=skip", gone=True)
    summary = pipeline.run(recipe, until="features")
    assert (summary["features"]["videos"], summary["features"]["unreadable"], summary["features"]["missing"]) == (
        30,
        1,
        1,
    )
    work = Workspace(recipe)
    kept = [r.id for r in work.records("rl")]
    assert kept == [f"rl/{i:05d}" for i in (0, 1, 4, 5, 6, 7)]
    assert [r.id for r in work.records("policy_init")] == [f"{i}/init" for i in kept]
    for record in work.records("rl"):
        assert record.video.endswith(f"{record.id}.mp4") and work.features(record).features_KD.shape == (24, 128)


def test_videos_that_come_go_or_are_replaced_make_the_run_stale(broken, monkeypatch, capsys):
    """Only the content counts: a file that was touched, or is the same again, changes nothing."""
    recipe, ran = broken("data.on_missing=skip", gone=True), []
    for name, stage in pipeline.STAGES.items():
        monkeypatch.setattr(stage, "run", lambda work, name=name: ran.append(name) or {})
    monkeypatch.setattr(pipeline, "write_summary", lambda *_, **__: None)
    monkeypatch.setattr(pipeline.page, "write", lambda _: None)
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "summary.json").write_text("{}")

    def after() -> list[str]:
        ran.clear()
        pipeline.run(recipe, until="features")
        return ran.copy()

    assert after() == ["data", "features"] and after() == []
    first, second, third, fourth = sorted(Path(recipe.data.rl[0]).parent.glob("videos/rl/*.mp4"))[:4]
    os.utime(first, (1, 1))
    assert after() == []
    third.write_bytes(first.read_bytes())  # the empty one, replaced in place
    assert after() == ["data", "features"] and after() == []
    assert "videos were added, removed or replaced" in capsys.readouterr().err
    shutil.copy(first, first.with_name("00003.mp4"))  # the missing one arrives
    assert after() == ["data", "features"] and after() == []
    fourth.unlink()
    assert after() == ["data", "features"]


def test_lost_features_are_said(rerun):
    recipe = rerun()
    work = Workspace(recipe)
    record = work.records("rl")[0]
    work.features(record)
    fresh = Workspace(recipe)
    for path in (Path(recipe.output) / "features" / "cache").iterdir():
        path.unlink()
    with pytest.raises(StageError, match="cached features of .*rl/00000.mp4 are gone or damaged. Delete .*done.json"):
        fresh.features(fresh.records("rl")[0])
    (Path(recipe.output) / "features" / "done.json").unlink()
    pipeline.run(recipe, until="features")
    assert torch.equal(Workspace(recipe).features(record).features_KD, work.features(record).features_KD)


# ---- features


def test_cached_features_are_those_of_the_video(finished, load):
    """Decoded, resized, encoded and pruned anew; a record about a clip gets the clip's."""
    from rlaif_lite.model.pixels import to_pixels
    from rlaif_lite.video.decode import View, decode_views

    base, work = load(tower=True), Workspace(finished)
    clip = next(r for r in work.records("sft_easy") if r.clip == 1)
    whole = next(r for r in work.records("rl"))
    for record, view in ((whole, View(6)), (clip, View(6, 1, 3))):
        frames = decode_views(record.video, {"v": view}, size=(32, 32))["v"]
        want_TPD = base.encode(to_pixels(frames.rgb_THWC, base.images)).features_LGPD[0]
        found = work.features(record)
        assert (found.features_KD - want_TPD.flatten(0, 1)).abs().max() <= 1e-5
        assert np.allclose(found.time_T, frames.time_T) and (found.layout_tokens, found.frames) == (24, 6)
    assert (work.views(clip)["clip1"].features_KD - work.views(clip)["video"].features_KD).abs().max() > 1e-2


def test_the_narrative_may_have_other_clips_than_the_records(rerun):
    """Records that say of how many clips theirs is one keep it; the narrative has as many as the recipe says."""
    recipe = rerun("features.clips=2", "context.markers=[first,finally]")
    before = Workspace(recipe)
    clip = next(r for r in before.records("sft_easy") if r.clip == 2)
    was = before.views(clip)["clip2"]
    summary = pipeline.run(recipe, until="context")
    assert summary["stages"]["sft"]["status"] == "skipped"  # it is trained on the same clips
    work = Workspace(recipe)
    assert torch.equal(work.features(clip).features_KD, was.features_KD)
    captions = read_jsonl(Path(recipe.output) / "context" / "captions.jsonl")
    assert {len(row["captions"]) for batch in captions for row in batch["results"]} == {2}
    narrated = work.views(work.records("preference")[0])
    assert set(narrated) == {"video", "clip0", "clip1"}


@pytest.mark.parametrize("clips", [None, 3])
def test_records_that_the_recipe_cuts_are_stale_with_it(recipe, tmp_path, world, clips):
    """`features.clips` decides which frames a record's clip has, unless the record says of how many it is one."""
    own = json.loads((world / "sft_easy.jsonl").read_text().splitlines()[0])
    own |= {"video": str(world / own["video"]), "clips": clips}
    (tmp_path / "own.jsonl").write_text(json.dumps({k: v for k, v in own.items() if v is not None}))
    keys = (f"data.folder={world}", f"data.sft_easy=[{tmp_path / 'own.jsonl'}]")
    cut = ("features.clips=2", "context.markers=[first,finally]")
    reads = [pipeline.inputs(Workspace(recipe(*keys, *more)), "sft", sft.READS) for more in ((), cut)]
    assert (reads[0] == reads[1]) == (clips is not None)


def test_a_record_about_a_clip_that_is_not_there(recipe, tmp_path, world):
    record = {
        "id": "x",
        "video": str(world / "videos/sft/00000.mp4"),
        "clip": 3,
        "messages": [
            {"role": "user", "content": "<video> describe the clip"},
            {"role": "assistant", "content": "red ."},
        ],
    }
    write_jsonl(tmp_path / "own.jsonl", [record])
    with pytest.raises(DataError, match="own.jsonl#0: the record is about clip 3, but `features.clips` is 3"):
        pipeline.run(recipe(f"data.sft_easy=[{tmp_path / 'own.jsonl'}]"), until="features")
