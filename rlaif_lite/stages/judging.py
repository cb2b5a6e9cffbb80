"""What every stage that learns from judged answers does: a role answers prompts, a role judges the answers, and the
judge is held against the truth where that is known. All of it goes on batch by batch after a kill."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.records import Record, question_of
from ..data.truth import Truth
from ..errors import JudgeError
from ..files import by_batches, chunks, even_chunks
from ..judge.claims import AnswerToJudge, judge_claims
from ..judge.outside.answers import score_answers
from ..judge.pairwise import AnswerPair, judge_pairs
from ..model.inputs import encode_prompt
from ..model.text import decode_answer
from ..phases import phase
from ..progress import progress
from ..rollout import Sampling, sample
from ..workspace import Workspace


class Judged(NamedTuple):
    """One pair of answers and what a judge said of it."""

    record: Record
    a: str
    b: str
    margin: float  # positive: a is better
    consistent: bool  # both orders agreed (always true of judges that see one answer at a time)
    has_mass: bool = True  # the judge gave its verdict words probability, or a score, for both answers
    said: Sequence[Sequence] = ((), ())  # of a and of b: (claim, P(yes), P(no)); nothing where pairs are compared


class Answers(NamedTuple):
    """The answers to one prompt."""

    record: Record
    texts: list[str]
    ids: list[list[int]]  # their tokens as they were sampled, EOS included where there is one


def sample_answers(
    work: Workspace,
    role: str,
    records: list[Record],
    sampling: Sampling,
    samples: int,
    seed_of: Callable[[Record, int], int],
    path: Path,
    label: str,
) -> list[Answers]:
    """`samples` answers of a role to every prompt, answer j drawn with seed_of(record, j); kept in `path`."""
    base, in_flight = work.base(), work.recipe.preference.batch_size

    def answer(batch: list[Record]) -> list[dict]:
        prompts = [encode_prompt(base, r.prompt, work.features(r)) for r in batch]
        seeds = [seed_of(r, j) for r in batch for j in range(samples)]
        with work.roles.use(role) as active:
            found = sample(active, prompts, sampling, seeds=seeds, per_prompt=samples, batch_size=in_flight)
        return [
            {"key": r.key, "answers": [decode_answer(base, t.ids) for t in part], "ids": [t.ids for t in part]}
            for r, part in zip(batch, chunks(found, samples), strict=True)
        ]

    batches = even_chunks(records, in_flight // samples)
    with progress(len(records), label, unit="prompt") as bar:
        rows = by_batches(path, batches, answer, bar.advance)
    return [Answers(record, row["answers"], row["ids"]) for record, row in zip(records, rows, strict=True)]


def compare_pairs(
    work: Workspace,
    role: str,
    judge: str,
    pairs: list[tuple[Record, str, str]],
    contexts: Mapping[str, str] | None,
    path: Path,
    label: str,
) -> list[Judged]:
    """A role decides `pairs` as judge "pairwise" or "claims", with the videos' contexts or without; kept in `path`. The
    judge "outside" is no role."""
    section = work.recipe.preference

    def decide(batch: list) -> list[list]:
        if judge == "outside":
            found = outside_scores(work, [(r, x) for r, a, b in batch for x in (a, b)], contexts)
            known = [None not in both for both in zip(found[0::2], found[1::2], strict=True)]
            return [[a - b if k else 0.0, True, k] for a, b, k in zip(found[0::2], found[1::2], known, strict=True)]
        with work.roles.use(role) as active, phase("judge"):
            if judge == "pairwise":
                asked = [
                    AnswerPair(work.features(r), question_of(r), a, b, context_of(work, r, contexts))
                    for r, a, b in batch
                ]
                found = judge_pairs(active, asked, section.pairwise, section.batch_size)
                return [[c.margin, c.consistent, c.has_mass, [[], []]] for c in found]
            items = [item_of(work, r, x, contexts) for r, a, b in batch for x in (a, b)]
            scores = judge_claims(active, items, section.claims, section.batch_size)
        said = [score.said(item.answer, section.claims.mode) for score, item in zip(scores, items, strict=True)]
        both = zip(scores[0::2], scores[1::2], chunks(said, 2), strict=True)
        return [[a.score - b.score, True, a.has_mass and b.has_mass, claims] for a, b, claims in both]

    with progress(len(pairs), label, unit="pair") as bar:
        decisions = by_batches(path, even_chunks(pairs, section.batch_size), decide, bar.advance)
    return [Judged(*pair, *decision) for pair, decision in zip(pairs, decisions, strict=True)]


def outside_scores(
    work: Workspace, answers: list[tuple[Record, str]], contexts: Mapping[str, str] | None
) -> list[float | None]:
    """What the judge from outside says of (record, answer), 0 to 10; None where its reply cannot be read. It reads the
    record's `captions` and the narrative."""
    asked = []
    for record, text in answers:
        known = [*record.captions, *filter(None, [context_of(work, record, contexts)])]
        asked.append((record, text, "\n".join(known)))
    with phase("judge"):
        return score_answers(work.outside, asked, work.recipe.preference.outside.rubric)


def refuse_unread(work: Workspace, read: list[bool], who: str) -> int:
    """How many verdicts of the judge from outside cannot be read. Raises JudgeError where none can."""
    if read and not any(read):
        raise JudgeError(
            f"{who}: none of {len(read)} replies of {work.outside.id} holds a score, so they say nothing. They are in "
            f"{work.folder / 'outside'}. Choose a model that follows instructions, or raise its longest reply in "
            "`preference.outside.body`."
        )
    return len(read) - sum(read)


def context_of(work: Workspace, record: Record, contexts: Mapping[str, str] | None) -> str | None:
    """The narrative of the record's video; None without narratives, or without a video."""
    return contexts[work.name_of(record)] if contexts is not None and record.video is not None else None


def item_of(work: Workspace, record: Record, answer: str, contexts: Mapping[str, str] | None) -> AnswerToJudge:
    """An answer with all that its judge reads."""
    return AnswerToJudge(work.features(record), question_of(record), answer, context_of(work, record, contexts))


def figures_of(truth: Truth, judge: str, context: bool, judged: list[Judged]) -> dict:
    """What can be said of a judge: consistency, length bias and, where the truth is known, agreement with it."""

    def prefers_longer(verdicts: list[tuple[Judged, float]]) -> float | None:
        """Of pairs whose answers are not equally long, the share in which the verdict (> 0: a) is the longer one."""
        words = [(len(j.a.split()), len(j.b.split()), margin) for j, margin in verdicts]
        found = [(margin > 0) == (a > b) for a, b, margin in words if a != b]
        return sum(found) / len(found) if found else None

    figures = {
        "judge": judge,
        "context": context,
        "pairs": len(judged),
        "without_mass": sum(not j.has_mass for j in judged),
        "length_bias": prefers_longer([(j, j.margin) for j in judged]),
    }
    gaps = [(j, truth.gap(j.record, j.a, j.b)) for j in judged]
    known = [(j, gap) for j, gap in gaps if gap is not None]
    decided = [(j, gap) for j, gap in known if gap != 0]
    if decided:
        right = sum((j.margin > 0) == (gap > 0) for j, gap in decided)
        figures |= {
            "agreement": right / len(decided),
            "decided_pairs": len(decided),
            "truth_ties": len(known) - len(decided),
            "truth_length_bias": prefers_longer(decided),
        }
    if judge == "pairwise":
        figures["consistency"] = sum(j.consistent for j in judged) / max(1, len(judged))
        if decided:
            figures["consistency_decided"] = sum(j.consistent for j, _ in decided) / len(decided)
    return figures
