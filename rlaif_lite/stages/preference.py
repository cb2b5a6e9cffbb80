"""Preferences that the model itself gives: it answers each prompt several times and judges its own answers (VLM-RLAIF
section 3.2).

Answers are sampled from the SFT model. A judge, which is the SFT model too, reads the video, the narrative, and the
answers: `pairwise` compares two answers by logits in both orders (the published form), `claims` checks each answer
claim by claim and prefers the higher score, `outside` asks another model for scores. Pairs are written in the JSON
shape of the released files, with scores beside them.

Where the truth is known (the synthetic world), the judge's agreement with it is reported, with and without the
narrative; everywhere, how often the longer answer wins.

Pairs that the recipe gives (`data.pairs`) are used as they are instead: nothing is sampled or judged.
"""

from ..data.records import VIDEO_MARK, Record, question_of
from ..data.truth import TRUTH, content_words
from ..files import read_jsonl, write_json, write_jsonl
from ..judge.claims import refuse_silent_judge
from ..progress import say
from ..rollout import Sampling
from ..workspace import Workspace
from .judging import Judged, compare_pairs, figures_of, refuse_unread, sample_answers

READS = ("seed", "preference", "data.preference", "data.pairs", *TRUTH)
NEEDS = ("features", "sft", "context")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # as the release spells them


def run(work: Workspace) -> dict:
    """Write `preference/pairs.json` and `preference/judgements.json`; returns the figures of the summary."""
    section = work.recipe.preference
    if not work.recipe.data.preference:
        return write_given(work)
    work.load_role("sft")
    sampling = Sampling(section.max_new_tokens, section.temperature, section.top_p, section.top_k)
    records, path = work.records("preference"), work.stage("preference") / "answers.jsonl"
    seed_of = lambda record, j: work.seed("preference", record.key, j)
    answers = sample_answers(work, "sft", records, sampling, section.samples, seed_of, path, "preference: answers")
    both = [(of.record, a, b) for of in answers for a, b in zip(of.texts[0::2], of.texts[1::2], strict=True)]
    pairs = [(record, a, b) for record, a, b in both if a != b]  # neighbouring answers, where they differ
    narratives = work.narratives()

    def judged(judge: str, context: bool, count: int) -> list[Judged]:
        name = f"{judge}.{'context' if context else 'plain'}"
        path = work.stage("preference") / "judged" / f"{name}.{len(pairs[:count])}.jsonl"
        contexts = narratives if context else None
        return compare_pairs(work, "sft", judge, pairs[:count], contexts, path, f"preference: {name}")

    label = judged(section.judge, section.context, len(pairs))
    told = [j.has_mass for j in label]
    if section.judge == "outside":
        refuse_unread(work, told, "preference")
    else:
        refuse_silent_judge(told, "preference")
    table = {(section.judge, section.context): label}
    both = section.compare_context and section.judge != "outside"  # which is paid for
    if both:
        table[section.judge, not section.context] = judged(section.judge, not section.context, len(pairs))
    if section.compare_pairs:
        other = "pairwise" if section.judge == "claims" else "claims"
        for context in (True, False) if both else (section.context,):
            table[other, context] = judged(other, context, section.compare_pairs)
    kept = [
        j
        for j in label
        if j.margin != 0 and abs(j.margin) > section.min_margin and (j.consistent or not section.consistent_only)
    ]
    write_pairs(work, kept)
    figures = [
        figures_of(work.truth, judge, context, found) | {"same_winner": same_winner(label, found)}
        for (judge, context), found in table.items()
    ]
    write_json(work.stage("preference") / "judgements.json", figures)
    outside = outside_narrative(work, pairs, narratives)
    return summary(section, figures, pairs=len(kept), judged=len(label)) | {"outside_narrative": outside}


def same_winner(label: list[Judged], other: list[Judged]) -> float | None:
    """Share of the pairs of `other`, which are the first of `label`, in which both judges name the same winner."""
    same = [(one.margin > 0) == (two.margin > 0) for one, two in zip(label, other, strict=False)]
    return sum(same) / len(same) if same else None


def outside_narrative(
    work: Workspace, pairs: list[tuple[Record, str, str]], narratives: dict[str, str]
) -> float | None:
    """Share of the answers that have no content word of their video's narrative; None where there are no narratives.
    It needs no truth, and says where judge and policy speak of different things."""
    told = {name: content_words(text) for name, text in narratives.items()}
    known = [(told[name], text) for r, a, b in pairs if (name := work.name_of(r)) in told for text in (a, b)]
    return sum(not words & content_words(text) for words, text in known) / len(known) if known else None


def write_pairs(work: Workspace, kept: list[Judged]) -> None:
    """`pairs.json` in the released shape (RM_13b_v1_dataset), with the score gap beside the preference, and
    `pairs.jsonl` as the reward stage reads it, with what the judge said of both answers, claim by claim."""
    released, own = [], []
    for judged in kept:
        record, a_is_better = judged.record, judged.margin > 0
        released.append(
            {
                "id": record.id,
                "video": record.video,
                "conversations": [{"from": "human", "value": f"{VIDEO_MARK}\n{question_of(record)}"}],
                "output_1": {"from": "llm", "value": judged.a},
                "output_2": {"from": "llm", "value": judged.b},
                "preference": 1 if a_is_better else 2,
                "score_gap": judged.margin,
            }
        )
        own.append(
            {
                "key": record.key,
                "chosen": judged.a if a_is_better else judged.b,
                "rejected": judged.b if a_is_better else judged.a,
                "margin": abs(judged.margin),
                "consistent": judged.consistent,
                "said": list(judged.said if a_is_better else judged.said[::-1]),
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
    """The pairs of `data.pairs` whose answers differ."""
    given = work.records("preference") if work.recipe.data.pairs else []
    return [(r, r.chosen, r.rejected) for r in given if r.chosen != r.rejected]


def read_pairs(work: Workspace) -> list[tuple[Record, str, str]]:
    """(record, chosen, rejected) as this stage left them."""
    if not work.recipe.data.preference:
        return given_pairs(work)
    records = {r.key: r for r in work.records("preference")}
    return [
        (records[row["key"]], row["chosen"], row["rejected"])
        for row in read_jsonl(work.folder / "preference" / "pairs.jsonl")
    ]


def summary(section, figures: list[dict], pairs: int, judged: int) -> dict:
    """The summary's `preference` block (see docs/run_folder.md)."""
    by_key = {(f["judge"], f["context"]): f for f in figures}
    own = by_key[section.judge, section.context]
    out = {
        "source": "judged",
        "judge": section.judge,
        "context": section.context,
        "pairs": pairs,
        "pairs_judged": judged,
        "dropped": judged - pairs,
        "verdicts_without_mass": own["without_mass"],
        "judge_agreement_with_truth": own.get("agreement"),
        "length_bias": own["length_bias"],
        "truth_length_bias": own.get("truth_length_bias"),
        "judges": figures,
    }
    without = by_key.get((section.judge, False))
    out["judge_agreement_without_context"] = without.get("agreement") if without else None
    compared = [f for f in figures if "consistency" in f and f["context"] == section.context]
    out["position_consistency"] = (
        compared[0].get("consistency_decided", compared[0]["consistency"]) if compared else None
    )
    return out
