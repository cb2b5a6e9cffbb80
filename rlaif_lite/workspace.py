"""What every stage works with: the recipe, the run folder, the records, the cached features, the base and its roles.

A stage takes what it needs from here and leaves its results in the run folder:

    <run>/recipe.yaml            the resolved recipe
    <run>/metrics.jsonl          one line per step of every stage
    <run>/summary.json           the contract other programs read
    <run>/adapters/<role>/       PEFT folders (and `head.safetensors`)
    <run>/<stage>/               the stage's own outputs, its checkpoint, and `done.json` when it is finished
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from .data.records import Record
from .data.splits import Loaded, load_splits
from .data.truth import Truth
from .errors import StageError
from .model.base import Base, load_base
from .model.roles import Roles
from .recipe import Recipe, flatten
from .training.loop import MetricsLog, derive_seed
from .training.trackers import Trackers
from .video.cache import FeatureRecord, FeatureStore, read_index

WHOLE = "video"  # name of the view of a whole video; clips are "clip0", "clip1", ...


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
        self.video_tokens = 0  # of a whole video, as planned; 0: not planned
        self._base: Base | None = None
        self._roles: Roles | None = None
        self._loaded: Loaded | None = None
        self._truth: Truth | None = None
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
            recipe = self.recipe.model_copy(update={"model": self.recipe.model.for_reward()})
            self._for_reward = Workspace(recipe, "index_reward.json", self._load_model)
            self._for_reward._loaded = self._load()
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

    def records(self, name: str) -> list[Record]:
        """The records of a split; `sft` files are split into `sft_easy` and `sft_hard` by the length of the answer.

        Videos that are missing stop the run with their list, or are left out and counted (`data.on_missing: skip`)."""
        loaded = self._load().records
        if name not in loaded:
            raise StageError(f"The recipe names no `data.{name}`, which this stage needs. Add its file to the recipe.")
        bad = self.quarantined
        return [r for r in loaded[name] if r.video is None or self.name_of(r) not in bad]

    def split_names(self) -> list[str]:
        """The splits that the recipe gives data for."""
        return list(self._load().records)

    @property
    def missing_videos(self) -> set[str]:
        """Videos that are not on the disk (only with `data.on_missing: skip`)."""
        return self._load().missing

    def _load(self) -> Loaded:
        if self._loaded is None:
            self._loaded = load_splits(self.recipe, self.data_folder)
        return self._loaded

    @property
    def quarantined(self) -> set[str]:
        """Videos that a finished features stage could not decode (only with `data.on_missing: skip`)."""
        folder = self.folder / "features"
        return set(json.loads((folder / "quarantine.json").read_text())) if (folder / "done.json").exists() else set()

    def name_of(self, record: Record) -> str:
        """A record's video as the run's files name it; of a record without a video, the record's key."""
        return record.key if record.video is None else self._load().video_names[record.video]

    @property
    def truth(self) -> Truth:
        """What is true of the records' videos; nothing is trained on it."""
        if self._truth is None:
            section, splits = self.recipe.evaluate, self._load().records.values()
            self._truth = Truth((r for records in splits for r in records), section.truth, section.synonyms)
        return self._truth

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
