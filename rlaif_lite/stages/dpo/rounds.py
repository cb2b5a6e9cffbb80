"""Direct preference optimisation in rounds: no reward model, no critic, no sampling inside a step.

Round t = 1, 2, ... starts from the policy that round t - 1 left (round 1: the adapter `reference`, which is where PPO
starts, too) and goes

    1  `sample_answers`  several answers to every prompt, same decoding, other seeds: pairs then differ in content alone
    2  `judge_round`     a judge scores or compares them: `preference.judge`, or RLAIF-V's divided claims; its context
                         is the narrative, or the policy's own description (i-SRT)
    3  `choose`          pairs, at most `dpo.pairs` of a prompt, their lengths balanced
    4  `reference_logps` of these pairs, once
    5  `train`           DPO (`rl.dpo`); steps 4 and 5 are in `train.py`
    6  `look`            the policy answers the held-out prompts greedily and is judged

The judge of step 6 is the SFT adapter in every round, whoever judges in step 2, and it reads the narratives, if
anything: only then can rounds be compared. Scores are means over answers, of which one that cannot be divided counts as
rejected in all its sentences, or who says nothing would win; a judge of pairs compares with the answers that the run
started from, and the score is the share won. Where the truth is known it stands beside the score, and chooses nothing.

Every step resumes where a kill stopped it. On a CPU a killed run ends with the same bits as one that was not.

Departure from RLAIF-V: an answer keeps its tokens as they were sampled, so that no end is taught where it was cut.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ... import ranks
from ...data.records import Record
from ...data.sentences import split_claims
from ...data.splits import hold_out_videos
from ...data.truth import TRUTH
from ...errors import StageError
from ...files import read_json, read_jsonl, write_json, write_jsonl
from ...judge.claims import refuse_silent_judge
from ...progress import say
from ...rl.dpo import balance_lengths, draw_pairs, pairs_by_score
from ...rollout import Sampling
from ...training.loop import batches
from ...workspace import Workspace
from ..judging import Answers, Judged, compare_pairs, figures_of, sample_answers
from .altered import answer_ids, draw_videos, prefers_own_video
from .judges import describe_videos, prepare_divider, score_answers
from .train import Preferred, reference_logps, role_from, spans_of, train

READS = ("seed", "model", "preference", "dpo", "data.preference", *TRUTH)
NEEDS = ("features", "sft", "context")
START = "reference"  # the adapter that round 1 starts from; `sft` where the recipe asks whose answers or log-probs


class ChosenPairs(NamedTuple):
    """A round's pairs, and how they came about."""

    pairs: list[Preferred]
    judged: list[Judged]  # all that the judge decided
    dropped: dict[str, int]  # why answers and pairs are not among `pairs`


def run(work: Workspace) -> dict:
    """Train the `policy` role; writes `dpo/round<t>/` with answers, judgements, pairs, policy and held-out answers."""
    section = work.recipe.dpo
    records, held = split_by_video(work)
    prompts = batches(len(records), section.prompts or len(records), section.rounds, work.recipe.seed, "dpo.prompts")
    prepare_divider(work)
    policy, table = work.adapter(START), []
    for number in range(section.rounds + 1):
        folder = round_folder(work, number)
        if not ranks.first((folder / "round.json").exists):
            row = {"round": number}
            if number > 0:
                learnt = one_round(work, number, policy, [records[i] for i in dict.fromkeys(prompts[number - 1])])
                if learnt is None:
                    break
                row |= learnt
            row |= look(work, number, folder / "policy" if number else policy, held)
            write_json(folder / "round.json", row)
        table.append(ranks.first(lambda folder=folder: read_json(folder / "round.json")))
        policy = folder / "policy" if number else policy
    start, *trained = table
    best = max(trained, key=lambda row: row["heldout_score"]) if section.select == "best" else trained[-1]
    with role_from(work, "policy", round_folder(work, best["round"]) / "policy"):
        work.roles.save("policy", work.adapter("policy"))
    if best["heldout_score"] <= start["heldout_score"]:
        say(f"dpo: round {best['round']} is taken, which the held-out judge finds no better than where it started")
    return {
        "judge": judge_name(work),
        "rounds": [row | {"selected": row["round"] == best["round"]} for row in table],
        "selected": best["round"],
        "heldout_prompts": len(held),
    }


def one_round(work: Workspace, number: int, before: Path, records: list[Record]) -> dict | None:
    """Steps 1 to 5 of round `number` from the policy in `before` -> the round's line of the table; None, in a later
    round than the first, where the judge finds no two answers to differ. Raises StageError where it does so at once."""
    section, folder = work.recipe.dpo, round_folder(work, number)
    preference, start = work.recipe.preference, work.adapter(START)
    if section.altered:
        pairs = []  # VDPO's: every record's answer on its own video, preferred to the same on another
        for record, other in zip(records, draw_videos(work, records, number), strict=True):
            ids, text = answer_ids(work, record), record.answer or ""
            pairs.append(Preferred(record, text, text, ids, ids, 0.0, other))
        return learn(work, number, before, ChosenPairs(pairs, [], {}))
    sampling = Sampling(preference.max_new_tokens, preference.temperature, preference.top_p, preference.top_k)
    with role_from(work, "generator", before if section.generator == "policy" else start) as role:
        seed_of = lambda record, j: work.seed("dpo", number, record.key, j)
        path, label = folder / "answers.jsonl", f"dpo {number}: answers"
        answers = sample_answers(work, role, records, sampling, preference.samples, seed_of, path, label)
    contexts, told = work.narratives() if preference.context else None, {}
    if section.describe is not None:
        with role_from(work, "generator", before) as role:
            last = round_folder(work, number - 1) / "descriptions.json"
            contexts, told = describe_videos(work, role, records, last, folder)
    with role_from(work, "judge", before if section.judge_role == "policy" else work.adapter("sft")) as role:
        choice = judge_round(work, role, number, answers, contexts, folder)
    if not choice.pairs:
        said = f"Round {number} of DPO has no pairs ({choice.dropped} left out of {len(records)} prompts)"
        if number == 1:
            raise StageError(f"{said}. More `preference.samples`, prompts or a higher `preference.temperature` help.")
        say(f"{said}: round {number - 1} was the last")
        return None
    learnt = learn(work, number, before, choice)
    texts = [text for found in answers for text in found.texts]
    figures = figures_of(work.truth, judge_name(work), contexts is not None, choice.judged)
    known = ("agreement", "length_bias", "truth_length_bias", "consistency")
    return {
        "prompts": len(records),
        "answers": len(texts),
        "answer_words": mean_words(texts),
        **{key: figures[key] for key in known if key in figures},
        **learnt,
        **told,
    }


def learn(work: Workspace, number: int, before: Path, choice: ChosenPairs) -> dict:
    """Steps 4 and 5 on a round's pairs -> what is said of them in the round's line."""
    folder, section = round_folder(work, number), work.recipe.dpo
    write_jsonl(folder / "pairs.jsonl", [pair.row() for pair in choice.pairs])
    held_to = before if section.reference == "previous" else work.adapter(START)
    with role_from(work, "reference", held_to) as role:
        reference = reference_logps(work, role, choice.pairs, folder)
    learnt = train(work, number, before, held_to, choice.pairs, reference, folder)
    chosen, rejected = (mean_words([getattr(pair, which) for pair in choice.pairs]) for which in ("chosen", "rejected"))
    counts = {"pairs": len(choice.pairs), "dropped": choice.dropped}
    return counts | {"chosen_words": chosen, "rejected_words": rejected} | learnt


# -------------------------------------------------------------------------------------------- who answers, who is asked


def split_by_video(work: Workspace) -> tuple[list[Record], list[Record]]:
    """(prompts of the rounds, prompts held out): a random `dpo.heldout` of the videos only chooses among rounds."""
    records, share = work.records("preference"), work.recipe.dpo.heldout
    rest, held = hold_out_videos(records, share, work.name_of, lambda name: work.seed("dpo.heldout", name))
    if not rest:
        videos = len({work.name_of(r) for r in held})
        raise StageError(f"`dpo.heldout: {share}` leaves none of the {videos} videos to learn from. Give more.")
    return rest, held


def round_folder(work: Workspace, number: int) -> Path:
    """The folder of a round, made where it is not there."""
    folder = work.stage("dpo") / f"round{number}"
    if ranks.is_first():
        folder.mkdir(exist_ok=True)
    return folder


def judge_name(work: Workspace) -> str:
    """How answers are judged: divide, claims, pairwise or outside; or their videos are altered."""
    if work.recipe.dpo.altered:
        return "altered"
    return "divide" if work.recipe.dpo.divide is not None else work.recipe.preference.judge


# ------------------------------------------------------------------------------------------------ from answers to pairs


def judge_round(
    work: Workspace, role: str, number: int, answers: list[Answers], contexts: Mapping[str, str] | None, folder: Path
) -> ChosenPairs:
    """Judge a round's answers and choose its pairs: all that differ by a judge's score, or neighbours it compares."""
    section, least = work.recipe.dpo, work.recipe.preference.min_margin
    dropped = dict.fromkeys(("mismatched", "claimless", "unread", "tied", "inconsistent", "surplus", "length"), 0)
    label, pairs = f"dpo {number}", []
    if judge_name(work) == "pairwise":
        found = judge_neighbours(work, role, answers, contexts, folder / "judged.jsonl", f"{label}: judge")
        by_prompt = [[j for j in of if j.margin] for of in found]
        candidates = [[j for j in of if abs(j.margin) > least] for of in by_prompt]
        dropped["tied"] = sum(map(len, found)) - sum(map(len, candidates))
        if work.recipe.preference.consistent_only:
            dropped["inconsistent"] = sum(not j.consistent for of in candidates for j in of)
            candidates = [[j for j in of if j.consistent] for of in candidates]
    else:
        scored = score_answers(work, role, answers, contexts, folder, label)
        dropped |= scored.dropped
        candidates = []
        for of, scores in zip(answers, scored.scores, strict=True):
            texts = [(text, score) for text, score in zip(of.texts, scores, strict=True) if score is not None]
            better = pairs_by_score([score for _, score in texts], least)
            dropped["tied"] += math.comb(len(texts), 2) - len(better)
            candidates.append(
                [Judged(of.record, texts[p.chosen][0], texts[p.rejected][0], p.margin, True) for p in better]
            )
        by_prompt = candidates
    for of, found in zip(answers, candidates, strict=True):
        ids = dict(zip(of.texts, of.ids, strict=True))
        drawn = draw_pairs(found, section.pairs, work.seed("dpo.pairs", number, of.record.key))
        dropped["surplus"] += len(found) - len(drawn)
        for j in drawn:
            chosen, rejected = (j.a, j.b) if j.margin > 0 else (j.b, j.a)
            pairs.append(Preferred(of.record, chosen, rejected, ids[chosen], ids[rejected], abs(j.margin)))
    if section.balance_lengths:
        _, stay = balance_lengths([(len(p.chosen.split()), len(p.rejected.split())) for p in pairs])
        dropped["length"] = stay.count(False)
        pairs = [pair for pair, stays in zip(pairs, stay, strict=True) if stays]
    if section.spans is not None:
        spans = [spans_of(work.base(), section.spans, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
        dropped["alike"] = sum(not any(found) for found in spans)
        pairs = [pair._replace(spans=found) for pair, found in zip(pairs, spans, strict=True) if any(found)]
    return ChosenPairs(pairs, [j for of in by_prompt for j in of], dropped)


def judge_neighbours(
    work: Workspace, role: str, answers: list[Answers], contexts: Mapping[str, str] | None, path: Path, label: str
) -> list[list[Judged]]:
    """What the pairwise judge says of every two neighbouring answers that differ, prompt by prompt."""
    asked = [
        (place, (of.record, a, b))
        for place, of in enumerate(answers)
        for a, b in zip(of.texts[0::2], of.texts[1::2], strict=True)
        if a != b
    ]
    found = compare_pairs(work, role, "pairwise", [pair for _, pair in asked], contexts, path, label)
    refuse_silent_judge([judged.has_mass for judged in found], label)
    by_prompt: list[list[Judged]] = [[] for _ in answers]
    for (place, _), judged in zip(asked, found, strict=True):
        by_prompt[place].append(judged)
    return by_prompt


# ----------------------------------------------------------------------------------------------------- held-out prompts


def look(work: Workspace, number: int, policy: Path, held: list[Record]) -> dict[str, float | None]:
    """The held-out prompts answered greedily by `policy`, and judged by the SFT adapter."""
    folder = round_folder(work, number) / "heldout"
    if work.recipe.dpo.altered:
        with role_from(work, "generator", policy) as role:
            score = prefers_own_video(work, role, held, draw_videos(work, held, "heldout"), folder / "preferred.jsonl")
        words = mean_words([record.answer or "" for record in held])
        return {"heldout_score": score, "heldout_truth": None, "heldout_words": words}
    contexts = work.narratives() if work.recipe.preference.context else None
    sampling = Sampling(work.recipe.preference.max_new_tokens, temperature=0.0)

    def greedy(role: str, path: Path) -> list[Answers]:
        return sample_answers(work, role, held, sampling, 1, lambda *_: 0, path, f"dpo {number}: held out")

    with role_from(work, "generator", policy) as role:
        answers = greedy(role, folder / "answers.jsonl")
    with role_from(work, "judge", work.adapter("sft")) as role:
        if judge_name(work) == "pairwise":
            path = round_folder(work, 0) / "heldout" / "answers.jsonl"
            rows = [row for line in read_jsonl(path) for row in line["results"]]  # as `by_batches` wrote them
            first = [Answers(r, row["answers"], row["ids"]) for r, row in zip(held, rows, strict=True)]
            both = [
                Answers(new.record, [*new.texts, *old.texts], [*new.ids, *old.ids])
                for new, old in zip(answers, first, strict=True)
            ]
            found = judge_neighbours(work, role, both, contexts, folder / "judged.jsonl", f"dpo {number}: judge")
            scores = [0.5 if not of else float(of[0].margin > 0) for of in found]
        else:
            scored = score_answers(work, role, answers, contexts, folder, f"dpo {number}: held out")
            judged = [score for (score,) in scored.scores]
            if all(score is None for score in judged):
                raise StageError(f"Round {number} of DPO: no held-out answer of {len(held)} could be judged: {folder}")
            outside = judge_name(work) == "outside"  # its lowest score is 0
            scores = [
                (0.0 if outside else -max(1, len(split_claims(of.texts[0])))) if score is None else score
                for of, score in zip(answers, judged, strict=True)
            ]
    truths = [score for of in answers if (score := work.truth.score(of.texts[0], of.record)) is not None]
    return {
        "heldout_score": sum(scores) / len(scores),
        "heldout_truth": sum(truths) / len(truths) if truths else None,
        "heldout_words": mean_words([of.texts[0] for of in answers]),
    }


def mean_words(texts: list[str]) -> float:
    """Words per text."""
    return sum(len(text.split()) for text in texts) / len(texts)
