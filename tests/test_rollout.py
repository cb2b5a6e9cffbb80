"""Sampling: greedy equals transformers' generate, samples follow the exact distribution and their own seeds, flags are right.

Shapes: B rows, S positions, D width, V vocabulary, N drawn tokens.
"""

import math
from collections import Counter

import pytest
import torch
from core import shake, video_of
from rlaif_kernels import linear_logprob
from torch.nn.utils.rnn import pad_sequence

from rlaif_lite.data.records import Message
from rlaif_lite.model.inputs import IGNORE, Sequence, collate, encode_prompt, target_rows
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora
from rlaif_lite.rollout import Sampling, draw, sample


def prompts_of(base) -> list[Sequence]:
    """Ragged: a pruned video, a whole one, and none."""
    given = [("<video> describe the video", video_of(base, layout=12, keep=[0, 3, 4, 9])),
             ("what is the colour first ? what is true ?", None), ("<video> describe", video_of(base, 24, seed=5)),
             ("star", None), ("<video> what is the shape then ?", video_of(base, 4, seed=6))]  # fmt: skip
    return [encode_prompt(base, [Message("user", text)], video) for text, video in given]


@pytest.fixture
def policy(roles) -> Roles:
    roles.add("policy")
    shake(roles, "policy")
    return roles


def test_greedy_is_transformers_generate(policy):
    """Token for token, from the same embeddings; `generate` pads on the left."""
    base = policy.base
    prompts = prompts_of(base)
    embeds = [collate(base, [p]).embed(base)[0].flip(0) for p in prompts]
    banned = base.ban_bias_V.nonzero()[:, 0].tolist()
    with policy.use("policy") as role:
        got = sample(role, prompts, Sampling(12, temperature=0.0), seeds=[0] * len(prompts))
        with torch.no_grad():
            want = base.model.generate(
                inputs_embeds=pad_sequence(embeds, batch_first=True).flip(1),
                attention_mask=pad_sequence([torch.ones(len(e), dtype=torch.long) for e in embeds], batch_first=True).flip(1),
                position_ids=pad_sequence([p.position_CS[0].flip(0) for p in prompts], batch_first=True).flip(1),
                do_sample=False, max_new_tokens=12, suppress_tokens=banned, pad_token_id=base.tokenizer.pad_token_id,
                eos_token_id=base.eos_id,
            )  # fmt: skip
    for trajectory, row in zip(got, want.tolist(), strict=True):
        end = row.index(base.eos_id) + 1 if base.eos_id in row else len(row)
        assert trajectory.ids == row[:end]
    assert len({tuple(t.ids) for t in got}) == len(prompts) and len({i for t in got for i in t.ids}) > 5  # a real comparison


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sample_does_not_depend_on_its_batch(load, checkpointing):
    """Nor on what was trained in between: gradient checkpointing turns the cache of key and values off in training mode."""
    base = load(gradient_checkpointing=checkpointing)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    prompts = prompts_of(base)
    seeds = list(range(100, 100 + 3 * len(prompts)))
    sampling = Sampling(10, temperature=1.0)
    with roles.use("policy") as role:
        together = sample(role, prompts, sampling, seeds=seeds, per_prompt=3, batch_size=64)
    roles.trainable("policy")
    with roles.use("policy") as role:
        role.hidden(collate(base, prompts)).mean().backward()
    with roles.use("policy") as role:
        split = sample(role, prompts, sampling, seeds=seeds, per_prompt=3, batch_size=1)
        single = [
            sample(role, [prompt], sampling, seeds=[seed])[0]
            for i, prompt in enumerate(prompts) for seed in seeds[3 * i : 3 * i + 3]
        ]  # fmt: skip
    assert [t.ids for t in together] == [t.ids for t in split] == [t.ids for t in single]
    assert [t.prompt for t in together] == [t.prompt for t in split] == [i for i in range(len(prompts)) for _ in range(3)]
    assert len({tuple(t.ids) for t in together[:3]}) == 3  # seeds tell answers to one prompt apart


def chi_square(counts: Counter, prob_V: torch.Tensor, drawn: int) -> tuple[float, int]:
    """(statistic, degrees of freedom); tokens expected fewer than five times count as one."""
    common = [i for i, p in enumerate(prob_V.tolist()) if p * drawn >= 5]
    cells = [(counts[i], prob_V[i].item() * drawn) for i in common]
    rest = drawn - sum(expected for _, expected in cells)
    if rest > 1:
        cells.append((drawn - sum(found for found, _ in cells), rest))
    return sum((found - expected) ** 2 / expected for found, expected in cells), len(cells) - 1


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8)])
def test_tokens_follow_the_exact_distribution(policy, temperature, top_p):
    """Chi-square of 6,000 first tokens against the softmax in float64. The bound lies 5 standard deviations above the mean."""
    base, drawn = policy.base, 6000
    prompt = prompts_of(base)[0]
    with policy.use("policy") as role:
        found = sample(role, [prompt], Sampling(1, temperature, top_p), seeds=range(drawn), per_prompt=drawn, batch_size=drawn)
        with torch.no_grad():
            hidden_D = role.hidden(collate(base, [prompt]))[0, -1].double()
    logits_V = base.head_weight_VD.double() @ hidden_D + base.ban_bias_V.double()
    prob_V = torch.softmax(logits_V / temperature, -1)
    if top_p < 1:
        order = prob_V.argsort(descending=True)
        kept = order[: int((prob_V[order].cumsum(0) < top_p).sum()) + 1]
        prob_V = torch.zeros_like(prob_V).index_copy(0, kept, prob_V[kept] / prob_V[kept].sum())
    counts = Counter(t.ids[0] for t in found)
    statistic, freedom = chi_square(counts, prob_V, drawn)
    assert freedom >= 5 and statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert all(prob_V[token] > 0 for token in counts)


def one_hot_draw(prob: list[float], uniform: list[float], sampling: Sampling) -> list[int]:
    """`draw` on logits log(prob): the head is the identity."""
    logits_ND = torch.tensor(prob).log().expand(len(uniform), -1)
    eye_VD = torch.eye(len(prob))
    return draw(eye_VD, torch.zeros(len(prob)), logits_ND, torch.tensor(uniform, dtype=torch.float64), sampling)[0].tolist()


def test_draw_by_hand():
    """Probabilities .1 .2 .7: the uniform number falls into [0, .1), [.1, .3) or [.3, 1)."""
    uniform = [0.0, 0.05, 0.099, 0.101, 0.299, 0.301, 0.999999]
    assert one_hot_draw([0.1, 0.2, 0.7], uniform, Sampling(1)) == [0, 0, 0, 1, 1, 2, 2]
    # temperature 1/2 squares them: .01 .04 .49, of .54
    assert one_hot_draw([0.1, 0.2, 0.7], [0.018, 0.019, 0.092, 0.093], Sampling(1, temperature=0.5)) == [0, 1, 1, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.5], Sampling(1, temperature=0.0)) == [2, 2]
    # the smallest set that reaches .85 is {.7, .2}; drawn among them by 2 : 7 in the order of ids
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.22, 0.23], Sampling(1, top_p=0.85)) == [1, 1, 2]
    assert one_hot_draw([0.1, 0.2, 0.7], [0.0, 0.99], Sampling(1, top_p=0.01)) == [2, 2]  # the most likely always stays
    assert one_hot_draw([0.25, 0.25, 0.25, 0.25], [0.0, 0.51], Sampling(1, top_p=0.3)) == [0, 1]  # of equals, the first ones


def test_logp_is_of_the_sampling_distribution():
    logits_ND = torch.tensor([[0.1, 0.2, 0.7]]).log()
    uniform_N = torch.tensor([0.5], dtype=torch.float64)
    for sampling, want in ((Sampling(1), 0.7), (Sampling(1, 0.5), 0.49 / 0.54), (Sampling(1, 1.0, 0.5), 0.7), (Sampling(1, 0.0), 0.7)):
        _, logp_N = draw(torch.eye(3), torch.zeros(3), logits_ND, uniform_N, sampling)
        assert logp_N.item() == pytest.approx(math.log(want), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_banned_tokens_are_never_drawn(base, temperature):
    """Even where they are by far the most likely."""
    banned = base.ban_bias_V.nonzero()[:, 0]
    hidden_ND = base.head_weight_VD[banned].repeat_interleave(400, 0) * 20
    generator = torch.Generator().manual_seed(0)
    uniform_N = torch.rand(len(hidden_ND), generator=generator, dtype=torch.float64)
    uniform_N[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    token_N, logp_N = draw(base.head_weight_VD, base.ban_bias_V, hidden_ND, uniform_N, Sampling(1, temperature))
    assert not set(token_N.tolist()) & set(banned.tolist())
    assert logp_N.isfinite().all() and (logp_N > -1e20).all()


def test_stop_flags(policy):
    base = policy.base
    prompts = prompts_of(base)
    with policy.use("policy") as role:
        found = sample(role, prompts, Sampling(6), seeds=range(40 * len(prompts)), per_prompt=40, batch_size=64)
    for trajectory in found:
        assert trajectory.stopped == (trajectory.ids[-1] == base.eos_id)
        assert base.eos_id not in trajectory.ids[:-1] and len(trajectory.ids) == len(trajectory.logp)
        assert len(trajectory.ids) == 6 or trajectory.stopped
    assert 0 < sum(t.stopped for t in found) < len(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logp_is_the_rescored_one(policy, temperature):
    """A cached decode against one forward over prompt and answer."""
    base = policy.base
    prompts = prompts_of(base)
    with policy.use("policy") as role:
        found = sample(role, prompts, Sampling(10, temperature), seeds=range(4 * len(prompts)), per_prompt=4)
        answers = [t.ids for t in found]
        rows = [prompts[t.prompt].extend(t.ids) for t in found]
        batch = collate(base, rows)
        target_BS = target_rows(rows, answers, batch.ids_BS.shape[1])
        with torch.no_grad():
            hidden_ND = role.hidden(batch)[target_BS != IGNORE]
        logp_N = linear_logprob(hidden_ND, base.head_weight_VD, target_BS[target_BS != IGNORE], bias_V=base.ban_bias_V,
                                temperature=temperature).logp_N  # fmt: skip
    sampled_N = torch.tensor([value for t in found for value in t.logp])
    assert (sampled_N - logp_N).abs().max() <= 1e-4


def test_seeds_must_fit(policy):
    prompts = prompts_of(policy.base)
    with policy.use("policy") as role:
        with pytest.raises(ValueError, match="3 seeds for 5 prompts x 2 answers"):
            sample(role, prompts, Sampling(2), seeds=[1, 2, 3], per_prompt=2)
        assert sample(role, [], Sampling(2), seeds=[]) == []
