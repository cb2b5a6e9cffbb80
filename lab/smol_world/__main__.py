"""The English world and a base that can read it: `python -m lab.smol_world --gguf FILE --out FOLDER`.

    FOLDER/base    a SmolVLM2 checkpoint like any other: what recipes/smol_world.yaml starts from
    FOLDER/data    the videos and records of that recipe

Four steps. The checkpoint is assembled (`checkpoint.py`). Tower and connector learn to read single frames (`tower.py`).
Decoder adapters learn clean English about videos of a world of their own: the product's own SFT stage with `base.yaml`.
The adapters are merged into the weights that are saved, so the language model is NOT the package's any more: it has
seen the world's sentences, statements with verdicts, and pairs. What is done is kept in FOLDER/work, and a second call
goes on from there.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from rlaif_lite.data.world import WorldSplits
from rlaif_lite.exchange.export import merge
from rlaif_lite.exchange.files import whole_folder
from rlaif_lite.pipeline import run
from rlaif_lite.recipe import load_recipe

from . import records, tower
from .checkpoint import assemble, read_gguf

BASE_WORLD = 1000  # seed of the videos that the base learns from; a run's world has another
SPLITS = WorldSplits(sft=128, preference=40, rl=60, test=50)


def build(
    read: Callable[[], tuple[PreTrainedTokenizerBase, LlamaForCausalLM]],
    out: Path,
    seed: int,
    base_videos: int,
    tower_steps: int,
    sft_steps: int,
    splits: WorldSplits = SPLITS,
) -> Path:
    """Make `out`/base and `out`/data -> `out`/base. `read` gives the language model where it has not been read yet.
    `seed` draws the run's world; the base is the same for all."""
    records.write(out / "data", splits, seed, workers=os.cpu_count() or 1)
    work = out / "work"
    records.write(work, WorldSplits(base_videos, 1, 1, 1), BASE_WORLD, workers=os.cpu_count() or 1)
    if not (work / "read").exists():
        with whole_folder(work / "read") as folder:
            assemble(*read(), folder)
            tower.train(folder, work, BASE_WORLD, base_videos, tower_steps)
    given = [
        f"output={work / 'run'}",
        f"model.base={work / 'read'}",
        f"data.sft_hard=[{work / 'conversations.jsonl'}]",
        f"sft.hard.steps={sft_steps}",
    ]
    run(load_recipe(Path(__file__).parent / "base.yaml", given), until="sft")
    if not (out / "base").exists():
        with whole_folder(out / "base") as folder:
            merge(work / "read", work / "run" / "adapters" / "sft", folder)
    return out / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the run's world")
    parser.add_argument("--base-videos", type=int, default=400, help="that the base learns from")
    parser.add_argument("--tower-steps", type=int, default=500)
    parser.add_argument("--sft-steps", type=int, default=60)
    given = vars(parser.parse_args())
    print(build(partial(read_gguf, given.pop("gguf")), **given))


if __name__ == "__main__":
    main()
