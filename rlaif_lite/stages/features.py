"""Frames to tokens, once: decode, frozen vision tower and projector, pruning, cache. Then the tower is dropped.

The release pushes 50 frames through the tower for policy, reference, reward and value in every epoch. Here a video is
decoded and encoded once, its clips for the context stage in the same pass, and the pruned tokens are kept on disk
under a key of everything they depend on: the video's bytes, the sampling, the image processor, the tower's weights,
the prune chain, the dtype.

Shapes: T frames, G frames after merging in time, P tokens per frame, D width, K tokens kept.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from .. import ranks
from ..data.records import Record
from ..errors import DataError, StageError, VideoError
from ..files import write_json
from ..model.base import Base
from ..model.families import Encoded
from ..model.layout import check_chain, lay_out, merged_times
from ..model.memory import in_pieces, out_of_memory
from ..model.pixels import to_pixels
from ..phases import phase
from ..progress import progress, say
from ..video.altered import altered, name_of, parts_of
from ..video.cache import FeatureRecord, feature_key, write_index
from ..video.decode import Frames, View
from ..video.workers import decode_all, digest_all, how_many
from ..workspace import WHOLE, Workspace

READS = (
    *("data", "features", "model.base", "model.revision", "model.dtype", "model.reward_base.base"),
    "model.reward_base.revision",
)
NEEDS = ("data",)
TOGETHER = 4  # videos that a rank encodes before they are written


def run(work: Workspace) -> dict:
    """Fill the cache for the base, and for the reward role's own where it has one. Videos that cannot be used are set
    aside, with the reason, in `features/quarantine.json`. Once all others are done they stop the run, or are counted
    (`data.on_missing: skip`)."""
    wanted = views_of(work)
    keys, failed = fill(work, wanted)
    if work.for_reward is not work:
        failed |= fill(work.for_reward, wanted)[1]
    set_aside(work, {name: failed[name] for name in wanted if name in failed}, len(wanted))
    return counts(work, wanted, keys, failed)


def fill(work: Workspace, wanted: dict) -> tuple[dict[str, str], dict[str, str]]:
    """Put what is missing into the cache and write the base's index -> {video name: key}, {video name: why it
    failed}."""
    section = work.recipe.features
    base = work.base(tower=True)
    base.limit_pixels(section.max_pixels)
    chain = [step.model_dump() for step in section.prune]
    check_chain(base.family, base.model.config.model_type, chain)
    keys, failed = keys_of(base, wanted, chain, how_many(section.workers))
    missing = ranks.first(lambda: [name for name in keys if not work.store.has(keys[name])])
    by_pyav: dict[str, str] = {}
    with progress(len(wanted), "features", unit="video") as bar:
        bar.advance(len(wanted) - len(missing))
        own = {name: wanted[name] for name in ranks.deal(missing)}
        encoded = encode_all(work, base, own, keys, len(missing) < len(keys))
        rounds = -(-len(missing) // (ranks.count() * TOGETHER))
        for _ in range(rounds):
            for name, found in itertools.chain(*ranks.collect(list(itertools.islice(encoded, TOGETHER)))):
                bar.advance(1)
                if isinstance(found, str):
                    failed[name] = found
                    continue
                views, reason = found
                if reason:
                    by_pyav[name] = reason
                work.store.put(keys[name], views, {"video": name})
    by_pyav, failed = ranks.first(lambda: (by_pyav, failed))
    if by_pyav:
        name, reason = next(iter(by_pyav.items()))
        say(
            f"features: {len(by_pyav)} of {len(missing)} videos were decoded with PyAV, in order, where decord would "
            f"be wrong or refuses; the first: {name}: {reason}"
        )
    write_index(work.index_file, {name: keys[name] for name in keys if name not in failed})
    base.drop_tower()
    return keys, failed


def encode_all(
    work: Workspace, base: Base, wanted: dict, keys: dict[str, str], tower_works: bool
) -> Iterator[tuple[str, tuple[dict[str, FeatureRecord], str] | str]]:
    """Each video's name with its views and why PyAV decoded it, if it did; or with the reason why there are none.
    `tower_works`: on some video it did, so a failure is the video's."""
    section, tower_failed = work.recipe.features, 0
    chain = [step.model_dump() for step in section.prune]
    size = base.images.size.of(section.frames)
    plain = {
        name: (video, {v: view for v, view in views.items() if not parts_of(v)[1]})
        for name, (video, views) in wanted.items()
    }
    for name, found in decode_all(plain, how_many(section.workers), size, section.max_source_pixels):
        if isinstance(found, VideoError):
            yield name, str(found)
            continue
        try:
            with phase("tower", sum(len(view.time_T) for view in found.values())):
                views = finite(encode(base, found, chain, wanted[name][1], seed=int(keys[name][:8], 16)))
        except torch.AcceleratorError:  # the GPU's state is lost: it would refuse every later video too
            raise
        except RuntimeError as error:
            tower_failed += 1
            if not tower_works and tower_failed == 3:  # not these videos' fault
                raise
            yield name, f"{name}: the vision tower failed on it ({error})."
        else:
            tower_works = True
            yield name, (views, found[WHOLE].reason)


def keys_of(base: Base, wanted: dict, chain: list[dict], workers: int) -> tuple[dict[str, str], dict[str, str]]:
    """{video name: key in the cache}, and why there is none for those whose bytes cannot be read."""
    digest = hashlib.sha256()  # over the weights of vision tower and projector, and of a token that ends every video
    for name, parameter in base.model.base_model.named_parameters():
        if name.split(".")[0] in (*base.family.tower, "image_newline"):
            digest.update(name.encode())
            digest.update(parameter.data.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    tower = digest.hexdigest()
    # all of the configuration but the language model: layer, strategy and strides decide the features as well
    config = base.model.config.to_diff_dict()
    of = {key: value for key, value in config.items() if key not in ("text_config", "quantization_config")}
    processor = base.images._asdict() | {"of": of}
    digests, failed = {}, {}
    common = {"processor": processor, "tower": tower, "chain": chain, "dtype": str(base.dtype)}
    with progress(len(wanted), "features: reading", unit="video") as bar:

        def read_bytes(names: list[str]) -> list[str | VideoError]:
            read = {}
            for name, found in digest_all({name: wanted[name][0] for name in names}, workers):
                read[name] = found
                bar.advance(1)
            bar.advance((len(wanted) - len(names)) if ranks.count() > 1 else 0)  # the other ranks read these
            return [read[name] for name in names]

        for name, found in zip(wanted, ranks.spread(list(wanted), read_bytes), strict=True):
            if isinstance(found, VideoError):
                failed[name] = str(found)
            else:
                digests[name] = found
    keys = {
        name: feature_key(video=digests[name], views=views, **common)
        for name, (_, views) in wanted.items()
        if name in digests
    }
    return keys, failed


def finite(views: dict[str, FeatureRecord]) -> dict[str, FeatureRecord]:
    """The views as they are; raises RuntimeError for features that would spoil everything that is trained on them."""
    if not all(view.features_KD.isfinite().all() for view in views.values()):
        raise RuntimeError("its features are not all finite")
    return views


def set_aside(work: Workspace, failed: dict[str, str], wanted: int) -> None:
    """Write `quarantine.json`; raises DataError where the recipe does not go on without these, or nothing is left."""
    path = work.stage("features") / "quarantine.json"
    write_json(path, failed)
    if failed and (work.recipe.data.on_missing == "error" or len(failed) == wanted):
        shown = "\n  ".join(list(failed.values())[:20])
        raise DataError(
            f"{len(failed)} of {wanted} videos cannot be decoded or encoded (listed in {path}):\n  {shown}\n"
            "The others are cached. Mend or remove these, or set `data.on_missing: skip` to go on without them."
        )


def views_of(work: Workspace) -> dict[str, tuple[str | tuple[str, ...], dict[str, View]]]:
    """{video name: (video, its views)}: the whole of every video, the clips that records name, all clips where a
    narrative is to be written, and altered videos where the recipe asks for them (`video/altered.py`)."""
    section = work.recipe.features
    wanted: dict[str, tuple[str | tuple[str, ...], dict[str, View]]] = {}

    cut = {f"clip{clip}": View(section.clip_frames, clip, section.clips) for clip in range(section.clips)}

    def want(record: Record, narrated: bool, kinds: Sequence[str]) -> None:
        still = isinstance(record.video, tuple) and len(record.video) == 1  # a picture: more frames would repeat it
        whole = View(1 if still else section.frames)
        _, views = wanted.setdefault(work.name_of(record), (record.video, {WHOLE: whole}))
        views |= {name: view._replace(count=1) if still else view for name, view in cut.items()} if narrated else {}
        if record.clip is not None:
            clips = record.clips or section.clips
            if record.clip >= clips:
                raise DataError(
                    f"{record.source}: the record is about clip {record.clip}, but `features.clips` is {clips}."
                )
            views[work.view_name(record)] = View(section.clip_frames, record.clip, clips)
        view = work.view_name(record)
        views |= {name_of(view, kind): views[view] for kind in kinds}

    for split in work.split_names():
        for record in work.records(split):
            if record.video is not None:
                want(record, split in work.recipe.narrated, work.recipe.altered.get(split, ()))
    return {name: (video, dict(sorted(views.items()))) for name, (video, views) in wanted.items()}


def encode(
    base: Base, frames: dict[str, Frames], chain: list[dict], names: Iterable[str] | None = None, seed: int = 0
) -> dict[str, FeatureRecord]:
    """All views of a video in one pass of the tower, then altered (`names` has such views; None: none) and pruned one
    by one. A family that merges frames in time gets the last one again where a view has too few. `seed`: the video's
    own, for what is drawn at random."""
    merged = base.images.patch.frames if base.images.patch else 1
    pixels = [to_pixels(view.rgb_THWC, base.images) for view in frames.values()]
    pixels = [torch.cat([each, each[-1:].expand(-len(each) % merged, -1, -1, -1)]) for each in pixels]
    encoded = through_tower(base, torch.cat(pixels), merged)
    parts = encoded.features_LGPD.split([len(pixels_TCHW) // merged for pixels_TCHW in pixels], 1)
    of_view = dict(zip(frames, parts, strict=True))
    out = {}
    for name in frames if names is None else names:
        view, kind = parts_of(name)
        features_LGPD, time_G = of_view[view], merged_times(torch.as_tensor(frames[view].time_T), merged)
        if kind:
            features_LGPD, time_G = altered(kind, features_LGPD, time_G, seed)
        out[name] = lay_out(
            base.family,
            base.model.config,
            encoded._replace(features_LGPD=features_LGPD),
            chain,
            time_G=time_G,
            frames=min(len(frames[view].time_T), len(time_G) * merged),
            duration=frames[view].duration,
            seed=seed,
        )
    return out


def through_tower(base: Base, pixels_TCHW: torch.Tensor, merged: int) -> Encoded:
    """`Base.encode`, in parts of half as many frames where memory runs out. `merged`: frames that stay together.

    Raises StageError where the fewest frames do not fit: that is no fault of the video."""

    apart = lambda encoded: [encoded._replace(features_LGPD=part) for part in encoded.features_LGPD.split(1, 1)]
    groups = pixels_TCHW.split(merged)
    try:
        parts = in_pieces(groups, len(groups), lambda some: apart(base.encode(torch.cat(list(some)))))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise StageError(
            f"features: {merged} frame(s) of {tuple(pixels_TCHW.shape[2:])} pixels do not fit into memory in the "
            "vision tower. Lower `features.max_pixels`, or free memory on the device. Videos that are done stay cached."
        ) from error
    return parts[0]._replace(features_LGPD=torch.cat([part.features_LGPD for part in parts], 1))


def counts(work: Workspace, wanted: dict, keys: dict[str, str], failed: dict[str, str]) -> dict:
    """Counts for the report; says what the first video became, and how many tokens the others have."""
    done = [name for name in wanted if name not in failed]
    out = {"videos": len(wanted) - len(failed), "unreadable": len(failed), "missing": len(work.missing_videos)}
    if done:
        view = work.store.get(keys[done[0]])[WHOLE]
        kept = [work.store.tokens(keys[name], WHOLE) for name in done]
        out |= {
            "frames": view.frames,
            "tokens_before": view.layout_tokens,
            "tokens_after": round(sum(kept) / len(kept)),
        }
        out |= {"tokens_fewest": min(kept), "tokens_most": max(kept)}
        others = "" if min(kept) == max(kept) else f"; {min(kept)} to {max(kept)} in all"
        say(
            f"features: {view.frames} frames, {view.layout_tokens} video tokens, {kept[0]} after pruning "
            f"(first video: {done[0]}{others})"
        )
    return out
