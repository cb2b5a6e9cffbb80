"""What every stage works with: the recipe, the run folder, the records, the cached features, the base and its roles.

A stage takes what it needs from here and leaves its results in the run folder:

    <run>/recipe.yaml            the resolved recipe
    <run>/metrics.jsonl          one line per step of every stage
    <run>/summary.json           the contract other programs read
    <run>/adapters/<role>/       PEFT folders (and `head.safetensors`)
    <run>/<stage>/               the stage's own outputs, its checkpoint, and `done.json` when it is finished
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .data.objects import files_of
from .data.readers import read_records, split_by_answer_length, with_videos
from .data.records import Record
from .errors import DataError, StageError
from .model.base import Base, load_base
from .model.roles import Roles
from .progress import say
from .recipe import Recipe, flatten
from .training.loop import MetricsLog, derive_seed
from .training.trackers import Trackers
from .video.cache import FeatureRecord, FeatureStore, read_index, video_name

WORLD = "world:"
WHOLE = "video"  # name of the view of a whole video; clips are "clip0", "clip1", ...


class Split(NamedTuple):
    """Where a split's records come from in the recipe."""

    name: str  # as the stages call it
    paths: list[str]


class Workspace:
    """One run."""

    def __init__(self, recipe: Recipe, index: str = "index.json", load: Callable[..., Base] = load_base):
        """`index`: the file that lists the base's features (see `for_reward`); `load` gives the base."""
        self.recipe = recipe
        self._load_model = load
        self.folder = Path(recipe.output)
        self.device = torch.device(pick_device(recipe.device))
        trackers = Trackers(recipe.track, self.folder, flatten(recipe)) if recipe.track else None
        self.log = MetricsLog(self.folder / "metrics.jsonl", trackers)
        self.missing_videos: set[str] = set()
        self.video_tokens = 0  # of a whole video, as planned; 0: not planned
        self._base: Base | None = None
        self._roles: Roles | None = None
        self._records: dict[str, list[Record]] = {}
        self._features: FeatureStore | None = None
        self._index: dict[str, str] = {}
        self._narratives: dict[str, str] = {}
        self._for_reward: Workspace | None = None
        self.index_file = self.folder / "features" / index

    @property
    def for_reward(self) -> "Workspace":
        """This run on the base that the reward role sits on: itself or, with `model.reward_base`, the same folder and
        records with another base, its roles and its features."""
        if self.recipe.model.reward_base is None:
            return self
        if self._for_reward is None:
            self._load()
            recipe = self.recipe.model_copy(update={"model": self.recipe.model.for_reward()})
            self._for_reward = Workspace(recipe, "index_reward.json", self._load_model)
            self._for_reward._records = self._records
        return self._for_reward

    # ---- folders and randomness

    def stage(self, name: str) -> Path:
        """The stage's folder."""
        folder = self.folder / name
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

    def splits(self) -> list[Split]:
        """Every split that the recipe names, with its files; `world:rl` is the file that the `data` stage writes."""
        data = self.recipe.data
        named = [
            ("sft", data.sft),
            ("sft_easy", data.sft_easy),
            ("sft_hard", data.sft_hard),
            ("policy_init", data.policy_init),
            ("preference", data.pairs or data.preference),
            ("rl", data.rl),
            ("test", data.test),
        ]
        return [Split(name, [self._path(p) for p in paths]) for name, paths in named if paths]

    def records(self, name: str) -> list[Record]:
        """The records of a split; `sft` files are split into `sft_easy` and `sft_hard` by the length of the answer.

        Videos that are missing stop the run with their list, or are left out and counted (`data.on_missing: skip`)."""
        self._load()
        if name not in self._records:
            raise StageError(f"The recipe names no `data.{name}`, which this stage needs. Add its file to the recipe.")
        bad = self.quarantined
        return [r for r in self._records[name] if r.video is None or self.name_of(r) not in bad]

    def split_names(self) -> list[str]:
        """The splits that the recipe gives data for."""
        self._load()
        return list(self._records)

    def _load(self) -> None:
        if self._records:
            return
        loaded = {split.name: self._read(split) for split in self.splits()}
        if "sft" in loaded:
            easy, hard = split_by_answer_length(
                loaded.pop("sft"), self.recipe.data.max_easy_words, self.recipe.sft.train_on
            )
            sft, most = self.recipe.sft, self.recipe.data.max_easy_words
            for name, found, why in (("easy", easy, "every record has"), ("hard", hard, "no record has")):
                if not found and (sft.easy if name == "easy" else sft.hard) is not None:
                    raise DataError(
                        f"data.sft: no record is for sft.{name}, as {why} an answer of more words than "
                        f"`data.max_easy_words: {most}`. Change that number, or set `sft.{name}: null`."
                    )
            loaded["sft_easy"] = loaded.get("sft_easy", []) + easy
            loaded["sft_hard"] = loaded.get("sft_hard", []) + hard
        self._records = loaded

    def _read(self, split: Split) -> list[Record]:
        records = []
        for path in split.paths:
            read = read_records(path, video_root=self.recipe.data.video_root)
            say(f"{path}: {len(read.records)} records, {read.format}")
            records += read.records
        records, missing = with_videos(records)
        pairs = split.name == "preference" and self.recipe.data.pairs
        key = "data.pairs" if pairs else f"data.{split.name}"
        if missing and self.recipe.data.on_missing == "error":
            shown = "\n  ".join(sorted({video_name(r.video) for r in missing})[:20])
            raise DataError(
                f"{key}: {len(missing)} records have a video that is not there, among them:\n  {shown}\n"
                "Set `data.video_root` to their folder, or `data.on_missing: skip` to go on without them."
            )
        if pairs and (alone := [r.source for r in records if r.chosen is None]):
            raise DataError(
                f"{key}: {len(alone)} records hold no pair, the first {alone[0]}. Each needs `chosen` and `rejected`, or "
                "the release's `output_1`, `output_2` and `preference`. Prompts alone go to `data.preference`."
            )
        self.missing_videos |= {video_name(r.video) for r in missing}
        return records

    def own_files(self) -> list[str]:
        """The data files that are the user's, not the world's. Raises DataError for one that is not there."""
        data = self.recipe.data
        named = (
            data.sft,
            data.sft_easy,
            data.sft_hard,
            data.policy_init,
            data.preference,
            data.pairs,
            data.rl,
            data.test,
        )
        files = [Path(self._path(path)) for paths in named for path in paths if not path.startswith(WORLD)]
        if missing := [str(path) for path in files if not path.exists()]:
            raise DataError(f"There is no data file {', '.join(missing)}. Paths start at {Path.cwd()}.")
        return [str(file) for path in files for file in files_of(path)]

    def _path(self, path: str) -> str:
        return (
            str(self.data_folder / f"{path.removeprefix(WORLD)}.jsonl")
            if path.startswith(WORLD)
            else os.path.expanduser(path)
        )

    @property
    def quarantined(self) -> set[str]:
        """Videos that a finished features stage could not decode (only with `data.on_missing: skip`)."""
        folder = self.folder / "features"
        return set(json.loads((folder / "quarantine.json").read_text())) if (folder / "done.json").exists() else set()

    def name_of(self, record: Record) -> str:
        """A record's video as the run's files name it: without the folder of the world or `data.video_root`, so that
        a run can be moved and what it finds does not depend on where it lies."""
        if record.video is None:
            return record.id
        name = video_name(record.video).removeprefix(f"{self.data_folder}{os.sep}")
        root = self.recipe.data.video_root
        return name.removeprefix(f"{os.path.expanduser(root)}{os.sep}") if root else name

    # ---- features

    @property
    def store(self) -> FeatureStore:
        if self._features is None:
            self._features = FeatureStore(Path(self.recipe.features.cache or self.folder / "features" / "cache"))
        return self._features

    def features(self, record: Record) -> FeatureRecord | None:
        """The cached tokens of a record's video (or of its clip), pruned as the recipe says; None for a text record."""
        if record.video is None:
            return None
        return self.views(record)[self.view_name(record)]

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
        views = self.store.get(self._index[name])
        if views is None:
            raise StageError(
                f"The cached features of {name} are gone or damaged. Delete {self.folder / 'features' / 'done.json'} and run again: "
                "only what is missing is encoded."
            )
        return views

    # ---- narratives

    def narratives(self) -> dict[str, str]:
        """{video: narrative}, as the context stage wrote them."""
        if not self._narratives:
            self._narratives = json.loads((self.folder / "context" / "narratives.json").read_text())
        return self._narratives

    # ---- model

    def base(self, tower: bool = False) -> Base:
        """The frozen base, loaded once; loaded again when a tower is asked for and was dropped."""
        if self._base is None or (tower and not self._base.has_tower):
            self._roles = None
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

    def release_roles(self) -> None:
        """Free every role, and the reward role's own base: the next stage loads what it needs from disk."""
        self._for_reward = None
        if self._roles is not None:
            for name in self._roles.names:
                self._roles.remove(name)


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("`device: cuda`, but torch sees no CUDA GPU here. Set `device: auto` or `cpu`.")
    return device
