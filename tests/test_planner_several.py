"""The plan of several ranks: a rank's share of memory, bytes and seconds of the all-reduces, the serial rest."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.bench import many_cards as tables
from rlaif_lite.cli import app
from rlaif_lite.errors import RecipeError, StageError
from rlaif_lite.planner import make_plan
from rlaif_lite.planner.rates import SERIAL
from rlaif_lite.planner.several import LINKS, all_reduce_seconds, link_of, of_one_rank, on_ranks
from rlaif_lite.planner.stages import Phase
from rlaif_lite.recipe import load_recipe

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "recipes" / "tiny.yaml")


def test_seconds_of_an_all_reduce_by_hand():
    """160 MB among 8: each is sent 2 * 7/8 = 1.75 times, 280 MB over 0.8 * 32 GB/s: 10.9 ms. Of 2 ranks once."""
    assert all_reduce_seconds(160e6, 8, LINKS["pcie"]) == pytest.approx(280e6 / 25.6e9)
    assert all_reduce_seconds(160e6, 2, LINKS["100gb"]) == pytest.approx(160e6 / 10e9)
    assert all_reduce_seconds(160e6, 1, LINKS["nvlink"]) == 0.0
    with pytest.raises(RecipeError, match="--link token-ring.*nvlink, pcie, 100gb"):
        link_of("token-ring")


def test_a_stage_on_four_ranks_by_hand(monkeypatch):
    """100 s, 10 of them serial: 10 + 90 / 4 = 32.5 s, and 50 updates of 0.8 GB, each 1.5 * 0.8 / 25.6 s."""
    monkeypatch.setitem(SERIAL, "ppo", 0.1)
    found = on_ranks("ppo", 100.0, [(30, 800_000_000), (20, 800_000_000)], 4, LINKS["pcie"])
    assert found.updates == 50 and found.bytes == 40_000_000_000
    assert found.exchange_seconds == pytest.approx(50 * 1.2 / 25.6) and found.seconds == pytest.approx(32.5 + 2.34375)
    assert on_ranks("data", 7.0, [], 4, LINKS["pcie"]).seconds == 7.0  # rank 0 alone draws the world
    assert on_ranks("ppo", None, [(1, 8)], 4, LINKS["pcie"]).seconds is None


def test_a_rank_has_its_share_of_a_batch_and_no_less_of_what_is_not_shared():
    """Of 48 rows in micro-batches of 16 one of four ranks has 12; of 5 one of two has 3."""
    phase = Phase("update", "ppo.micro_batch", 16, 48, lambda rows: {"activations": rows})
    assert of_one_rank(phase, 4, ("ppo.micro_batch",))[2:4] == (12, 12)
    assert of_one_rank(phase._replace(rows=5, most=5), 2, ("ppo.micro_batch",))[2:4] == (3, 3)
    assert of_one_rank(phase, 4, ("sft.easy.micro_batch",)) == phase == of_one_rank(phase, 1, ("ppo.micro_batch",))


def test_the_demo_on_two_ranks():
    """PPO: 20 steps of 2 epochs of 2 minibatches, for the policy and for the critic with its head of the base's width.
    SFT: 100 + 120 + 20 steps. All in float32."""
    recipe = load_recipe(TINY, ["device=cpu"])
    one, two = (make_plan(recipe, cards=cards) for cards in (1, 2))
    assert all(stage.several is None for stage in one.stages.values())
    adapter = one.stages["ppo"].terms["adapters"] // 4  # of four roles
    ppo, sft, reward = (two.stages[name].several for name in ("ppo", "sft", "reward"))
    width = (ppo.bytes // 80 - 2 * adapter) // 4
    assert ppo.updates == 160 and ppo.bytes == 80 * (2 * adapter + 4 * width) and 0 < width < 1000
    assert sft.updates == 240 and sft.bytes == 240 * adapter
    assert reward.bytes == reward.updates * (adapter + 4 * width)
    assert two.device.memory == one.device.memory // 2 and two.recipe == one.recipe
    for name in ("reward", "ppo"):  # in one process the whole batch goes through at once
        assert two.stages[name].terms["activations"] < one.stages[name].terms["activations"]
    assert two.stages["data"].several.seconds == one.stages["data"].seconds
    assert one.stages["ppo"].seconds / 2 < ppo.seconds < one.stages["ppo"].seconds


def test_auto_is_the_same_for_any_number_of_ranks():
    recipe = load_recipe(TINY, ["device=cpu", "ppo.micro_batch=auto"])
    assert make_plan(recipe, cards=4).recipe == make_plan(recipe, cards=1).recipe


def test_the_command_shows_it_and_refuses_what_cannot_be():
    result = CliRunner().invoke(app, ["plan", TINY, "--gpus", "4", "--link", "nvlink", "--json"])
    found = json.loads(result.output)
    assert (
        found["ranks"] == 4
        and found["link"]["bandwidth"] == 300e9
        and found["stages"]["sft"]["several"]["updates"] == 240
    )
    shown = CliRunner().invoke(app, ["plan", TINY, "--gpus", "4"]).output
    assert "Time, 4 ranks" in shown and "PCIe 4.0 x16" in shown
    keys = ["ppo.value=none", "ppo.baseline=group", "ppo.group_size=8"]
    refused = CliRunner().invoke(app, ["plan", TINY, *keys, "--gpus", "5"])
    assert refused.exit_code == 2 and "5 ranks do not divide the 12 groups" in refused.output
    with pytest.raises(StageError, match="multiple of 40"):
        make_plan(load_recipe(TINY, keys), cards=5)


# ------------------------------------------------------------------------------------------------------------- the docs


def test_the_longest_of_some_answers_by_hand():
    """Exponential lengths of mean 1 without a cap: 1 + 1/2 + 1/3 for three. With a cap of ln 2 half of all are cut:
    1/2 + 1/8 for two."""
    assert tables.longest(3, cap=50.0) == pytest.approx(11 / 6)
    assert tables.longest(2, cap=math.log(2)) == pytest.approx(5 / 8)


def test_the_page_shows_what_the_formulas_give():
    page = (ROOT / "docs" / "many_cards.md").read_text(encoding="utf-8")
    assert tables.exchange_table() in page and tables.straggler_table() in page
    assert f"{tables.update_seconds():.2f} s" in page
    assert tables.adapter_bytes(16) == 4 * 32 * 16 * (4 * 8192 + 3 * 15104)
