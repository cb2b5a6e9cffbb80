"""The examples of the docs do what their pages say."""

import json
import re
from pathlib import Path

import pytest

from rlaif_lite import pipeline
from rlaif_lite.stages.ppo import step

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
