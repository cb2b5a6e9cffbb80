"""What people are asked about a run, in which order, and where their verdicts go.

Everybody gets the same items in the same random order, so that the first items are judged by all and people can be
compared. Pairs that the reward model was not trained on come first: only these say how good it is. Which answer is
shown as number 1 is drawn for each person and item.

A verdict is a line of `labels/<person>.jsonl` in the run folder, and is on the disk when `add` returns. Files are
locked while they are written, so two pages of one person, or two servers, never judge an item twice.
"""

import contextlib
import hashlib
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import NamedTuple

from ..data.records import Message, Record, question_of, to_json
from ..data.splits import Video
from ..errors import RlaifError, StageError
from ..files import appending, fsync, read_json, read_jsonl, whole_lines, write_jsonl
from ..recipe import load_recipe
from ..report.folder import method_of
from ..report.people import BACK, LABELS, SKIP, SOURCES, TIE, Item, Labels, items_of, read_labels
from ..workspace import Workspace

NAME = re.compile(r"\w[\w .-]{0,39}")
_lock = threading.Lock()


class Shown(NamedTuple):
    """An item as one person sees it."""

    item: Item
    question: str
    video: Video | None
    answers: tuple[str, str]  # as number 1 and number 2
    roles: tuple[str, str]  # whose these are; not shown


class Exported(NamedTuple):
    """What `export` wrote, and what it left out."""

    pairs: int
    undecided: int  # items that people call a tie, or are divided about
    held_out: int  # items about held-out videos


class Store:
    """The items of a run, and people's verdicts on them."""

    def __init__(self, run: Path):
        """Raises RlaifError where `run` is no run folder, its data files or videos are gone, nothing can be judged,
        or a label file is damaged or of another run."""
        self.folder = run
        summary = read_json(run / "summary.json")
        self.recipe = load_recipe(run / "recipe.yaml", [f"output={run}", "device=cpu", "track=[]"])
        self.recipe_hash, self.method = summary.get("recipe_hash", ""), method_of(summary)
        self.work = Workspace(self.recipe)
        rows = [row for path in sorted((run / "evaluate").glob("*.jsonl")) for row in read_jsonl(path)]
        held = {row["key"] for row in read_jsonl(run / "reward" / "heldout.jsonl")}
        found = items_of(run, rows, self.method)
        found.sort(key=lambda item: (item.key not in held, hashlib.sha256(item.id.encode()).digest()))
        self.items = {item.id: item for item in found}
        if not found:
            raise StageError(
                f"{run} has nothing to compare: no pairs of a judge, and no greedy answers of SFT and policy that "
                "differ. Run its recipe further, or evaluate both roles (`evaluate.roles`)."
            )
        splits = [name for name in ("preference", "test") if name in self.work.split_names()]
        self.records = {record.key: record for name in splits for record in self.work.records(name)}
        self.narratives = read_json(path) if (path := run / "context" / "narratives.json").exists() else {}
        self.labels()

    def labels(self) -> Labels:
        """What people said so far. Raises StageError for a file that is damaged or of another run."""
        labels = read_labels(self.folder, self.items.values(), self.recipe_hash)
        if labels.refused:
            raise StageError("\n".join(labels.refused))
        return labels

    def person(self, name: str) -> str:
        """A name as it is kept: spaces are made even, and case is that of the first time. Raises RlaifError for one
        that cannot name a file."""
        name = " ".join(unicodedata.normalize("NFC", name).split())
        if not NAME.fullmatch(name):
            raise RlaifError(
                f"{name!r} cannot be used as a name. Use up to 40 letters, digits, blanks, dots and hyphens, the first "
                "a letter or a digit."
            )
        known = {path.stem.casefold(): path.stem for path in (self.folder / LABELS).glob("*.jsonl")}
        return known.get(name.casefold(), name)

    def of(self, source: str) -> list[Item]:
        """The items of a source, in the order in which they are asked."""
        return [item for item in self.items.values() if item.source == source]

    def sources(self) -> list[str]:
        """The sources that have items."""
        return [source for source in SOURCES if self.of(source)]

    def progress(self, person: str, source: str) -> tuple[int, int]:
        """(items that a person is done with, all items)."""
        done, items = self.labels().by_person.get(person, {}), self.of(source)
        return sum(item.id in done for item in items), len(items)

    def next_item(self, person: str, source: str) -> Shown | None:
        """The first item that a person has said nothing about; None when all are done."""
        done = self.labels().by_person.get(person, {})
        item = next((item for item in self.of(source) if item.id not in done), None)
        return None if item is None else self.show(person, item)

    def show(self, person: str, item: Item) -> Shown:
        """An item with the sides that this person sees."""
        order = 1 if hashlib.sha256(f"{person}\0{item.id}".encode()).digest()[0] % 2 else -1
        record = self.records.get(item.key)
        question = "" if record is None else question_of(record)
        video = None if record is None else record.video
        return Shown(item, question, video, item.answers[::order], SOURCES[item.source][::order])

    def add(self, person: str, item_id: str, said: str) -> bool:
        """Keep a verdict: "1", "2", "tie", "skip", or "back", which takes this person's last verdict back. False, and
        nothing is written, where the item has a verdict of this person already (another page was faster)."""
        shown = self.show(person, self.items[item_id])
        better = said if said in (TIE, SKIP) else shown.roles[int(said) - 1]
        with self._writing(person) as (path, done):
            if item_id in done:
                return False
            self._append(path, person, shown, better)
        return True

    def back(self, person: str, source: str) -> bool:
        """Take a person's last verdict on a source back; its item is the next one. False where there is none."""
        with self._writing(person) as (path, done):
            own = [item for item, row in done.items() if row["source"] == source]
            if own:
                self._append(path, person, self.show(person, self.items[own[-1]]), BACK)
        return bool(own)

    @contextlib.contextmanager
    def _writing(self, person: str) -> Iterator[tuple[Path, dict[str, dict]]]:
        """(a person's file, what it says), while nobody else writes."""
        folder = self.folder / LABELS
        folder.mkdir(exist_ok=True)
        with _lock, open(folder / ".lock", "ab") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: one server is safe by `_lock` alone
                flock(lock, LOCK_EX)
            yield folder / f"{person}.jsonl", self.labels().by_person.get(person, {})

    def _append(self, path: Path, person: str, shown: Shown, better: str) -> None:
        item, record, new = shown.item, self.records.get(shown.item.key), not path.exists()
        with appending(path, whole_lines(path)) as append:
            append(
                {
                    "run": self.recipe_hash,
                    "person": person,
                    "source": item.source,
                    "item": item.id,
                    "key": item.key,
                    "video": item.key if record is None else self.work.name_of(record),
                    "question": shown.question,
                    "answers": dict(zip(SOURCES[item.source], item.answers, strict=True)),
                    "first": shown.roles[0],
                    "better": better,
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                }
            )
        if new:
            fsync(path.parent)

    def verdicts(self, item: Item) -> dict[str, str]:
        """{person: what they said of an item}, without who skipped it."""
        said = {person: of[item.id]["better"] for person, of in self.labels().by_person.items() if item.id in of}
        return {person: better for person, better in said.items() if better != SKIP}

    def export(self, path: Path, held_out: bool = False) -> Exported:
        """Write what people decided as pairs that `data.pairs` takes: chosen by most, ties left out. Pairs on held-out
        videos only with `held_out`: a run that learns from them cannot be evaluated on these videos."""
        rows, undecided, left = [], 0, 0
        for item in self.items.values():
            said = Counter(self.verdicts(item).values())
            first, second = (said[role] for role in SOURCES[item.source])
            if not said:
                continue
            if first == second or said[TIE] >= max(first, second):
                undecided += 1
            elif item.source == "policy" and not held_out:
                left += 1
            elif (record := self.records.get(item.key)) is not None:
                chosen, rejected = item.answers if first > second else item.answers[::-1]
                rows.append(to_json(_pair(record, chosen, rejected)) | {"id": f"{record.key}/{item.id}"})
        if not rows:
            raise RlaifError(
                f"There is nothing to export: people decided no pair, {undecided} items are undecided, and {left} are "
                "about held-out videos (`--held-out` exports these too). Label some on the page first."
            )
        write_jsonl(path, rows)
        return Exported(len(rows), undecided, left)


def _pair(record: Record, chosen: str, rejected: str) -> Record:
    """The record with two answers, and with a video that is found from any folder."""
    video = record.video
    if video is not None:
        video = str(Path(video).absolute()) if isinstance(video, str) else tuple(str(Path(f).absolute()) for f in video)
    messages = tuple(Message(m.role, m.content) for m in record.prompt)
    return replace(record, video=video, messages=messages, chosen=chosen, rejected=rejected, verdicts=())


def claims_of(store: Store, item: Item) -> list[list[tuple[str, float, float]]]:
    """What the judge said of both answers of a judged pair: (claim, P(yes), P(no)); nothing where it kept none."""
    if "said" in item.row:
        return item.row["said"]
    found = {}
    for path in sorted((store.folder / "dpo").glob("round*/judged.jsonl")):
        for line in read_jsonl(path):
            for row in line["results"]:
                if isinstance(row, dict) and row["key"] == item.key:
                    found[row["answer"]] = row["said"]
    return [found.get(answer, []) for answer in item.answers]


def as_text(exported: Exported, path: Path) -> str:
    """What an export did, in a sentence."""
    return (
        f"{path}: {exported.pairs} pairs for `data.pairs`. Left out: {exported.undecided} undecided, "
        f"{exported.held_out} about held-out videos."
    )
