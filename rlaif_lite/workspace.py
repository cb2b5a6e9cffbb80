"""What every stage works with: the recipe, the run folder, the records, the cached features, the base and its roles.

A stage takes what it needs from here and leaves its results in the run folder:

    <run>/recipe.yaml            the resolved recipe
    <run>/metrics.jsonl          one line per step of every stage
    <run>/summary.json           the contract other programs read
    <run>/adapters/<role>/       PEFT folders (and `head.safetensors`)
    <run>/<stage>/               the stage's own outputs, its checkpoint, and `done.json` when it is finished
"""

import contextlib
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch

from . import ranks
from .data.readers import read_records
from .data.records import Record
from .data.splits import Loaded, load_splits, name_videos, own_files, roots_of
from .data.truth import Truth
from .errors import StageError
from .files import digest_of, read_json, read_sealed, sha256, write_sealed
from .judge.outside.answers import open_judge
from .judge.outside.cached import CachedJudge
from .model.base import Base, load_base
from .model.roles import Roles
from .progress import say
from .recipe import Recipe, flatten
from .training.loop import MetricsLog, derive_seed
from .training.trackers import Trackers
from .video.altered import name_of as altered_name
from .video.cache import FeatureRecord, FeatureStore, read_index

WHOLE = "video"  # name of the view of a whole video; clips are "clip0", "clip1", ...


class Workspace:
    """One run."""

    def __init__(self, recipe: Recipe, index: str = "index.json", load: Callable[..., Base] = load_base):
        """`index`: the file that lists the base's features (see `for_reward`); `load` gives the base."""
        self.recipe = recipe
        self._load_model = load
        self.folder = Path(recipe.output)
        self.device = torch.device(ranks.device(pick_device(recipe.device)))
        tracked = recipe.track and ranks.is_first()
        trackers = Trackers(recipe.track, self.folder, flatten(recipe)) if tracked else None
        self.log = MetricsLog(self.folder / "metrics.jsonl", trackers, recipe.health)
        self.video_tokens = 0  # of a whole video, as planned; 0: not planned
        self._base: Base | None = None
        self._roles: Roles | None = None
        self._index: dict[str, str] = {}
        self._narratives: dict[str, str] = {}
        self._files: dict[str, list[Record]] = {}
        self._read_before: dict[str, list] = {}
        self._for_reward: Workspace | None = None
        self._outside: CachedJudge | None = None
        self.index_file = self.folder / "features" / index

    @property
    def for_reward(self) -> "Workspace":
        """This run on the base that the reward role sits on: itself or, with `model.reward_base`, the same folder and
        records with another base, its roles and its features."""
        if self.recipe.model.reward_base is None:
            return self
        if self._for_reward is None:
            recipe = self.recipe.model_copy(update={"model": self.recipe.model.for_reward()})
            self._for_reward = Workspace(recipe, "index_reward.json", self._load_model)
            self._for_reward._loaded = self._loaded
        return self._for_reward

    # ---- folders and randomness

    def stage(self, name: str) -> Path:
        """The stage's folder, made where it is not there."""
        folder = self.folder / name
        if ranks.is_first():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def adapter(self, role: str) -> Path:
        return self.folder / "adapters" / role

    def seed(self, *parts: int | str) -> int:
        """A seed that depends on the recipe's seed and `parts` alone."""
        return derive_seed(self.recipe.seed, *parts)

    # ---- data

    @property
    def data_folder(self) -> Path:
        return Path(self.recipe.data.folder) if self.recipe.data.folder else self.folder / "data"

    def records(self, name: str) -> list[Record]:
        """The records of a split; `sft` files are split into `sft_easy` and `sft_hard` by the length of the answer.

        Videos that are missing stop the run with their list, or are left out and counted (`data.on_missing: skip`)."""
        loaded = self._loaded.records
        if name not in loaded:
            raise StageError(f"The recipe names no `data.{name}`, which this stage needs. Add its file to the recipe.")
        bad = self.quarantined
        return [r for r in loaded[name] if r.video is None or self.name_of(r) not in bad]

    def cut_by_recipe(self) -> bool:
        """Whether a record is about a clip and does not say of how many: `features.clips` decides its frames."""
        return any(r.clip is not None and r.clips is None for found in self._loaded.records.values() for r in found)

    def split_names(self) -> list[str]:
        """The splits that the recipe gives data for."""
        return list(self._loaded.records)

    @property
    def missing_videos(self) -> set[str]:
        """Videos that are not on the disk (only with `data.on_missing: skip`)."""
        return self._loaded.missing

    @cached_property
    def _loaded(self) -> Loaded:
        return load_splits(self.recipe, self.data_folder, self._of_file)

    def _of_file(self, path: str) -> list[Record]:
        if path not in self._files:
            read = read_records(path, video_root=self.recipe.data.video_root)
            say(f"{path}: {len(read.records)} records, {read.format}")
            self._files[path] = read.records
        return self._files[path]

    def videos_digest(self) -> str:
        """Of the content of the user's own videos, missing ones included: it changes when one comes, goes or is
        replaced.

        `videos.json` in the run folder keeps what was read, so that only files of another size or time are read
        again."""
        memo = self.folder / "videos.json"
        with contextlib.suppress(StageError):  # a damaged one is made again
            self._read_before = read_sealed(memo) or {}
        states, found = {}, {}
        data = self.recipe.data
        videos = [r.video for path in own_files(data) for r in self._of_file(path) if r.video is not None]
        for video, name in name_videos(videos, roots_of(data, self.data_folder)).items():
            if name not in states:
                parts = [Path(part) for part in ([video] if isinstance(video, str) else video)]
                files = [file for part in parts for file in (sorted(part.iterdir()) if part.is_dir() else [part])]
                states[name] = [self._content(file, found) for file in files]
        if found != self._read_before:
            write_sealed(memo, found)
        return digest_of(states)

    def _content(self, path: Path, found: dict[str, list]) -> str | None:
        """sha256 of a file, or None where there is none; `found` gains [size, time, sha256]."""
        if not path.is_file():
            return None
        stat = path.stat()
        known = self._read_before.get(str(path), [None, None, None])
        same = known[:2] == [stat.st_size, stat.st_mtime_ns]
        found[str(path)] = known if same else [stat.st_size, stat.st_mtime_ns, sha256(path)]
        return found[str(path)][2]

    @property
    def quarantined(self) -> set[str]:
        """Videos that a finished features stage could not decode (only with `data.on_missing: skip`)."""
        folder = self.folder / "features"
        return set(read_json(folder / "quarantine.json")) if (folder / "done.json").exists() else set()

    def name_of(self, record: Record) -> str:
        """A record's video as the run's files name it; of a record without a video, the record's key."""
        return record.key if record.video is None else self._loaded.video_names[record.video]

    @cached_property
    def truth(self) -> Truth:
        """What is true of the records' videos; nothing is trained on it."""
        section, splits = self.recipe.evaluate, self._loaded.records.values()
        return Truth((r for records in splits for r in records), section.truth, section.synonyms)

    # ---- features

    @cached_property
    def store(self) -> FeatureStore:
        return FeatureStore(Path(self.recipe.features.cache or self.folder / "features" / "cache"))

    def features(self, record: Record, altered: str = "") -> FeatureRecord | None:
        """The cached tokens of a record's video (or of its clip), pruned as the recipe says; None for a text record.
        `altered`: of the video with its frames "shuffled", "reversed" or "dropped" (`Recipe.altered` lists where)."""
        if record.video is None:
            return None
        view = self.view_name(record)
        return self.views(record)[altered_name(view, altered) if altered else view]

    def view_name(self, record: Record) -> str:
        """The view that a record is about: the whole, a clip as the context stage cuts them, or one of another cut."""
        if record.clip is None:
            return WHOLE
        usual = record.clips in (None, self.recipe.features.clips)
        return f"clip{record.clip}" if usual else f"clip{record.clip}of{record.clips}"

    def views(self, record: Record) -> dict[str, FeatureRecord]:
        """All views of a record's video: the whole and each clip."""
        if not self._index:
            self._index = read_index(self.index_file)
        name = self.name_of(record)
        views = self.store.get(self._index[name]) if name in self._index else None
        if views is None:
            raise StageError(
                f"The cached features of {name} are gone or damaged. Delete {self.folder / 'features' / 'done.json'} "
                "and run again: only what is missing is encoded."
            )
        return views

    # ---- narratives

    def narratives(self) -> dict[str, str]:
        """{video: narrative}, as the context stage wrote them."""
        if not self._narratives:
            self._narratives = read_json(self.folder / "context" / "narratives.json")
        return self._narratives

    # ---- model

    def base(self, tower: bool = False) -> Base:
        """The frozen base, loaded once; loaded again when a tower is asked for and was dropped."""
        if self._base is None or (tower and not self._base.has_tower):
            self._roles = self._base = None  # freed first: two bases may not fit
            self._base = self._load_model(self.recipe.model, self.device, tower=tower)
        return self._base

    @property
    def roles(self) -> Roles:
        if self._roles is None:
            self._roles = Roles(self.base(), self.recipe.model.lora)
        return self._roles

    def load_role(self, name: str) -> None:
        """Put a saved role onto the base, frozen."""
        if name not in self.roles.names:
            self.roles.load(name, self.adapter(name))

    @property
    def outside(self) -> CachedJudge:
        """The judge from outside. Its verdicts are in a folder of no stage: one that runs again pays for none twice."""
        if self._outside is None:
            section = self.recipe.preference
            self._outside = open_judge(section.outside, self.folder / "outside", self.device, section.batch_size)
        return self._outside

    def release_roles(self) -> None:
        """Free every role, the reward role's own base and the judge from outside: the next stage loads what it
        needs."""
        self._for_reward = self._outside = None
        if self._roles is not None:
            for name in self._roles.names:
                self._roles.remove(name)


def pick_device(device: str) -> str:
    """`cuda` or `cpu` for the recipe's `device`. Raises StageError where there is no GPU to take."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("`device: cuda`, but torch sees no CUDA GPU here. Set `device: auto` or `cpu`.")
    if device == "cuda":
        let_segments_grow()
    return device


def let_segments_grow() -> None:
    """Ask torch for `expandable_segments`: lengths differ from batch to batch, and freed blocks that fit nothing else
    are wasted otherwise. torch reads the variable at its first allocation. What the user set is kept."""
    deprecated, name = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    said = {each: os.environ.get(each, "") for each in (name, deprecated)}
    if sys.platform == "linux" and not any("expandable_segments" in text for text in said.values()):
        used = deprecated if said[deprecated] and not said[name] else name
        os.environ[used] = ",".join(filter(None, (said[used], "expandable_segments:True")))
