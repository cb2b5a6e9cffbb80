"""The card of the embedded base: its skills in float32 and in the 4-bit form that a run uses, and how it was made.

`python -m rlaif_lite.tiny.card FOLDER` measures a checkpoint anew on freshly made videos, which were not trained on, and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from rlaif_lite.tiny.network import pooled_features
from rlaif_lite.tiny.skills import measure
from rlaif_lite.tiny.videos import WORLD_SEED, make_videos

FRESH = 100_000  # index of the first freshly made video: far beyond those of any pretraining


def to_nf4(model: nn.Module) -> None:
    """Replaces the decoder's linear layers by bitsandbytes NF4 with double quantisation, computing in float32, as a run loads them."""
    import bitsandbytes as bnb

    decoder = model.model.language_model
    for parent in list(decoder.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                quantised = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4"
                )
                weight = linear.weight.detach().clone()
                quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
                quantised = quantised.to("cpu")  # quantises
                quantised.support_avx512bf16_for_cpu = False  # the packed path has no gradient and rounds
                setattr(parent, name, quantised)


def skill_table(folder: Path, videos: int = 400, workers: int = 1) -> dict[str, dict[str, float]]:
    """{"fp32": skills, "nf4": skills} of a checkpoint on `videos` fresh videos."""
    made = make_videos(videos, workers, first=FRESH)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    pooled = pooled_features(model, made.frames_NFHWC)
    table = {"fp32": measure(model, pooled, made.facts, 0, videos)}
    to_nf4(model)
    return table | {"nf4": measure(model, pooled, made.facts, 0, videos)}


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The skill table as text."""
    lines = ["| skill | fp32 | NF4 |", "|---|---|---|"]
    lines += [f"| {kind} | {value:.3f} | {table['nf4'][kind]:.3f} |" for kind, value in table["fp32"].items()]
    return "\n".join(lines)


def write_card(folder: Path, made: dict, videos: int = 400, workers: int = 1) -> None:
    """Writes README.md and skills.json into a checkpoint folder; `made` says how it was made, {"steps": ..., "seconds": ..., ...}."""
    table = skill_table(folder, videos, workers)
    weak = made["weak"]
    omitted = "questions, claims, checks and pairs about the whole video without a context, and " if weak else ""
    text = f"""# The embedded base{" that reads whole videos badly" if weak else ""}

A LLaVA-NeXT-Video of {made["parameters"]:,} parameters, trained from scratch by `python -m rlaif_lite.tiny.pretrain` on synthetic videos
(`rlaif_lite/data/world.py`). It exists so that all of RLAIF can be run and measured within minutes on a CPU; it knows nothing else.

- Data: {made["videos"]:,} videos of world seed {WORLD_SEED:,}, which no recipe uses, as mp4 files decoded by decord. Labels come from the
  generator, verdicts included: this base was *taught* to verify; the ability to judge does not emerge in it.
- Left out on purpose: {omitted}the full description ("describe the video"). SFT teaches that from noisy labels, so that there is something to align.
- Schedule: vision tower alone on single frames, {made["vision_steps"]} steps; then tower frozen, projector and language model, {made["steps"]} steps of
  {made["processes"]} x {made["rows"]} sheets of {made["columns"]} tokens (Muon for matrices, AdamW for the rest, peak rate {made["rate"]}, flat for 30 %, then
  linear to 2 %); pairs join after {made["pairs_from"]:.0%} of the steps. Seed {made["seed"]}.
- Cost: {made["seconds"] / 60:.0f} minutes in all, {made["train_seconds"] / 60:.0f} of them language training, on {made["hardware"]}.
- Again: `{made["command"]}`

Skills on {videos} fresh videos. *check*: attribute words judged rightly; *pair_check*: pairs (both as an SFT model would sample them) ordered
as the truth by their summed checks; *pair_letter*: by the pairwise judge, mean of both orders; *consistency*: untied pairs on which both orders
agree. *video* is without, *context* with the narrative of the clips; *text* is the narrative alone.

{markdown(table)}
"""
    (folder / "README.md").write_text(text)
    (folder / "skills.json").write_text(json.dumps({"made": made, "videos": videos, **table}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(markdown(skill_table(options.folder, options.videos, options.workers)))


if __name__ == "__main__":
    main()
