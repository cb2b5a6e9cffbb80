"""Videos for pretraining the embedded base: made, encoded to mp4, read back like any other, kept as 32 x 32 frames.

They come from a world seed that no recipe uses. Training and held-out videos are different indices of it.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lab.embedded_base.architecture import FRAME_SIZE
from rlaif_lite.data.world import WorldConfig, facts_of, write_video
from rlaif_lite.data.world_text import COLOURS, SHAPES, Facts

WORLD_SEED = 1_000_003
FRAMES = 24
HIDDEN = 6  # the class "no object" of colour; SHAPES has its own at 4


class VideoSet(NamedTuple):
    """Decoded videos with what is true of them."""

    frames_NFHWC: np.ndarray  # uint8, RGB, 32 x 32
    labels_NFL: (
        np.ndarray
    )  # float32: colour class, shape class, x, y, radius / 16 (x, y as share of the width), star colour class
    facts: list[Facts]


def _one(index: int, config: WorldConfig) -> tuple[np.ndarray, np.ndarray]:
    """Makes video `index`; decord wants a file, so it goes through one."""
    import decord

    path = os.path.join(tempfile.gettempdir(), f"pretrain_{os.getpid()}.mp4")
    placed = write_video(path, WORLD_SEED, "pretrain", index, config)
    reader = decord.VideoReader(path, width=FRAME_SIZE, height=FRAME_SIZE, num_threads=1)
    frames = reader.get_batch(range(FRAMES)).asnumpy()
    os.remove(path)
    facts = facts_of(WORLD_SEED, "pretrain", index, config)
    labels = np.empty((FRAMES, 6), np.float32)
    for number, (colour, shape, _) in enumerate(facts["events"]):
        part = slice(number * config.frames_per_event, (number + 1) * config.frames_per_event)
        visible = placed[part, 0] > 0
        labels[part, 0] = np.where(visible, COLOURS.index(colour), HIDDEN)
        labels[part, 1] = np.where(visible, SHAPES.index(shape), len(SHAPES))
    labels[:, 2:4], labels[:, 4] = placed[:, 1:3] / config.size, placed[:, 3] / 16
    labels[:, 5] = COLOURS.index(facts["star"]) if facts["star"] else HIDDEN
    return frames, labels


PLAIN = WorldConfig()


def make_videos(
    count: int, workers: int, cache: Path | None = None, first: int = 0, config: WorldConfig = PLAIN
) -> VideoSet:
    """Videos `first` to `first + count` of the pretraining split; folder `cache` keeps them for the next run."""
    facts = [facts_of(WORLD_SEED, "pretrain", first + index, config) for index in range(count)]
    key = hashlib.sha256(f"{config} {first} {count}".encode()).hexdigest()[:12]
    if cache and (cache / f"labels_{key}.npy").exists():
        frames = np.load(cache / f"frames_{key}.npy", mmap_mode="c")
        return VideoSet(frames, np.load(cache / f"labels_{key}.npy"), facts)
    frames = np.empty((count, FRAMES, FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
    labels = np.empty((count, FRAMES, 6), np.float32)
    make, wanted = functools.partial(_one, config=config), range(first, first + count)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) if workers > 1 else None
    results = pool.map(make, wanted, chunksize=16) if pool else map(make, wanted)
    for index, result in enumerate(results):
        frames[index], labels[index] = result
    if pool:
        pool.shutdown()
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(cache / f"frames_{key}.npy", frames)
        np.save(cache / f"labels_{key}.npy", labels)
    return VideoSet(frames, labels, facts)
