"""The table of docs/results/dry_run.md: what each shipped GPU recipe takes by its dry run, and what the planner says.

python -m lab.dry_run               # every recipe at two small depths; two minutes a recipe on a free core; resumable
python -m lab.dry_run NAME --whole  # one recipe at full depth instead

A decoder's layers are alike, so sizes and times are linear in their number: two depths give the full one. Each phase is
extrapolated by itself, because another one may have the peak at full depth. A recipe with two bases is run whole.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lab import commit
from rlaif_lite.dryrun.launch import dry_run
from rlaif_lite.model.base import read_config
from rlaif_lite.planner.plan import AUTO, CHECKPOINTING, DENSE, get_key, make_plan
from rlaif_lite.profiler.inputs import made_up
from rlaif_lite.recipe import load_recipe

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "dry_run.json"
CARDS = {"48gb": "l40s", "80gb": "a100"}  # whose rates are used, by the end of a recipe's name; else those of a 4090
SIZES = (*AUTO, CHECKPOINTING, DENSE)
DEPTHS = (2, 3)
PEAK, RESERVED, SECONDS = "peak_memory_bytes", "reserved_memory_bytes", "measured_seconds"
HEAD = """# Dry runs of the shipped GPU recipes, and the planner

    python -m lab.dry_run

GiB of one GPU. No GPU was used: these are shapes, not measurements ([dry_run.md](../dry_run.md)). The runs had 2 and
3 layers of the decoder and are extrapolated to its depth, unless `depth` says `whole`. `reserved` is a model of torch's
allocator with `expandable_segments`. Sizes that a recipe leaves to the plan are those for the card in its name, for
the lengths that the plan assumes where data is missing. The records of a dry run are made up and longer, so a stage may
take more here than the card has. `planned` is `rlaif-lite plan`'s peak for the same inputs, cuBLAS's workspace included
in both. `seconds` is a roofline on the card named: of one step of a training stage, else of the whole stage.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; none: all of recipes/*gb.yaml that are not done")
    parser.add_argument("--whole", action="store_true", help="at full depth")
    asked = parser.parse_args()
    names = asked.recipes or [
        path.stem for path in sorted((ROOT / "recipes").glob("*gb.yaml")) if path.stem not in read()
    ]
    for name in names:
        found = figures_of(name, asked.whole)
        results = read() | {name: found}  # another process may have added to it meanwhile
        OUT.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")
        OUT.with_suffix(".md").write_text(HEAD + "\n" + table(results) + "\n", encoding="utf-8")
    print(table(read()))


def read() -> dict:
    """{recipe: its figures} of the recipes that are done."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}


def figures_of(name: str, whole: bool) -> dict:
    """Sizes and roofline seconds of each stage of a recipe at its full depth."""
    size = name.rsplit("_", 1)[1]
    whole = whole or load_recipe(ROOT / "recipes" / f"{name}.yaml").model.reward_base is not None  # of another depth
    card, chosen = CARDS.get(size, "4090"), make_plan(load_recipe(ROOT / "recipes" / f"{name}.yaml"), size).recipe
    sizes = {key: value for key in SIZES if (value := get_key(chosen, key)) is not None}
    sft = chosen.sft  # phases of one size need the same
    for phase in ("hard", "policy_init") if sft.easy is not None else ():
        other = getattr(sft, phase)
        if other is not None and (other.batch_size, other.micro_batch) == (sft.easy.batch_size, sft.easy.micro_batch):
            sizes = {key: value for key, value in sizes.items() if not key.startswith(f"sft.{phase}.")}
            sizes |= {f"sft.{phase}": None}
    overrides = [f"{key}={json.dumps(value)}" for key, value in sizes.items()]
    runs = [profile(name, card, depth, overrides) for depth in ((None,) if whole else DEPTHS)]
    stages = runs[0]["stages"]
    if not whole:
        depth = layers_of(name)
        stages = {stage: extrapolated(*(run["stages"][stage] for run in runs), depth) for stage in stages}
    planned = runs[0]["dry"]["planned_at_full_depth"]
    return {
        "commit": commit(),
        "card": card,
        "sizes": sizes,
        "depth": "whole" if whole else list(DEPTHS),
        "stages": {
            stage: {key: figures[key] for key in (PEAK, RESERVED, SECONDS)} | {"planned_memory_bytes": planned[stage]}
            for stage, figures in stages.items()
        },
    }


def profile(name: str, card: str, layers: int | None, overrides: Sequence[str], stages: Sequence[str] = ()) -> dict:
    """The JSON of one dry run, of all stages where none is named."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "dry.json"
        code = dry_run(str(ROOT / "recipes" / f"{name}.yaml"), overrides, card, stages, layers, False, out)
        if code:
            sys.exit(code)
        return json.loads(out.read_text(encoding="utf-8"))


def layers_of(name: str) -> int:
    """Layers of the recipe's decoder."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = made_up(load_recipe(ROOT / "recipes" / f"{name}.yaml"), Path(folder), small=False)
        return read_config(recipe.model).get_text_config().num_hidden_layers


def extrapolated(low: dict, high: dict, depth: int) -> dict[str, float]:
    """A stage at `depth` layers from the two of DEPTHS. What the allocator wastes is a share, so the deeper run's is
    taken as it is."""
    peak = max(of_depth(depth, low["phases"][name][PEAK], high["phases"][name][PEAK]) for name in low["phases"])
    seconds = of_depth(depth, low[SECONDS], high[SECONDS])
    return {PEAK: peak, RESERVED: peak * high[RESERVED] / high[PEAK], SECONDS: seconds}


def of_depth(depth: int, low: float, high: float) -> float:
    """A figure at `depth` layers from those at the two of DEPTHS."""
    return low + (high - low) * (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])


def table(found: dict) -> str:
    """Markdown."""
    lines = ["| recipe | stage | tensors | reserved | | planned | | seconds |", "|---|---|---|---|---|---|---|---|"]
    for name, run in sorted(found.items()):
        for stage, figures in run["stages"].items():
            peak, reserved, planned = (figures[key] for key in (PEAK, RESERVED, "planned_memory_bytes"))
            gib = [f"{size / 2**30:.2f}" for size in (peak, reserved, planned)]
            lines.append(
                f"| {name} | {stage} | {gib[0]} | {gib[1]} | {reserved / peak - 1:+.1%} | {gib[2]} | "
                f"{planned / peak - 1:+.1%} | {figures[SECONDS]:.1f} |"
            )
    runs = [
        f"{name}: {run['card']}, layers {run['depth']}, commit {run['commit']}" for name, run in sorted(found.items())
    ]
    return "\n".join([*lines, "", *(f"- {line}" for line in runs)])


if __name__ == "__main__":
    main()
