"""The model card of an exported role: what it is, from which base and data, what was measured, what it cost.

The text is in `card.md.jinja`.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .. import __version__
from ..data.splits import splits_of
from ..files import file_digest, read_json, read_jsonl
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
    """README.md of an exported folder. `scalar`: the role has a head that gives a number; `compared`: what the merge
    cost, in words, None where nothing was measured."""
    recipe, model = work.recipe, work.recipe.model
    summary = read_json(path) if (path := work.folder / "summary.json").is_file() else {}
    evaluation = summary.get("evaluation", {})
    on_hub = not Path(resolve_base(model.base)).is_dir()
    text = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return text.get_template("card.md.jinja").render(
        role=role,
        says=SAYS[role],
        scalar=scalar,
        compared=compared,
        version=__version__,
        recipe=recipe,
        recipe_hash=recipe_hash(recipe),
        model=model,
        on_hub=on_hub,
        base=model.base if on_hub else Path(model.base).name,
        base_digest=base_digest(model),
        files=list(files_of(work)),
        summary={"stages": {}} | summary,
        reward=summary.get("reward"),
        evaluation=evaluation,
        compared_roles=[name for name in dict.fromkeys(("base", "sft", role)) if name in evaluation],
        metrics=METRICS,
        speeds=[row["time"]["tokens_per_second"] for row in read_jsonl(work.log.path) if row["stage"] == "ppo"],
        median=median,
    )


def files_of(work: Workspace) -> Iterator[tuple[str, str, str | None]]:
    """(what it is, name, digest, None where it is not there any more) of each file that the run was made from."""
    sources = [
        (f"{what} started from", Path(given).name, Path(given) / "adapter_model.safetensors")
        for what, given in (("sft", work.recipe.sft.adapter), ("reward", work.recipe.reward.adapter))
        if given is not None
    ]
    for split in splits_of(work.recipe.data, work.data_folder):
        sources += [(f"data: {split.name}", Path(path).name, Path(path)) for path in split.paths]
    for what, name, path in sources:
        yield what, name, file_digest(path) if path.is_file() else None
