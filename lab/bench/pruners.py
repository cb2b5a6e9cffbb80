"""Each selector of video tokens at several shares, on the synthetic world: what SFT and the judge lose, and the cost.

    python -m lab.bench.pruners --out FOLDER [--seeds 80 81 82] [--only NAME ...] [--threads N]
    python -m lab.bench.pruners --out FOLDER --table docs/results/pruners.md

The base is the embedded default: 4 tokens a frame, 48 of 12 frames. `vidcom2` and `v_cast` keep a token of every
frame, so 25 % is the least that they can keep here. Every point trains SFT on its own pruned features, from the same
records in the same order. Then the SFT role describes held-out videos (greedy), and judges pairs of made-up answers
without the narrative. Pairs, videos and records of a seed are the same at all points. `dtd` has no share: its threshold
is the one that keeps that share of the training videos' tokens in the mean.

Points are lines of FOLDER/points.jsonl, and a killed bench goes on after the last one.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lab import commit
from lab.bench import ROOT
from rlaif_kernels import frame_dissimilarity
from rlaif_lite import pipeline
from rlaif_lite.data.world_text import pair
from rlaif_lite.files import write_json, write_text
from rlaif_lite.formats import markdown_table
from rlaif_lite.recipe import Recipe, load_recipe
from rlaif_lite.report.stats import stat
from rlaif_lite.stages.evaluate import answer_all, metrics_of
from rlaif_lite.stages.judging import compare_pairs, figures_of
from rlaif_lite.training.meter import describe_machine, versions
from rlaif_lite.video import prune
from rlaif_lite.workspace import Workspace

SHARES = (0.5, 0.25, 0.15, 0.1)
SELECTORS = ("evs", "vidcom2", "v_cast", "dtd", "random")
OTHERS = {"all tokens": [], "pool": [{"pool": 1}], "st_mean": [{"st_mean": True}]}
LAYOUT = (12, 4)  # frames and tokens of a frame
KEYS = (
    f"features.frames={LAYOUT[0]}",
    "data.world={{seed: {seed}, sft: 128, preference: 1, rl: 1, test: 120, dropout: 0.33}}",
    "data.policy_init=[]",
    "sft.policy_init=null",
    *(f"sft.{phase}.{key}" for phase in ("easy", "hard") for key in ("steps=35", "batch_size=16", "micro_batch=null")),
    "evaluate.bootstrap=100",
)
PAIRS = 3  # of answers about each held-out video that are judged
REAL = (16, 400, 3584)  # frames, tokens and width at which the cost is measured: a 7B of Qwen2.5-VL
MEASURES = {
    "F1": "F1 of SFT",
    "hallucination": "hallucinated objects of SFT",
    "judge": "judge, agreement with the truth",
}


class Point(NamedTuple):
    """One training."""

    seed: int
    selector: str
    share: float | None  # None: the selector has no share


def points(seeds: list[int], only: list[str]) -> list[Point]:
    """What is to run, seed by seed; a share below what a selector can keep is left out."""
    return [
        Point(seed, name, share)
        for seed in seeds
        for name, shares in [*((name, (None,)) for name in OTHERS), *((name, SHARES) for name in SELECTORS)]
        for share in shares
        if (not only or name in only) and (share is None or name == "dtd" or reached(name, share))
    ]


def reached(name: str, share: float) -> bool:
    return prune.count_kept(name, share, *LAYOUT) == int(share * LAYOUT[0] * LAYOUT[1])


def chain_of(point: Point, out: Path) -> list[dict]:
    """The recipe's prune chain of a point."""
    if point.share is None:
        return OTHERS[point.selector]
    value = threshold(out, point.seed, point.share) if point.selector == "dtd" else point.share
    return [{point.selector: value}]


def threshold(out: Path, seed: int, share: float) -> float:
    """The cosine above which `dtd` drops, so that it keeps `share` of the tokens of the seed's SFT videos."""
    work = Workspace(load_recipe(out / "runs" / f"{seed} all tokens" / "recipe.yaml"))
    videos = {work.name_of(record): record for record in work.records("sft_hard")}
    changes = []
    for record in videos.values():
        view = work.features(record)
        changes.append(frame_dissimilarity(view.features_KD.unflatten(0, (view.frames, -1))).flatten())
    change_N = torch.cat(changes).sort(descending=True).values
    return 1 - change_N[round(share * len(change_N))].item()


def run(point: Point, out: Path) -> dict:
    """Train SFT on the point's features, and examine it on held-out videos."""
    recipe = recipe_of(point, out)
    seconds = time.process_time()
    pipeline.run(recipe, until="sft")
    work = Workspace(recipe)
    answers = answer_all(work, "sft", "greedy", 0.0, lambda done: None, None)
    work.load_role("sft")
    made_up = random.Random(point.seed)
    pairs = [
        (record, *pair(record.facts, made_up, ties=0.0)[:2]) for record in work.records("test") for _ in range(PAIRS)
    ]
    judged = compare_pairs(work, "sft", "claims", pairs, None, work.stage("judged") / "pairs.jsonl", "judge")
    judge = figures_of(work.truth, "claims", False, judged)
    kept = [len(work.features(record).features_KD) for record in work.records("test")]
    found = metrics_of(answers)
    return point._asdict() | {
        "chain": [step.model_dump() for step in recipe.features.prune],
        "F1": found["f1"],
        "hallucination": found["hallucination"],
        "malformed": found["malformed"],
        "judge": judge["agreement"],
        "tokens": sum(kept) / len(kept),
        "fewest": min(kept),
        "most": max(kept),
        "seconds": time.process_time() - seconds,
        "commit": commit(),
    }


def recipe_of(point: Point, out: Path) -> Recipe:
    """The embedded recipe in small."""
    name = point.selector if point.share is None else f"{point.selector} {point.share:g}"
    keys = [key.format(seed=point.seed) if key.startswith("data.world") else key for key in KEYS]
    return load_recipe(
        ROOT / "recipes" / "tiny.yaml",
        [
            *keys,
            f"seed={point.seed}",
            f"data.folder={out / 'worlds' / str(point.seed)}",
            f"output={out / 'runs' / f'{point.seed} {name}'}",
            f"features.prune={json.dumps(chain_of(point, out))}",
        ],
    )


def costs() -> dict[str, float]:
    """Milliseconds of one thread that each selector takes for a video of a 7B, the median of five."""
    torch.set_num_threads(1)
    frames, tokens, width = REAL
    features_TPC = torch.randn(frames, tokens, width, generator=torch.Generator().manual_seed(0)).cumsum(0).bfloat16()
    chains = {"pool": [{"pool": 10}], "st_mean": [{"st_mean": True}]}
    chains |= {name: [{name: 0.25}] for name in SELECTORS}
    out = {}
    for name, chain in chains.items():
        spent = []
        for _ in range(5):
            began = time.process_time()
            prune.apply(chain, features_TPC)
            spent.append(1e3 * (time.process_time() - began))
        out[name] = sorted(spent)[2]
    return out


# ---- the table


def table(found: dict) -> str:
    """docs/results/pruners.md."""
    rows = found["points"]
    groups: dict[tuple[str, float | None], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["selector"], row["share"]), []).append(row)
    given = found["seeds"]
    commits = sorted({row["commit"] for row in rows})
    full = {row["seed"]: row for row in rows if row["selector"] == "all tokens"}
    lines = [
        "# Selectors of video tokens on the synthetic world",
        "",
        f"Seeds {', '.join(map(str, given))}. {found['machine']['cpu']}, one thread a run. "
        f"Commit {', '.join(commits)}. Written by:",
        "",
        f"    {found['command']}",
        f"    {found['command']} --table docs/results/pruners.md",
        "",
        *__doc__.split("\n\n")[2].split("\n"),
        "",
        "Means over the seeds. In brackets: change against all tokens, paired by seed, with Student's 95 % interval.",
        "`share` is what the recipe asks for (of `dtd`, what its threshold was chosen for). `tokens` are those of the",
        "held-out videos, with fewest and most where they differ.",
        "",
        f"{len(rows)} of {len(points(given, []))} points have run.",
        "",
    ]
    body = []
    for (name, share), group in groups.items():
        cells = [_cell(group, full, key) for key in MEASURES]
        fewest, most = min(row["fewest"] for row in group), max(row["most"] for row in group)
        tokens = f"{sum(row['tokens'] for row in group) / len(group):.1f}" if fewest != most else str(fewest)
        tokens += f" ({fewest} to {most})" if fewest != most else ""
        malformed = sum(row["malformed"] for row in group) / len(group)
        asked = "" if share is None else f"{share:.0%}"
        body.append((name, asked, f"{len(group)}", tokens, *cells, f"{malformed:.3f}"))
    frames, tokens, width = REAL
    lines += [
        markdown_table(("selector", "share", "seeds", "tokens", *MEASURES.values(), "malformed"), body),
        "",
        "## Cost per video",
        "",
        f"A video of {frames} x {tokens} tokens of {width} channels in bfloat16, one CPU thread, median of five.",
        "",
        markdown_table(("selector", "ms"), [(name, f"{cost:.0f}") for name, cost in found["costs"].items()]),
        "",
    ]
    return "\n".join(lines)


def _cell(group: list[dict], full: dict[int, dict], key: str) -> str:
    mean = stat([row[key] for row in group]).mean
    paired = [row[key] - full[row["seed"]][key] for row in group if row["seed"] in full]
    if group[0]["selector"] == "all tokens" or not paired:
        return f"{mean:.3f}"
    change = stat(paired)
    interval = "" if change.low is None else f", {change.low:+.3f} to {change.high:+.3f}"
    return f"{mean:.3f} ({change.mean:+.3f}{interval})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[80, 81, 82])
    parser.add_argument("--only", nargs="+", default=[], choices=[*OTHERS, *SELECTORS])
    parser.add_argument("--table", type=Path, help="write the table of the points that ran, and run none")
    given = parser.parse_args()
    lines = given.out / "points.jsonl"
    done = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    if given.table:
        found = {
            "seeds": given.seeds,
            "points": sorted(done, key=lambda row: points(given.seeds, []).index(Point(*list(row.values())[:3]))),
            "costs": costs(),
            "machine": describe_machine(),
            "versions": versions(),
            "command": f"python -m lab.bench.pruners --out FOLDER --seeds {' '.join(map(str, given.seeds))}",
        }
        write_json(given.table.with_suffix(".json"), found)
        write_text(given.table, table(found))
        return
    given.out.mkdir(parents=True, exist_ok=True)
    there = {Point(row["seed"], row["selector"], row["share"]) for row in done}
    for point in points(given.seeds, given.only):
        if point not in there:
            found = run(point, given.out.absolute())
            with lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
