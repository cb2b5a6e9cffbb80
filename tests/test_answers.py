"""Answers that share their prompt: places by hand, the numbers and gradients of rows of their own, and when it pays.

Shapes: B rows, S positions, D width, N answer tokens.
"""

import pytest
import torch

from core import shake, video_of
from family_checkpoints import write
from rlaif_lite.data.records import Message
from rlaif_lite.model import answers
from rlaif_lite.model.answers import Group, lay_out, sharing_pays
from rlaif_lite.model.inputs import Sequence, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora
from rlaif_lite.rollout.score import answer_logps
from test_families import TURNS, Case


def plain(ids: list[int]) -> Sequence:
    """A row of text."""
    return Sequence(ids, torch.arange(len(ids))[None], None, torch.tensor([len(ids)]))


def test_places_by_hand(base):
    """Prompts of 3 and 2 tokens; two answers to the first, one to the second."""
    rows = lay_out(base, [Group(plain([7, 8, 9]), [[10, 11], [12]]), Group(plain([7, 8]), [[13, 14]])])
    assert rows.batch.ids_BS.tolist() == [[7, 8, 9, 10, 11, 12], [7, 8, 13, 14, 0, 0]]
    assert rows.batch.position_CBS[0].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 3, 0, 0]]
    assert rows.token_N.tolist() == [10, 11, 12, 13, 14]
    assert rows.before_N.tolist() == [2, 3, 2, 7, 8]  # the prompt's end predicts the first token of both its answers
    assert rows.at_N.tolist() == [3, 4, 5, 8, 9]
    assert rows.answer_N.tolist() == [0, 0, 1, 2, 2]


def test_answers_to_one_prompt_each_keep_rows_of_their_own(base):
    rows = lay_out(base, [Group(plain([7, 8, 9]), [[10, 11]]), Group(plain([7, 8]), [[12]])])
    assert rows.batch.attention.dim() == 2  # no branches, so no mask is computed with
    assert rows.batch.ids_BS.tolist() == [[7, 8, 9, 10, 11], [7, 8, 12, 0, 0]]
    assert rows.before_N.tolist() == [2, 3, 6] and rows.at_N.tolist() == [3, 4, 7]


def test_when_sharing_pays():
    """Eight answers of 256 tokens to 730: a third of the tokens. Two of 4,000 to 30: their attention costs more than
    the prompt does."""
    group = (730, [256] * 8)
    assert sharing_pays(4096, [group]) and (730 + 8 * 256) / (8 * (730 + 256)) < 0.36
    assert not sharing_pays(4096, [(30, [4000, 4000])])
    assert not sharing_pays(4096, [(730, [256])] * 8)  # nothing to share
    assert not sharing_pays(128, [(30, [10, 10]), (30, [400, 400])])  # the short row would be padded to 830


def measured(roles: Roles, groups: list[Group]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """logp_B, and the adapter's gradients of a weighted sum of them."""
    for parameter in roles.parameters("policy"):
        parameter.grad = None
    with roles.use("policy") as role:
        logp_B = answer_logps(role, groups)
        (logp_B * torch.linspace(-1, 1, len(logp_B))).sum().backward()
    return logp_B.detach(), [p.grad for p in roles.parameters("policy")]


def check_the_same(monkeypatch, base, groups: list[Group]) -> None:
    """Shared prompts against rows of their own: log-probs and gradients to 1e-5 of the largest."""
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    shake(roles, "policy")
    roles.trainable("policy")
    found = []
    for shared in (True, False):
        monkeypatch.setattr(answers, "sharing_pays", lambda width, groups, shared=shared: shared)
        rows = lay_out(base, groups)
        assert len(rows.batch.ids_BS) == (len(groups) if shared else sum(len(g.answers) for g in groups))
        found.append(measured(roles, groups))
    (logp_B, gradients), (want_B, wanted) = found
    assert (logp_B - want_B).abs().max() <= 1e-5 * want_B.abs().max()
    largest = max(gradient.abs().max() for gradient in wanted)
    assert largest > 1e-2
    for got, want in zip(gradients, wanted, strict=True):
        assert (got - want).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_log_probs_and_gradients(load, monkeypatch, checkpointing):
    """Groups of 3, 1 and 2 ragged answers, one of a pruned video, one without a video."""
    base = load(gradient_checkpointing=checkpointing)
    asked = [Message("user", "<video> describe the video")]
    prompts = [
        encode_prompt(base, asked, video_of(base, layout=16, keep=[0, 1, 2, 5, 9, 15])),
        encode_prompt(base, [Message("user", "what is true ?")], None),
        encode_prompt(base, asked, video_of(base, 8, seed=1)),
    ]
    texts = [[[9, 10, 11, 12], [13], [14, 15, 2]], [[16, 2]], [[17, 18, 19, 20, 21], [22, 2]]]
    check_the_same(monkeypatch, base, list(map(Group, prompts, texts)))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_the_same_on_real_layouts(family, tmp_path, monkeypatch):
    """One rope channel, mrope, and mrope with deepstack; the video pruned."""
    case = Case(family, write(family, tmp_path))
    prompt = encode_prompt(case.base, TURNS, case.record([{"evs": 0.4}]))
    check_the_same(monkeypatch, case.base, [Group(prompt, [[5, 6, 7], [8, 9], [10, 11, 12, 13]])])
