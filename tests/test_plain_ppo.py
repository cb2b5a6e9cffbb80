"""The plain step that ours is measured beside: it computes the same, so what differs is how."""

import pytest
import torch

from core import SHORT_STEP
from lab.bench import plain_ppo
from rlaif_lite import profiler
from rlaif_lite.model.base import Base
from rlaif_lite.profiler import inputs
from rlaif_lite.recipe import load_recipe
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import cut

KEYS = [*SHORT_STEP, "ppo.minibatch=2"]


@pytest.fixture(scope="module")
def plain():
    return plain_ppo


@pytest.mark.parametrize("recipe", ("vlm_rlaif_7b_24gb", "qwen2_5_vl_3b_24gb"))
def test_the_same_step_by_other_means(plain, recipe, monkeypatch):
    """From the same state, on the same answers: scores, advantages and the updated adapters are equal."""
    monkeypatch.setattr(inputs, "PROMPT_TOKENS", 5)
    monkeypatch.setattr(inputs, "FRAME", (56, 56))
    monkeypatch.setattr(inputs, "VIDEOS", (2, 2))
    loaded = load_recipe(f"recipes/{recipe}.yaml", KEYS)
    with profiler.opened(loaded, 1, None, profiler.Random(small=True)) as (work, _):
        given = plain.prepare(work)
        calls = []
        encode = Base.encode
        monkeypatch.setattr(Base, "encode", lambda base, pixels: (calls.append(1), encode(base, pixels))[1])
        answers = plain.plain_rollout(given)
        assert [len(a.ids) for a in answers] == [5] * 4 and calls == [1]
        micros = cut(work, given.feedback.critic_prompt, given.records, answers, 0, 2)
        theirs = plain.plain_score(given, micros, answers)
        assert len(calls) == 1 + 4 * 2  # a pass of the tower for every role and micro-batch
        taken = given.feedback.take(given.records, answers, 0)
        own = ppo.score(work.roles, loaded.ppo, given.feedback, micros, taken, loaded.ppo.kl_coef)
        for name in ("logp_BT", "kl_BT", "value_BT", "raw_B", "advantage_BT", "return_BT"):
            torch.testing.assert_close(getattr(theirs, name), getattr(own, name), rtol=1e-4, atol=1e-4)
        before = [p.detach().clone() for p in work.roles.parameters("policy")]
        order = torch.arange(len(micros))
        monkeypatch.setattr(torch, "randperm", lambda n, generator: order)  # ours shuffles its minibatches
        ppo.update(work.roles, work.recipe, micros, own, given.optimizers, 0, loaded.ppo.kl_coef)
        moved = [p.detach().clone() for p in work.roles.parameters("policy")]
        for parameter, old in zip(work.roles.parameters("policy"), before, strict=True):
            parameter.data.copy_(old)
        for optimizer in given.optimizers.values():
            optimizer.state.clear()
        plain.plain_update(given, micros, theirs)
        assert any(not torch.equal(a, b) for a, b in zip(moved, before, strict=True))
        worst = max((a - b).abs().max().item() for a, b in zip(moved, work.roles.parameters("policy"), strict=True))
        assert worst < 0.1 * loaded.ppo.lr  # Adam's steps are of the size of the rate
