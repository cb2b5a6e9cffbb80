"""Held-out videos, the same for every role: greedy and sampled answers, against the truth where it is known.

Every role answers with the same random numbers, so that differences are the roles'. The SFT model is also sampled at
lower temperatures: what sharpening alone would give must not be sold as alignment. Metrics are ratios of sums over
the test set; intervals resample videos (`report.stats`). Without truth in the data, lengths and stop rates are what
is reported.

With `evaluate.best_of: N` the policy also gives N sampled answers to every prompt and takes the one of the highest
length-normalised implicit reward (`rollout.score.best_of`): a column of its own, "dpo@bo8", held against the policy's
single answers, sampled and greedy.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from .. import ranks
from ..data.records import Record, question_of
from ..errors import RlaifError, StageError
from ..files import by_batches, even_chunks, write_json, write_jsonl
from ..model.inputs import encode_prompt
from ..model.text import decode_answer
from ..progress import progress, say
from ..report.stats import RATIOS, asked, measured, paired, paired_bootstrap, tally
from ..rl.losses import repetition
from ..rollout import Sampling, sample
from ..rollout.score import best_of
from ..video.strip import strips
from ..video.workers import how_many
from ..workspace import Workspace
from .ppo.rules import accuracy

READS = ("seed", "method", "evaluate", "data.test", "ppo.rules")
NEEDS = ("features", "sft", "ppo", "dpo")
SHUFFLED = "shuffled"  # greedy answers to videos with their frames shuffled
ADAPTERS = {"sft": "sft", "reference": "reference", "ppo": "policy", "dpo": "policy"}  # the role `base` has none


def run(work: Workspace) -> dict:
    """Write `evaluate/<role>.<mode>.jsonl`, the example strips, and return the tables of the summary."""
    section, method = work.recipe.evaluate, work.recipe.method
    records = work.records("test") if section.roles else []
    roles = [method if role == "policy" else role for role in section.roles]
    jobs = [
        (role, mode, temperature)
        for role in roles
        for mode, temperature in (("greedy", 0.0), ("sample", section.temperature))
    ]
    best = f"{method}@bo{section.best_of}" if section.best_of and method in roles else None
    if best:
        jobs.append((best, "sample", section.temperature))
    if "sft" in roles:
        jobs += [("sft", "sample", t) for t in section.temperatures]
    if section.shuffled:
        jobs += [(role, SHUFFLED, 0.0) for role in ("sft", method) if role in roles]
    rows = {}
    with progress(len(jobs) * len(records), "evaluate", unit="video") as bar:
        for number, (role, mode, temperature) in enumerate(jobs, 1):
            count = section.best_of if role == best else None
            rows[role, mode, temperature] = answer_all(work, role, mode, temperature, bar.advance, count)
            if number == len(jobs) or jobs[number][0] != role:  # one adapter at a time
                work.release_roles()
    ranks.first(lambda: write_examples(work, records[: section.examples]))
    order = {
        role: sensitivity(work, rows[role, "greedy", 0.0], rows.pop((role, SHUFFLED, 0.0)))
        for role, mode, _ in jobs
        if mode == SHUFFLED and records
    }
    evaluation: dict[str, dict[str, float]] = {}
    for (role, mode, temperature), found in rows.items():
        column = role if mode == "greedy" or temperature == section.temperature else f"{role}@{temperature:g}"
        evaluation.setdefault(column, {}).update({f"{mode}_{name}": value for name, value in metrics_of(found).items()})
    intervals = {
        f"{method}-{before}": compare(work, rows, before, method)
        for before in ("sft", "reference")
        if {before, method} <= set(roles)
    }
    if best:
        rows[best, "greedy", 0.0] = rows[best, "sample", section.temperature]  # one kind of answers against both
        intervals[f"{best}-{method}"] = compare(work, rows, method, best)
    counts = asked(row for found in rows.values() for row in found)
    return {"evaluation": evaluation, "evaluation_intervals": intervals, "order": order, **counts._asdict()}


def answer_all(
    work: Workspace, role: str, mode: str, temperature: float, done: Callable[[int], None], best_count: int | None
) -> list[dict]:
    """All of a role's answers to the test prompts: one when greedy, `samples` when sampled, the policy's best of
    `best_count` where that is given."""
    section, base = work.recipe.evaluate, work.base()
    per_prompt = best_count or (section.samples if mode == "sample" else 1)
    altered = "shuffled" if mode == SHUFFLED else ""
    sampling = Sampling(section.max_new_tokens, temperature)
    needed = ("policy", "reference") if best_count else (ADAPTERS[role],) if role in ADAPTERS else ()
    for name in needed:
        work.load_role(name)

    def answer(batch: list[Record]) -> list[dict]:
        prompts = [encode_prompt(base, r.prompt, work.features(r, altered)) for r in batch]
        seeds = [work.seed("evaluate", r.key, j) for r in batch for j in range(per_prompt)]
        if best_count:
            best = best_of(
                work.roles,
                *needed,
                prompts,
                sampling,
                count=best_count,
                seeds=seeds,
                beta=work.recipe.dpo.beta,
                batch_size=section.batch_size,
            )
            found = [each.answer for each in best]
        else:
            with work.roles.use(ADAPTERS.get(role, role)) as active:
                found = sample(
                    active, prompts, sampling, seeds=seeds, per_prompt=per_prompt, batch_size=section.batch_size
                )
        out = []
        for trajectory in found:
            record, text = batch[trajectory.prompt], decode_answer(base, trajectory.ids)
            truth = work.truth.of(text, record)
            out.append(
                {
                    "key": record.key,
                    "video": work.name_of(record),
                    "id": record.id,
                    "role": role,
                    "mode": mode,
                    "temperature": temperature,
                    "prompt": question_of(record),
                    "answer": text,
                    "length": len(trajectory.ids),
                    "stopped": trajectory.stopped,
                    "truth": truth and truth.counts._asdict(),
                    "accuracy": accuracy(work.recipe.ppo.rules, record, text),
                    "repetition": repetition(trajectory.ids),
                    "wrong_words": truth.wrong_words if truth else [],
                }
            )
        return out

    folder = work.stage("evaluate") / ("order" if altered else "")  # the report reads what lies in `evaluate` itself
    if ranks.is_first():
        folder.mkdir(exist_ok=True)
    path = folder / f"{role}.{mode}{f'@{temperature:g}' if mode == 'sample' else ''}.jsonl"
    batches = even_chunks(work.records("test"), section.batch_size // per_prompt)
    rows = by_batches(work.stage("evaluate") / "parts" / path.name, batches, answer, done)
    write_jsonl(path, rows)
    return rows


def metrics_of(rows: list[dict]) -> dict[str, float]:
    """Metrics of one role in one mode; those that need the truth only where it is known."""
    total = sum(tally(rows).values())
    return {name: float(RATIOS[name](total)) for name in measured(rows)}


def compare(work: Workspace, rows: dict, before: str, after: str) -> dict[str, dict[str, float]]:
    """95 % paired bootstrap intervals of the change of every metric, greedy and sampled."""
    section = work.recipe.evaluate
    out = {}
    for mode, temperature in (("greedy", 0.0), ("sample", section.temperature)):
        one, other = rows[before, mode, temperature], rows[after, mode, temperature]
        counts = paired(one, other)
        for name in measured(other):
            interval = paired_bootstrap(*counts, RATIOS[name], section.bootstrap, work.recipe.seed)
            out[f"{mode}_{name}"] = interval._asdict()
    return out


def sensitivity(work: Workspace, ordered: list[dict], shuffled: list[dict]) -> dict:
    """What a role's greedy answers lose when the frames are shuffled: the share of answers that change and, where it is
    known, accuracy or F1 with the interval of its fall."""
    changed = sum(one["answer"] != other["answer"] for one, other in zip(ordered, shuffled, strict=True)) / len(ordered)
    name = next((name for name in ("accuracy", "f1") if name in measured(ordered)), None)
    if name is None:
        return {"changed": changed}
    counts = paired(ordered, shuffled)
    interval = paired_bootstrap(*counts, RATIOS[name], work.recipe.evaluate.bootstrap, work.recipe.seed)
    ends = {key: float(RATIOS[name](found.sum(0))) for key, found in zip(("ordered", "shuffled"), counts, strict=True)}
    return {"changed": changed, "metric": name, **ends, "change": interval._asdict()}


def write_examples(work: Workspace, records: list[Record]) -> None:
    """Strips of frames for the report, one PNG per video. A video that cannot be shown is left out and named."""
    folder = work.stage("evaluate") / "examples"
    folder.mkdir(exist_ok=True)
    features = work.recipe.features
    videos = {str(number): record.video for number, record in enumerate(records) if record.video is not None}
    found: dict[str, np.ndarray | RlaifError] = {}
    try:
        found.update(strips(videos, how_many(features.workers), features.max_source_pixels))
    except StageError as error:  # the answers are what counts, and they are written
        found = dict.fromkeys(videos, error) | found
    index = []
    for number, record in enumerate(records):
        if record.video is None:
            continue
        strip = found[str(number)]
        if isinstance(strip, RlaifError):
            say(f"evaluate: the report shows no frames of {record.video}: {strip}")
            continue
        Image.fromarray(strip).save(folder / f"{number:02d}.png")
        shown = {"key": record.key, "id": record.id, "file": f"{number:02d}.png"}
        index.append(shown | {"truth": work.truth.describe(record)})
    write_json(folder / "index.json", index)
