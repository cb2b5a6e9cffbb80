"""The examples of the docs do what their pages say."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rlaif_lite import pipeline
from rlaif_lite.stages.ppo import step
from rlaif_lite.video import prune
from rlaif_lite.workspace import Workspace

DOCS = Path(__file__).parent.parent / "docs"


def code_of(page: str) -> str:
    """The Python block of a page."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    return code


def test_a_reward_of_ones_own(rerun, monkeypatch):
    """The page's script on a small run: PPO runs on its scores, and logs what it counted."""
    monkeypatch.setattr(step, "FEEDBACK", dict(step.FEEDBACK))
    exec(compile(code_of("extending/reward.md"), "brevity.py", "exec"), {"__name__": "brevity"})
    recipe = rerun(
        "ppo.feedback=ranking",
        "ppo.judge_context=false",
        "ppo.group_size=4",
        "ppo.value=none",
        "ppo.baseline=group",
        "ppo.steps=2",
        "ppo.stop_penalty=0",
        "evaluate.roles=[]",
    )
    summary = pipeline.run(recipe)
    assert summary["ppo"]["kl_start"] == 0 and "reward" not in summary["stages"]
    lines = [json.loads(line) for line in (Path(recipe.output) / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["stage"] == "ppo" and "brevity/words" in line]
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["objective/scores"] == pytest.approx(-0.1 * line["brevity/words"], rel=1e-4)


def test_a_pruner_of_ones_own(finished, rerun, monkeypatch):
    """The page's script on a small run: half of the tokens are kept, the half that the page says."""
    monkeypatch.setattr(prune, "evs", prune.evs)
    exec(compile(code_of("extending/pruner.md"), "odd_ones.py", "exec"), {"__name__": "odd_ones"})
    recipe = rerun("features.prune=[{evs: 0.5}]")
    pipeline.run(recipe, until="features")
    whole, pruned = Workspace(finished), Workspace(recipe)
    for record, same in list(zip(whole.records("rl"), pruned.records("rl"), strict=True))[:3]:
        full_TPD = whole.features(record).features_KD.unflatten(0, (6, 4)).float()
        unit_TPD, mean_T1D = (F.normalize(x, dim=-1) for x in (full_TPD, full_TPD.mean(1, keepdim=True)))
        odd = (unit_TPD * mean_T1D).sum(-1).flatten().argsort()[:12].sort().values
        kept = pruned.features(same)
        assert torch.equal(kept.position_CK[0], odd) and torch.equal(
            kept.features_KD.float(), full_TPD.flatten(0, 1)[odd]
        )
