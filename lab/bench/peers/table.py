"""The tables of the comparison, between two marks of a page whose text is written by hand."""

from pathlib import Path
from statistics import median

from rlaif_lite.files import write_text
from rlaif_lite.formats import markdown_table

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
TITLES = {"grpo": "GRPO", "dpo": "DPO", "sft": "SFT"}
HEAD = (
    "",
    "reads",
    "wall, s",
    "processor, s",
    "times ours",
    "peak memory, MiB",
    "times ours",
    "beyond imports, MiB",
    "times ours",
    "decoder positions",
    "tower patches",
)
MIB = 2**20


def write_tables(page: Path, result: dict) -> None:
    """Put the tables of a result into the page, which is made where there is none."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Against peers on a CPU\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    sizes, tasks = result["sizes"], result["tasks"]
    videos = {"grpo": sizes["prompts"], "dpo": sizes["pairs"], "sft": sizes["records"]}
    read = [row for found in tasks.values() for row in found["rows"] if row["task"] == "features" and row["steps"]]
    video = figures(read[0]) if read else None
    tables = "\n\n".join(as_table(TITLES[task], found, video, videos[task]) for task, found in tasks.items())
    write_text(page, f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.partition(END)[2]}")


def figures(row: dict) -> dict[str, float]:
    """Medians over the steps; the peak is the highest."""
    middle = lambda key: median(step.get(key, 0.0) for step in row["steps"])
    peak = max(step["peak_bytes"] for step in row["steps"])
    found = {"seconds": middle("seconds"), "processor": middle("processor_seconds"), "peak": peak}
    found["own"] = peak - row["facts"]["imported_bytes"]
    reading = ("prefill", "decode", "forward", "reference", "score reference", "score policy", "update policy forward")
    counted = lambda step: step.get("decoder_positions") or sum(step.get(f"{name}: tokens", 0) for name in reading)
    return found | {"positions": median(map(counted, row["steps"])), "patches": middle("tower_patches")}


def as_table(title: str, found: dict, video: dict[str, float] | None, videos: int) -> str:
    """A task as Markdown. `video`: what the features of one video cost, of which a step has `videos`. Ratios are to
    ours from cached features."""
    rows = found["rows"]
    ours = next((figures(row) for row in rows if row["name"] == "ours" and row["steps"]), None)
    rounds = max((len(row["steps"]) for row in rows), default=0)
    shown = [(row["name"], row["reads"], figures(row)) for row in rows if row["steps"]]
    if ours and video:
        both = ours | {key: ours[key] + videos * video[key] for key in ("seconds", "processor")}
        both |= {key: max(ours[key], video[key]) for key in ("peak", "own")}
        shown.insert(1, ("ours, nothing cached", "video", both))
    body = []
    for name, reads, each in shown:
        times = lambda key, each=each: f"{each[key] / ours[key]:.2f}" if ours else ""
        cells = [name, reads, f"{each['seconds']:.2f}", f"{each['processor']:.2f}", times("processor")]
        cells += [f"{each['peak'] / MIB:.0f}", times("peak"), f"{each['own'] / MIB:.0f}", times("own")]
        cells += [f"{each[key]:.0f}" if each[key] else "" for key in ("positions", "patches")]
        body.append(cells)
    missing = [f"- {row['name']} did not run: `{row['why']}`." for row in rows if "why" in row]
    lines = [f"## {title}", "", f"Commit {found['commit']}, medians of {rounds} rounds.", ""]
    return "\n".join([*lines, markdown_table(HEAD, body), *([""] if missing else []), *missing])
