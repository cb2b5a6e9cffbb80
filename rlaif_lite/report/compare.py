"""`rlaif-lite compare A B`: what changed between two runs, or two benchmark results, and is it more than noise?

Both must have answered about the same videos, and benchmarks must have had the same judge; else there is nothing to
compare and the reason is said. Changes are B - A with 95 % intervals (`stats.paired_bootstrap`, which resamples
videos). The intervals cover which videos were drawn, not which seed: two runs of one recipe differ too.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlaif_lite.errors import StageError
from rlaif_lite.files import read_json, read_jsonl
from rlaif_lite.formats import duration, size
from rlaif_lite.report.folder import Run, method_of, read_run
from rlaif_lite.report.page import MEASURES, MODES
from rlaif_lite.report.stats import RATIOS, Interval, by_video, measured, paired, paired_bootstrap, ratio

SEED_NOTE = "One run of each: with another seed, the same recipe may differ by more than these intervals say."
SETTINGS = ("answers", "prompt", "max_new_tokens", "weights", "features")  # of a benchmark
SHOWN_KEYS = 60  # characters of a value


class Line(NamedTuple):
    """One metric."""

    table: str  # greedy, sample, or the benchmark's name
    metric: str
    before: float
    after: float
    interval: Interval
    better: int  # 1 more is better, -1 less is better, 0 neither or not known
    share: bool  # shown in per cent

    @property
    def verdict(self) -> str:
        return self.interval.verdict(self.better)


class Comparison(NamedTuple):
    """Everything that is shown; pairs are (A's, B's)."""

    names: tuple[str, str]
    lines: list[Line]
    videos: dict[str, int]  # by table
    keys: dict[str, tuple[Any, Any]]  # recipe keys and inputs that differ
    alone: tuple[dict[str, int], dict[str, int]]
    "sections of the recipe that only one of them read, and how many keys each has"
    cost: dict[str, tuple[float | None, float | None]]
    "seconds of each stage, of all, and the highest peak of memory in bytes; None: no such stage"
    notes: list[str]


def compare(a: Path, b: Path, role: str | None = None) -> Comparison:
    """Two runs, or two folders of `rlaif-lite bench`. `role`: a column of both; else what each run trained.

    Raises StageError, with the reason, for folders that cannot be compared."""
    kinds = [_kind(folder) for folder in (a, b)]
    if kinds[0] != kinds[1]:
        raise StageError(f"{a} holds a {kinds[0]} and {b} a {kinds[1]}. Give two of a kind.")
    if kinds[0] == "run":
        return compare_runs(read_run(a), read_run(b), role)
    if role is not None:
        raise StageError(
            "A benchmark's folder holds one role's results. Leave --role out, and give that role's folder."
        )
    return compare_benchmarks(a, b)


def _kind(folder: Path) -> str:
    if (folder / "summary.json").is_file():
        return "run"
    if any(folder.rglob("results.json")):
        return "benchmark"
    raise StageError(
        f"{folder} holds neither a run's summary.json nor a benchmark's results.json. Give folders that `rlaif-lite "
        f"run` or `rlaif-lite bench` wrote; paths start at {Path.cwd()}."
    )


# ---------------------------------------------------------------------------------------------------------------- runs


def compare_runs(a: Run, b: Run, role: str | None = None) -> Comparison:
    """Two runs' answers to the same held-out videos, metric by metric."""
    reads = [_reads(run) for run in (a, b)]
    columns = [method_of(run.summary) if role in (None, "policy") else role for run in (a, b)]
    answers = [_answers(run, read, column) for run, read, column in zip((a, b), reads, columns, strict=True)]
    _same_test_set(a, b, reads, answers)
    notes = [SEED_NOTE]
    lines = []
    for mode in MODES:
        before, after = (found[mode] for found in answers)
        if before and after and before[0]["temperature"] == after[0]["temperature"]:
            lines += _changes(mode, before, after)
        elif before or after:
            at = " and ".join(f"{rows[0]['temperature']:g}" if rows else "not at all" for rows in (before, after))
            notes.append(f"{MODES[mode]} answers are not compared: A and B were sampled at temperature {at}.")
    if not lines:
        raise StageError(f"{a.folder} and {b.folder} have no answers in common. {' '.join(notes[1:])}")
    videos = {line.table: len({row["video"] for row in answers[0][line.table]}) for line in lines}
    differ, alone = _differences(*reads)
    names = tuple(_name(run, column) for run, column in zip((a, b), columns, strict=True))
    stages = [run.summary["stages"] for run in (a, b)]
    cost = {name: tuple(of.get(name, {}).get("seconds") for of in stages) for name in dict.fromkeys(chain(*stages))}
    cost["all stages"] = tuple(sum(stage["seconds"] for stage in of.values()) for of in stages)
    cost["peak memory"] = tuple(max(stage["peak_memory_bytes"] for stage in of.values()) for of in stages)
    return Comparison(names, lines, videos, differ, alone, cost, notes)


def _name(run: Run, column: str) -> str:
    return f"{run.folder}: {run.summary['recipe']}, seed {run.summary['seed']}, answers of {column}"


def _reads(run: Run) -> dict[str, dict[str, Any]]:
    """{stage: what it read}, of every stage that is done: recipe keys, digests of files, the version."""
    found = {path.parent.name: read_json(path) for path in sorted(run.folder.glob("*/done.json"))}
    if missing := {"data", "evaluate"} - found.keys():
        raise StageError(
            f"{run.folder} has not done {' and '.join(sorted(missing))}, so there is nothing to compare. Run its "
            "recipe again; it goes on where it stopped."
        )
    return {stage: done["reads"] for stage, done in found.items()}


def _answers(run: Run, reads: dict[str, dict], column: str) -> dict[str, list[dict]]:
    """Rows of a column by mode; "sft@0.3" is SFT sampled at that temperature, as in the summary."""
    main, found, there = reads["evaluate"]["evaluate.temperature"], {mode: [] for mode in MODES}, set()
    for row in run.rows:
        plain = row["mode"] == "greedy" or row["temperature"] == main
        name = row["role"] if plain else f"{row['role']}@{row['temperature']:g}"
        there.add(name)
        if name == column:
            found[row["mode"]].append(row)
    if column not in there:
        raise StageError(f"{run.folder} has no answers of `{column}`. It has {', '.join(sorted(there))}.")
    return found


def _same_test_set(a: Run, b: Run, reads: list[dict], answers: list[dict]) -> None:
    """Raises StageError where the two did not answer the same questions about the same videos."""
    reasons = []
    sources = [_sources(read["data"]) for read in reads]
    for what in sources[0].keys() | sources[1].keys():
        one, other = (source.get(what, "not there") for source in sources)
        if one != other:
            reasons.append(f"{what} is {one} in A and {other} in B")
    question = lambda row: (row["prompt"], row["truth"] and row["truth"]["total"])
    asked = [{row["key"]: question(row) for rows in found.values() for row in rows} for found in answers]
    common = asked[0].keys() & asked[1].keys()
    if len(common) < max(map(len, asked)):
        reasons.append(f"A has {len(asked[0])} questions and B {len(asked[1])}, {len(common)} of them the same")
    elif other := [key for key in common if asked[0][key] != asked[1][key]]:
        reasons.append(f"{len(other)} questions or truths differ, among them that of {min(other)}")
    if reasons:
        raise StageError(
            f"{a.folder} and {b.folder} were evaluated on different test sets: {'; '.join(sorted(reasons))}. Evaluate "
            "both on the same `data.test`."
        )


def _sources(reads: dict[str, Any]) -> dict[str, Any]:
    """What the test videos come from: the world's draw, or the contents of the files."""
    found: dict[str, Any] = {}
    for number, path in enumerate(reads["data.test"]):
        if path.startswith("world:"):
            found |= {f"`{key}`": reads[key] for key in ("data.world.seed", "data.world.dropout")}
        else:
            found[f"the content of `data.test[{number}]`"] = reads[f"file {path}"]
    return found


def _changes(mode: str, before: list[dict], after: list[dict]) -> list[Line]:
    video_of = {row["key"]: row["video"] for row in before}  # B's folders may have other names
    counts_NK = paired(before, [row | {"video": video_of[row["key"]]} for row in after])
    silent = not all(RATIOS["mentions"](found.sum(0)) for found in counts_NK)
    names = set(measured(before)) & set(measured(after))
    lines = []
    for name, measure in MEASURES.items():
        if name not in names or name in ("hallucination", "precision") and silent:
            continue  # who names nothing does not hallucinate, which is no merit
        ends = [float(RATIOS[name](found.sum(0))) for found in counts_NK]
        interval = paired_bootstrap(*counts_NK, RATIOS[name])
        lines.append(Line(mode, name, *ends, interval, measure.better, measure.share))
    return lines


def _differences(a: dict, b: dict) -> tuple[dict[str, tuple[Any, Any]], tuple[dict[str, int], dict[str, int]]]:
    """(keys that both read and whose values differ, {section: keys} that one alone read, for each)."""
    flat = [
        {key: value for reads in stages.values() for key, value in reads.items() if not key.startswith("stage ")}
        for stages in (a, b)
    ]
    differ = {key: (flat[0][key], flat[1][key]) for key in sorted(flat[0].keys() & flat[1].keys())}
    alone: tuple[dict[str, int], dict[str, int]] = {}, {}
    for mine, other, counts in ((flat[0], flat[1], alone[0]), (flat[1], flat[0], alone[1])):
        for key in sorted(mine.keys() - other.keys()):
            section = key.partition(".")[0]
            counts[section] = counts.get(section, 0) + 1
    return {key: pair for key, pair in differ.items() if pair[0] != pair[1]}, alone


# ---------------------------------------------------------------------------------------------------------- benchmarks


class Result(NamedTuple):
    """One folder of `rlaif-lite bench`."""

    folder: Path
    summary: dict[str, Any]
    items: dict[str, dict]  # lines of items.jsonl by id


def compare_benchmarks(a: Path, b: Path) -> Comparison:
    """Benchmarks that both folders hold (themselves, or below, under the same names)."""
    found = [_results(folder) for folder in (a, b)]
    common = [name for name in found[0] if name in found[1]]
    if not common:
        names = " and ".join(", ".join(of) for of in found)
        raise StageError(
            f"{a} and {b} hold no benchmark under the same name: {names}. Give the folders of one benchmark."
        )
    notes = [
        f"Only in {which}: {name}."
        for which, mine, other in (("A", *found), ("B", *found[::-1]))
        for name in mine
        if name not in other
    ]
    lines, videos, keys = [], {}, {}
    for name in common:
        one, other = found[0][name], found[1][name]
        _same_benchmark(one, other)
        table = one.summary["benchmark"] if len(common) == 1 else name
        lines += _metrics(table, one, other)
        videos[table] = len({item["video"] for item in one.items.values()})
        settings = {key: (one.summary.get(key), other.summary.get(key)) for key in SETTINGS}
        keys |= {f"{table}: {key}": pair for key, pair in settings.items() if pair[0] != pair[1]}
        notes.append(f"Judge of {table}: {one.summary['judge'] or 'none; counted by rules'}.")
    names = tuple(
        f"{folder}: {', '.join(dict.fromkeys(of[name].summary['who'] for name in common))}"
        for folder, of in zip((a, b), found, strict=True)
    )
    return Comparison(names, lines, videos, keys, ({}, {}), {}, notes)


def _results(folder: Path) -> dict[str, Result]:
    out = {}
    for path in sorted(folder.rglob("results.json")):
        items = {item["id"]: item for item in read_jsonl(path.parent / "items.jsonl")}
        out[f"{path.parent.relative_to(folder)}"] = Result(path.parent, read_json(path), items)
    return out


def _same_benchmark(a: Result, b: Result) -> None:
    """Raises StageError where figures of the two cannot be set against each other."""
    reasons = []
    for what, key in (("benchmark", "benchmark"), ("content of the files", "files"), ("texts to choose from", "texts")):
        one, other = (result.summary.get(key) for result in (a, b))
        one, other = (sorted(value.values()) if isinstance(value, dict) else value for value in (one, other))
        if one != other:
            reasons.append(f"the {what} is {one} in A and {other} in B")
    judges = [{item["judge"] for item in result.items.values()} for result in (a, b)]
    if judges[0] != judges[1]:
        shown = (", ".join(sorted(map(str, judge))) for judge in judges)
        reasons.append("they were judged by different judges, {} and {}; judge one of them again".format(*shown))
    common = a.items.keys() & b.items.keys()
    if len(common) < max(len(a.items), len(b.items)):
        reasons.append(f"A has {len(a.items)} items and B {len(b.items)}, {len(common)} of them the same")
    elif other := [id for id in common if any(a.items[id][key] != b.items[id][key] for key in ("video", "question"))]:
        reasons.append(f"{len(other)} items differ, among them {min(other)}")
    if reasons:
        raise StageError(f"{a.folder} and {b.folder} cannot be compared: {'; '.join(reasons)}.")


def _metrics(table: str, a: Result, b: Result) -> list[Line]:
    """Every metric that both counted: ratios of sums over items, all items about a video together."""
    lines = []
    counts = [by_video((item["video"], item["counts"]) for item in result.items.values()) for result in (a, b)]
    for metric in (name for name in counts[0] if name in counts[1]):
        of_videos = [found[metric] for found in counts]
        videos = sorted(of_videos[0].keys() | of_videos[1].keys())
        counts_N2 = [np.stack([of.get(video, np.zeros(2)) for video in videos]) for of in of_videos]
        if not all(found[:, 1].sum() for found in counts_N2):
            continue
        ends = [float(ratio(found.sum(0))) for found in counts_N2]
        lines.append(Line(table, metric, *ends, paired_bootstrap(*counts_N2, ratio), 0, False))
    return lines


# ------------------------------------------------------------------------------------------------------------- showing


def as_text(found: Comparison) -> str:
    """For a terminal."""
    out = [f"A  {found.names[0]}", f"B  {found.names[1]}"]
    for table, videos in found.videos.items():
        title = MODES.get(table, table)
        out += ["", f"{f'{title}, {videos} videos':<28}{'A':>9}{'B':>9}{'B - A':>9}   95 % interval"]
        for line in (line for line in found.lines if line.table == table):
            label = MEASURES[line.metric].label if table in MODES else line.metric
            factor, digits, unit = (100, 1, " %") if line.share else (1, 2 if table in MODES else 3, "")
            before, after = (f"{factor * value:.{digits}f}{unit}" for value in (line.before, line.after))
            delta, low, high = (f"{factor * value:+.{digits}f}" for value in line.interval)
            text = f"  {label:<26}{before:>9}{after:>9}{delta:>9}   {f'{low} to {high}':<20} {line.verdict}"
            out.append(text.rstrip())
    beyond = [line for line in found.lines if line.verdict]
    looked_at = len(found.lines)
    out += [
        "",
        f"{looked_at} metrics looked at, {len(beyond)} beyond noise: their interval leaves out 0. If nothing "
        f"differed, about {0.05 * looked_at:.1f} of {looked_at} would too.",
        *found.notes,
    ]
    if found.keys or any(found.alone):
        out += ["", f"{'Differs':<40}{'A':<24}  B"]
        for key, pair in found.keys.items():
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in pair]
            texts = [" ".join(text.split()) for text in texts]
            one, other = (text if len(text) <= SHOWN_KEYS else f"{text[:SHOWN_KEYS]}..." for text in texts)
            out.append(f"  {key:<38}{one:<24}  {other}")
        for which, sections in zip("AB", found.alone, strict=True):
            if sections:
                counted = ", ".join(f"{section} ({count})" for section, count in sections.items())
                out.append(f"  read by {which} alone: {counted}")
    if found.cost:
        out += ["", f"{'Cost':<28}{'A':>14}{'B':>14}"]
        for what, pair in found.cost.items():
            words = ["-" if v is None else size(v) if what == "peak memory" else duration(v) for v in pair]
            out.append(f"  {what:<26}{words[0]:>14}{words[1]:>14}")
    return "\n".join(out)


def as_json(found: Comparison) -> dict[str, Any]:
    """For programs."""
    metrics = [
        {
            "table": line.table,
            "metric": line.metric,
            "a": line.before,
            "b": line.after,
            **line.interval._asdict(),
            "verdict": line.verdict or "noise",
        }
        for line in found.lines
    ]
    beyond = sum(bool(line.verdict) for line in found.lines)
    return {
        "a": found.names[0],
        "b": found.names[1],
        "videos": found.videos,
        "looked_at": len(metrics),
        "beyond_noise": beyond,
        "metrics": metrics,
        "differs": found.keys,
        "read_by_one": {"a": found.alone[0], "b": found.alone[1]},
        "cost": found.cost,
        "notes": found.notes,
    }
