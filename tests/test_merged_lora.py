"""The merged LoRA forward of a CPU computes PEFT's function and gradients; elsewhere PEFT's own code runs."""

import pytest
import torch

from core import shake, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.model import merged_lora
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.merged_lora import MergedForward, MergedLinear
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora


def batch_of(base):
    prompt = [Message("user", "<video> describe the video")]
    return collate(base, [encode_prompt(base, prompt, video_of(base, tokens)) for tokens in (4, 8)])


def outputs(roles: Roles, role: str, batch) -> list[torch.Tensor]:
    """The hidden states and every adapter gradient of a sum of them."""
    roles.trainable(role)
    with roles.use(role) as active:
        hidden_BSD = active.hidden(batch)
        weight_D = torch.linspace(-1, 1, hidden_BSD.shape[-1])
        (hidden_BSD * weight_D).sum().backward()  # a square would hardly move: the final norm fixes it
    return [hidden_BSD.detach(), *(p.grad.clone() for p in roles.parameters(role))]


@pytest.mark.parametrize("keep", [0, merged_lora.KEEP_BYTES], ids=["dequantised each time", "kept"])
def test_the_same_function_as_pefts(load, monkeypatch, keep):
    monkeypatch.setattr(merged_lora, "KEEP_BYTES", keep)
    base = load()
    batch = batch_of(base)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    assert all((layer.forward.weight_OD is None) == (keep == 0) for layer in roles._layers)
    ours = outputs(roles, "policy", batch)
    for layer in roles._layers:
        assert isinstance(vars(layer).pop("forward"), MergedForward)
    for p in roles.parameters("policy"):
        p.grad = None
    wanted = outputs(roles, "policy", batch)
    scale = max(want.abs().max().item() for want in wanted[1:])
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=1e-5)
    for got, want in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale)


def test_gradients_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    x, A_RD, B_OR = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5), (2, 5), (4, 2))
    )
    frozen = torch.nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    apply = lambda x, A, B: MergedLinear.apply(x, A, B, 0.7, frozen, frozen.weight)
    assert torch.autograd.gradcheck(apply, (x, A_RD, B_OR))


def test_the_base_alone_and_other_dtypes_are_pefts(roles, monkeypatch):
    base = roles.base
    roles.add("policy")
    batch, calls = batch_of(base), []
    monkeypatch.setattr(MergedLinear, "apply", lambda *a: calls.append(1) or torch.zeros(()))
    with roles.use("base") as plain:
        plain.hidden(batch)
    layer = roles._layers[0]
    with roles.use("policy"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
    assert not calls
