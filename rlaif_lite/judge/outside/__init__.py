"""A judge reads a case (question, reference, prediction) and gives a verdict; it always says who it is.

Benchmarks are judged so, and with `preference.judge: outside` or `ppo.feedback: outside` the answers that a run learns
from. Three kinds: `rules` (no model, benchmarks only), `local` (a model on this machine, the default), `endpoint` (a
model behind an OpenAI-compatible address). Results of two judges are never put into one column: a judge's version alone
moves the published numbers by ten points, so `Judge.id` is written with every score.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Task = Literal["qa", "correctness", "detail", "context", "temporal", "consistency", "mmhal", "caption", "answer"]


class Case(NamedTuple):
    """One thing to judge."""

    id: str  # unique within a benchmark
    task: Task
    """
    qa: is the meaning the reference's, yes or no, and how well, 0-5 (zero-shot QA)
    correctness, detail, context, temporal: 0-5 (Video-ChatGPT's axes)
    consistency: 0-5, `question` and `prediction` are pairs: two wordings of one question
    mmhal: 0-6, hallucinated below 3; `context` is what the image shows
    caption: 1-5, correct from 3 on; `context` is the video's caption (i-SRT's protocol)
    answer: 0-10 by `rubric`; `context` is what is known of the video, `reference` a right answer or ""
    """
    question: str | tuple[str, str]
    reference: str
    prediction: str | tuple[str, str]
    context: str | None = None  # what the judge may know of the video in words, where the task uses it
    rubric: str = ""  # answer: what a good answer is


class Verdict(NamedTuple):
    """What a judge said of one case. What it could not judge is a verdict too, with its problem."""

    id: str  # the case's
    correct: bool | None
    "where the task asks for it (qa, mmhal: not hallucinated, caption: score >= 3); None where there is a problem"
    score: float | None  # on the task's scale; None where there is a problem, or where the judge gives none
    raw: str  # the judge's own words
    problem: str | None  # why there is no verdict: the answer cannot be read, or is out of range


class Judge(Protocol):
    """What every kind of judge does."""

    id: str  # kind, model, revision and the hash of its prompts; two judges with one id would say the same

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict for each case, in order. Raises RlaifError where it cannot go on; what was judged is kept."""
        ...
