"""One role of a run, or a plain base, on a benchmark's items: answers, rankings and audits, item by item.

Results are JSON lines, written as they are made. A run that was stopped resumes after the last whole line. Videos are
encoded first, through the run's own feature cache; then the tower is dropped. If a video's content changes, its items
are done again. A picture is a video of one frame. Decoding is greedy (published: sampled at T = 0.2).
"""

import base64
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from ..data.records import VIDEO_MARK, Message
from ..errors import DataError, StageError
from ..files import appending, chunks, digest_of, file_digest, whole_lines
from ..judge.narrative import captions_of, narrative, spans_of
from ..model.base import Base, base_digest
from ..model.inputs import Sequence, encode_prompt
from ..model.roles import BASE, ActiveRole
from ..model.text import decode_answer, encode_answer
from ..progress import progress
from ..recipe import load_recipe
from ..rollout import Sampling, sample
from ..stages.evaluate import ADAPTERS
from ..stages.features import fill
from ..video.cache import FeatureRecord
from ..video.decode import IMAGES, View
from ..workspace import WHOLE, Workspace
from .audit import Audited, Seen, audit
from .items import Item
from .ranking import rank, score_texts

T = TypeVar("T")
Span = tuple[float, float]  # seconds


class Examinee:
    """The role that is tested, and what it needs: its base, its adapter, the videos' features."""

    def __init__(self, where: str | Path, role: str):
        """where: a run folder, or for the role `base` a recipe.

        Raises StageError for a role that is not there; RecipeError."""
        path = Path(where)
        is_run = (path / "recipe.yaml").is_file()
        recipe = load_recipe(path / "recipe.yaml" if is_run else where)
        self.work = Workspace(recipe.model_copy(update={"output": str(path)}) if is_run else recipe)
        self.name = str(where)
        self.role = ADAPTERS.get(role, role)
        self.judge_role = "sft" if (self.work.adapter("sft") / "adapter_model.safetensors").exists() else BASE
        if self.role != BASE and not (self.work.adapter(self.role) / "adapter_model.safetensors").exists():
            there = [path.name for path in sorted(self.work.folder.glob("adapters/*"))]
            raise StageError(f"{where} has no role {role}. It has {', '.join([BASE, *there])}.")
        self._keys: dict[str, str] = {}

    def __str__(self) -> str:
        return f"{self.name}:{self.role}"

    @property
    def base(self) -> Base:
        return self.work.base()

    def digest(self, role: str) -> str:
        """A digest of the role's base and adapter."""
        file = self.work.adapter(role) / "adapter_model.safetensors"
        adapter = file_digest(file)[:12] if role != BASE else "none"
        return f"{base_digest(self.work.recipe.model)}+{adapter}"

    def use(self, role: str):
        """Context in which the role is active. It is loaded on first use."""
        if role != BASE:
            self.work.load_role(role)
        return self.work.roles.use(role)

    # ---- videos

    def look(
        self, videos: dict[str, str], index: Path, spans: Iterable[tuple[str, Span]] = (), clips: bool = False
    ) -> dict[str, str]:
        """Decode and encode {name: path}, except what the cache holds -> {name: why it cannot be used}.

        `spans`: parts of videos that are asked about, (name, from where to where). `clips`: also encode the recipe's
        clips of each video that is not a picture."""
        index.parent.mkdir(parents=True, exist_ok=True)
        self.work.index_file = index
        section = self.work.recipe.features
        parts = {f"clip{n}": View(section.clip_frames, n, section.clips) for n in range(section.clips)} if clips else {}
        of_picture, of_video = {WHOLE: View(1)}, {WHOLE: View(section.frames), **parts}
        wanted = {
            name: (path, dict(of_picture if path.lower().endswith(IMAGES) else of_video))
            for name, path in videos.items()
        }
        for name, span in spans:
            if name in wanted:
                wanted[name][1][view_of(span)] = View(section.frames, seconds=span)
        self._keys, failed = fill(self.work, wanted)
        return failed

    def views(self, name: str) -> dict[str, FeatureRecord]:
        """An encoded video: the whole, and its clips if `look` was asked for them."""
        views = self.work.store.get(self._keys[name])
        if views is None:
            raise StageError(
                f"The cached features of {name} are damaged. Run the same command again: it makes new ones."
            )
        return views

    # ---- what is asked

    def prompt(self, text: str, video: str | None, view: str = WHOLE) -> Sequence:
        """A request about a video, or the part of it that `view` names; with `video` None, the request alone."""
        mark, seen = (f"{VIDEO_MARK} ", self.views(video)[view]) if video is not None else ("", None)
        return encode_prompt(self.base, [Message("user", mark + text)], seen)

    def answers(self, items: list[Item], path: Path, template: str, max_new_tokens: int) -> dict[str, dict]:
        """{id: its line of `path`}: greedy answers to the items' questions."""
        size = self.work.recipe.evaluate.batch_size

        def work(batch: list[Item]) -> Iterable[dict]:
            prompts = [
                self.prompt(template.replace("{question}", question), video, view_of(item.span))
                for item in batch
                for video, question in zip(item.videos, item.questions, strict=True)
            ]
            with self.use(self.role) as role:
                found = iter(
                    sample(role, prompts, Sampling(max_new_tokens, 0.0), seeds=[0] * len(prompts), batch_size=size)
                )
            for item in batch:
                mine = [next(found) for _ in item.questions]
                yield {
                    "id": item.id,
                    "answers": [decode_answer(self.base, each.ids) for each in mine],
                    "lengths": [len(each.ids) for each in mine],
                    "stopped": [each.stopped for each in mine],
                }

        seen = {item.id: "+".join(dict.fromkeys(self._keys[video] for video in item.videos)) for item in items}
        return resumed(path, "id", {item.id: item for item in items}, seen, 4 * size, work, "answers")

    def rankings(self, items: list[Item], path: Path, request: str, retrieval: bool) -> dict[str, dict]:
        """{id: {rank, ...}}, from the scores of all texts for every video, one line of `path` per video."""
        texts = list(dict.fromkeys(text for item in items for text in ((item.reference,) if retrieval else item.among)))
        videos = {item.video: item.video for item in items}

        def scores_of(role: ActiveRole, video: str | None) -> list[float]:
            prompt = self.prompt(request, video)
            return score_texts(role, prompt, [encode_answer(self.base, prompt.opening, text) for text in texts])

        def work(batch: list[str]) -> Iterable[dict]:
            with self.use(self.role) as role:
                for name in batch:
                    yield {"video": name, "scores": scores_of(role, name)}

        lines = resumed(path, "video", videos, self._keys, 16, work, "scores")
        scores = {name: line["scores"] for name, line in lines.items()}
        right = {item.id: texts.index(item.reference) for item in items}
        if retrieval:
            place = {name: number for number, name in enumerate(videos)}
            of_text = list(zip(*scores.values(), strict=True))
            return {item.id: {"rank": rank(of_text[right[item.id]], place[item.video])} for item in items}
        with self.use(self.role) as role:
            prior = scores_of(role, None)
        out = {}
        for item in items:
            mine = scores[item.video]
            calibrated = [score - usual for score, usual in zip(mine, prior, strict=True)]
            best = texts[max(range(len(texts)), key=calibrated.__getitem__)]
            ranks = {"rank": rank(calibrated, right[item.id]), "uncalibrated_rank": rank(mine, right[item.id])}
            out[item.id] = ranks | {"best": best}
        return out

    def narratives(self, videos: list[str], path: Path) -> dict[str, str | None]:
        """{video: narrative}, as the context stage makes them, by the role that judges; None for a picture."""
        section = self.work.recipe.context

        def work(batch: list[str]) -> Iterable[dict]:
            videos = [[view for part, view in self.views(name).items() if part != WHOLE] for name in batch]
            with self.use(self.judge_role) as role:
                captions = captions_of(role, videos, [section.prompt] * len(videos), section)
            for name, said, clips in zip(batch, captions, videos, strict=True):
                yield {"id": name, "narrative": narrative(said, section.markers, spans_of(clips)) if said else None}

        lines = resumed(path, "id", {name: name for name in videos}, self._keys, section.batch_size, work, "narratives")
        return {name: line["narrative"] for name, line in lines.items()}

    def audits(self, items: list[Item], answers: dict[str, dict], folder: Path) -> dict[str, dict]:
        """{id: its line of claims.jsonl}: the claims of answers that are there, judged by the run's own judge."""
        section, size = self.work.recipe.preference.claims, self.work.recipe.preference.batch_size
        videos = list(dict.fromkeys(item.video for item in items))
        narrative_of = self.narratives(videos, folder / "narratives.jsonl")
        # the control: each claim at the next video as well
        after = dict(zip(videos, videos[1:] + videos[:1], strict=True))

        def shown(name: str) -> Seen:
            return Seen(self.views(name)[WHOLE], narrative_of[name])

        def work(batch: list[Item]) -> Iterable[dict]:
            rows = [Audited(i, answers[i.id]["answers"][0], shown(i.video), shown(after[i.video])) for i in batch]
            with self.use(self.judge_role) as role:
                found = audit(role, rows, section, size)
            return [{"id": item.id, "claims": claims} for item, claims in zip(batch, found, strict=True)]

        seen = {
            item.id: digest_of([self._keys[item.video], self._keys[after[item.video]], *answers[item.id]["answers"]])
            for item in items
        }
        things = {item.id: item for item in items}
        return resumed(folder / "claims.jsonl", "id", things, seen, 4 * size, work, "claims")


def view_of(span: Span | None) -> str:
    """The name of the view that shows a part of a video; of all of it where there is none."""
    return WHOLE if span is None else f"{span[0]:g}-{span[1]:g}s"


def resumed(
    path: Path,
    key: str,
    things: dict[str, T],
    seen: dict[str, str],
    at_once: int,
    work: Callable[[list[T]], Iterable[dict]],
    name: str,
) -> dict[str, dict]:
    """Map `work` over {value of `key`: thing}, some at a time -> {value of `key`: its line}.

    `seen` is a digest of what an item depends on, such as the video's content. Lines of `path` with the same `seen` are
    reused; the others are made and appended."""
    whole = whole_lines(path)
    lines = {line[key]: line for line in map(json.loads, whole)}
    todo = [thing for value, thing in things.items() if lines.get(value, {}).get("seen") != seen[value]]
    with appending(path, whole) as append, progress(len(things), name, unit="item") as bar:
        bar.advance(len(things) - len(todo))
        for batch in chunks(todo, at_once):
            for line in work(batch):
                line["seen"] = seen[line[key]]
                append(line)
                lines[line[key]] = line
                bar.advance(1)
    return {value: lines[value] for value in things}


def write_pictures(items: list[Item], folder: Path) -> dict[str, str]:
    """{video: path} of the pictures that the benchmark's file holds, written into `folder`."""
    out = {}
    for item in items:
        if item.picture is not None:
            # `x/0` and `y/0` are two pictures, and a name is no path that is written to
            path = folder / f"{os.path.basename(item.video)}-{digest_of([item.video], 8)}.jpg"
            try:
                content = base64.b64decode(item.picture, validate=True)
            except (ValueError, TypeError) as error:
                raise DataError(f"The picture of item {item.id} is not base64 ({error}).") from None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            out[item.video] = str(path)
    return out
