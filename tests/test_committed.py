"""Nothing that is not finite is applied or saved: the last good checkpoint and adapter stay as they are."""

from pathlib import Path

import pytest
import torch

from core import shake
from rlaif_lite.errors import StageError
from rlaif_lite.stages import sft
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.training import checkpoint
from rlaif_lite.training import fit as training
from rlaif_lite.training.fit import clip_and_step, keep
from rlaif_lite.workspace import Workspace


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_step_with_a_norm_that_is_not_finite(value):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([0.0, value, 1.0])
    with pytest.raises(
        StageError, match="ppo, step 4: the gradient's norm is .* last checkpoint is kept.*learning rate"
    ):
        clip_and_step([weight], optimizer, 1.0, "ppo, step 4")
    assert torch.equal(weight.data, torch.ones(3)) and not optimizer.state


@pytest.mark.parametrize("spoilt", ["parameter", "moment"])
def test_no_checkpoint_or_adapter_that_is_not_finite(roles, tmp_path, spoilt):
    roles.add("policy")
    shake(roles, "policy")
    roles.trainable("policy")
    parameters = roles.parameters("policy")
    optimizers = {"policy": torch.optim.AdamW(parameters)}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers["policy"].step()
    keep(roles, optimizers, tmp_path, 1, {})
    roles.save("policy", tmp_path / "adapter")
    files = [tmp_path / checkpoint.FILE, *sorted((tmp_path / "adapter").iterdir())]
    before = [file.read_bytes() for file in files]
    if spoilt == "parameter":
        parameters[3].data[0, 0] = float("nan")
        with pytest.raises(StageError, match="1 of .* tensors of the adapter .* not finite"):
            roles.save("policy", tmp_path / "adapter")
    else:
        optimizers["policy"].state[parameters[3]]["exp_avg"][0, 0] = float("inf")
    with pytest.raises(StageError, match="1 of .* tensors of the checkpoint after step 1 are not finite"):
        keep(roles, optimizers, tmp_path, 2, {})
    assert [file.read_bytes() for file in files] == before and checkpoint.load(tmp_path).step == 1


def test_a_nan_in_the_last_minibatch_of_the_last_step_is_not_saved(rerun, monkeypatch):
    """One learning-rate step away from a finished run: nothing of that step may reach the disk."""
    recipe = rerun("ppo.steps=2", "ppo.checkpoint_every=1", "ppo.epochs=1")
    work = Workspace(recipe)
    (work.adapter("policy") / "adapter_model.safetensors").unlink()
    backward, calls = ppo.policy_backward, []

    def spoilt(section, policy, *rest):
        found = backward(section, policy, *rest)
        calls.append(1)
        if len(calls) == 4:  # two minibatches of four answers in each of two steps
            policy.roles.parameters("policy")[0].grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(ppo, "policy_backward", spoilt)
    with pytest.raises(StageError, match="ppo, step 1: the gradient's norm is nan"):
        ppo.run(work)
    saved = checkpoint.load(work.stage("ppo") / "checkpoint")
    assert saved.step == 1 and all(tensor.isfinite().all() for tensor in saved.tensors.values())
    assert not (work.adapter("policy") / "adapter_model.safetensors").exists()


def test_metrics_that_are_lost_in_the_middle_of_a_stage_are_noticed(rerun, monkeypatch):
    recipe = rerun("sft.easy.steps=4", "sft.hard=null", "sft.policy_init=null")
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    keep_ = sft.fit.__globals__["keep"]

    def killed(*arguments):
        keep_(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setitem(sft.fit.__globals__, "keep", killed)
    work = Workspace(recipe)
    with pytest.raises(KeyboardInterrupt):
        sft.run(work)
    monkeypatch.setitem(sft.fit.__globals__, "keep", keep_)
    log = Path(recipe.output) / "metrics.jsonl"
    whole = log.read_text(encoding="utf-8")
    for damaged in (None, whole.replace('"stage": "sft.easy", "step": 0', '"stage": "sft.easy", "step": 1')):
        log.unlink() if damaged is None else log.write_text(damaged, encoding="utf-8")
        with pytest.raises(
            StageError, match=r"metrics.jsonl: the lines of sft.easy before step 2 .*delete the folder .*sft"
        ):
            sft.run(Workspace(recipe))
    log.write_text(whole, encoding="utf-8")
    sft.run(Workspace(recipe))
