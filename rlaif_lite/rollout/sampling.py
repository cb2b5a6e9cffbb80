"""Drawing the next token, and what a drawn answer is.

Shapes: R rows, D width, V vocabulary, T new tokens.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor


class Trajectory(NamedTuple):
    """One sampled answer."""

    prompt: int  # index into the prompts given
    ids: list[int]  # sampled tokens, the EOS included when there is one
    stopped: bool  # ended by EOS (the only stop rule), not by the length limit
    logp: list[float]  # log-prob of each token as the sampler saw it (before top-k and top-p), for comparison


class Sampling(NamedTuple):
    """How to draw."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all


def draw(
    weight_VD: Tensor, bias_V: Tensor, hidden_RD: Tensor, uniform_R: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Next tokens by inverse transform sampling -> (token_R, logp_R at the sampling temperature).

    The softmax is taken in float32 and summed up in float64. Banned ids carry -1e30 in `bias_V`.
    """
    logits_RV = (hidden_RD @ weight_VD.T).float() + bias_V
    greedy = sampling.temperature == 0
    logp_RV = torch.log_softmax(logits_RV if greedy else logits_RV / sampling.temperature, -1)
    if greedy:
        token_R = logp_RV.argmax(-1)
    else:
        prob_RV = logp_RV.double().exp()
        if sampling.top_p < 1.0 or sampling.top_k:
            prob_RV = _most_likely(prob_RV, sampling.top_p, sampling.top_k)
        cdf_RV = prob_RV.cumsum(-1)
        point_R1 = uniform_R[:, None] * cdf_RV[:, -1:]
        token_R = torch.searchsorted(cdf_RV, point_R1, right=True)[:, 0].clamp(max=cdf_RV.shape[-1] - 1)
    return token_R, logp_RV.gather(-1, token_R[:, None])[:, 0]


def _most_likely(prob_RV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Keep the `top_k` most likely tokens (0: all), and of these the fewest whose share of them reaches `top_p`; the
    most likely one always stays. This is the order in which transformers and vLLM apply the two."""
    sorted_RV, order_RV = prob_RV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        sorted_RV[:, top_k:] = 0.0
    cdf_RV = sorted_RV.cumsum(-1)
    dropped_RV = cdf_RV - sorted_RV >= top_p * cdf_RV[:, -1:]  # what is 0 stands behind all of the probability
    return prob_RV.masked_fill(torch.zeros_like(dropped_RV).scatter(-1, order_RV, dropped_RV), 0.0)


def uniforms(seeds: Seq[int], count: int) -> Tensor:
    """float64 in [0,1), (len(seeds), count): row i is the stream of seeds[i]."""
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )
