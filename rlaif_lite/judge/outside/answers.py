"""The judge from outside that a recipe names: a language model that scores single answers, from 0 to 10.

It reads text alone: the question, what is known of the video in words, a right answer where the record has one, and the
answer. Two answers are compared by their scores.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ...data.records import Record, question_of
from ...recipe import Outside
from . import Case
from .cached import CachedJudge
from .endpoint import Endpoint, settings_of
from .local import of_model


def open_judge(section: Outside, folder: Path, device: torch.device, batch_size: int) -> CachedJudge:
    """The recipe's judge, its verdicts in `folder`; `batch_size` prompts at a time where it is on this machine.

    Raises JudgeError for an endpoint that does not answer, ModelError for a model that cannot be loaded."""
    if section.url is None:
        model = of_model(section.model or "", device, batch_size=batch_size)
    else:
        settings = settings_of(section.body, "`preference.outside.body`")
        model = Endpoint(section.url, section.model or "", section.key, concurrency=section.concurrency, body=settings)
    return CachedJudge(model, folder, budget=section.budget)


def score_answers(
    judge: CachedJudge, asked: Sequence[tuple[Record, str, str | None]], rubric: str
) -> list[float | None]:
    """The scores of (record, answer, what is known of its video), 0 to 10; None where a reply cannot be read."""
    cases = [
        Case(record.key, "answer", question_of(record), record.solution or record.answer or "", answer, known, rubric)
        for record, answer, known in asked
    ]
    return [verdict.score for verdict in judge.judge(cases)]
