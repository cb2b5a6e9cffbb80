"""The table of docs/results/dry_run.md: what each shipped GPU recipe takes by its dry run, and what the planner says.

python -m lab.dry_run            # every recipe at full depth; hours on one core, resumable recipe by recipe
python -m lab.dry_run --layers 2 # a quick look; nothing is written to docs
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rlaif_lite.dryrun.launch import dry_run

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "dry_run.json"
SIZES = ("peak_memory_bytes", "reserved_memory_bytes", "planned_memory_bytes")
HEAD = """# Dry runs of the shipped GPU recipes, and the planner

    python -m lab.dry_run

GiB of one GPU at full depth, on a roofline of an A100 80 GB. No GPU was used: these are shapes, not measurements
([dry_run.md](../dry_run.md)). `reserved` is a model of torch's allocator with `expandable_segments`. `planned` is
`rlaif-lite plan`'s peak for the same inputs, cuBLAS's workspace included in both.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names; none: all of recipes/*gb.yaml")
    parser.add_argument("--layers", type=int)
    asked = parser.parse_args()
    names = asked.recipes or sorted(path.stem for path in (ROOT / "recipes").glob("*gb.yaml"))
    found = read() if asked.layers is None else {}
    for name in names:
        found[name] = figures_of(name, asked.layers)
        if asked.layers is None:  # another process may have added to it meanwhile
            found = read() | {name: found[name]}
            OUT.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
            OUT.with_suffix(".md").write_text(HEAD + "\n" + table(found) + "\n", encoding="utf-8")
    print(table(found))


def read() -> dict:
    """{recipe: {stage: bytes}} of the recipes that are done."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}


def figures_of(name: str, layers: int | None) -> dict[str, dict[str, float]]:
    """Sizes and roofline seconds of each stage of a recipe."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "dry.json"
        code = dry_run(str(ROOT / "recipes" / f"{name}.yaml"), [], "a100", [], layers, False, out)
        if code:
            sys.exit(code)
        profile = json.loads(out.read_text(encoding="utf-8"))
    keys = (*SIZES, "measured_seconds")
    return {stage: {key: figures[key] for key in keys} for stage, figures in profile["stages"].items()}


def table(found: dict) -> str:
    """Markdown."""
    lines = ["| recipe | stage | tensors | reserved | | planned | |", "|---|---|---|---|---|---|---|"]
    for name, stages in sorted(found.items()):
        for stage, figures in stages.items():
            peak, reserved, planned = (figures[key] for key in SIZES)
            gib = [f"{size / 2**30:.2f}" for size in (peak, reserved, planned)]
            lines.append(
                f"| {name} | {stage} | {gib[0]} | {gib[1]} | {reserved / peak - 1:+.1%} | {gib[2]} | "
                f"{planned / peak - 1:+.1%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
