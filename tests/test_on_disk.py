"""What is on disk is what was written: a flipped bit is found and named, and a fault of the disk is one message."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from rlaif_lite import files, pipeline, run_folder
from rlaif_lite.errors import RlaifError, StageError
from rlaif_lite.files import atomic, by_batches, clean, read_sealed, write_json, write_sealed
from rlaif_lite.training.loop import MetricsLog
from rlaif_lite.workspace import Workspace

REWRITTEN = ("recipe.yaml", "summary.json", "report.html", ".lock")  # made again by every start, from what is checked


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_a_flipped_bit_is_found_and_named_whatever_file_it_is_in(rerun):
    """Every file of a finished run folder, one at a time; of the many videos and cached features, some."""
    recipe, rng = rerun(), random.Random(0)
    folder = Path(recipe.output)
    every = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    cached = [path for path in every if "cache" in path.parts]
    videos = [path for path in every if path.suffix == ".mp4"]
    others = [path for path in every if path not in cached and path not in videos and path.name not in REWRITTEN]
    begun = [path for path in others if path.name == "begun.json"]
    assert len(others) > 60
    for path in [*others, *rng.sample(videos, 4)]:
        sound = path.read_bytes()
        flip(path, rng)
        found = ""
        try:
            for name in recipe.stages:
                stage = folder / name
                read_sealed(stage / "begun.json")
                done = read_sealed(stage / "done.json")
                run_folder.check(folder, name, done, MetricsLog(folder / "metrics.jsonl").digests())
        except StageError as error:
            found = str(error)
        assert path.name in found and "run again" in found, (path, found)
        path.write_bytes(sound)
    assert begun
    store = Workspace(recipe).store
    for path in rng.sample(cached, 8):
        flip(path, rng)
        assert store.get(path.stem) is None and not path.exists()


def test_a_run_refuses_a_damaged_adapter_and_makes_it_again(rerun, monkeypatch):
    recipe = rerun()
    adapter = Path(recipe.output) / "adapters" / "reward" / "adapter_model.safetensors"
    sound = adapter.read_bytes()
    flip(adapter, random.Random(1))
    with pytest.raises(StageError, match="(?s)`reward` is done, but 1 of its files .*adapter_model.*delete the folder"):
        pipeline.run(recipe)
    with pytest.raises(RlaifError, match="damaged, as the content does not match"):
        Workspace(recipe).load_role("reward")
    shutil.rmtree(Path(recipe.output) / "reward")
    ran, run_stage = [], pipeline.STAGES["reward"].run
    monkeypatch.setattr(pipeline.STAGES["reward"], "run", lambda work: ran.append("reward") or run_stage(work))
    monkeypatch.setattr(pipeline.STAGES["ppo"], "run", lambda work: ran.append("ppo"))
    pipeline.run(recipe)
    assert adapter.read_bytes() == sound and ran == ["reward"]


@pytest.mark.parametrize("name", ["done.json", "begun.json"])
def test_marks_that_are_damaged_are_named(rerun, name):
    recipe = rerun()
    path = Path(recipe.output) / "sft" / name
    for content in (b"", b"{", b"[]", b'{"reads": {}}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(StageError, match=f"{name} is damaged.*Delete the folder .*sft"):
            pipeline.run(recipe)


def test_the_first_exception_is_the_one_that_is_shown(rerun, monkeypatch):
    recipe = rerun("ppo.steps=1")

    def fails(_):
        raise ZeroDivisionError("of the stage")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline.STAGES["ppo"], "run", fails)
    monkeypatch.setattr(pipeline.page, "write", full)
    with pytest.raises(ZeroDivisionError, match="of the stage"):
        pipeline.run(recipe)


FULL = [
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "no space is left on the disk .*/x/y.*Free some space"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only"),
    (OSError(errno.EFBIG, "File too large"), "larger than the limit"),
    (MemoryError(), "memory ran out"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "no space is left"),
]


@pytest.mark.parametrize(("error", "words"), FULL, ids=["space", "read-only", "size", "memory", "safetensors"])
def test_a_fault_of_the_environment_is_one_message(rerun, monkeypatch, error, words):
    recipe = rerun("ppo.steps=1")

    def fails(_):
        raise error

    monkeypatch.setattr(pipeline.STAGES["ppo"], "run", fails)
    with pytest.raises(StageError, match=f"^ppo: .*{words}") as found:
        pipeline.run(recipe)
    said = str(found.value)
    assert "data, features, sft, context, preference, reward" in said and "run the same command again" in said


def test_a_file_size_limit_in_a_real_write_keeps_the_old_file(tmp_path):
    import resource

    write_json(tmp_path / "a.json", {"old": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as found:
            write_json(tmp_path / "a.json", {"new": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run_folder.fault_of(found.value)[0].startswith("a file would be larger")
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_file_system_without_locks_has_a_lock_file(tmp_path, monkeypatch, capfd):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with run_folder.only_run(tmp_path):
        assert "has no locks" in capfd.readouterr().err
        again = pytest.raises(StageError, match="Another run is going on .*If that process is gone, delete the file")
        with again, run_folder.only_run(tmp_path):
            pass
    assert not (tmp_path / ".lock.pid").exists()
    (tmp_path / ".lock.pid").write_text(f"{run_folder.socket.gethostname()} 999999999")  # of a killed process
    with run_folder.only_run(tmp_path):
        pass


def test_a_writer_that_fails_leaves_the_old_content(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("1")
    for name in ("folder", "file"):
        with pytest.raises(ZeroDivisionError), atomic(tmp_path / name) as tmp:
            tmp.mkdir()
            raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "old"]
    with atomic(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp / "new").write_text("2")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    (tmp_path / "folder" / ".x.json.999999999.tmp").write_text("left by a kill")
    clean(tmp_path)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


def test_what_is_written_is_synced_before_it_is_in_place(tmp_path, monkeypatch):
    order = []
    sync, replace = files.fsync, os.replace
    monkeypatch.setattr(files, "fsync", lambda path: order.append(f"sync {path.name}") or sync(path))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    write_json(tmp_path / "a.json", 1)
    assert order == [f"sync .a.json.{os.getpid()}.tmp", "replace", f"sync {tmp_path.name}"]


def test_lines_of_batches_that_are_damaged_are_made_again(tmp_path, capfd):
    path, made = tmp_path / "lines.jsonl", []
    work = lambda batch: made.append(batch) or [[x, f"\u2028{x}"] for x in batch]
    whole = by_batches(path, [[1, 2], [3], [4]], work)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"[3,", b"[7,"))
    made.clear()
    assert by_batches(path, [[1, 2], [3], [4]], work) == whole and made == [[3], [4]]
    assert path.read_bytes() == sound and "line 2 is damaged" in capfd.readouterr().err
    made.clear()
    assert by_batches(path, [[1], [2], [3, 4]], work) == whole and made == [[1], [2], [3, 4]]  # other batches


def test_a_sealed_file_says_when_a_digit_changed(tmp_path):
    write_sealed(tmp_path / "done.json", {"result": {"kl": 0.25}})
    assert read_sealed(tmp_path / "done.json") == {"result": {"kl": 0.25}}
    (tmp_path / "done.json").write_text((tmp_path / "done.json").read_text().replace("0.25", "0.26"))
    with pytest.raises(StageError, match="does not match its checksum"):
        read_sealed(tmp_path / "done.json")


@pytest.mark.parametrize(("count", "handed"), [(1, [1] * 10), (2, [8, 2])])
def test_ranks_wait_for_each_other_after_several_batches(tmp_path, monkeypatch, count, handed):
    together = []
    monkeypatch.setattr(files.ranks, "count", lambda: count)
    monkeypatch.setattr(files.ranks, "spread", lambda some, work: together.append(len(some)) or work(some))
    assert by_batches(tmp_path / "x.jsonl", [[number] for number in range(10)], list) == list(range(10))
    assert together == handed
