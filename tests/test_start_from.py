"""Recipes that start from what is there: an adapter, a trained reward role, preference pairs. All through
`pipeline.run`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import VIDEOS, shake, small_recipe
from rlaif_lite import pipeline
from rlaif_lite.data.readers import read_records
from rlaif_lite.errors import DataError, ModelError, RecipeError, StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.roles import Roles
from rlaif_lite.planner import make_plan
from rlaif_lite.recipe import Lora, check_files
from rlaif_lite.stages.reward import RewardInput, score_pairs
from rlaif_lite.workspace import Workspace

NO_PHASES = ("sft.easy=null", "sft.hard=null", "sft.policy_init=null")
WORDS = ("a red circle moves left .", "first a blue square moves up .")


@pytest.fixture(scope="module")
def start(load, tmp_path_factory) -> Path:
    """A folder with two roles on the random base, `sft` and `rm`, the latter with a head."""
    folder = tmp_path_factory.mktemp("start")
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    for seed, name in enumerate(("sft", "rm")):
        roles.add(name, seed=seed)
        if name == "rm":
            roles.add_head(name, zero=False, seed=7)
        shake(roles, name, seed=seed)
        roles.save(name, folder / name)
    return folder


@pytest.fixture
def given(checkpoint, world, tmp_path):
    """given(overrides, pairs=...) -> a recipe on a world's files and on pairs of the released shape, in a file beside
    them.

    The ids repeat, and one pair is no choice at all."""
    records = read_records(world / "preference.jsonl").records
    rows = [
        {
            "id": "same",
            "video": r.video,
            "preference": 1 + i % 2,
            "conversations": [
                {"from": "human", "value": f"<video>\nwhat is there {i} ?"},
                {"from": "gpt", "value": "stand-in"},
            ],
            **{f"output_{n + 1}": {"from": "llm", "value": text} for n, text in enumerate(WORDS)},
        }
        for i, r in enumerate(records)
    ]
    rows[-1]["output_1"] = rows[-1]["output_2"]

    def make(*overrides: str, pairs: list[dict] = rows):
        (tmp_path / "pairs.json").write_text(json.dumps(pairs))
        files = [
            f"data.{name}=[{world / name}.jsonl]" for name in ("sft_easy", "sft_hard", "policy_init", "rl", "test")
        ]
        own = [*files, "data.world=null", "data.preference=[]", f"data.pairs=[{tmp_path / 'pairs.json'}]"]
        return small_recipe(
            checkpoint, tmp_path, *own, "ppo.steps=1", "sft.easy.steps=1", "sft.hard.steps=1", *overrides
        )

    return make


def done(recipe, stage: str) -> dict:
    return json.loads((Path(recipe.output) / stage / "done.json").read_text())["result"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- everything given: an imported policy, an imported reward model, their pairs


def test_from_released_parts_to_ppo(given, start):
    recipe = given(f"sft.adapter={start / 'sft'}", f"reward.adapter={start / 'rm'}", *NO_PHASES)
    check_files(recipe)
    summary = pipeline.run(recipe)
    folder = Path(recipe.output)
    for role, source in (("sft", "sft"), ("reference", "sft"), ("reward", "rm")):
        assert same(weights(folder / "adapters" / role), weights(start / source)), role
    assert (folder / "adapters/reward/head.safetensors").read_bytes() == (start / "rm/head.safetensors").read_bytes()
    assert {line["stage"] for line in read_jsonl(folder / "metrics.jsonl")} == {"ppo"}  # nothing else was trained
    assert not same(weights(folder / "adapters" / "policy"), weights(start / "sft"))
    assert summary["finished"] and summary["ppo"]["kl_start"] == 0

    # nothing sampled, judged or narrated
    assert sorted(p.name for p in (folder / "preference").iterdir()) == [
        "begun.json",
        "done.json",
        "files.sha256",
        "pairs.json",
    ]
    assert json.loads((folder / "context" / "narratives.json").read_text()) == {}
    assert summary["preference"] == {"source": "given", "pairs": VIDEOS - 1, "dropped": 1, "judges": []}
    page = (folder / "report.html").read_text()
    assert "given with the recipe" in page and "The judge" not in page
    # and what is written can be given again
    again = read_records(folder / "preference" / "pairs.json").records
    assert [r.prompt[0].content for r in again] == [f"<video>\nwhat is there {i} ?" for i in range(VIDEOS - 1)]
    assert [(r.chosen, r.rejected) for r in again] == [(WORDS[i % 2], WORDS[1 - i % 2]) for i in range(VIDEOS - 1)]

    # all pairs are held out: counted one by one from the imported role itself
    work = Workspace(recipe)
    work.roles.load("reward", start / "rm")
    layout, right = RewardInput(work), 0
    records = [r for r in work.records("preference") if r.chosen != r.rejected]
    for r in records:
        with torch.no_grad(), work.roles.use("reward") as role:
            chosen, rejected = score_pairs(layout, role, [(r, r.chosen, r.rejected)])[0].tolist()
        right += chosen > rejected
    reward = summary["reward"]
    assert (reward["train_pairs"], reward["heldout_pairs"], reward["steps"]) == (0, VIDEOS - 1, 0)
    assert reward["heldout_accuracy"] == right / (VIDEOS - 1)


def test_training_goes_on_from_an_adapter_and_on_given_pairs(given, start):
    """Three steps of at most 1e-6 away from the adapter; the reward role learns the pairs, some videos held out."""
    recipe = given(f"sft.adapter={start / 'sft'}", *NO_PHASES, "sft.easy={steps: 3, lr: 1.0e-6, batch_size: 4}")
    pipeline.run(recipe, until="reward")
    folder = Path(recipe.output)
    moved, source = weights(folder / "adapters" / "sft"), weights(start / "sft")
    assert 0 < max((moved[key] - value).abs().max().item() for key, value in source.items()) < 1e-5
    assert same(moved, weights(folder / "adapters" / "reference"))
    reward = done(recipe, "reward")
    assert reward["train_pairs"] + reward["heldout_pairs"] == VIDEOS - 1 and reward["train_pairs"] > 0
    assert [line["stage"] for line in read_jsonl(folder / "metrics.jsonl")] == ["sft.easy"] * 3 + ["reward"] * 3


def test_a_floor_that_was_not_measured_is_not_passed(given, start):
    """A reward role without any pairs: refused by the check of the recipe and by PPO, unless the floor is 0."""
    parts = (f"sft.adapter={start / 'sft'}", f"reward.adapter={start / 'rm'}", "data.pairs=[]", *NO_PHASES)
    recipe = given(*parts, "reward.floor=0.5")
    with pytest.raises(RecipeError, match="data.preference.*is empty.*give `data.pairs`, or set `reward.floor: 0`"):
        check_files(recipe)
    with pytest.raises(StageError, match=r"`reward.floor: 0.5` cannot be checked: there are no pairs"):
        pipeline.run(recipe)
    assert done(recipe, "reward")["heldout_accuracy"] is None and done(recipe, "preference")["source"] == "none"
    recipe = given(*parts, "evaluate.roles=[]")
    check_files(recipe)
    assert pipeline.run(recipe)["ppo"]["steps"] == 1
    assert "The reward model was given and not measured" in (Path(recipe.output) / "report.html").read_text()


def test_given_pairs_have_narratives_where_the_reward_role_reads_them(given, start, world, tmp_path):
    """And a pair whose video cannot be read is left out with it, as everywhere."""
    shutil.copytree(world / "videos", tmp_path / "world" / "videos")
    (tmp_path / "world" / "videos" / "preference" / "00001.mp4").write_bytes(b"")
    told = ("reward.context=true", "reward.prompt='{context} response :'", "data.on_missing=skip")
    recipe = given(f"sft.adapter={start / 'sft'}", *told, *NO_PHASES)
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    for row in pairs:
        row["video"] = row["video"].replace(str(world), str(tmp_path / "world"))
    pairs[2]["video"] += ".gone"
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    summary = pipeline.run(recipe, until="preference")
    assert (summary["features"]["unreadable"], summary["features"]["missing"]) == (1, 1)
    assert summary["preference"]["pairs"] == VIDEOS - 3  # and one is no choice
    assert done(recipe, "context")["videos"] == 2 * VIDEOS - 2  # of the pairs, and of PPO
    with pytest.raises(DataError, match="(?s)data.pairs: 1 records have a video that is not there.*00002.mp4.gone"):
        pipeline.run(
            small_recipe(
                Path(recipe.model.base),
                tmp_path,
                "data.world=null",
                "output=" + str(tmp_path / "other"),
                *(f"data.{name}=[]" for name in ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")),
                f"data.pairs=[{tmp_path / 'pairs.json'}]",
            ),
            until="data",
        )


# ---- what is refused


@pytest.mark.parametrize(
    "overrides, said",
    [
        (
            ["sft.adapter={start}/sft", "model.lora.rank=8"],
            r"`sft.adapter` \(override `sft.adapter=.*\) names .*, whose rank is 4, but "
            r"`model.lora.rank` \(override `model.lora.rank=8`\) is 8",
        ),
        (["sft.adapter={start}/sft", "model.lora.alpha=16"], "whose alpha is 8.0, but `model.lora.alpha` .* is 16.0"),
        (
            ["reward.adapter={start}/rm", "model.lora.targets=[q_proj]"],
            r"whose targets is \['down_proj', .*\], but .* is \['q_proj'\]",
        ),
        (["sft.adapter={start}/gone"], "lacks adapter_config.json, adapter_model.safetensors. `rlaif-lite import`"),
        (["reward.adapter={start}/sft"], "`reward.adapter` .* lacks head.safetensors"),
        (["sft.adapter={start}/sft", "output={start}"], "inside this run's own folder"),
        (["data.pairs=[nowhere.json]"], r"`data.pairs\[0\]` .* names nowhere.json, which is not a file"),
    ],
)
def test_what_cannot_be_started_from_is_refused_by_line(given, start, overrides, said):
    with pytest.raises(RecipeError, match=said):
        check_files(given(*(override.format(start=start) for override in overrides)))


def test_a_file_that_is_no_adapter_is_refused(given, start, tmp_path):
    shutil.copytree(start / "sft", tmp_path / "pointer")
    (tmp_path / "pointer" / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RecipeError, match="is no LoRA adapter that can be read"):
        check_files(given(f"sft.adapter={tmp_path / 'pointer'}"))


def test_an_adapter_with_layers_that_the_base_has_not(roles, start, tmp_path):
    shutil.copytree(start / "sft", tmp_path / "deeper", ignore=shutil.ignore_patterns("files.sha256"))
    tensors = weights(start / "sft")
    key = next(key for key in tensors if ".layers.0." in key)
    save_file(
        {**tensors, key.replace(".layers.0.", ".layers.9."): tensors[key].clone()},
        tmp_path / "deeper" / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"layers\.9\..*has no place on this base"):
        roles.load("sft", tmp_path / "deeper")


def test_pairs_and_prompts_are_not_both_given_and_pairs_are_pairs(given, world):
    with pytest.raises(RecipeError, match="`data.pairs` .* stands beside data.preference"):
        given(f"data.preference=[{world / 'rl.jsonl'}]")
    with pytest.raises(DataError, match="data.pairs: 8 records hold no pair, the first rl.jsonl#0"):
        pipeline.run(given(f"data.pairs=[{world / 'rl.jsonl'}]"), until="data")


# ---- the plan, and what is stale


def test_the_plan_of_given_parts_takes_less(given, start):
    check_files(given())  # data.preference is not asked for
    trained, used = make_plan(given()), make_plan(given(f"reward.adapter={start / 'rm'}", *NO_PHASES))
    assert used.stages["preference"].phase == used.stages["context"].phase == ""
    for stage in ("sft", "reward"):
        assert {"optimizer", "gradients"} <= trained.stages[stage].terms.keys() and used.stages[stage].fits
        assert not {"optimizer", "gradients"} & used.stages[stage].terms.keys()


def test_changed_parts_make_stale_what_depends_on_them(given, start, tmp_path, monkeypatch, capsys):
    parts = tmp_path / "parts"
    shutil.copytree(start, parts)
    recipe = given(f"sft.adapter={parts / 'sft'}", f"reward.adapter={parts / 'rm'}")
    monkeypatch.setattr(pipeline, "write_summary", lambda *_, **__: None)
    ran: list[str] = []
    for name, stage in pipeline.STAGES.items():
        monkeypatch.setattr(stage, "run", lambda work, name=name: ran.append(name) or {})

    def after() -> list[str]:
        ran.clear()
        (Path(recipe.output) / "summary.json").write_text("{}")
        monkeypatch.setattr(pipeline.page, "write", lambda _: None)
        pipeline.run(recipe)
        return ran.copy()

    Path(recipe.output).mkdir()
    stages = list(recipe.stages)
    assert after() == stages and after() == []
    for path, stale in (
        (parts / "rm" / "head.safetensors", stages[stages.index("reward") :]),
        (parts / "sft" / "adapter_model.safetensors", stages[stages.index("sft") :]),
        (tmp_path / "pairs.json", stages),
    ):
        capsys.readouterr()
        path.write_bytes(path.read_bytes() + b" ")
        assert after() == stale and after() == [], path
        assert f"{stale[0]}: runs again, because" in capsys.readouterr().err
    kept = Path(recipe.output) / "adapters" / "sft"
    kept.mkdir(parents=True)
    shutil.move(parts / "sft", parts / "moved")
    with pytest.raises(StageError, match="There is no adapter in .*/parts/sft"):
        after()
    assert kept.exists()  # what was made from it is not thrown away
