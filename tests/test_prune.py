"""Token pruning against hand-worked numbers and float64."""

import pytest
import torch

from rlaif_lite.errors import RecipeError
from rlaif_lite.video.prune import apply, evs, pool, st_mean


def slow_video(frames: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    """float64 features that drift a little per frame, each cell at its own speed: what a calm video looks like."""
    random = torch.Generator().manual_seed(seed)
    start_PC = torch.randn(tokens, width, generator=random, dtype=torch.float64)
    speed_TP = torch.rand(frames, tokens, 1, generator=random, dtype=torch.float64) * 0.05
    step_TPC = torch.randn(frames, tokens, width, generator=random, dtype=torch.float64)
    return start_PC + (speed_TP * step_TPC).cumsum(0)


def float64_scores(features_TPC: torch.Tensor) -> list[float]:
    """1 - cosine to the same cell one frame earlier, token by token in float64; infinite on frame 0."""
    frames, tokens, _ = features_TPC.shape
    score = [float("inf")] * tokens
    for t in range(1, frames):
        for p in range(tokens):
            now, before = features_TPC[t, p].double(), features_TPC[t - 1, p].double()
            score.append(1 - float(now @ before / (now.norm() * before.norm())))
    return score


def kept_by_float64(features_TPC: torch.Tensor, count: int) -> list[int]:
    """The tokens of the largest scores, ties to the earlier, in order."""
    score = float64_scores(features_TPC)
    return sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:count])


def test_pool_by_hand():
    image = torch.arange(16.0).reshape(1, 16, 1)  # one frame of 4 x 4
    pruned = pool(image, (4, 4), 2)
    assert pruned.features_KC.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pruned.position_K.tolist() == [0, 1, 2, 3] and pruned.layout_tokens == 4


def test_pool_keeps_frames_apart_and_knows_rows_from_columns():
    wide = torch.tensor([[0.0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5]])  # 2 rows, 6 columns
    pruned = pool(torch.stack([wide.flatten(), wide.flatten() + 10])[..., None], (2, 6), 2)
    top, bottom = [1 / 3, 5 / 3], [10 / 3, 14 / 3]
    assert torch.allclose(pruned.features_KC.flatten(), torch.tensor(top + bottom + [10 + x for x in top + bottom]))
    assert pruned.frame_K.tolist() == [0] * 4 + [1] * 4


def test_st_mean_by_hand():
    features_TPC = torch.tensor([[[1.0], [3.0]], [[5.0], [11.0]], [[0.0], [1.0]]])  # 3 frames of 2 cells
    pruned = st_mean(features_TPC)
    assert pruned.features_KC.flatten().tolist() == [2.0, 8.0, 0.5, 2.0, 5.0]
    assert pruned.position_K.tolist() == [0, 1, 2, 3, 4] and pruned.frame_K.tolist() == [0, 1, 2, -1, -1]
    assert pruned.layout_tokens == 5


def test_st_mean_of_the_published_size_has_626_tokens():
    assert st_mean(torch.zeros(50, 576, 4)).layout_tokens == 626


def test_evs_by_hand():
    right, up, diagonal = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    features_TPC = torch.tensor([[right, right], [right, up], [diagonal, up]])
    pruned = evs(features_TPC, 0.5)  # of 6: frame 0 (2), then the turn by 90 degrees at token 3
    assert pruned.position_K.tolist() == [0, 1, 3] and pruned.frame_K.tolist() == [0, 0, 1]
    assert pruned.features_KC.tolist() == [right, right, up] and pruned.layout_tokens == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.9])
def test_evs_selects_what_float64_selects(dtype, keep):
    features_TPC = slow_video(12, 49, 64, seed=1).to(dtype)
    pruned = evs(features_TPC, keep)
    right = kept_by_float64(features_TPC, max(49, int(keep * 12 * 49)))
    assert len(pruned.position_K) == len(right)
    score = float64_scores(features_TPC)
    cut = min(score[i] for i in right)
    for i in set(right) ^ set(pruned.position_K.tolist()):  # only what float32 cannot tell from the cut may differ
        assert abs(score[i] - cut) < 3e-7
    assert pruned.position_K.tolist() == sorted(pruned.position_K.tolist())
    assert torch.equal(pruned.features_KC, features_TPC.flatten(0, 1)[pruned.position_K])
    assert pruned.features_KC.dtype == dtype


def test_scores_in_bfloat16_would_keep_the_wrong_tokens():
    features_TPC = slow_video(16, 64, 64, seed=2).bfloat16()
    right = kept_by_float64(features_TPC, 256)
    cosine_TP = torch.nn.functional.cosine_similarity(features_TPC[1:], features_TPC[:-1], dim=-1)
    score_N = torch.cat([torch.full((64,), torch.inf), (1 - cosine_TP).flatten().float()])
    naive = score_N.argsort(descending=True, stable=True)[:256].tolist()
    assert len(set(right) - set(naive)) > 20  # the pitfall is real on these features
    assert evs(features_TPC, 0.25).position_K.tolist() == right


def test_evs_of_a_still_video_keeps_the_earliest_tokens():
    features_TPC = torch.randn(1, 5, 8).expand(4, 5, 8)
    assert evs(features_TPC, 0.35).position_K.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_evs_keeps_frame_0_even_when_the_share_is_smaller():
    features_TPC = torch.randn(10, 4, 8)
    assert evs(features_TPC, 0.01).position_K.tolist() == [0, 1, 2, 3]


def test_evs_counts_the_share_exactly():
    assert len(evs(torch.randn(100, 1, 8), 0.29).position_K) == 29  # .29 * 100 is 28.999... in floating point
    assert len(evs(torch.randn(100, 1, 8), 1.0).position_K) == 100


def test_a_chain_selects_on_the_pooled_layout():
    features_TPC = torch.randn(6, 16, 8)
    pooled = apply([{"pool": 2}], features_TPC)
    pruned = apply([{"pool": 2}, {"evs": 0.5}], features_TPC)
    assert pooled.layout_tokens == pruned.layout_tokens == 24 and len(pruned.position_K) == 12
    assert torch.equal(pruned.features_KC, pooled.features_KC[pruned.position_K])
    assert torch.equal(pruned.frame_K, pruned.position_K // 4)
    assert apply([{"pool": 2}, {"st_mean": True}], features_TPC).layout_tokens == 6 + 4


def test_an_empty_chain_keeps_everything_on_any_grid():
    features_TPC = torch.randn(3, 7, 8)  # 7 is no square: a layout with a class token, say
    pruned = apply([], features_TPC)
    assert torch.equal(pruned.features_KC, features_TPC.flatten(0, 1))
    assert pruned.frame_K.tolist() == [0] * 7 + [1] * 7 + [2] * 7


@pytest.mark.parametrize(
    "chain, says",
    [
        ([{"evs": 0.5}, {"pool": 2}], "optional pool, then"),
        ([{"evs": 0.5}, {"st_mean": True}], "optional pool, then"),
        ([{"prune": 2}], "optional pool, then"),
        ([{"pool": 5}], "4 x 4 tokens"),
        ([{"pool": 0}], "4 x 4 tokens"),
        ([{"evs": 0.0}], "share between 0"),
        ([{"evs": 1.5}], "share between 0"),
    ],
)
def test_chains_that_cannot_run_are_refused(chain, says):
    with pytest.raises(RecipeError, match=says):
        apply(chain, torch.randn(3, 16, 8))


def test_pool_without_a_square_grid_asks_for_the_grid():
    with pytest.raises(RecipeError, match="no grid of 3 x 3"):
        apply([{"pool": 2}], torch.randn(3, 12, 8))
    assert apply([{"pool": 2}], torch.randn(3, 12, 8), (3, 4)).layout_tokens == 12
