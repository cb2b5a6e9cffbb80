"""The page "Change the loss": its code block, put in place of the shipped function, trains a PPO step."""

import re
from pathlib import Path

import torch

from rlaif_lite.rl import losses
from test_ppo import Step, ragged

PAGE = Path(__file__).parent.parent / "docs" / "change_the_loss.md"


def test_the_edit_of_the_page_changes_the_step(finished, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(block.strip().splitlines()) <= 10
    edited: dict = {}
    exec(compile(block, str(PAGE), "exec"), vars(losses), edited)

    def moved() -> tuple[list[torch.Tensor], float, float]:
        step = Step(finished, minibatch=8, epochs=1, max_grad_norm=1e9)
        _, experience = step.score(ragged(step))
        shift_BT = 0.3 * torch.randn(experience.logp_BT.shape, generator=torch.Generator().manual_seed(0))
        old_BT = experience.logp_BT - shift_BT * experience.mask_BT
        before = [p.detach().clone() for p in step.work.roles.parameters("policy")]
        history = step.update(experience._replace(logp_BT=old_BT), roles=("policy", "value"))
        after = step.work.roles.parameters("policy")
        ratio_N, gain_N = shift_BT[experience.mask_BT].exp(), experience.advantage_BT[experience.mask_BT]
        tau_N = torch.where(gain_N > 0, 1.0, 1.05)
        by_hand = (-gain_N * 4 / tau_N / (1 + (-tau_N * (ratio_N - 1)).exp())).mean().item()
        return [now - then for now, then in zip(after, before, strict=True)], history[0]["policy_loss"].item(), by_hand

    shipped, shipped_loss, by_hand = moved()
    monkeypatch.setattr(losses, "clipped_loss", edited["clipped_loss"])
    soft, soft_loss, _ = moved()
    assert abs(soft_loss - by_hand) < 1e-5 < abs(shipped_loss - by_hand)
    assert all(move.isfinite().all() for move in soft)
    assert max((a - b).abs().max() for a, b in zip(shipped, soft, strict=True)) > 1e-4
