"""Videos with their frames in another order: made from features before pruning, and what is learnt from them."""

import json
from pathlib import Path

import pytest
import torch
from torch import tensor

from rlaif_lite import pipeline
from rlaif_lite.data.records import to_json
from rlaif_lite.errors import DataError, RecipeError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.pixels import to_pixels
from rlaif_lite.recipe import flatten, load_recipe
from rlaif_lite.rl.advantages import needs_order
from rlaif_lite.stages.dpo.altered import OtherVideo, altered_prompts, draw_videos
from rlaif_lite.stages.features import encode
from rlaif_lite.video.altered import altered
from rlaif_lite.video.decode import View, decode_views
from rlaif_lite.workspace import Workspace

RECIPES = Path(__file__).parent.parent / "recipes"


def frames(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that say their frame's number, at times that are not equally far apart."""
    return torch.arange(float(count)).view(1, count, 1, 1).expand(2, count, 3, 4), torch.arange(count).double() ** 2


def test_the_orders_by_hand():
    features_LGPD, time_G = frames(5)
    turned, times = altered("reversed", features_LGPD, time_G, 0)
    assert turned[1, :, 2, 3].tolist() == [4, 3, 2, 1, 0] and torch.equal(times, time_G)
    kept, times = altered("dropped", features_LGPD, time_G, 0)
    assert kept.shape == (2, 3, 3, 4) and times.tolist() == [number**2 for number in kept[0, :, 0, 0].tolist()]
    assert kept[0, :, 0, 0].tolist() == sorted(kept[0, :, 0, 0].tolist())
    with pytest.raises(ValueError, match="'upside down'"):
        altered("upside down", features_LGPD, time_G, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shuffled_frames_are_all_there_and_never_in_order(count):
    features_LGPD, time_G = frames(count)
    orders = [altered("shuffled", features_LGPD, time_G, seed)[0][0, :, 0, 0].tolist() for seed in range(50)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count == 1 or list(range(count)) not in orders
    assert count < 3 or len(set(map(tuple, orders))) > 2


@pytest.mark.parametrize("chain", [[], [{"pool": 1}], [{"evs": 0.5}], [{"st_mean": True}]], ids=str)
def test_an_altered_video_is_what_the_tower_would_make_of_its_frames(load, world, chain):
    """Frames reversed before the tower and features reversed after it are pruned to the same tokens."""
    base = load(tower=True)
    found = decode_views(world / "videos/test/00000.mp4", {"video": View(6)}, size=base.images.size.of(6))
    view = found["video"]
    ours = encode(base, found, chain, ["video", "video~reversed"])
    turned = view._replace(rgb_THWC=view.rgb_THWC[::-1].copy())
    theirs = encode(base, {"video": turned}, chain)["video"]
    assert to_pixels(turned.rgb_THWC, base.images).shape[0] == 6
    torch.testing.assert_close(ours["video~reversed"].features_KD, theirs.features_KD, atol=1e-5, rtol=1e-4)
    for name in ("position_CK", "frame_K", "time_T", "kept_R"):
        assert torch.equal(getattr(ours["video~reversed"], name), getattr(theirs, name)), name
    assert not torch.equal(ours["video"].features_KD, theirs.features_KD)


# ---- the evaluation, on in every run


def test_every_run_says_how_much_the_order_matters(finished):
    order = json.loads((Path(finished.output) / "summary.json").read_text())["order"]
    assert set(order) == {"sft", "ppo"}
    for found in order.values():
        assert found["metric"] == "f1" and 0 <= found["changed"] <= 1
        assert found["change"]["delta"] == pytest.approx(found["shuffled"] - found["ordered"])
    rows = read_jsonl(Path(finished.output) / "evaluate/order/ppo.shuffled.jsonl")
    assert len(rows) == 8 and rows[0]["mode"] == "shuffled"
    assert "With the frames shuffled" in (Path(finished.output) / "report.html").read_text(encoding="utf-8")


def test_shuffled_features_are_cached_for_the_test_videos_alone(finished):
    work = Workspace(finished)
    test, rl = work.records("test")[0], work.records("rl")[0]
    own, other = work.features(test).features_KD, work.features(test, "shuffled").features_KD
    frames_TPD, others_TPD = own.unflatten(0, (6, 4)), other.unflatten(0, (6, 4))
    places = [next(i for i in range(6) if torch.equal(frame, frames_TPD[i])) for frame in others_TPD]
    assert sorted(places) == list(range(6)) != places
    assert set(work.views(rl)) == {"video"}


# ---- T-GRPO


def test_who_earns_the_bonus_by_hand():
    """Means .5, .25 and .75 against .5, .5 and .9: the second is under .8 of the shuffled one. At .8 it counts."""
    ordered_B = tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.5, 0.4, 0.4])
    shuffled_J = tensor([0.5, 0.5, 0.9, 0.5])
    assert needs_order(ordered_B, shuffled_J, 2).tolist() == [True, False, False, False, True, True, True, True]
    assert needs_order(tensor([0.4, 0.4]), tensor([0.51]), 2).tolist() == [False, False]
    assert needs_order(tensor([0.1, 0.2]), tensor([0.0]), 2).tolist() == [False, True]


def test_a_run_with_the_bonus(rerun, tmp_path):
    work = Workspace(rerun())
    lines = [to_json(r) | {"solution": "first a red circle"} for r in work.records("rl")]
    (tmp_path / "rl.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    keys = {"feedback": "rules", "rules.rewards": "[{rule: rouge}]", "order_bonus": 0.3, "value": "none",
            "baseline": "group", "group_size": 4, "steps": 2, "stop_penalty": 0.0}  # fmt: skip
    overrides = [f"ppo.{key}={value}" for key, value in keys.items()]
    pipeline.run(rerun(*overrides, f"data.rl=[{tmp_path / 'rl.jsonl'}]", "evaluate.roles=[]"))
    steps = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    for step in steps:
        want = step["rules/rouge"] + 0.3 * step["order/bonus"]
        assert step["objective/scores"] == pytest.approx(want, abs=1e-6)
        assert step["order/accuracy"] == pytest.approx(step["rules/rouge"], abs=1e-6)
    assert any(step["order/shuffled"] != step["order/accuracy"] for step in steps)


def test_the_recipe_is_video_r1s_with_the_bonus_alone():
    r1, t_grpo = (flatten(load_recipe(RECIPES / f"tiny_{name}.yaml")) for name in ("video_r1", "t_grpo"))
    assert {key for key in r1 if r1[key] != t_grpo[key]} == {"name", "output", "ppo.order_bonus"}


# ---- VDPO

VDPO = ("method=dpo", "data.preference=[world:policy_init]", "preference.context=false", "dpo.balance_lengths=false",
        "dpo.steps=2", "dpo.batch_size=4", "dpo.heldout=0.3", "evaluate.temperatures=[]")  # fmt: skip


def test_vdpo_learns_from_the_datas_answers_on_altered_videos(rerun):
    recipe = rerun(*VDPO, "dpo.altered=[shuffled, reversed, dropped, other]")
    summary = pipeline.run(recipe)
    work = Workspace(recipe)
    pairs = read_jsonl(work.stage("dpo") / "round1/pairs.jsonl")
    records = {r.key: r for r in work.records("preference")}
    for pair in pairs:
        assert pair["chosen"] == pair["rejected"] == records[pair["record"]].answer
        assert (pair["other"]["record"] != pair["record"]) == (pair["other"]["kind"] == "")
    assert (
        not (work.folder / "dpo/round1/answers.jsonl").exists()
        and not (work.folder / "dpo/round1/judged.jsonl").exists()
    )
    rounds = summary["dpo"]["rounds"]
    assert [0 <= row["heldout_score"] <= 1 for row in rounds] == [True, True] and rounds[1]["steps"] == 2
    assert summary["dpo"]["judge"] == "altered" and "rounds of DPO" in (work.folder / "report.html").read_text()


def test_the_rejected_answer_reads_the_other_video(rerun):
    recipe = rerun(*VDPO, "dpo.altered=[reversed, other]")
    pipeline.run(recipe, until="features")
    work = Workspace(recipe)
    records = work.records("preference")
    own, turned = altered_prompts(work, records[0], OtherVideo(records[0], "reversed"))
    assert own.ids_S == turned.ids_S and not torch.equal(own.features_KD, turned.features_KD)
    assert torch.equal(turned.features_KD, work.features(records[0], "reversed").features_KD)
    _, other = altered_prompts(work, records[0], OtherVideo(records[1], ""))
    assert torch.equal(other.features_KD, work.features(records[1]).features_KD)
    assert draw_videos(work, records, 1) == draw_videos(work, records, 1) != draw_videos(work, records, 2)


def test_another_video_takes_another_video(rerun, tmp_path):
    """Held out there may be one video: the others are those of all records. With one video in all there is no other."""
    recipe = rerun(*VDPO, "dpo.altered=[other]")
    pipeline.run(recipe, until="data")
    work = Workspace(recipe)
    first, *_ = records = work.records("preference")
    (drawn,) = draw_videos(work, [first], "heldout")
    assert drawn.record in records[1:]
    same = [to_json(r) | {"video": first.video, "id": f"q{i}"} for i, r in enumerate(records[:3])]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in same), encoding="utf-8")
    work = Workspace(rerun(*VDPO, "dpo.altered=[other]", f"data.preference=[{tmp_path / 'one.jsonl'}]"))
    with pytest.raises(DataError, match="all 3 records are about one video, .*00000.mp4. Give records of other videos"):
        draw_videos(work, work.records("preference")[:1], 1)


def test_what_has_no_answer_is_named(rerun):
    with pytest.raises(DataError, match=r"records have no answer or no video, the first .*preference.jsonl"):
        pipeline.run(rerun(*VDPO, "data.preference=[world:preference]", "dpo.altered=[other]"), until="dpo")


@pytest.mark.parametrize(
    "keys, message",
    [
        (["ppo.order_bonus=0.3"], "ppo.order_bonus.*Set ppo.feedback to rules"),
        (["method=dpo", "dpo.altered=[other]"], "dpo.balance_lengths.*compares videos"),
        (["method=dpo", "dpo.altered=[upside_down]"], "dpo.altered"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(recipe, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe(*keys)
