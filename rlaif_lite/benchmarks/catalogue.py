"""Every benchmark by name: how its files are read, what is asked, and what its figures are sums of."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from ..judge.outside import Task
from . import audit, choices, hallucination, questions, ranking, vidhalluc
from .items import Item, Tally


class Benchmark(NamedTuple):
    """One benchmark."""

    load: Callable[[list[Path]], list[Item]]
    files: str  # what `load` reads
    tally: Callable[[Item, dict], Tally]
    kind: Literal["answers", "retrieval", "recognition", "claims"] = "answers"
    tasks: tuple[Task, ...] = ()
    "what a judge is asked about each answer; none where rules or the run's own claims judge decide"
    prompt: str = "{question}"  # the request; --prompt gives another


OPTIONS = "{question}\nAnswer with the letter of the right option."
YES_NO = "{question}\nAnswer the question using 'yes' or 'no'."  # VideoHallucer's
BEGINNING = "{question}\nPlease answer yes or no:"  # EventHallusion's
CAPTION = "Describe this video in one sentence."
_QA = Benchmark(questions.load_qa, questions.QA, questions.tally, tasks=("qa",))
_RETRIEVAL = Benchmark(ranking.load_captions, ranking.CAPTIONS, ranking.tally, "retrieval", prompt=CAPTION)
_ACTIONS = Benchmark(
    ranking.load_actions,
    ranking.ACTIONS,
    ranking.tally,
    "recognition",
    prompt="What is being done in this video? Answer with the name of the action.",
)

BENCHMARKS = {
    "videochatgpt": Benchmark(
        questions.load_generic, questions.GENERIC, questions.tally, tasks=("correctness", "detail", "context")
    ),
    "videochatgpt-temporal": Benchmark(questions.load_generic, questions.GENERIC, questions.tally, tasks=("temporal",)),
    "videochatgpt-consistency": Benchmark(
        questions.load_consistency, questions.CONSISTENCY, questions.tally, tasks=("consistency",)
    ),
    "msvd-qa": _QA,
    "msrvtt-qa": _QA,
    "tgif-qa": _QA,
    "activitynet-qa": _QA,
    "nextqa": Benchmark(questions.load_qa, questions.QA, choices.tally_choice, prompt=OPTIONS),
    "tempcompass": Benchmark(choices.load_tempcompass, choices.TEMPCOMPASS, choices.tally_choice),
    "mvbench": Benchmark(choices.load_mvbench, choices.MVBENCH, choices.tally_choice, prompt=OPTIONS),
    "videohallucer": Benchmark(choices.load_videohallucer, choices.VIDEOHALLUCER, choices.tally_pair, prompt=YES_NO),
    "eventhallusion": Benchmark(
        choices.load_eventhallusion, choices.EVENTHALLUSION, choices.tally_beginning, prompt=BEGINNING
    ),
    "vidhalluc": Benchmark(vidhalluc.load, vidhalluc.VIDHALLUC, vidhalluc.tally),
    "msvd-retrieval": _RETRIEVAL,
    "msrvtt-retrieval": _RETRIEVAL,
    "ucf101": _ACTIONS,
    "hmdb51": _ACTIONS,
    "pope": Benchmark(hallucination.load_pope, hallucination.POPE, hallucination.tally_pope),
    "amber": Benchmark(hallucination.load_amber, hallucination.AMBER, hallucination.tally_amber),
    "objhal": Benchmark(hallucination.load_objhal, hallucination.OBJHAL, hallucination.tally_objhal),
    "mmhal": Benchmark(hallucination.load_mmhal, hallucination.MMHAL, hallucination.tally_mmhal, tasks=("mmhal",)),
    "claims": Benchmark(questions.load_generic, questions.GENERIC, audit.tally, "claims"),
}
