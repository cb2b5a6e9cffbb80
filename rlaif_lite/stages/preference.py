"""Preferences that the model itself gives: it answers each prompt several times and judges its own answers (VLM-RLAIF
section 3.2).

Answers are sampled from the SFT model. A judge, which is the SFT model too, reads the video, the narrative, and the
answers: `pairwise` compares two answers by logits in both orders (the published form), `claims` checks each answer
claim by claim and prefers the higher score. Pairs are written in the JSON shape of the released files, with scores
beside them.

Where the truth is known (the synthetic world), the judge's agreement with it is reported, with and without the
narrative; everywhere, how often the longer answer wins.

Pairs that the recipe gives (`data.pairs`) are used as they are instead: nothing is sampled or judged.
"""

from typing import NamedTuple

from ..data.records import Record
from ..data.world_text import score as truth_score
from ..judge.claims import Item, judge_claims
from ..judge.pairwise import Pair, judge_pairs
from ..model.inputs import VIDEO_MARK, decode_answer, encode_prompt
from ..phases import phase
from ..progress import progress, say
from ..rollout import Sampling, sample
from ..workspace import Workspace, by_batches, chunks, question_of, read_jsonl, write_json, write_jsonl

READS = ("seed", "preference", "data.preference", "data.pairs")
NEEDS = ("features", "sft", "context")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # as the release spells them


class Judged(NamedTuple):
    """One pair of answers and what a judge said of it."""

    record: Record
    a: str
    b: str
    margin: float  # positive: a is better
    consistent: bool  # both orders agreed (always true of the claims judge, which sees one answer at a time)


def run(work: Workspace) -> dict:
    """Write `preference/pairs.json` and `preference/judgements.json`; returns the figures of the summary."""
    section = work.recipe.preference
    if not work.recipe.data.preference:
        return write_given(work)
    work.load_role("sft")
    records = {r.id: r for r in work.records("preference")}
    pairs = make_pairs(records, sample_answers(work))
    narratives = work.narratives()

    def judged(judge: str, context: bool, count: int) -> list[Judged]:
        return judge_all(work, judge, pairs[:count], narratives if context else None)

    label = judged(section.judge, section.context, len(pairs))
    table = {(section.judge, section.context): label}
    if section.compare_context:
        table[section.judge, not section.context] = judged(section.judge, not section.context, len(pairs))
    if section.compare_pairs:
        other = "pairwise" if section.judge == "claims" else "claims"
        for context in (True, False) if section.compare_context else (section.context,):
            table[other, context] = judged(other, context, section.compare_pairs)
    kept = [
        j
        for j in label
        if j.margin != 0 and abs(j.margin) > section.min_margin and (j.consistent or not section.consistent_only)
    ]
    write_pairs(work, kept)
    figures = [figures_of(judge, context, found) for (judge, context), found in table.items()]
    write_json(work.stage("preference") / "judgements.json", figures)
    return summary(section, figures, pairs=len(kept), judged=len(label))


def sample_answers(work: Workspace) -> list[dict]:
    """`samples` answers to every preference prompt, from the SFT role -> rows {id, answers}."""
    section, base = work.recipe.preference, work.base()
    sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, section.top_k)
    records = work.records("preference")

    def answer(batch: list[Record]) -> list[dict]:
        prompts = [encode_prompt(base, r.prompt, work.features(r)) for r in batch]
        seeds = [work.seed("preference", r.id, j) for r in batch for j in range(section.samples)]
        with work.roles.use("sft") as role:
            found = sample(
                role, prompts, sampling, seeds=seeds, per_prompt=section.samples, batch_size=section.batch_size
            )
        texts = [decode_answer(base, t.ids) for t in found]
        return [{"id": r.id, "answers": part} for r, part in zip(batch, chunks(texts, section.samples), strict=True)]

    # several times what is in flight, so that slots are refilled
    batches = chunks(records, max(1, 4 * section.batch_size // section.samples))
    with progress(len(records), "preference: answers", unit="prompt") as bar:
        return by_batches(work.stage("preference") / "answers.jsonl", batches, answer, bar.advance)


def make_pairs(records: dict[str, Record], rows: list[dict]) -> list[tuple[Record, str, str]]:
    """Neighbouring answers of a prompt, where they differ."""
    return [
        (records[row["id"]], a, b)
        for row in rows
        for a, b in zip(row["answers"][0::2], row["answers"][1::2], strict=True)
        if a != b
    ]


def judge_all(work: Workspace, judge: str, pairs: list, narratives: dict[str, str] | None) -> list[Judged]:
    """Decide `pairs` by one judge, with the narratives or without, resumable batch by batch."""
    section = work.recipe.preference
    name = f"{judge}.{'context' if narratives is not None else 'plain'}.{len(pairs)}"

    def context_of(record: Record) -> str | None:
        return narratives[work.name_of(record)] if narratives is not None and record.video is not None else None

    def decide(batch: list) -> list[list]:
        with work.roles.use("sft") as role, phase("judge"):
            if judge == "pairwise":
                asked = [Pair(work.features(r), question_of(r), a, b, context_of(r)) for r, a, b in batch]
                return [list(choice) for choice in judge_pairs(role, asked, section.pairwise, section.batch_size)]
            items = [Item(work.features(r), question_of(r), x, context_of(r)) for r, a, b in batch for x in (a, b)]
            scores = [v.score for v in judge_claims(role, items, section.claims, section.batch_size)]
        return [[a - b, True] for a, b in zip(scores[0::2], scores[1::2], strict=True)]

    with progress(len(pairs), f"preference: {name.rsplit('.', 1)[0]}", unit="pair") as bar:
        path = work.stage("preference") / "judged" / f"{name}.jsonl"
        decisions = by_batches(path, chunks(pairs, 4 * section.batch_size), decide, bar.advance)
    return [Judged(*pair, *decision) for pair, decision in zip(pairs, decisions, strict=True)]


def write_pairs(work: Workspace, kept: list[Judged]) -> None:
    """`pairs.json` in the released shape (RM_13b_v1_dataset), with the score gap beside the preference, and
    `pairs.jsonl` as the reward stage reads it."""
    released, own = [], []
    for judged in kept:
        record, better = judged.record, judged.a if judged.margin > 0 else judged.b
        released.append({
            "id": record.id,
            "video": record.video,
            "conversations": [
                {"from": "human", "value": f"{VIDEO_MARK}\n{question_of(record)}"},
            ],
            "output_1": {"from": "llm", "value": judged.a},
            "output_2": {"from": "llm", "value": judged.b},
            "preference": 1 if judged.margin > 0 else 2,
            "score_gap": judged.margin,
        })  # fmt: skip
        own.append(
            {
                "id": record.id,
                "chosen": better,
                "rejected": judged.b if judged.margin > 0 else judged.a,
                "margin": abs(judged.margin),
            }
        )
    write_json(work.stage("preference") / "pairs.json", released)
    write_jsonl(work.stage("preference") / "pairs.jsonl", own)


def write_given(work: Workspace) -> dict:
    """`pairs.json` from the pairs that the recipe gives, in the same shape but for the score, which they have not."""
    given, pairs = work.records("preference") if work.recipe.data.pairs else [], given_pairs(work)
    released = [
        {
            "id": record.id,
            "video": record.video,
            "conversations": [{"from": SPEAKERS[turn.role], "value": turn.content} for turn in record.prompt],
            "output_1": {"from": "llm", "value": chosen},
            "output_2": {"from": "llm", "value": rejected},
            "preference": 1,
        }
        for record, chosen, rejected in pairs
    ]
    write_json(work.stage("preference") / "pairs.json", released)
    source = "given" if given else "none"
    say(f"preference: {len(pairs)} pairs, {source}; nothing is judged")
    return {"source": source, "pairs": len(pairs), "dropped": len(given) - len(pairs), "judges": []}


def given_pairs(work: Workspace) -> list[tuple[Record, str, str]]:
    """The pairs of `data.pairs` whose answers differ. Taken from the records: their ids need not be unique."""
    given = work.records("preference") if work.recipe.data.pairs else []
    return [(r, r.chosen, r.rejected) for r in given if r.chosen != r.rejected]


def read_pairs(work: Workspace) -> list[tuple[Record, str, str]]:
    """(record, chosen, rejected) as this stage left them."""
    if not work.recipe.data.preference:
        return given_pairs(work)
    records = {r.id: r for r in work.records("preference")}
    return [
        (records[row["id"]], row["chosen"], row["rejected"])
        for row in read_jsonl(work.folder / "preference" / "pairs.jsonl")
    ]


def figures_of(judge: str, context: bool, judged: list[Judged]) -> dict:
    """What can be said of a judge: consistency, length bias and, where the truth is known, agreement with it."""
    longer = [j for j in judged if len(j.a.split()) != len(j.b.split())]
    prefers_longer = sum((j.margin > 0) == (len(j.a.split()) > len(j.b.split())) for j in longer)
    figures = {
        "judge": judge,
        "context": context,
        "pairs": len(judged),
        "length_bias": prefers_longer / len(longer) if longer else None,
    }
    known = [j for j in judged if j.record.facts is not None]
    gaps = [truth_score(j.a, j.record.facts) - truth_score(j.b, j.record.facts) for j in known]
    decided = [(j, gap) for j, gap in zip(known, gaps) if gap != 0]
    if decided:
        right = sum((j.margin > 0) == (gap > 0) for j, gap in decided)
        figures |= {
            "agreement": right / len(decided),
            "decided_pairs": len(decided),
            "truth_ties": len(known) - len(decided),
            "truth_length_bias": _truth_length_bias(decided),
        }
    if judge == "pairwise":
        figures["consistency"] = sum(j.consistent for j in judged) / max(1, len(judged))
        if decided:
            figures["consistency_decided"] = sum(j.consistent for j, _ in decided) / len(decided)
    return figures


def _truth_length_bias(decided: list[tuple[Judged, int]]) -> float | None:
    longer = [(j, gap) for j, gap in decided if len(j.a.split()) != len(j.b.split())]
    agrees = sum((gap > 0) == (len(j.a.split()) > len(j.b.split())) for j, gap in longer)
    return agrees / len(longer) if longer else None


def summary(section, figures: list[dict], pairs: int, judged: int) -> dict:
    """The summary's `preference` block (see docs/run_folder.md)."""
    by_key = {(f["judge"], f["context"]): f for f in figures}
    own = by_key[section.judge, section.context]
    out = {
        "source": "judged",
        "judge": section.judge, "context": section.context, "pairs": pairs, "pairs_judged": judged, "dropped": judged - pairs,
        "judge_agreement_with_truth": own.get("agreement"), "length_bias": own["length_bias"],
        "truth_length_bias": own.get("truth_length_bias"), "judges": figures,
    }  # fmt: skip
    without = by_key.get((section.judge, False))
    out["judge_agreement_without_context"] = without.get("agreement") if without else None
    compared = [f for f in figures if "consistency" in f and f["context"] == section.context]
    out["position_consistency"] = (
        compared[0].get("consistency_decided", compared[0]["consistency"]) if compared else None
    )
    return out
