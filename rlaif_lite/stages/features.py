"""Frames to tokens, once: decode, frozen vision tower and projector, pruning, cache. Then the tower is dropped.

The release pushes 50 frames through the tower for policy, reference, reward and value in every epoch. Here a video is
decoded and encoded once, its clips for the context stage in the same pass, and the pruned tokens are kept on disk
under a key of everything they depend on: the video's bytes, the sampling, the image processor, the tower's weights,
the prune chain, the dtype.

Shapes: T frames, P tokens per frame, D width, K tokens kept.
"""

import hashlib
import multiprocessing
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Iterator

import torch

from ..data.records import Record
from ..errors import DataError, VideoError
from ..model.base import Base
from ..model.families import to_pixels
from ..progress import progress, say
from ..video.cache import FeatureRecord, feature_key, video_digest, write_index
from ..video.decode import Frames, View, decode_views
from ..video.prune import apply
from ..workspace import WHOLE, Workspace, write_json

READS = ("data", "features", "model.base", "model.revision", "model.dtype")
NEEDS = ("data",)


def run(work: Workspace) -> dict:
    """Fill the cache and write `features/index.json`. Unreadable videos stop the run with their list once all others
    are done, or are set aside and counted (`data.on_missing: skip`)."""
    base = work.base(tower=True)
    wanted = views_of(work)
    tower = tower_digest(base)
    processor = base.images._asdict() | {"of": tower_config(base)}
    chain = [step.model_dump() for step in work.recipe.features.prune]
    keys = {
        name: feature_key(
            video=video_digest(video), views=views, processor=processor, tower=tower, chain=chain, dtype=str(base.dtype)
        )
        for name, (video, views) in wanted.items()
    }
    missing = {name: wanted[name] for name in wanted if not work.store.has(keys[name])}
    failed: dict[str, str] = {}
    with progress(len(wanted), "features", unit="video") as bar:
        bar.advance(len(wanted) - len(missing))
        for name, found in decoded(missing, work.recipe.features.workers, (base.images.height, base.images.width)):
            if isinstance(found, VideoError):
                failed[name] = str(found)
            else:
                work.store.put(keys[name], encode(base, found, chain), {"video": name})
            bar.advance(1)
    if failed and work.recipe.data.on_missing == "error":
        shown = "\n  ".join(list(failed.values())[:20])
        raise DataError(
            f"{len(failed)} of {len(wanted)} videos cannot be decoded:\n  {shown}\n"
            "The others are cached. Mend or remove these, or set `data.on_missing: skip` to go on without them."
        )
    write_json(work.stage("features") / "quarantine.json", failed)
    write_index(
        work.folder / "features" / "index.json", {name: key for name, key in keys.items() if name not in failed}
    )
    base.drop_tower()
    return describe(work, wanted, keys, failed)


def views_of(work: Workspace) -> dict[str, tuple[str | tuple[str, ...], dict[str, View]]]:
    """{video name: (video, its views)}: the whole of every video, the clips that records name, and all clips where a
    narrative is to be written."""
    section = work.recipe.features
    wanted: dict[str, tuple[str | tuple[str, ...], dict[str, View]]] = {}

    def want(record: Record, clips: range | list[int]) -> None:
        _, views = wanted.setdefault(work.name_of(record), (record.video, {WHOLE: View(section.frames)}))
        for clip in clips:
            if clip >= section.clips:
                raise DataError(
                    f"{record.source}: the record is about clip {clip}, but `features.clips` is {section.clips}."
                )
            views[f"clip{clip}"] = View(section.clip_frames, clip, section.clips)

    for split in work.split_names():
        for record in work.records(split):
            if record.video is not None:
                clips = range(section.clips) if split == "preference" else [] if record.clip is None else [record.clip]
                want(record, clips)
    return {name: (video, dict(sorted(views.items()))) for name, (video, views) in wanted.items()}


def decoded(wanted: dict, workers: int, size: tuple[int, int]) -> Iterator[tuple[str, dict[str, Frames] | VideoError]]:
    """Decode in worker processes, a few videos ahead, and yield in order.

    A file that crashes a decoder takes its process with it: the videos that were in flight are then decoded one by one,
    each in a process of its own, and the culprit is a VideoError like any other unreadable file."""
    if workers == 0:
        for name, (video, views) in wanted.items():
            yield name, _decode(video, views, size)
        return
    queue = deque(wanted.items())
    while queue:
        flying: dict[str, tuple[tuple, Future]] = {}
        crashed: dict[str, tuple] = {}
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                while queue or flying:
                    while queue and len(flying) < 4 * workers:
                        name, job = queue.popleft()
                        flying[name] = (job, pool.submit(_decode, *job, size))
                    name = next(iter(flying))
                    yield name, flying[name][1].result()
                    del flying[name]
            except BrokenProcessPool:
                crashed = {name: job for name, (job, _) in flying.items()}
        for name, job in crashed.items():
            yield name, _decode_alone(*job, size)


def _decode_alone(video, views: dict[str, View], size: tuple[int, int]) -> dict[str, Frames] | VideoError:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_decode, video, views, size).result()
        except BrokenProcessPool:
            return VideoError(f"{video}: the decoder crashed on it. Re-encode or remove the file.")


def _decode(video, views: dict[str, View], size: tuple[int, int]) -> dict[str, Frames] | VideoError:
    try:
        return decode_views(video, views, size=size)
    except VideoError as error:
        return error


def encode(base: Base, frames: dict[str, Frames], chain: list[dict]) -> dict[str, FeatureRecord]:
    """All views of a video in one pass of the tower, then pruned one by one."""
    pixels_TCHW = torch.cat([to_pixels(view.rgb_THWC, base.images) for view in frames.values()])
    features_TPD = base.encode(pixels_TCHW)
    out = {}
    for name, features in zip(frames, features_TPD.split([len(view.time_T) for view in frames.values()]), strict=True):
        pruned = apply(chain, features)
        time_T = torch.as_tensor(frames[name].time_T)
        out[name] = FeatureRecord(
            features_KD=pruned.features_KC.cpu(),
            position_CK=pruned.position_K[None].cpu(),
            frame_K=pruned.frame_K.cpu(),
            time_T=time_T,
            kept_R=torch.tensor([len(pruned.position_K)]),
            span_R=torch.tensor([pruned.layout_tokens]),
            layout_tokens=pruned.layout_tokens,
            frames=len(time_T),
        )
    return out


def tower_digest(base: Base) -> str:
    """sha256 over the weights of vision tower and projector."""
    digest = hashlib.sha256()
    for part in base.family.tower:
        for name, parameter in getattr(base.model.base_model, part).named_parameters():
            digest.update(f"{part}.{name}".encode())
            digest.update(parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def tower_config(base: Base) -> dict:
    """The base's configuration but for its language model: layer, strategy and strides decide the features as well."""
    return {
        key: value
        for key, value in base.model.config.to_diff_dict().items()
        if key not in ("text_config", "quantization_config")
    }


def describe(work: Workspace, wanted: dict, keys: dict[str, str], failed: dict[str, str]) -> dict:
    """Counts for the report; says what the first video became."""
    first = next((name for name in wanted if name not in failed), None)
    out = {"videos": len(wanted) - len(failed), "unreadable": len(failed), "missing": len(work.missing_videos)}
    if first is not None:
        view = work.store.get(keys[first])[WHOLE]
        frames, unpruned = view.frames, view.frames * work.base().family.grid(work.base().model.config) ** 2
        out |= {"frames": frames, "tokens_before": unpruned, "tokens_after": view.features_KD.shape[0]}
        say(
            f"features: {frames} frames, {unpruned} video tokens, {view.features_KD.shape[0]} after pruning (first video: {first})"
        )
    return out
