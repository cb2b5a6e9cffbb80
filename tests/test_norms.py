"""RMS norms in one kernel compute what transformers' modules do, and no worse."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from core import video_of
from rlaif_lite.data.records import Message
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.norms import RmsNorm, fuse_norms, fuses_norms
from rlaif_lite.model.roles import BASE, Roles
from rlaif_lite.recipe import Lora, Model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_as_right_as_transformers(dtype):
    """Both against float64."""
    generator = torch.Generator().manual_seed(0)
    x_ND, dy_ND = (torch.randn(40, 64, generator=generator).to(dtype) for _ in range(2))
    theirs = LlamaRMSNorm(64).to(dtype).requires_grad_(False)
    theirs.weight.copy_(torch.rand(64, generator=generator) + 0.5)

    def results(forward, x_ND) -> tuple[torch.Tensor, torch.Tensor]:
        y_ND = forward(x_ND.requires_grad_())
        return y_ND.detach(), torch.autograd.grad(y_ND, x_ND, dy_ND.to(y_ND.dtype))[0]

    x64_ND = x_ND.double()
    weight_D = theirs.weight.double()
    exact = lambda x_ND: weight_D * x_ND * (x_ND.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    apart = lambda got, want: ((got.double() - want).norm() / want.norm()).item()
    wanted, plain, ours = results(exact, x64_ND), results(theirs, x_ND.clone()), results(RmsNorm(theirs), x_ND.clone())
    for got, other, want in zip(ours, plain, wanted, strict=True):
        assert got.dtype == dtype
        assert apart(got, want) <= max(1.05 * apart(other, want), 1e-7)


def test_a_decoder_computes_the_same_with_them(load):
    base = load(quantization="none")
    rows = [encode_prompt(base, [Message("user", "<video> describe the video")], video_of(base, 4))]
    with torch.no_grad(), Roles(base, Lora()).use(BASE) as role:
        plain_BSD = role.hidden(collate(base, rows))
        fuse_norms(base.model)
        assert sum(isinstance(vars(m).get("forward"), RmsNorm) for m in base.decoder.modules()) == 1 + 2 * len(
            base.decoder.layers
        )
        torch.testing.assert_close(role.hidden(collate(base, rows)), plain_BSD, rtol=1e-5, atol=1e-5)


def test_a_gpu_has_them_and_unsloths_loader_has_its_own():
    kinds = [("cuda", "transformers"), ("cuda", "unsloth"), ("cpu", "transformers")]
    assert [fuses_norms(Model(loader=loader), torch.device(kind)) for kind, loader in kinds] == [True, False, False]
