"""Token pruning against hand-worked numbers and float64."""

import math

import numpy as np
import pytest
import torch

from rlaif_lite.errors import RecipeError
from rlaif_lite.video.prune import (
    SHARES,
    apply,
    count_kept,
    dtd,
    evs,
    pool,
    random,
    shared_out,
    st_mean,
    v_cast,
    vidcom2,
)


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


def vidcom2_by_float64(features_TPC: torch.Tensor, keep: float) -> tuple[list[int], np.ndarray]:
    """(tokens kept, likeness of every token): the paper's formulas with loops, and vLLM's exact count."""
    x_TPC = features_TPC.double().numpy()
    frames, tokens, width = x_TPC.shape
    calm = np.argsort(x_TPC.reshape(-1, width).var(0), kind="stable")[: width // 2]
    x_TPC = x_TPC[..., calm]
    x_TPC = x_TPC / np.linalg.norm(x_TPC, axis=-1, keepdims=True)

    def likeness(token: np.ndarray, centre: np.ndarray) -> float:
        return sum(math.exp(-((token - centre) ** 2).sum() / (2 * 2.0**k)) for k in range(-3, 2))

    of_video = x_TPC.mean((0, 1))
    video = np.array([[likeness(x_TPC[t, p], of_video) for p in range(tokens)] for t in range(frames)])
    frame = np.array([[likeness(x_TPC[t, p], x_TPC[t].mean(0)) for p in range(tokens)] for t in range(frames)])
    score = -video.mean(1)
    weight = np.exp((score - score.max()) / 0.01)
    weight /= weight.sum()
    both, kept = video + frame, set()
    for t in range(frames):
        count = min(tokens, max(1, round(min(1.0, keep * (1 + weight[t] - weight.mean())) * tokens)))
        kept |= {t * tokens + int(p) for p in np.argsort(both[t], kind="stable")[:count]}
    flat, target = both.flatten(), max(frames, int(keep * frames * tokens + 1e-9))
    while len(kept) > target:
        kept.remove(max(kept, key=lambda i: flat[i]))
    while len(kept) < target:
        kept.add(min(set(range(len(flat))) - kept, key=lambda i: flat[i]))
    return sorted(kept), flat


def v_cast_by_float64(features_TPC: torch.Tensor, keep: float) -> tuple[list[int], np.ndarray]:
    """(tokens kept, score of every token), with loops."""
    x_TPC = features_TPC.double().numpy()
    frames, tokens, _ = x_TPC.shape

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    mean = [x.mean(0) / np.linalg.norm(x.mean(0)) for x in x_TPC]
    turn = [1.0] * frames
    for t in range(1, frames - 1):
        turn[t] = 1 - cosine(mean[t] - mean[t - 1], mean[t + 1] - mean[t])
    weight = np.exp(np.array(turn) / 0.7)
    weight /= weight.sum()
    count = max(frames, round(keep * frames * tokens))
    exact = (count - frames) * weight
    counts = [min(tokens, 1 + int(each)) for each in exact]
    order = sorted(range(frames), key=lambda t: -(exact[t] % 1))
    while sum(counts) < count:
        for t in order:
            if counts[t] < tokens and sum(counts) < count:
                counts[t] += 1
    score = np.zeros((frames, tokens))
    for t in range(frames):
        norm = np.linalg.norm(x_TPC[t], axis=-1)
        for p in range(tokens):
            score[t, p] = 1 - cosine(x_TPC[t, p], mean[t]) + (norm[p] - norm.min()) / (norm.max() - norm.min())
    kept = [t * tokens + int(p) for t in range(frames) for p in np.argsort(-score[t], kind="stable")[: counts[t]]]
    return sorted(kept), score.flatten()


def busy_video(frames: int, tokens: int, width: int, seed: int) -> torch.Tensor:
    """float64 features with a cut after a third, a turn and a frame unlike all others."""
    random = torch.Generator().manual_seed(seed)
    features_TPC = slow_video(frames, tokens, width, seed)
    features_TPC[frames // 3 :] += torch.randn(tokens, width, generator=random, dtype=torch.float64)
    features_TPC[frames // 2] *= -1.5
    return features_TPC


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("selector, reference", [(vidcom2, vidcom2_by_float64), (v_cast, v_cast_by_float64)])
def test_selectors_keep_what_float64_keeps(selector, reference, keep, dtype):
    features_TPC = busy_video(9, 30, 48, seed=3).to(dtype)
    pruned, (right, score) = selector(features_TPC, keep), reference(features_TPC, keep)
    assert len(pruned.position_K) == len(right) == count_kept(selector.__name__, keep, 9, 30)
    apart = set(right) ^ set(pruned.position_K.tolist())
    assert len(apart) <= 2 and np.ptp([score[i] for i in apart] or [0.0]) < 1e-5  # what float32 cannot tell apart
    assert torch.equal(pruned.features_KC, features_TPC.flatten(0, 1)[pruned.position_K])
    assert torch.equal(pruned.frame_K, pruned.position_K // 30) and (pruned.position_K.diff() > 0).all()


def test_vidcom2_gives_the_frame_unlike_the_video_more():
    """One frame of ten differs: its share is keep * (1 + 1 - 1/10), that of the others keep * (1 - 1/10)."""
    features_TPC = 1 + 0.1 * torch.randn(10, 100, 8, generator=torch.Generator().manual_seed(0))
    features_TPC[4] *= -1
    counts = vidcom2(features_TPC, 0.25).frame_K.bincount(minlength=10)
    assert counts.sum() == 250 and counts[4] == pytest.approx(100 * 0.25 * 1.9, abs=7)
    assert (counts[[0, 1, 2, 3, 5, 6, 7, 8, 9]] <= 23).all()  # 22 x 9 + 48 is 4 too few: they are filled up


def test_v_cast_gives_the_frame_where_the_video_turns_more():
    """Weights 1, 1 and e^(2/.7), e^(1/.7) at the ends: a step there and back has cosine -1."""
    there, back = [1.0, 0.0, 0.1], [0.0, 1.0, 0.1]
    features_TPC = torch.tensor([there, back, there])[:, None].expand(3, 40, 3) * torch.linspace(1, 2, 40)[:, None]
    weight = [math.exp(1 / 0.7), math.exp(2 / 0.7), math.exp(1 / 0.7)]
    middle = 1 + (30 - 3) * weight[1] / sum(weight)
    counts = v_cast(features_TPC, 0.25).frame_K.bincount().tolist()
    assert counts[1] == pytest.approx(middle, abs=1) and sum(counts) == 30 and abs(counts[0] - counts[2]) <= 1
    kept = v_cast(features_TPC, 0.25).position_K
    assert kept[kept < 40].tolist() == list(range(40 - counts[0], 40))  # all of one direction: the largest


def test_what_rounding_leaves_goes_round_by_largest_remainder():
    assert shared_out(10, [0.5, 0.3, 0.2], 10) == [5, 3, 2]  # 1 + 3.5, 1 + 2.1, 1 + 1.4: 3 + 2 + 1, one to the first
    assert shared_out(10, [0.98, 0.01, 0.01], 4) == [4, 3, 3]  # the first is full
    assert shared_out(3, [0.98, 0.01, 0.01], 4) == [1, 1, 1]


def test_dtd_drops_what_is_alike_and_counts_by_content():
    features_TPC = slow_video(12, 49, 64, seed=1).float()
    score = float64_scores(features_TPC)
    threshold = 1 - sorted(score)[300]  # between two scores, so that float32 decides as float64 does
    threshold = threshold - (sorted(score)[301] - sorted(score)[300]) / 2
    pruned = dtd(features_TPC, threshold)
    assert pruned.position_K.tolist() == [i for i in range(12 * 49) if not 1 - score[i] > threshold]
    assert len(pruned.position_K) == 12 * 49 - 301
    assert len(dtd(features_TPC[:1].expand(4, 49, 64), 0.5).position_K) == 49  # a still: frame 0 alone
    assert len(dtd(features_TPC, 1.0).position_K) == 12 * 49
    right, up = [1.0, 0.0], [0.0, 1.0]
    back = torch.tensor([[right], [up], [right], [right]])  # what is compared is the frame before, dropped or not
    assert dtd(back, 0.5).position_K.tolist() == [0, 1, 2]


def test_random_is_the_seeds():
    features_TPC = slow_video(6, 20, 8, seed=0).float()
    kept = [random(features_TPC, 0.25, seed).position_K.tolist() for seed in (1, 1, *range(2, 200))]
    assert kept[0] == kept[1] and len({tuple(each) for each in kept}) == 199
    assert all(len(each) == 30 and each == sorted(set(each)) for each in kept)
    often = np.bincount(sum(kept[1:], []), minlength=120) / 199
    assert often.min() > 0.1 and often.max() < 0.4  # every place is kept a quarter of the time
    chained = apply([{"random": 0.25}], features_TPC, seed=1)
    assert chained.position_K.tolist() == kept[0]


@pytest.mark.parametrize("name", [*SHARES, "dtd"])
def test_shares_are_exact_and_have_a_floor(name):
    for frames, tokens, keep in ((100, 1, 0.29), (8, 5, 0.5), (7, 3, 0.01), (1, 6, 0.5), (3, 4, 1.0)):
        features_TPC = torch.randn(frames, tokens, 8, generator=torch.Generator().manual_seed(0))
        kept = len(apply([{name: keep}], features_TPC).position_K)
        assert (
            kept <= count_kept(name, keep, frames, tokens)
            if name == "dtd"
            else kept == count_kept(name, keep, frames, tokens)
        )
    if name in ("evs", "vidcom2"):
        # vLLM: int(N * (1 - q)) of the rate q = 1 - keep, in floating point; for .1 that is a token less
        served = [int(100 * (1 - (1 - keep))) for keep in (0.5, 0.29, 0.25, 0.15, 0.1)]
        ours = [
            count_kept(name, keep, 100, 1) if name == "evs" else count_kept(name, keep, 1, 100)
            for keep in (0.5, 0.29, 0.25, 0.15, 0.1)
        ]
        assert [a - b for a, b in zip(ours, served, strict=True)] == [0, 0, 0, 0, 1]


def test_scores_that_are_all_alike_and_zero_features_give_the_first_tokens():
    for name in ("vidcom2", "v_cast", "dtd", "random"):
        pruned = apply([{name: 0.5}], torch.zeros(4, 6, 8))
        assert len(pruned.position_K) == (24 if name == "dtd" else 12) and pruned.features_KC.isfinite().all()


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
        ([{"vidcom2": 0}], "vidcom2: 0 is not a share"),
        ([{"v_cast": 2}], "v_cast: 2 is not a share"),
        ([{"random": -1}], "random: -1 is not a share"),
        ([{"dtd": 1.5}], "1.5 is not a cosine between -1 and 1"),
        ([{"vidcom2": 0.5}, {"evs": 0.5}], "optional pool, then"),
    ],
)
def test_chains_that_cannot_run_are_refused(chain, says):
    with pytest.raises(RecipeError, match=says):
        apply(chain, torch.randn(3, 16, 8))


def test_pool_without_a_square_grid_asks_for_the_grid():
    with pytest.raises(RecipeError, match="no grid of 3 x 3"):
        apply([{"pool": 2}], torch.randn(3, 12, 8))
    assert apply([{"pool": 2}], torch.randn(3, 12, 8), (3, 4)).layout_tokens == 12
