"""Scores of video tokens in float32, and the selection that follows from them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_kernels import frame_dissimilarity, reference, select_and_gather


def test_worked_by_hand(impl):
    """Per cell: turned by a right angle, turned round, scaled, 60 degrees, from nothing."""
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[0.0, 3.0], [-2.0, 0.0], [2.0, 4.0], [1.0, math.sqrt(3)], [1.0, 0.0]])
    score_TP = frame_dissimilarity(torch.stack([before, after]), impl=impl)
    assert score_TP[0].tolist() == [math.inf] * 5
    assert score_TP[1].tolist() == pytest.approx([1.0, 2.0, 0.0, 0.5, 1.0], abs=2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float32_scores_whatever_the_dtype(impl, dtype):
    features_TPC = torch.randn(1, 6, 200) + 0.02 * torch.randn(4, 6, 200).cumsum(0)  # a slow video: cosines near 1
    features_TPC = features_TPC.to(dtype)
    score_TP = frame_dissimilarity(features_TPC, impl=impl)
    want = reference.frame_dissimilarity(features_TPC.double())
    assert score_TP.dtype == torch.float32
    torch.testing.assert_close(score_TP.double(), want, rtol=0, atol=3e-7)


def test_bfloat16_scores_would_choose_other_tokens():
    """Why this function exists: the same features, the same rule, scored as they are stored."""
    features_TPC = (torch.randn(1, 50, 256) + 0.01 * torch.randn(16, 50, 256).cumsum(0)).bfloat16()
    k = 300
    want = set(reference.select(reference.frame_dissimilarity(features_TPC.double()).flatten(), k))
    ours = set(reference.select(frame_dissimilarity(features_TPC).flatten(), k))
    rounded = 1 - torch.cosine_similarity(features_TPC[1:], features_TPC[:-1], dim=-1)
    rounded = set(reference.select(torch.cat([torch.full((1, 50), math.inf), rounded.float()]).flatten(), k))
    assert len(ours - want) <= 1 and len(rounded - want) > 20


@pytest.mark.parametrize("C", [7, 96, 1030, 3584])
def test_an_unchanged_cell_scores_exactly_zero(impl, C):
    frame_PC = torch.randn(5, C).bfloat16()
    assert not frame_dissimilarity(frame_PC.expand(3, -1, -1), impl=impl)[1:].any()


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (1, 4, 8), (3, 4, 0)])
def test_empty_shapes(impl, shape):
    score_TP = frame_dissimilarity(torch.randn(*shape), impl=impl)
    assert score_TP.shape == shape[:2] and (score_TP[:1] == math.inf).all() and (score_TP[1:] == 1).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.inf, -1.0]), max_size=25),
    share=st.floats(0, 1),
    axes=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_selects_the_best_first_of_equals_in_order(impl, scores, share, axes, dtype):
    N, C = len(scores), 10
    k = int(share * N)
    features_NC = torch.randn(N, C).to(dtype)
    position = torch.randint(0, 99, (N,) if axes == 1 else (3, N))
    frame_N = torch.arange(N) // 4
    chosen = select_and_gather(torch.tensor(scores), k, features_NC, position, frame_N, impl=impl)
    want = reference.select(torch.tensor(scores), k)
    assert chosen.index_K.tolist() == want
    assert torch.equal(chosen.features_KC, features_NC[want]) and chosen.features_KC.dtype == dtype
    assert torch.equal(chosen.position, position[..., want]) and torch.equal(chosen.frame_K, frame_N[want])


def test_gradient_reaches_the_kept_features():
    features_NC = torch.randn(4, 3, requires_grad=True)
    chosen = select_and_gather(
        torch.tensor([1.0, 3.0, 2.0, 3.0]), 2, features_NC, torch.arange(4), torch.zeros(4, dtype=torch.int64)
    )
    chosen.features_KC.sum().backward()
    assert features_NC.grad.sum(1).tolist() == [0.0, 3.0, 0.0, 3.0]


BAD = {
    "k is 5": {"k": 5},
    "k is -1": {"k": -1},
    "score_N is float32 of shape (3,) on cpu; expected float32": {"score_N": torch.zeros(3)},
    "position is int64 of shape (2, 4)": {"position": torch.zeros(2, 4, dtype=torch.int64)},
    "position is float32 of shape": {"position": torch.zeros(4)},
    "position is None": {"position": None},
    "frame_N is int64 of shape (5,)": {"frame_N": torch.zeros(5, dtype=torch.int64)},
    "features_NC is float32 of shape (2, 2, 4)": {"features_NC": torch.zeros(2, 2, 4)},
}


@pytest.mark.parametrize("message", BAD, ids=str)
def test_bad_input_is_named(message):
    index_N = torch.zeros(4, dtype=torch.int64)
    good = {
        "score_N": torch.zeros(4),
        "k": 2,
        "features_NC": torch.zeros(4, 3),
        "position": index_N,
        "frame_N": index_N,
    }
    with pytest.raises(ValueError) as error:
        select_and_gather(**{**good, **BAD[message]})
    assert message in str(error.value)


def test_features_of_the_wrong_rank_are_named():
    with pytest.raises(ValueError, match=r"features_TPC is float32 of shape \(4, 3\)"):
        frame_dissimilarity(torch.zeros(4, 3))
