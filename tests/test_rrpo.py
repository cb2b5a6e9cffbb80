"""RRPO: preferences over the spans in which two answers differ, and the exact KL(reference || policy)."""

import math

import pytest
import torch
from torch import tensor

from core import shake, video_of
from rlaif_lite.data.records import Message
from rlaif_lite.errors import RecipeError
from rlaif_lite.model.answers import Group
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.model.text import decode_answer, encode_answer
from rlaif_lite.rl.dpo import Scored, changed_spans, dpo_loss
from rlaif_lite.rollout.score import answer_hidden, token_scores
from rlaif_lite.stages.dpo.train import spans_of

ASKED = [Message("user", "<video> describe the video")]
CHOSEN = "first a red circle left . then a blue square up . also a red star ."
REJECTED = "first a red circle left . then a green square down ."


@pytest.mark.parametrize(
    "chosen, rejected, spans",
    [
        ("abcd", "abcd", ([], [])),
        ("abcd", "axcy", ([(1, 2), (3, 4)], [(1, 2), (3, 4)])),
        ("abc", "ac", ([(1, 2)], [])),  # what the rejected answer leaves out
        ("ac", "abbc", ([], [(1, 3)])),
        ("", "ab", ([], [(0, 2)])),
    ],
)
def test_where_two_sequences_differ(chosen, rejected, spans):
    assert changed_spans(chosen, rejected) == spans
    assert changed_spans(rejected, chosen) == spans[::-1]


def test_the_loss_by_hand():
    """h = .5 ((-1 + 2) - (-3 + 2)) = 1 for one pair: softplus(-1), and .1 times the KL of 3 nats."""
    kl_B = tensor([3.0], requires_grad=True)
    pair, lengths = Scored(tensor([-1.0]), tensor([-3.0])), Scored(tensor([2]), tensor([2]))
    ones = {"beta": 0.5, "nll_B": tensor([0.7])}
    loss, stats = dpo_loss(pair, Scored(tensor([-2.0]), tensor([-2.0])), lengths, kl_weight=0.1, kl_B=kl_B, **ones)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)) + 0.3)
    assert stats.kl == 3 and stats.margin == 1 and stats.nll.item() == pytest.approx(0.7)
    loss.backward()
    assert kl_B.grad.item() == pytest.approx(0.1)


def test_spans_are_at_the_tokens_of_the_answers(base):
    opening = encode_prompt(base, ASKED, video_of(base)).opening
    ids = [encode_answer(base, opening, text) for text in (CHOSEN, REJECTED)]

    def said(by: str) -> list[list[str]]:
        spans = spans_of(base, by, *ids)
        return [
            [decode_answer(base, of[start:end]) for start, end in each] for of, each in zip(ids, spans, strict=True)
        ]

    claims = [["then a blue square up . also a red star ."], ["then a green square down ."]]
    assert said("claims") == claims
    assert said("tokens") == [["blue", "up", "also a red star ."], ["green", "down"]]


def test_log_probs_and_kl_are_those_of_whole_float64_logits(roles):
    """Of every token, against plain log-softmax of all logits. The kernels' tests hold their gradients."""
    base = roles.base
    for seed, name in enumerate(("reference", "policy")):
        roles.add(name)
        shake(roles, name, seed=seed)
    prompt = encode_prompt(base, ASKED, video_of(base))
    ids = [encode_answer(base, prompt.opening, text) for text in (CHOSEN, REJECTED)]
    groups, spans = [Group(prompt, ids)], spans_of(base, "claims", *ids)
    with torch.no_grad(), roles.use("reference") as role:
        _, reference_ND = answer_hidden(role, groups)
    with torch.no_grad(), roles.use("policy") as role:
        found = token_scores(role, groups, reference_ND)
        rows, hidden_ND = answer_hidden(role, groups)
    logp_NV, ref_NV = (
        torch.log_softmax(x_ND.double() @ base.head_weight_VD.double().T + base.ban_bias_V.double(), -1)
        for x_ND in (hidden_ND, reference_ND)
    )
    want_N = logp_NV.gather(1, rows.token_N[:, None])[:, 0]
    kl_N = (ref_NV.exp() * (ref_NV - logp_NV)).sum(1)
    torch.testing.assert_close(found.logp_N.double(), want_N, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.kl_N.double(), kl_N, atol=1e-5, rtol=1e-4)
    assert kl_N.min() > 1e-3
    inside = [any(a <= t < b for a, b in of) for each, of in zip(ids, spans, strict=True) for t in range(len(each))]
    assert sum(inside) == 11 + 6 < len(inside)


def test_spans_are_of_two_answers(recipe):
    with pytest.raises(RecipeError, match="dpo.spans.*Set it to null"):
        recipe("method=dpo", "dpo.altered=[other]", "dpo.balance_lengths=false", "dpo.spans=claims")
