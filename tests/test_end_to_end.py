"""The whole method on a smaller world, through the command line's door: it must really improve the model."""

import json
from pathlib import Path

import pytest
import torch

from rlaif_lite import pipeline
from rlaif_lite.model.base import load_base
from rlaif_lite.recipe import load_recipe

SMALL = [
    "data.world={seed: 77, sft: 160, preference: 130, rl: 100, test: 60, dropout: 0.33, workers: 1}",
    "features.workers=1",
    "threads=1",
    "sft.easy.steps=30",
    "sft.hard.steps=60",
    "sft.policy_init.steps=4",
    "preference.samples=4",
    "preference.compare_pairs=40",
    "ppo.steps=8",
    "ppo.rollouts=64",
    "ppo.minibatch=32",
    "evaluate.temperatures=[0.5]",
    "evaluate.roles=[sft, reference, policy]",
    "evaluate.bootstrap=500",
    "evaluate.examples=2",
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    recipes = Path(__file__).parent.parent / "recipes"
    recipe = load_recipe(recipes / "tiny.yaml", [*SMALL, f"output={tmp_path_factory.mktemp('run')}"])
    base = load_base(recipe.model, torch.device("cpu"), tower=False)
    return recipe, base.fingerprint(), pipeline.run(recipe)


@pytest.mark.slow
def test_feedback_improves_the_model_on_held_out_videos(run_of):
    _, _, summary = run_of
    change = summary["evaluation_intervals"]["ppo-sft"]["sample_hallucination"]
    assert change["high"] < 0, change
    assert summary["evaluation"]["ppo"]["sample_f1"] > summary["evaluation"]["sft"]["sample_f1"]
    assert summary["ppo"]["oracle_end"] > summary["ppo"]["oracle_start"]


@pytest.mark.slow
def test_the_judge_is_right_and_the_narrative_helps_it(run_of):
    _, _, summary = run_of
    preference = summary["preference"]
    assert preference["judge_agreement_with_truth"] > 0.9
    assert preference["judge_agreement_with_truth"] > preference["judge_agreement_without_context"]
    assert summary["reward"]["heldout_accuracy_truth"] > 0.65


@pytest.mark.slow
def test_ppo_starts_at_the_reference_and_the_base_never_changes(run_of):
    recipe, fingerprint, summary = run_of
    assert summary["ppo"]["kl_start"] == 0.0
    assert summary["ppo"]["kl_end"] > 0.0
    assert summary["ppo"]["base_fingerprint"] == fingerprint
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["stage"] == "ppo")
    assert first["objective/kl"] == 0.0


@pytest.mark.slow
def test_a_second_run_skips_everything_and_the_report_stands(run_of):
    recipe, _, summary = run_of
    again = pipeline.run(recipe)
    assert {stage["status"] for stage in again["stages"].values()} == {"skipped"}
    assert again["evaluation"] == summary["evaluation"]
    page = (Path(recipe.output) / "report.html").read_text()
    assert "hallucination" in page.lower() and "http" not in page.split("</style>")[0]
