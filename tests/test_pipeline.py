"""A whole run on a random base: what is skipped, what is stale and why, the lock, the summary, the files others
read."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from core import VIDEOS, small_recipe
from rlaif_lite import pipeline
from rlaif_lite.errors import StageError
from rlaif_lite.files import by_batches, read_json, read_jsonl, write_jsonl
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import flatten, load_recipe
from rlaif_lite.workspace import Workspace

STAGES = ["data", "features", "sft", "context", "preference", "reward", "ppo", "evaluate"]


def summary_of(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "summary.json").read_text())


# ---- what a run leaves


def test_the_summary_keeps_the_contract(finished):
    """The names of design.md: other programs read them."""
    summary = summary_of(finished.output)
    assert (summary["recipe"], summary["seed"], summary["device"], summary["finished"]) == ("test", 3, "cpu", True)
    assert len(summary["recipe_hash"]) == 12 and {"torch", "transformers", "peft"} <= summary["versions"].keys()
    assert list(summary["stages"]) == STAGES
    for stage in summary["stages"].values():
        assert stage["status"] == "done" and stage["seconds"] > 0 and stage["peak_memory_bytes"] > 1e7
        assert "planned_memory_bytes" in stage
    for role in ("base", "sft", "reference", "ppo"):
        table = summary["evaluation"][role]
        for mode in ("greedy", "sample"):
            assert {
                f"{mode}_{name}" for name in ("precision", "recall", "f1", "hallucination", "length")
            } <= table.keys()
    assert "sample_f1" in summary["evaluation"]["sft@0.5"]  # sharpening alone, beside it
    assert {"delta", "low", "high"} <= summary["evaluation_intervals"]["ppo-sft"]["greedy_hallucination"].keys()
    preference = summary["preference"]
    assert preference["pairs"] > 0 and 0 <= preference["judge_agreement_with_truth"] <= 1
    assert 0 <= preference["judge_agreement_without_context"] <= 1 and 0 <= preference["position_consistency"] <= 1
    assert 0 <= summary["reward"]["heldout_accuracy"] <= 1
    assert summary["ppo"]["kl_start"] == 0 and {"kl_end", "reward_start", "reward_end"} <= summary["ppo"].keys()
    sizes = summary["ppo"]["roles"]
    assert set(sizes) == {"policy", "reference", "reward", "value"} and all(
        size["bytes"] > 0 for size in sizes.values()
    )


def test_the_base_is_the_same_before_and_after(finished, load):
    assert summary_of(finished.output)["ppo"]["base_fingerprint"] == load().fingerprint()


def test_every_role_loads_with_plain_peft(finished, checkpoint):
    folders = sorted(path for path in (Path(finished.output) / "adapters").iterdir())
    assert [f.name for f in folders] == ["policy", "reference", "reward", "sft", "value"]
    ids_BS = torch.tensor([[1, 17, 18, 20, 6]])
    for folder in folders:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        with torch.no_grad():
            plain_BSV = model(input_ids=ids_BS).logits
            adapted_BSV = PeftModel.from_pretrained(model, folder)(input_ids=ids_BS).logits
        assert (adapted_BSV - plain_BSV).abs().max() > 1e-4, folder.name
        assert (folder / "head.safetensors").exists() == (folder.name in ("reward", "value"))


def test_the_folder(finished):
    folder = Path(finished.output)
    on_a_cpu = {"model.dense_rollouts": True}  # what `auto` is there
    assert flatten(load_recipe(folder / "recipe.yaml")) == flatten(finished) | on_a_cpu
    assert (folder / "report.html").stat().st_size > 1000
    stages = {line["stage"] for line in read_jsonl(folder / "metrics.jsonl")}
    assert stages == {"sft.easy", "sft.hard", "sft.policy_init", "reward", "ppo"}
    left = [
        path
        for path in folder.rglob("*")
        if path.name == "checkpoint" or ".tmp" in path.name or path.suffix in (".pt", ".pkl", ".bin")
    ]
    assert not left  # and never a pickle
    narratives = json.loads((folder / "context" / "narratives.json").read_text())
    assert len(narratives) == VIDEOS
    rows = [row for line in read_jsonl(folder / "context" / "captions.jsonl") for row in line["results"]]
    for row in rows:  # a caption without a word goes with its marker
        for marker, caption in zip(("first", "then", "finally"), row["captions"], strict=True):
            said = f"{marker} {caption}" in narratives[row["video"]]
            assert said == any(character.isalnum() for character in caption)
    released = json.loads((folder / "preference" / "pairs.json").read_text())
    assert {"id", "video", "conversations", "output_1", "output_2", "preference"} <= released[0].keys()
    own = read_jsonl(folder / "preference" / "pairs.jsonl")
    for theirs, ours in zip(released, own, strict=True):
        assert theirs["id"] == ours["key"] and theirs["conversations"][0]["value"] == "<video>\ndescribe the video"
        assert theirs[f"output_{theirs['preference']}"]["value"] == ours["chosen"] != ours["rejected"]
        assert (theirs["score_gap"] > 0) == (theirs["preference"] == 1) and ours["margin"] == abs(
            theirs["score_gap"]
        ) > 0
        for answer, said in zip((ours["chosen"], ours["rejected"]), ours["said"], strict=True):
            assert all(claim in answer and 0 <= yes + no <= 1.0001 for claim, yes, no in said)
    by_judge = {(row["judge"], row["context"]): row for row in read_json(folder / "preference" / "judgements.json")}
    assert by_judge["claims", True]["same_winner"] == 1.0  # the labelling judge itself
    assert all(0 <= row["same_winner"] <= 1 for row in by_judge.values()) and len(by_judge) == 4
    held = read_jsonl(folder / "reward" / "heldout.jsonl")
    assert {(row["key"], row["chosen"], row["rejected"]) for row in held} <= {
        (row["key"], row["chosen"], row["rejected"]) for row in own
    }
    accuracy = json.loads((folder / "summary.json").read_text())["reward"]["heldout_accuracy"]
    assert sum(row["gap"] > 0 for row in held) / len(held) == accuracy


def test_evaluation_answers_every_video_once_per_role(finished):
    folder = Path(finished.output) / "evaluate"
    ids = [f"test/{i:05d}" for i in range(VIDEOS)]
    for role in ("base", "sft", "reference", "ppo"):
        assert [row["id"] for row in read_jsonl(folder / f"{role}.greedy.jsonl")] == ids
        assert [row["id"] for row in read_jsonl(folder / f"{role}.sample@1.jsonl")] == [
            i for i in ids for _ in range(2)
        ]
    assert (folder / "sft.sample@0.5.jsonl").exists()
    assert [e["id"] for e in json.loads((folder / "examples" / "index.json").read_text())] == ids[:2]


def test_runs_with_the_same_seed_are_the_same_run(finished, rerun, tmp_path):
    """Checkpointed at other steps, in another folder: the same bits. (`test_resume` has a whole run of its own.)"""
    recipe = rerun("ppo.checkpoint_every=3")
    for left in ("ppo", "adapters/policy", "adapters/value"):
        shutil.rmtree(tmp_path / "run" / left)
    pipeline.run(recipe, until="ppo")
    for role in ("policy", "value"):
        for file in (Path(finished.output) / "adapters" / role).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "run" / "adapters" / role / file.name).read_bytes(), (
                role,
                file.name,
            )


# ---- what is done, what is stale


class Ran:
    """Replaces the stages by stand-ins that note that they ran."""

    def __init__(self, monkeypatch):
        self.names: list[str] = []
        for name, stage in pipeline.STAGES.items():
            monkeypatch.setattr(stage, "run", self._note(name))
        monkeypatch.setattr(pipeline.page, "write", lambda folder: None)

    def _note(self, name):
        def run(work):
            self.names.append(name)
            done = json.loads((Path(work.recipe.output) / "kept" / f"{name}.json").read_text())
            return done["result"]

        return run

    def after(self, recipe) -> list[str]:
        """The stages that a run of `recipe` did not skip."""
        folder = Path(recipe.output)
        if not (folder / "kept").exists():
            (folder / "kept").mkdir()
            for name in STAGES:
                (folder / "kept" / f"{name}.json").write_text((folder / name / "done.json").read_text())
        self.names.clear()
        pipeline.run(recipe)
        return self.names.copy()


def test_a_second_run_skips_everything(rerun, monkeypatch, capsys):
    recipe = rerun()
    files = {path: path.read_bytes() for path in (Path(recipe.output) / "adapters").rglob("*.safetensors")}
    assert Ran(monkeypatch).after(recipe) == []
    said = capsys.readouterr().err
    assert all(f"{name}: done before, nothing it reads has changed" in said for name in STAGES)
    summary = summary_of(recipe.output)
    assert {stage["status"] for stage in summary["stages"].values()} == {"skipped"} and summary["finished"]
    assert summary["ppo"]["kl_start"] == 0  # its results are still there
    assert all(path.read_bytes() == data for path, data in files.items())


FROM = {name: STAGES[i:] for i, name in enumerate(STAGES)}


@pytest.mark.parametrize(
    "override, stale, why",
    [
        ("evaluate.samples=3", FROM["evaluate"], "`evaluate.samples` was 2 and is 3"),
        ("ppo.kl_coef=0.3", FROM["ppo"], "`ppo.kl_coef` was 0.1 and is 0.3"),
        ("reward.lr=0.01", FROM["reward"], "`reward.lr` was 0.001 and is 0.01"),
        ("preference.min_margin=0.1", FROM["preference"], "`preference.min_margin` was 0.0 and is 0.1"),
        ("context.max_new_tokens=4", FROM["context"], "`context.max_new_tokens` was 5 and is 4"),
        ("sft.hard.lr=0.01", FROM["sft"], "`sft.hard.lr` was 0.002 and is 0.01"),
        ("model.lora.rank=8", FROM["sft"], "`model.lora.rank` was 4 and is 8"),
        ("seed=4", FROM["sft"], "`seed` was 3 and is 4"),
        ("features.frames=4", FROM["features"], "`features.frames` was 6 and is 4"),
        ("data.world.dropout=0.2", FROM["data"], "`data.world.dropout` was"),
        ("reward.floor=0.01", FROM["ppo"], "`reward.floor` was 0.0 and is 0.01"),
        # where and how fast, not what
        ("ppo.checkpoint_every=1", [], ""),
        ("features.workers=2", [], ""),
        ("threads=2", [], ""),
        ("name=other", [], ""),
        ("model.gradient_checkpointing=true", [], ""),
    ],
)
def test_a_changed_key_makes_stale_what_depends_on_it(rerun, monkeypatch, capsys, override, stale, why):
    ran = Ran(monkeypatch)
    recipe = rerun(override)
    capsys.readouterr()
    checked = ["data"] if override.startswith("features.frames") else []  # records must fit into the context again
    assert ran.after(recipe) == checked + stale
    said = capsys.readouterr().err
    if stale:
        assert f"{stale[0]}: runs again, because {why}" in said
        for name in stale[1:]:
            assert f"{name}: runs again, because" in said and f"stage {stale[0]} ran again" in said
    assert ran.after(recipe) == []  # and then it is done again


def test_more_views_of_a_video_leave_the_training_on_whole_videos_alone(rerun, monkeypatch):
    overrides = ("reward.context=true", "reward.prompt='{context} {question}'")
    assert Ran(monkeypatch).after(rerun(*overrides)) == ["features", *FROM["context"]]


def test_other_frames_of_clips_make_stale_the_training_on_clips(rerun, monkeypatch):
    """The world's easy records are about clips too, whatever the narrative is made of."""
    recipe = rerun("features.clip_frames=4")
    assert any(record.clip is not None for record in Workspace(recipe).records("sft_easy"))
    assert Ran(monkeypatch).after(recipe) == FROM["features"]


def test_a_stale_stage_starts_from_nothing(rerun, monkeypatch):
    """What an older recipe left, its adapters too, is gone before the stage runs; cached features stay."""
    recipe = rerun("sft.hard.lr=0.01")
    folder = Path(recipe.output)
    cached = sorted((folder / "features" / "cache").iterdir())

    def look(work):
        assert sorted(p.name for p in (folder / "sft").iterdir()) == ["begun.json"]
        assert not (folder / "adapters" / "sft").exists() and not (folder / "adapters" / "reference").exists()
        assert (folder / "adapters" / "policy").exists()  # its turn has not come
        assert {line["stage"] for line in read_jsonl(folder / "metrics.jsonl")} == {"reward", "ppo"}
        assert (
            summary_of(folder)["ppo"] == {} and not summary_of(folder)["finished"]
        )  # what it once found is not this recipe's
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.STAGES["sft"], "run", look)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe)
    assert sorted((folder / "features" / "cache").iterdir()) == cached


def test_a_policy_of_another_method_is_not_taken_for_its_own(rerun, monkeypatch):
    """PPO, then DPO in the same folder, then PPO again: `adapters/policy` is DPO's by then."""
    ran = Ran(monkeypatch)
    recipe = rerun()
    folder = Path(recipe.output)
    assert ran.after(recipe) == []
    (folder / "kept" / "dpo.json").write_text(json.dumps({"result": {}}))
    assert ran.after(load_recipe(folder / "recipe.yaml", ["method=dpo"])) == ["dpo", "evaluate"]
    assert not (folder / "adapters" / "value").exists() and not (folder / "ppo" / "done.json").exists()
    assert "ppo" not in {line["stage"] for line in read_jsonl(folder / "metrics.jsonl")}
    assert ran.after(recipe) == ["ppo", "evaluate"]
    assert not (folder / "dpo" / "done.json").exists()


def test_a_world_of_another_seed_is_another_world(rerun):
    """Videos are not kept under their old names."""
    recipe = rerun("data.world.seed=6")
    folder = Path(recipe.output) / "data"
    before = {p.relative_to(folder): p.read_bytes() for p in (folder / "videos").rglob("*.mp4")}
    pipeline.run(recipe, until="data")
    after = {p.relative_to(folder): p.read_bytes() for p in (folder / "videos").rglob("*.mp4")}
    assert before.keys() == after.keys() and not any(before[name] == after[name] for name in before)


def test_a_changed_recipe_after_a_kill_in_the_middle_of_emptying(rerun, monkeypatch):
    """The marks go last: what is half removed is not taken for work that was begun under the new recipe."""
    recipe = rerun("context.max_new_tokens=4")
    folder = Path(recipe.output) / "context"
    (folder / "part").mkdir()
    removed = []
    unlink = Path.unlink

    def dying(path, **more):
        if path.parent == folder:
            removed.append(path.name)
            if len(removed) > 1:
                raise SystemExit("killed")
        unlink(path, **more)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(SystemExit):
        pipeline.run(recipe)
    monkeypatch.undo()
    assert (folder / "begun.json").exists() or (folder / "done.json").exists()
    ran = Ran(monkeypatch)
    (Path(recipe.output) / "kept").mkdir()
    for name in STAGES:
        (Path(recipe.output) / "kept" / f"{name}.json").write_text(json.dumps({"result": {}}))
    monkeypatch.setattr(pipeline, "write_summary", lambda *_, **__: None)
    monkeypatch.setattr(pipeline.page, "write", lambda _: None)
    (Path(recipe.output) / "summary.json").write_text("{}")
    pipeline.run(recipe, until="context")
    assert ran.names == ["context"] and sorted(p.name for p in folder.iterdir()) == [
        "begun.json",
        "done.json",
        "files.sha256",
    ]


def test_changed_files_make_stale_what_reads_them(checkpoint, world, tmp_path, monkeypatch):
    """A data file of one's own, and the base in its folder."""
    shutil.copytree(checkpoint, tmp_path / "base")
    shutil.copy(world / "test.jsonl", tmp_path / "own.jsonl")
    own = [f"model.base={tmp_path / 'base'}", f"data.test=[{tmp_path / 'own.jsonl'}]", f"data.video_root={world}"]
    own.append(f"data.folder={world}")  # the stages do nothing here, so the world is made already
    recipe = small_recipe(checkpoint, tmp_path, *own)
    monkeypatch.setattr(pipeline, "write_summary", lambda *_, **__: None)
    monkeypatch.setattr(pipeline.page, "write", lambda _: None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    ran: list[str] = []
    for name, stage in pipeline.STAGES.items():
        monkeypatch.setattr(stage, "run", lambda work, name=name: ran.append(name) or {})

    def after() -> list[str]:
        ran.clear()
        pipeline.run(recipe)
        return ran.copy()

    assert after() == STAGES and after() == []
    lines = (tmp_path / "own.jsonl").read_text().split("\n")
    (tmp_path / "own.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert after() == STAGES and after() == []
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert after() == STAGES and after() == []  # another base may not be able to write the answers


def test_a_folder_has_one_run_at_a_time(finished):
    with open(Path(finished.output) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StageError, match="Another run is going on in"):
            pipeline.run(finished)


def test_until_stops_after_a_stage(checkpoint, tmp_path):
    recipe = small_recipe(checkpoint, tmp_path)
    summary = pipeline.run(recipe, until="data")
    assert list(summary["stages"]) == ["data"] and not summary["finished"] and not (tmp_path / "run" / "sft").exists()
    with pytest.raises(StageError, match="no stage `pop`; the stages are data, features"):
        pipeline.run(recipe, until="pop")


# ---- results that arrive batch by batch


def test_batches_that_are_done_are_not_done_again(tmp_path):
    path, asked, counted = tmp_path / "parts.jsonl", [], []

    def work(batch):
        asked.append(batch)
        return [{"x": x, "third": x / 3, "text": "\u2028\u00e9"} for x in batch for _ in range(2)]  # several of an item

    whole = by_batches(path, [[1, 2], [3], [4, 5]], work, counted.append)
    assert (
        asked == [[1, 2], [3], [4, 5]] and counted == [2, 1, 2] and [row["x"] for row in whole[::2]] == [1, 2, 3, 4, 5]
    )
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(lines[0] + b"\n" + lines[1][:7])  # killed while writing the second line
    asked.clear(), counted.clear()
    assert by_batches(path, [[1, 2], [3], [4, 5]], work, counted.append) == whole
    assert asked == [[3], [4, 5]] and counted == [2, 1, 2] and path.read_bytes().split(b"\n") == lines
    assert by_batches(tmp_path / "none.jsonl", [], work) == []


def test_answers_with_strange_line_ends_survive(tmp_path):
    rows = [{"answer": "one\u2028two\u0085three\x0b"}, {"answer": "four\n"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_the_finished_base_is_a_plain_one(finished):
    """Nothing of a run is left on the base's folder."""
    assert (
        load_base(finished.model, torch.device("cpu"), tower=False).fingerprint()
        == summary_of(finished.output)["ppo"]["base_fingerprint"]
    )
