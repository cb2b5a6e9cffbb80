"""One role of a run, or a plain base, at a benchmark's items: answers, rankings and audits, item by item.

What is done lies in JSON lines, written as it is done; a run that was stopped goes on after the last whole line. The
videos are encoded first, through the run's own feature cache, and the tower is dropped. A picture is a video of one
frame. Decoding is greedy (published: sampled at T = 0.2).
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..data.records import Message
from ..errors import DataError, StageError
from ..model.base import Base, base_digest
from ..model.inputs import VIDEO_MARK, Sequence, decode_answer, encode_answer, encode_prompt
from ..model.roles import BASE
from ..progress import progress
from ..recipe import load_recipe
from ..rollout import Sampling, sample
from ..stages.evaluate import ADAPTERS
from ..stages.features import fill
from ..video.cache import FeatureRecord
from ..video.decode import IMAGES, View
from ..workspace import WHOLE, Workspace, chunks
from .audit import Audited, audit
from .items import Item
from .ranking import rank, score_texts


class Examinee:
    """A role that is put to a benchmark, and what it needs: its base, its adapter, the videos' features."""

    def __init__(self, where: str | Path, role: str):
        """where: a run folder, or for the role `base` a recipe.

        Raises StageError for a role that is not there; RecipeError."""
        path = Path(where)
        is_run = (path / "recipe.yaml").is_file()
        recipe = load_recipe(path / "recipe.yaml" if is_run else where)
        self.work = Workspace(recipe.model_copy(update={"output": str(path)}) if is_run else recipe)
        self.name = path.name if is_run else recipe.name
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
        """What answers under this name: base and adapter, by their bytes."""
        file = self.work.adapter(role) / "adapter_model.safetensors"
        adapter = hashlib.sha256(file.read_bytes()).hexdigest()[:12] if role != BASE else "none"
        return f"{base_digest(self.work.recipe.model)}+{adapter}"

    def use(self, role: str):
        """The scope of a role, loaded when it is first used."""
        if role != BASE:
            self.work.load_role(role)
        return self.work.roles.use(role)

    # ---- videos

    def look(self, videos: dict[str, str], index: Path) -> dict[str, str]:
        """Decode and encode {name: path}, what is not in the cache yet -> {name: why it cannot be used}."""
        index.parent.mkdir(parents=True, exist_ok=True)
        self.work.index_file = index
        frames = self.work.recipe.features.frames
        wanted = {
            name: (path, {WHOLE: View(1 if path.lower().endswith(IMAGES) else frames)}) for name, path in videos.items()
        }
        self._keys, failed = fill(self.work, wanted)
        return failed

    def features(self, name: str) -> FeatureRecord:
        views = self.work.store.get(self._keys[name])
        if views is None:
            raise StageError(
                f"The cached features of {name} are damaged. Run the same command again: they are made anew."
            )
        return views[WHOLE]

    # ---- what is asked

    def prompt(self, text: str, video: str | None) -> Sequence:
        """A request about a video, or the same without it."""
        mark, seen = (f"{VIDEO_MARK} ", self.features(video)) if video is not None else ("", None)
        return encode_prompt(self.base, [Message("user", mark + text)], seen)

    def answers(self, items: list[Item], path: Path, template: str, max_new_tokens: int) -> dict[str, dict]:
        """{id: its line of `path`}: greedy answers to the items' questions."""
        size = self.work.recipe.evaluate.batch_size

        def work(batch: list[Item]) -> Iterable[dict]:
            asked = [(item, template.replace("{question}", question)) for item in batch for question in item.questions]
            prompts = [self.prompt(text, item.video) for item, text in asked]
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

        return resumed(path, "id", items, chunks_by=4 * size, work=work, name="answers")

    def rankings(self, items: list[Item], path: Path, request: str, retrieval: bool) -> dict[str, dict]:
        """{id: {rank, ...}}, from the scores of all texts for every video, one line of `path` per video."""
        texts = list(dict.fromkeys(text for item in items for text in ((item.reference,) if retrieval else item.among)))
        ids = [encode_answer(self.base, text) for text in texts]

        def work(batch: list[Item]) -> Iterable[dict]:
            with self.use(self.role) as role:
                for item in batch:
                    yield {"video": item.video, "scores": score_texts(role, self.prompt(request, item.video), ids)}

        videos = list({item.video: item for item in items}.values())
        scores = {name: line["scores"] for name, line in
                  resumed(path, "video", videos, chunks_by=16, work=work, name="scores").items()}  # fmt: skip
        place = {text: number for number, text in enumerate(texts)}
        if retrieval:
            order = {item.video: number for number, item in enumerate(videos)}
            return {item.id: {"rank": rank([scores[other.video][place[item.reference]] for other in videos],
                                           order[item.video])} for item in items}  # fmt: skip
        with self.use(self.role) as role:
            prior = score_texts(role, self.prompt(request, None), ids)
        out = {}
        for item in items:
            right, mine = place[item.reference], scores[item.video]
            calibrated = [score - usual for score, usual in zip(mine, prior, strict=True)]
            best = texts[max(range(len(texts)), key=calibrated.__getitem__)]
            out[item.id] = {"rank": rank(calibrated, right), "uncalibrated_rank": rank(mine, right), "best": best}
        return out

    def audits(self, items: list[Item], answers: dict[str, dict], path: Path) -> dict[str, dict]:
        """{id: its line of `path`}: the claims of answers that are there, judged by the run's own judge."""
        section, size = self.work.recipe.preference.claims, self.work.recipe.preference.batch_size
        videos = list(dict.fromkeys(item.video for item in items))
        after = dict(zip(videos, videos[1:] + videos[:1]))  # the control: each claim at the next video as well

        def work(batch: list[Item]) -> Iterable[dict]:
            rows = [Audited(item, answers[item.id]["answers"][0], self.features(item.video),
                            self.features(after[item.video])) for item in batch]  # fmt: skip
            with self.use(self.judge_role) as role:
                found = audit(role, rows, section, size)
            return [{"id": item.id, "claims": claims} for item, claims in zip(batch, found, strict=True)]

        return resumed(path, "id", items, chunks_by=4 * size, work=work, name="claims")


def resumed(
    path: Path, key: str, items: list[Item], chunks_by: int, work: Callable[[list[Item]], Iterable[dict]], name: str
) -> dict[str, dict]:
    """{an item's `key`: its line}: lines that `path` holds already are read, the others made and appended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = (
        path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
    )  # a kill may cut the last line
    lines = {line[key]: line for line in map(json.loads, filter(None, whole.split("\n")))}
    todo = [item for item in items if getattr(item, key) not in lines]
    with open(path, "a+", encoding="utf-8") as file, progress(len(items), name, unit="item") as bar:
        file.truncate(len(f"{whole}\n".encode()) if whole else 0)
        bar.advance(len(items) - len(todo))
        for batch in chunks(todo, chunks_by):
            for line in work(batch):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                lines[line[key]] = line
                bar.advance(1)
    return {getattr(item, key): lines[getattr(item, key)] for item in items}


def write_pictures(items: list[Item], folder: Path) -> dict[str, str]:
    """{video: path} of the pictures that the benchmark's file holds, written into `folder`."""
    out = {}
    for item in items:
        if item.picture is not None:
            path = folder / f"{os.path.basename(item.video)}.jpg"
            try:
                content = base64.b64decode(item.picture, validate=True)
            except (binascii.Error, TypeError) as error:
                raise DataError(f"The picture of item {item.id} is not base64 ({error}).") from None
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            out[item.video] = str(path)
    return out
