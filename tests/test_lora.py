"""Our LoRA forwards compute PEFT's function and gradients; where they do not serve, PEFT's own code runs."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from core import shake, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.model import lora
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.lora import AddedLinear, LoraForward, MergedLinear, dense_weight, quicken
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


@pytest.mark.parametrize("keep", [0, lora.KEEP_BYTES], ids=["dequantised each time", "kept"])
def test_the_same_function_as_pefts(load, monkeypatch, keep):
    monkeypatch.setattr(lora, "KEEP_BYTES", keep)
    base = load()
    batch = batch_of(base)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    assert all((layer.forward.weight_OD is None) == (keep == 0) for layer in roles._layers)
    ours = outputs(roles, "policy", batch)
    for layer in roles._layers:
        assert isinstance(vars(layer).pop("forward"), LoraForward)
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


def apart(got: Tensor, want: Tensor) -> float:
    """Relative distance of two tensors."""
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_layer_in_bfloat16_is_as_right_as_pefts(load, quantization):
    """Both against float64. The adapter's gradients, in float32, lose less than one part in 100,000."""
    roles = Roles(load(quantization=quantization, dtype="bfloat16"), Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    layer = next(each for each in roles._layers if each.in_features != each.out_features)
    assert isinstance(layer.get_base_layer(), Linear4bit) == (quantization == "nf4")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 40, layer.in_features, generator=generator).bfloat16().requires_grad_()
    dy = torch.randn(2, 40, layer.out_features, generator=generator).bfloat16()
    A_RD, B_OR = (each["policy"].weight.requires_grad_() for each in (layer.lora_A, layer.lora_B))
    weight_OD = dense_weight(layer.get_base_layer()).double()

    def results(forward, *inputs: Tensor) -> list[Tensor]:
        y = forward(inputs[0])
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]

    exact = [each.detach().double().requires_grad_() for each in (x, A_RD, B_OR)]
    wanted = results(lambda x: x @ weight_OD.T + layer.scaling["policy"] * x @ exact[1].T @ exact[2].T, *exact)
    layer._active_adapter = ["policy"]
    ours = results(layer, x, A_RD, B_OR)
    pefts = results(layer.forward.plain, x, A_RD, B_OR)
    assert [each.dtype for each in ours] == [each.dtype for each in pefts]
    for name, got, other, want in zip(("y", "dx", "dA", "dB"), ours, pefts, wanted, strict=True):
        assert apart(got, want) <= max(1.05 * apart(other, want), 1e-5), name


def test_a_decoder_in_bfloat16_learns_as_with_pefts_layers(load):
    """4-bit base; both against the same weights in float64, every adapter's gradient taken together. Rounding is a
    draw: over eight seeds our error is 0.81 to 1.12 of PEFT's, 0.98 in the mean."""
    section = {"quantization": "nf4", "dtype": "bfloat16"}
    roles = Roles(load(**section), Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    batch = batch_of(roles.base)
    ours = outputs(roles, "policy", batch)
    for p in roles.parameters("policy"):
        p.grad = None
    for layer in roles._layers:
        layer.forward = layer.forward.plain
    pefts = outputs(roles, "policy", batch)
    for layer in roles._layers:
        frozen = layer.get_base_layer()
        dense = torch.nn.Linear(frozen.in_features, frozen.out_features, bias=False, dtype=torch.float64)
        dense.weight.data = dense_weight(frozen).double()
        layer.base_layer = dense
        layer.forward = lambda x, layer=layer: (
            layer.base_layer(x) + layer.scaling["policy"] * layer.lora_B["policy"](layer.lora_A["policy"](x))
        )
    roles.base.model.double()
    for p in roles.parameters("policy"):
        p.grad = None
    wanted = outputs(roles, "policy", batch._replace(features=[each.double() for each in batch.features]))
    together = lambda found: torch.cat([each.double().flatten() for each in found])
    assert apart(ours[0], wanted[0]) <= 1.15 * apart(pefts[0], wanted[0])
    assert apart(together(ours[1:]), together(wanted[1:])) <= 1.15 * apart(together(pefts[1:]), together(wanted[1:]))


def test_the_base_alone_and_other_dtypes_are_pefts(roles, monkeypatch):
    base = roles.base
    roles.add("policy")
    batch, calls = batch_of(base), []
    for ours in (MergedLinear, AddedLinear):
        monkeypatch.setattr(ours, "apply", lambda *a: calls.append(1) or torch.zeros(()))
    with roles.use("base") as plain:
        plain.hidden(batch)
    layer = roles._layers[0]
    with roles.use("policy"):
        layer(torch.zeros(1, layer.in_features, dtype=torch.float16))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["use_dora", "use_rslora"])
def test_variants_are_pefts_own(dtype, variant):
    """DoRA is more than a sum, and runs PEFT's forward; rsLoRA is LoRA at another scale."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **{variant: True})
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 8)).to(dtype), config, autocast_adapter_dtype=True)
    ours = copy.deepcopy(model)
    quicken([m for m in ours.modules() if isinstance(m, LoraLayer)], dtype)
    x = torch.randn(3, 16).to(dtype)
    tolerance = {} if variant == "use_rslora" else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(ours(x), model(x), **tolerance)
