"""Sampling answers from a role, with a key/value cache.

A prompt is prefilled once and its cache shared by all of its samples. Every sample draws from its own stream of uniform
numbers (seeded by the caller), so what it says does not depend on which other samples shared its batch. The sampler's
own log-probs are returned for comparison only: PPO recomputes the old log-probs with the scoring forward, because a
cached decode and a full forward round differently.

Shapes: B samples, C channels of a position, S prompt positions, D width, V vocabulary, T new tokens.
"""

from typing import NamedTuple, Sequence as Seq

import torch
from torch import Tensor
from transformers import DynamicCache

from .model.inputs import Sequence, collate, decode, rope_positions
from .model.roles import ActiveRole


class Trajectory(NamedTuple):
    """One sampled answer."""

    prompt: int  # index into the prompts given
    ids: list[int]  # sampled tokens, the EOS included when there is one
    stopped: bool  # ended by EOS (the only stop rule), not by the length limit
    logp: list[float]  # log-prob of each token as the sampler saw it (before top-p), for comparison


class Sampling(NamedTuple):
    """How to draw."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0


@torch.no_grad()
def sample(
    role: ActiveRole,
    prompts: Seq[Sequence],
    sampling: Sampling,
    *,
    seeds: Seq[int],
    per_prompt: int = 1,
    batch_size: int = 64,
) -> list[Trajectory]:
    """Draw `per_prompt` answers to every prompt; answer j of prompt i uses seeds[i * per_prompt + j].

    Returns len(prompts) * per_prompt trajectories, those of one prompt next to each other. `batch_size` counts answers.
    """
    if len(seeds) != len(prompts) * per_prompt:
        raise ValueError(f"sample: {len(seeds)} seeds for {len(prompts)} prompts x {per_prompt} answers.")
    step = max(1, batch_size // per_prompt)
    out: list[Trajectory] = []
    for start in range(0, len(prompts), step):
        chunk = prompts[start : start + step]
        chunk_seeds = seeds[start * per_prompt : (start + len(chunk)) * per_prompt]
        out += _sample_batch(role, chunk, sampling, chunk_seeds, per_prompt, first=start)
    return out


def _sample_batch(
    role: ActiveRole, prompts: Seq[Sequence], sampling: Sampling, seeds: Seq[int], per_prompt: int, first: int
) -> list[Trajectory]:
    base = role.roles.base
    batch = collate(base, prompts)
    cache = DynamicCache()
    hidden_PSD = decode(base, batch, cache)
    last_P = batch.mask_BS.sum(1) - 1
    hidden_BD = hidden_PSD[torch.arange(len(prompts), device=last_P.device), last_P].repeat_interleave(per_prompt, 0)
    if per_prompt > 1:
        cache.batch_repeat_interleave(per_prompt)
    mask_BS = batch.mask_BS.repeat_interleave(per_prompt, 0)
    position_CB = torch.stack([p.next_position_C for p in prompts], 1).to(base.device).repeat_interleave(per_prompt, 1)
    uniform_BT = _uniforms(seeds, sampling.max_new_tokens).to(base.device)
    alive_B = torch.ones(len(seeds), dtype=torch.bool, device=base.device)
    tokens: list[Tensor] = []
    logps: list[Tensor] = []
    for t in range(sampling.max_new_tokens):
        token_B, logp_B = draw(base.head_weight_VD, base.ban_bias_V, hidden_BD, uniform_BT[:, t], sampling)
        tokens.append(torch.where(alive_B, token_B, -1))
        logps.append(logp_B)
        alive_B &= token_B != base.eos_id
        if t + 1 == sampling.max_new_tokens or not alive_B.any():
            break
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(seeds), 1)], 1)
        hidden_BD = base.decoder(
            inputs_embeds=base.model.get_input_embeddings()(token_B[:, None]),
            attention_mask=mask_BS,
            position_ids=rope_positions(position_CB[..., None]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        position_CB = position_CB + 1
    rows = torch.stack(tokens, 1).tolist()
    logp_rows = torch.stack(logps, 1).tolist()
    out = []
    for i, (row, logp) in enumerate(zip(rows, logp_rows, strict=True)):
        ids = [token for token in row if token >= 0]
        out.append(Trajectory(first + i // per_prompt, ids, ids[-1] == base.eos_id, logp[: len(ids)]))
    return out


def draw(
    weight_VD: Tensor, bias_V: Tensor, hidden_BD: Tensor, uniform_B: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Next tokens by inverse transform sampling -> (token_B, logp_B at the sampling temperature).

    The softmax is taken in float32 and summed up in float64. Banned ids carry -1e30 in `bias_V`.
    """
    logits_BV = (hidden_BD @ weight_VD.T).float() + bias_V
    greedy = sampling.temperature == 0
    logp_BV = torch.log_softmax(logits_BV if greedy else logits_BV / sampling.temperature, -1)
    if greedy:
        token_B = logp_BV.argmax(-1)
    else:
        prob_BV = logp_BV.double().exp()
        if sampling.top_p < 1.0:
            prob_BV = _nucleus(prob_BV, sampling.top_p)
        cdf_BV = prob_BV.cumsum(-1)
        point_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
        token_B = torch.searchsorted(cdf_BV, point_B1, right=True)[:, 0].clamp(max=cdf_BV.shape[-1] - 1)
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def _nucleus(prob_BV: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probability reaches `top_p`; the most likely one always
    stays."""
    sorted_BV, order_BV = prob_BV.sort(dim=-1, descending=True, stable=True)
    dropped_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
    return prob_BV.masked_fill(torch.zeros_like(dropped_BV).scatter(-1, order_BV, dropped_BV), 0.0)


def _uniforms(seeds: Seq[int], count: int) -> Tensor:
    """uniform_BT float64 in [0,1): row i is the stream of seeds[i]."""
    generator = torch.Generator()
    return torch.stack(
        [torch.rand(count, generator=generator.manual_seed(seed), dtype=torch.float64) for seed in seeds]
    )
