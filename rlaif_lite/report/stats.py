"""Metrics against the truth as ratios of sums, and paired bootstrap intervals of their change.

Precision over a test set is (sum of what was right) / (sum of what was said), not a mean of per-video precisions: a
short answer must not count as much as a long one. Such a ratio has no standard error to look up, so its change gets a
percentile bootstrap interval that resamples VIDEOS, all answers to a video together (Efron and Tibshirani 1993).

Answers to several questions about one video are no independent draws, so a video is one item however many there are.

Over seeds, which are few, Student's t.

Shapes: N items (videos), K counts per item (`COUNTS`, in that order), R resamples.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FACTS = ("correct", "wrong", "total", "mentions", "hallucinated")
COUNTS = ("answers", "known", *FACTS, "malformed", "length", "stopped", "repetition", "checked", "accuracy")
Metric = Callable[[NDArray[np.float64]], NDArray[np.float64]]


T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 1 to 10 degrees of freedom


class Interval(NamedTuple):
    """A change and its 95 % interval."""

    delta: float  # the change, after - before, on the items as they are
    low: float  # 2.5th percentile over resamples
    high: float  # 97.5th percentile over resamples

    def verdict(self, better: int) -> str:
        """Where more is better (1), or less (-1): "better" or "worse"; where neither is (0): "differs". Empty where the
        interval holds 0."""
        if self.low <= 0 <= self.high:
            return ""
        return "differs" if not better else "better" if (self.low > 0) == (better > 0) else "worse"


def tally(rows: Iterable[Mapping]) -> dict[str, NDArray[np.float64]]:
    """Counts (K,) per VIDEO, over all answers to all questions about it, of rows of `evaluate/*.jsonl`.

    A row without truth is no `known` answer and counts no facts. `malformed` counts answers, not sentences.
    """
    counts: dict[str, NDArray[np.float64]] = {}
    for row in rows:
        truth = row["truth"] or {}
        facts = [truth.get(name, 0) for name in FACTS]
        malformed = (truth.get("malformed") or 0) > 0
        accuracy = row.get("accuracy")
        values = [1, bool(truth), *facts, malformed, row["length"], row["stopped"], row["repetition"]]
        values += [accuracy is not None, accuracy or 0.0]
        counts[row["video"]] = counts.get(row["video"], 0.0) + np.array(values, dtype=np.float64)
    return counts


def measured(rows: Iterable[Mapping]) -> list[str]:
    """The names in RATIOS that can be said of these rows: those that need the truth where it is known of an answer,
    `malformed` where the truth has a grammar, `accuracy` where rules read the solution."""
    rows = list(rows)
    checked = any(row.get("accuracy") is not None for row in rows)
    truths = [row["truth"] for row in rows if row["truth"] is not None]
    grammar = any(truth["malformed"] is not None for truth in truths)
    known = [name for name in RATIOS if name not in NEEDS_TRUTH or (truths and (name != "malformed" or grammar))]
    return [name for name in known if name != "accuracy" or checked]


def paired(before: Iterable[Mapping], after: Iterable[Mapping]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`tally` of two sets of rows about the same videos, as counts (N, K) in the same order. Raises KeyError where
    `after` is about a video that `before` is not about."""
    one, other = tally(before), tally(after)
    return np.stack([one[video] for video in other]), np.stack(list(other.values()))


class Asked(NamedTuple):
    """What was evaluated."""

    videos: int
    questions: int
    known: int  # questions whose truth is known

    def __str__(self) -> str:
        videos = f"{self.videos} held-out video{'s' * (self.videos != 1)}"
        return videos if self.questions == self.videos else f"{self.questions} questions on {videos}"


def asked(rows: Iterable[Mapping]) -> Asked:
    """Counts of rows of `evaluate/*.jsonl`, each question once however many answers it has."""
    rows = list(rows)
    known = {row["key"] for row in rows if row["truth"] is not None}
    return Asked(len({row["video"] for row in rows}), len({row["key"] for row in rows}), len(known))


def _share(part: str, *whole: str) -> Metric:
    "Sum of `part` over the sum of all in `whole`; 0 where nothing was counted."

    def metric(sums_RK: NDArray[np.float64]) -> NDArray[np.float64]:
        below_R = sums_RK[..., [COUNTS.index(name) for name in whole]].sum(axis=-1)
        return sums_RK[..., COUNTS.index(part)] / np.where(below_R == 0, 1.0, below_R)

    return metric


RATIOS: dict[str, Metric] = {
    "accuracy": _share("accuracy", "checked"),
    "precision": _share("correct", "correct", "wrong"),
    "recall": _share("correct", "total"),
    "f1": lambda sums_RK: 2 * _share("correct", "correct", "wrong", "total")(sums_RK),
    "hallucination": _share("hallucinated", "mentions"),
    "mentions": _share("mentions", "known"),
    "malformed": _share("malformed", "known"),
    "right": _share("correct", "known"),
    "wrong": _share("wrong", "known"),
    "score": lambda sums_RK: RATIOS["right"](sums_RK) - RATIOS["wrong"](sums_RK),
    "length": _share("length", "answers"),
    "stop_rate": _share("stopped", "answers"),
    "repetition": _share("repetition", "answers"),
}
NEEDS_TRUTH = ("precision", "recall", "f1", "hallucination", "mentions", "malformed", "right", "wrong", "score")


def by_video(tallies: Iterable[tuple[str, Mapping[str, Sequence[float]]]]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """(video, {metric: (part, whole)}) of each item -> {metric: {video: its sums (2,)}}, for `ratio`."""
    sums: dict[str, dict[str, NDArray[np.float64]]] = {}
    for video, tally in tallies:
        for metric, counts in tally.items():
            of_video = sums.setdefault(metric, {})
            of_video[video] = of_video.get(video, 0.0) + np.array(counts, dtype=np.float64)
    return sums


def ratio(sums_R2: NDArray[np.float64]) -> NDArray[np.float64]:
    """(part, whole) -> the share; 0 where nothing was counted."""
    return sums_R2[..., 0] / np.where(sums_R2[..., 1] == 0, 1.0, sums_R2[..., 1])


def paired_bootstrap(
    before: NDArray | Sequence, after: NDArray | Sequence, metric: Metric | None = None, n: int = 2000, seed: int = 0
) -> Interval:
    """Change from `before` to `after`, measurements of the same N items in the same order, with its 95 % interval.

    Without `metric`: one number per item (N,), compared by their means. With one: counts (N, K), and
    `metric(sums_RK) -> (R,)`, one of `RATIOS`. Raises ValueError when the two do not have the same items.
    """
    before_NK, after_NK = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if before_NK.shape != after_NK.shape or len(before_NK) == 0:
        raise ValueError(f"cannot pair measurements of shapes {before_NK.shape} and {after_NK.shape}")
    items = len(before_NK)
    if metric is None:
        before_NK, after_NK = before_NK[:, None], after_NK[:, None]
    value = metric or (lambda sums_RK: sums_RK[..., 0] / items)

    def change(weight_RN: NDArray) -> NDArray[np.float64]:
        return value(weight_RN @ after_NK) - value(weight_RN @ before_NK)

    deltas_R = np.concatenate([change(weight_RN) for weight_RN in _resamples(items, n, seed)])
    low, high = np.percentile(deltas_R, [2.5, 97.5])
    return Interval(float(change(np.ones((1, items)))[0]), float(low), float(high))


@lru_cache(maxsize=1)
def _resamples(items: int, n: int, seed: int) -> list[NDArray[np.uint16]]:
    """How often each item is drawn in each of `n` resamples, 200 at a time, so that the products stay small. Every
    metric of a table resamples the same items, and the draws cost more than the products."""
    rng, even_N = np.random.default_rng(seed), np.full(items, 1.0 / items)
    pieces = [min(200, n - start) for start in range(0, n, 200)]
    return [rng.multinomial(items, even_N, size=piece).astype(np.uint16) for piece in pieces]


class Stat(NamedTuple):
    """Some draws of one figure."""

    n: int
    mean: float
    sd: float | None  # None for a single draw
    low: float | None  # the 95 % interval of the mean
    high: float | None


def stat(values: list[float]) -> Stat:
    """Mean, standard deviation and t interval of at least one value."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Stat(1, mean, None, None, None)
    sd = statistics.stdev(values)
    half = t_quantile(n - 1) * sd / n**0.5
    return Stat(n, mean, sd, mean - half, mean + half)


def t_quantile(df: int) -> float:
    """The 97.5 % quantile of Student's t; above ten degrees of freedom by its expansion around the normal's
    (Abramowitz and Stegun 26.7.5), right to 0.003."""
    return T_975[df - 1] if df <= len(T_975) else 1.96 + 2.372 / df + 2.823 / df**2
