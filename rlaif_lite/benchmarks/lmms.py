"""A role of a run as a model of lmms-eval, with the run's frames, pruning, quantised base and adapter.

    lmms-eval --model rlaif_lite --model_args run=runs/x,role=policy --tasks mvbench

lmms-eval finds this module by the entry point `lmms_eval.models` (its `models/registry_v2.py`), and nothing else
imports it. `run` is a run folder, or a recipe where `role` is base. Features are kept in the run's cache. What decides
answers is the recipe's, so `--batch_size` and `--device` of lmms-eval change nothing.
"""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image

from ..data.records import VIDEO_MARK, Message
from ..errors import DataError, RlaifError
from ..model.inputs import encode_prompt
from ..model.text import decode_answer
from ..rollout import Sampling, sample
from .answer import Examinee, Span, view_of

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 1024  # where a task names no number, as in lmms-eval's own models
ONLY_GENERATION = "`rlaif_lite` answers tasks of the kind `generate_until`. Choose the task's variant that generates."


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="rlaif_lite", chat_class_path=f"{__name__}.Model")


class Asked(NamedTuple):
    """One question of a task."""

    messages: list[Message]
    video: str | None  # path of a video, or of a picture
    span: Span | None  # seconds from where to where it is shown; None: all of it
    sampling: Sampling
    until: tuple[str, ...]


class Model(lmms):
    """lmms-eval's interface (`api/model.py`), its chat form."""

    is_simple = False

    def __init__(self, run: str, role: str = "policy", batch_size=None, max_batch_size=None, device=None):
        """The last three are lmms-eval's, given to every model. Raises RlaifError where there is no such role."""
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise RlaifError("`rlaif_lite` in lmms-eval runs in one process. Start it without `accelerate launch`.")
        self.examinee = Examinee(run, role)
        self.folder = self.examinee.work.folder / "bench" / "lmms-eval"

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request, in order. A video that cannot be used is named, and its answer is empty."""
        asked = [self._asked(request) for request in requests]
        videos = {each.video: each.video for each in asked if each.video is not None}
        spans = [(each.video, each.span) for each in asked if each.video is not None and each.span is not None]
        failed = self.examinee.look(videos, self.folder / "videos.json", spans)
        for reason in failed.values():
            log.warning("lmms-eval: %s Its questions get an empty answer, which counts as wrong.", reason)
        groups = defaultdict(list)
        for place, each in enumerate(asked):
            if each.video not in failed:
                groups[each.sampling].append(place)
        answers = [""] * len(asked)
        for sampling, places in groups.items():
            for place, answer in zip(places, self._answers([asked[place] for place in places], sampling), strict=True):
                answers[place] = answer
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise RlaifError(ONLY_GENERATION)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise RlaifError(ONLY_GENERATION)

    def _answers(self, asked: list[Asked], sampling: Sampling) -> Iterable[str]:
        examinee = self.examinee
        prompts = [
            encode_prompt(
                examinee.base,
                each.messages,
                None if each.video is None else examinee.views(each.video)[view_of(each.span)],
            )
            for each in asked
        ]
        size, seeds = examinee.work.recipe.evaluate.batch_size, list(range(len(prompts)))
        with examinee.use(examinee.role) as role:
            found = sample(role, prompts, sampling, seeds=seeds, batch_size=size)
        for each, trajectory in zip(asked, found, strict=True):
            yield cut(decode_answer(examinee.base, trajectory.ids), each.until)

    def _asked(self, request: Instance) -> Asked:
        _, doc_to_messages, settings, number, task, split = request.args
        place = f"lmms-eval, task {task}, {split}, document {number}"
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        images, videos, sounds = chat.extract_media()
        if sounds or len(images) + len(videos) > 1:
            raise DataError(
                f"{place}: {len(videos)} videos, {len(images)} pictures and {len(sounds)} sounds. A question to "
                "`rlaif_lite` is about one video or picture."
            )
        turns = [Message(message.role, " ".join(map(_text, message.content))) for message in chat.messages]
        video = self._picture(images[0]) if images else str(videos[0]) if videos else None
        until = settings.get("until") or ()
        warmth = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        sampling = Sampling(int(settings.get("max_new_tokens") or MAX_NEW_TOKENS), warmth)
        return Asked(turns, video, _span(chat), sampling, (until,) if isinstance(until, str) else tuple(until))

    def _picture(self, image: str | Image.Image) -> str:
        """The path of a picture; one that is given as pixels is written, named by them."""
        if isinstance(image, str):
            return image
        rgb = image.convert("RGB")
        path: Path = self.folder / "pictures" / f"{hashlib.sha256(rgb.tobytes()).hexdigest()[:16]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            rgb.save(path)
        return str(path)


def cut(answer: str, until: tuple[str, ...]) -> str:
    """An answer up to the first of the texts at which the task stops it."""
    ends = [end for text in until if text and (end := answer.find(text)) >= 0]
    return answer[: min(ends)] if ends else answer


def _span(chat: ChatMessages) -> Span | None:
    """The part of the video that is asked about; an end that is not given is far behind every video's."""
    for part in (part for message in chat.messages for part in message.content if part.type == "video"):
        if part.start_time is not None or part.end_time is not None:
            return float(part.start_time or 0), float(part.end_time if part.end_time is not None else 1e9)
    return None


def _text(part) -> str:
    """A part of a message as a record writes it."""
    return part.text if part.type == "text" else VIDEO_MARK
