"""The model card of an exported role: what it is, from which base and data, what was measured, what it cost."""

import json
from pathlib import Path
from statistics import median

from .. import __version__
from ..data.splits import splits_of
from ..files import file_digest, read_jsonl
from ..model.base import base_digest, resolve_base
from ..recipe import recipe_hash
from ..workspace import Workspace

SAYS = {
    "sft": "after supervised training",
    "reference": "the frozen policy that PPO starts from",
    "ppo": "after PPO against a reward model trained on its own preferences",
    "dpo": "after direct preference optimisation on its own preferences",
    "reward": "the reward model: a score for an answer to a question about a video",
    "value": "PPO's critic: the return expected from a prefix of an answer",
}
METRICS = ("f1", "precision", "recall", "hallucination", "repetition", "length", "stop_rate")


def card(work: Workspace, role: str, scalar: bool, compared: str | None) -> str:
    """README.md of an exported folder. `compared`: what the merge cost, in words; None where nothing was measured."""
    path = work.folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = f"{work.recipe.name} {role}"
    title = (
        f"# {name}\n\nOf the run `{work.recipe.name}`, role `{role}`: {SAYS[role]}. Made with rlaif-lite {__version__}."
    )
    sections = [
        front_matter(work, scalar),
        title,
        use(scalar),
        provenance(work),
        measured(summary, role),
        cost(work, summary),
    ]
    if not scalar:
        told = compared or "Not measured (exported with --no-check)."
        sections.append(f"## Merged weights against the adapter\n\n{told}")
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(work: Workspace, scalar: bool) -> str:
    """The card's YAML head, as the hub reads it."""
    base = work.recipe.model.base
    lines = [
        *([f"base_model: {base}"] if is_on_hub(base) else []),
        f"library_name: {'peft' if scalar else 'transformers'}",
        *([] if scalar else ["pipeline_tag: video-text-to-text"]),
        "tags: [video, rlaif, rlaif-lite]",
    ]
    return "\n".join(["---", *lines, "---"])


def is_on_hub(base: str) -> bool:
    """Whether the base is named by a hub id, not by a folder."""
    return not Path(resolve_base(base)).is_dir()


def use(scalar: bool) -> str:
    """The card's section on loading the weights; `scalar`: a role with a head that gives a number."""
    if scalar:
        return (
            "## Use\n\nA PEFT adapter and, in `head.safetensors`, one linear layer from the hidden state to a number. "
            "It cannot be merged into a causal language model: there is no place for the head. Load the base, then "
            "`PeftModel.from_pretrained(base, folder)`, and apply the head to the last hidden state."
        )
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForImageTextToText, AutoTokenizer\n\n"
        'model = AutoModelForImageTextToText.from_pretrained(folder, dtype="bfloat16")\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def provenance(work: Workspace) -> str:
    """Base, quantisation, recipe and the digests of the data files."""
    model, recipe = work.recipe.model, work.recipe
    name = model.base if is_on_hub(model.base) else Path(model.base).name
    lora = model.lora
    rows = [
        ("base", f"{name}, revision {model.revision or 'not pinned'}, digest `{base_digest(model)}`"),
        (
            "base while training",
            "frozen, 4-bit NF4 with double quantisation" if model.quantization == "nf4" else "frozen, not quantised",
        ),
        ("adapter", f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"),
        ("recipe", f"`{recipe.name}`, hash `{recipe_hash(recipe)}`, seed {recipe.seed}"),
    ]
    digest_of = lambda path: file_digest(path) if path.is_file() else "file not there at export"
    for what, given in (("sft", recipe.sft.adapter), ("reward", recipe.reward.adapter)):
        if given is not None:
            digest = digest_of(Path(given) / "adapter_model.safetensors")
            rows.append((f"{what} started from", f"{Path(given).name}, sha256 `{digest}`"))
    for split in splits_of(recipe.data, work.data_folder):
        for path in split.paths:
            rows.append((f"data: {split.name}", f"{Path(path).name}, sha256 `{digest_of(Path(path))}`"))
    return "## Where it comes from\n\n" + table(("", ""), rows)


def measured(summary: dict, role: str) -> str:
    """The run's own evaluation of the base, of SFT and of this role; for a reward model its held-out accuracy."""
    if role == "reward" and summary.get("reward"):
        accuracy, floor = summary["reward"]["heldout_accuracy"], summary["reward"]["floor"]
        if accuracy is None:
            return "## Measured\n\nThis reward model was given to the run, which had no pairs to measure it on."
        return f"## Measured\n\nAccuracy on held-out pairs {accuracy:.3f}; PPO would not have begun below {floor:g}."
    evaluation = summary.get("evaluation", {})
    roles = [name for name in dict.fromkeys(("base", "sft", role)) if name in evaluation]
    if role not in evaluation:
        return "## Measured\n\nThis role was not evaluated in the run."
    keys = [f"{mode}_{metric}" for mode in ("greedy", "sample") for metric in METRICS]
    rows = [
        (key.replace("_", " "), *(f"{evaluation[name][key]:.3f}" if key in evaluation[name] else "" for name in roles))
        for key in keys
        if key in evaluation[role]
    ]
    return "## Measured\n\nOn the run's test prompts.\n\n" + table(("metric", *roles), rows)


def cost(work: Workspace, summary: dict) -> str:
    """Seconds and peak memory by stage, and PPO's tokens per second."""
    if not summary.get("stages"):
        return ""
    rows = [
        (name, f"{stage['seconds']:.0f}", f"{stage['peak_memory_bytes'] / 2**30:.2f}")
        for name, stage in summary["stages"].items()
    ]
    gpu = summary["device"] != "cpu"
    kind = "the CUDA allocator's peak" if gpu else "the process's peak resident set"
    text = f"## What it cost\n\nOn {summary['device'] if gpu else summary['machine']['cpu']}. Memory is {kind}.\n\n"
    text += table(("stage", "seconds", "peak memory, GiB"), rows)
    log = work.folder / "metrics.jsonl"
    speeds = [
        row["time"]["tokens_per_second"] for row in (read_jsonl(log) if log.is_file() else []) if row["stage"] == "ppo"
    ]
    return text + (
        f"\n\nPPO: {median(speeds):.1f} answer tokens per second, median over {len(speeds)} steps." if speeds else ""
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
