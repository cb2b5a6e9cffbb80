"""GAE: by hand, against the plain loop in float64, and what padding must not change."""

import math

import pytest
import torch
from helpers import worst
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_kernels import gae, reference


def test_worked_by_hand(impl):
    """gamma = lambda = 1/2. Backwards: delta_2 = 4-3, delta_1 = 0+3/2-2, delta_0 = 1+2/2-1; the decay is 1/4."""
    reward_BT = torch.tensor([[1.0, 0.0, 4.0, 9.0]])
    value_BT = torch.tensor([[1.0, 2.0, 3.0, 9.0]])
    advantage_BT, return_BT = gae(reward_BT, value_BT, torch.tensor([[1, 1, 1, 0]]), gamma=0.5, lam=0.5, impl=impl)
    assert advantage_BT.tolist() == [[0.9375, -0.25, 1.0, 0.0]]
    assert return_BT.tolist() == [[1.9375, 1.75, 4.0, 0.0]]


def test_undiscounted_returns_are_rewards_to_go(impl):
    reward_BT = torch.arange(6.0).reshape(2, 3)
    _, return_BT = gae(reward_BT, torch.randn(2, 3), torch.ones(2, 3), gamma=1.0, lam=1.0, impl=impl)
    torch.testing.assert_close(return_BT, torch.tensor([[3.0, 3.0, 2.0], [12.0, 9.0, 5.0]]))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 40), min_size=0, max_size=4), gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_matches_the_loop(impl, lengths, gamma, lam):
    T = max(lengths, default=3)
    reward_BT, value_BT = torch.randn(2, len(lengths), T)
    mask_BT = torch.arange(T) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    got = gae(reward_BT, value_BT, mask_BT, gamma=gamma, lam=lam, impl=impl)
    want = reference.gae(reward_BT.double(), value_BT.double(), mask_BT, gamma=gamma, lam=lam)
    assert all(worst(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))
    reward_BT[~mask_BT] = math.nan
    value_BT[~mask_BT] = math.inf
    assert all(
        torch.equal(a, b)
        for a, b in zip(got, gae(reward_BT, value_BT, mask_BT, gamma=gamma, lam=lam, impl=impl), strict=True)
    )


def test_rows_longer_than_one_block(impl):
    """The Triton path scans a block at a time and carries on from the one after it."""
    reward_BT, value_BT = torch.randn(2, 2, 700)
    mask_BT = torch.arange(700) < torch.tensor([[700], [512]])
    got = gae(reward_BT, value_BT, mask_BT, gamma=0.999, lam=0.99, impl=impl)
    want = reference.gae(reward_BT.double(), value_BT.double(), mask_BT, gamma=0.999, lam=0.99)
    assert all(worst(a, b) <= 5e-5 for a, b in zip(got, want, strict=True))


def test_bfloat16_in_float32_out(impl):
    reward_BT, value_BT = torch.randn(2, 3, 30).bfloat16()
    got = gae(reward_BT, value_BT, torch.ones(3, 30, dtype=torch.bool), gamma=1.0, lam=0.95, impl=impl)
    want = reference.gae(reward_BT.double(), value_BT.double(), torch.ones(3, 30), gamma=1.0, lam=0.95)
    assert all(a.dtype == torch.float32 and worst(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))


def test_float64_stays_float64():
    reward_BT, value_BT = torch.randn(2, 3, 30, dtype=torch.float64)
    got = gae(reward_BT, value_BT, torch.ones(3, 30), gamma=1.0, lam=0.95)
    want = reference.gae(reward_BT, value_BT, torch.ones(3, 30), gamma=1.0, lam=0.95)
    assert all(worst(a, b) <= 1e-13 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "name, value", [("value_BT", torch.zeros(2, 4)), ("mask_BT", torch.ones(6)), ("reward_BT", torch.zeros(6))]
)
def test_bad_input_is_named(name, value):
    good = {"reward_BT": torch.zeros(2, 3), "value_BT": torch.zeros(2, 3), "mask_BT": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=f"{name} is float32 of shape"):
        gae(**{**good, name: value}, gamma=1.0, lam=1.0)
