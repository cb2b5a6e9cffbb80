"""Who judges the answers of a round of DPO: scores by claims or by divided claims (RLAIF-V), and the descriptions that
i-SRT's judge reads."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ... import ranks
from ...data.records import Message, Record, question_of
from ...data.world import divided_answer
from ...files import by_batches, chunks, even_chunks, read_json, write_json
from ...judge.claims import ask, judge_claims, refuse_silent_judge
from ...judge.divide import Divided, TextModel, Writer, divide, rejected, write_by_role
from ...judge.narrative import captions_of, narrative, spans_of
from ...model.memory import in_pieces
from ...model.roles import BASE, ActiveRole
from ...phases import phase
from ...progress import progress
from ...recipe import Divide
from ...training.fit import fit
from ...training.loop import split_micro
from ...workspace import Workspace
from ..judging import Answers, item_of, outside_scores, refuse_unread
from ..sft import backward, example

DIVIDER = "divider"  # the adapter that divides answers, where the recipe trains one
ASKING = 0.2  # share of the texts that ask


class Scores(NamedTuple):
    """What a judge of single answers says of a round."""

    scores: list[list[float | None]]  # of each prompt's answers; None: not to be judged
    dropped: dict[str, int]  # answers not judged, by reason


def score_answers(
    work: Workspace, role: str, answers: list[Answers], contexts: Mapping[str, str] | None, folder: Path, label: str
) -> Scores:
    """A role scores all answers, those that a prompt has twice once; `judged.jsonl` keeps what was asked and said."""
    preference = work.recipe.preference
    asked = list(dict.fromkeys((place, text) for place, of in enumerate(answers) for text in of.texts))
    divided: list[Divided | None] = [None] * len(asked)
    if work.recipe.dpo.divide is not None:
        divided = divide_answers(work, [(question_of(answers[p].record), t) for p, t in asked], folder, label)
    todo = [(*key, found) for key, found in zip(asked, divided, strict=True) if found is None or found.judged]

    def judge_outside(batch: list[tuple[int, str, Divided | None]]) -> list[dict]:
        scores = outside_scores(work, [(answers[place].record, text) for place, text, _ in batch], contexts)
        return [
            {"answer": text, "score": score, "has_mass": score is not None}
            for (_, text, _), score in zip(batch, scores, strict=True)
        ]

    def judge(batch: list[tuple[int, str, Divided | None]]) -> list[dict]:
        items = [item_of(work, answers[place].record, text, contexts) for place, text, _ in batch]
        with work.roles.use(role) as active, phase("judge"):
            if work.recipe.dpo.divide is None:
                verdicts = judge_claims(active, items, preference.claims, preference.batch_size)
                scores = [verdict.score for verdict in verdicts]
            else:
                both = [(item, found.questions) for item, (_, _, found) in zip(items, batch, strict=True)]
                verdicts = in_pieces(
                    both, len(both), lambda part: ask(active, *zip(*part, strict=True), preference.claims)
                )
                scores = [-rejected(verdict) for verdict in verdicts]
        return [
            {
                "key": answers[place].record.key,
                "answer": text,
                "claims": verdict.claims,
                "values": verdict.values,
                "said": verdict.said(text, "ask" if work.recipe.dpo.divide else preference.claims.mode),
                "score": score,
                "has_mass": verdict.has_mass,
            }
            for (place, text, _), verdict, score in zip(batch, verdicts, scores, strict=True)
        ]

    with progress(len(todo), f"{label}: judge", unit="answer") as bar:
        outside = work.recipe.dpo.divide is None and preference.judge == "outside"
        batches = chunks(todo, preference.batch_size)
        rows = by_batches(folder / "judged.jsonl", batches, judge_outside if outside else judge, bar.advance)
    told = [row["has_mass"] for row in rows]
    unread = refuse_unread(work, told, label) if outside else refuse_silent_judge(told, label) * 0
    score_of = {(place, text): row["score"] for (place, text, _), row in zip(todo, rows, strict=True)}
    why = {
        key: "mismatched" if found.claims else "claimless"
        for key, found in zip(asked, divided, strict=True)
        if found is not None and not found.judged
    }
    lost = [why[place, text] for place, of in enumerate(answers) for text in of.texts if (place, text) in why]
    scores = [[score_of.get((place, text)) for text in of.texts] for place, of in enumerate(answers)]
    return Scores(scores, {reason: lost.count(reason) for reason in ("mismatched", "claimless")} | {"unread": unread})


# --------------------------------------------------------------------------------------------- RLAIF-V: answers divided


def divide_answers(work: Workspace, answers: list[tuple[str, str]], folder: Path, label: str) -> list[Divided]:
    """Divide (question, answer), each different one once, whatever its video; `claims.jsonl` keeps the lists."""
    section = work.recipe.dpo.divide
    different = list(dict.fromkeys(answers))
    with writer(work) as write, progress(len(different), f"{label}: claims", unit="answer") as bar:
        batches = even_chunks(different, section.batch_size)
        work_on = lambda batch: [found._asdict() for found in divide(write, batch, section)]
        rows = by_batches(folder / "claims.jsonl", batches, work_on, bar.advance)
    found = dict(zip(different, (Divided(**row) for row in rows), strict=True))
    return [found[answer] for answer in answers]


@contextmanager
def writer(work: Workspace) -> Iterator[Writer]:
    """Who divides: a text model, the adapter `divider`, or the bare base."""
    section = work.recipe.dpo.divide
    if section.model is not None:
        yield TextModel(section.model, work.device, section).write
    elif section.train is None:
        with work.roles.use(BASE) as role:
            yield write_by_role(role, section)
    else:
        work.load_role(DIVIDER)
        with work.roles.use(DIVIDER) as role:
            yield write_by_role(role, section)
        work.roles.remove(DIVIDER)


def prepare_divider(work: Workspace) -> None:
    """Train the adapter `divider` on answers that the synthetic world divides, where the recipe asks for it."""
    divide_section, seed = work.recipe.dpo.divide, work.recipe.seed
    section = None if divide_section is None else divide_section.train
    if section is None or ranks.first(work.adapter(DIVIDER).exists):
        return
    base, roles = work.base(), work.roles

    def step_loss(active: ActiveRole, step: int, micro: int) -> dict[str, float]:
        rng = random.Random(work.seed("dpo.divide", step))
        records = [lesson(divide_section, rng) for _ in range(section.batch_size)]
        examples = sorted((example(base, r, None, "record") for r in records), key=lambda e: len(e.row.ids_S))
        own = ranks.deal(examples)  # in the order of their lengths
        return {"loss": sum(backward(active, part, len(examples)) for part in split_micro(own, micro))}

    roles.add(DIVIDER, seed=work.seed("dpo.divide", "init"))
    checkpoint = work.stage("dpo") / "checkpoint" / "divide"
    fit(roles, DIVIDER, section, section.steps, step_loss, "dpo.divide", checkpoint, work.log, seed)
    roles.save(DIVIDER, work.adapter(DIVIDER))
    roles.remove(DIVIDER)


def lesson(section: Divide, rng: random.Random) -> Record:
    """One text to learn from: an answer and its claims, or a claim and its question. What it tells of is drawn anew;
    it is no video of the run."""
    divided = divided_answer(rng)
    if section.split is None or (section.ask is not None and rng.random() < ASKING):
        claim, written = divided.asked(rng)
        prompt = section.ask.format(claim=claim)
    else:
        prompt = section.split.format(question=divided.question, answer=divided.answer)
        written = section.separator.join(divided.claims)
    return Record("lesson", None, (Message("user", prompt), Message("assistant", written)))


# ----------------------------------------------------------------------------------------- i-SRT: videos described anew


def describe_videos(
    work: Workspace, role: str, records: list[Record], last: Path, folder: Path
) -> tuple[dict[str, str], dict]:
    """Describe the records' videos while reading their descriptions in `last` (the narratives, where it is not there)
    -> ({video: description}, what to say of them). `descriptions.json` holds them, and the last ones of other videos.
    """
    section, context = work.recipe.dpo.describe, work.recipe.context
    read = ranks.first(lambda: read_json(last) if last.exists() else dict(work.narratives()))
    shown = {work.name_of(r): r for r in records if r.video is not None}
    clips = [f"clip{i}" for i in range(work.recipe.features.clips)]

    def write(batch: list[str]) -> list[str]:
        videos = [[views[clip] for clip in clips] for views in (work.views(shown[name]) for name in batch)]
        prompts = [section.prompt.format(context=read[name]) for name in batch]
        with work.roles.use(role) as active:
            captions = captions_of(active, videos, prompts, context)
        return [narrative(said, context.markers, spans_of(of)) for said, of in zip(captions, videos, strict=True)]

    batches = even_chunks(list(shown), context.batch_size // len(clips))
    with progress(len(shown), "dpo: descriptions", unit="video") as bar:
        texts = by_batches(folder / "described.jsonl", batches, write, bar.advance)
    now = dict(zip(shown, texts, strict=True))
    write_json(folder / "descriptions.json", read | now)
    told = {
        "descriptions": [{"video": v, "read": read[v], "written": now[v]} for v in list(shown)[: section.examples]],
        "description_changed": sum(read[v] != now[v] for v in shown) / max(1, len(shown)),
        "description_words": sum(len(text.split()) for text in texts) / max(1, len(texts)),
    }
    for when, of in (("read", read), ("written", now)):  # what is read in round 1 are the narratives
        shares = [share for v, r in shown.items() if (share := work.truth.share_true(of[v], r)) is not None]
        if shares:
            told[f"description_true_{when}"] = sum(shares) / len(shares)
    return now, told
