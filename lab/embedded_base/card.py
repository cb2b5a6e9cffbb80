"""The card of the embedded base: its skills in float32 and in the 4-bit form that a run uses, and how it was made.

`python -m lab.embedded_base.card FOLDER` measures a checkpoint anew on freshly made videos, which were not trained on,
and prints the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from lab.embedded_base.network import pooled_features
from lab.embedded_base.skills import measure
from lab.embedded_base.videos import WORLD_SEED, make_videos
from rlaif_lite.data.world import WorldConfig

HARDER = WorldConfig(dropout=0.4)  # as in recipes/tiny.yaml
FRESH = 100_000  # index of the first freshly made video: far beyond those of any pretraining


def to_nf4(model: nn.Module) -> None:
    """Puts the decoder's linear layers into NF4 with double quantisation, computing in float32, as a run loads them."""
    import bitsandbytes as bnb

    decoder = model.model.language_model
    for parent in list(decoder.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                quantised = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=torch.float32,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                weight = linear.weight.detach().clone()
                quantised.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                quantised = quantised.to("cpu")  # quantises
                quantised.support_avx512bf16_for_cpu = False  # the packed path has no gradient and rounds
                setattr(parent, name, quantised)


def skill_table(folder: Path, videos: int = 400, workers: int = 1) -> dict[str, dict[str, float]]:
    """{form: skills} of a checkpoint on `videos` fresh videos; the forms are the columns of the card."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    usual, harder = (make_videos(videos, workers, first=FRESH, config=config) for config in (WorldConfig(), HARDER))
    pooled = pooled_features(model, usual.frames_NFHWC)
    table = {"fp32": measure(model, pooled, usual.facts, 0, videos)}
    to_nf4(model)
    table["NF4"] = measure(model, pooled, usual.facts, 0, videos)
    table[f"NF4, {HARDER.dropout:.0%} hidden"] = measure(
        model, pooled_features(model, harder.frames_NFHWC), harder.facts, 0, videos
    )
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The skill table as text."""
    lines = [f"| skill | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for kind in table["fp32"]:
        lines.append(f"| {kind} | {' | '.join(f'{skills[kind]:.3f}' for skills in table.values())} |")
    return "\n".join(lines)


def card_text(made: dict, table: dict[str, dict[str, float]], videos: int) -> str:
    """The card as Markdown; `made` says how the checkpoint was made."""
    if made["weak"]:
        title = "The embedded base that reads clips well and whole videos badly"
        omitted = "whatever must be read from the whole video without a context, and the full description"
    else:
        title = "The embedded base"
        omitted = "the full description"
    return f"""# {title}

A LLaVA-NeXT-Video of {made["parameters"]:,} parameters, trained from scratch by
`python -m lab.embedded_base.pretrain` on synthetic videos (`rlaif_lite/data/world.py`).
It exists so that the whole of RLAIF can be run and measured within minutes on a CPU; it knows nothing else.

- **Data.** {made["videos"]:,} videos of world seed {WORLD_SEED:,}, which no recipe uses, as mp4 files read by
  decord; an object is hidden in {WorldConfig().dropout:.0%} of the frames.
  Labels come from the generator, verdicts included: this base was *taught* to verify. It does not show that the
  ability to judge emerges.
- **Left out on purpose:** {omitted} (`describe the video`).
  SFT teaches that from noisy labels, so that there is something to align.
- **Schedule.** The vision tower alone on single frames, {made["vision_steps"]} steps; then, with the tower frozen,
  projector and decoder, {made["steps"]} steps of {made["processes"]} x {made["rows"]} sheets of
  {made["columns"]} tokens. Muon for the decoder's matrices, AdamW for the rest;
  peak rate {made["rate"]}, flat for 30 %, then linear to 2 %.
  Pairs join after {made["pairs_from"]:.0%} of the steps. Seed {made["seed"]}.
- **Cost.** {made["seconds"] / 60:.0f} minutes in all, {made["train_seconds"] / 60:.0f} of them projector and decoder,
  on {made["hardware"]}.
- **Again:** `{made["command"]}`

## Skills on {videos} fresh videos

*video* is without, *context* with the narrative of the clips in the prompt, *text* is the narrative without the video.
*check*: attribute words judged rightly. *pair_check*: pairs of answers, as an SFT model would sample them, ordered as
the truth orders them by their summed checks. *pair_letter*: the same by the pairwise judge, mean of both orders.
*consistency*: untied pairs on which its two orders agree.

{markdown(table)}
"""


def write_card(folder: Path, made: dict, videos: int = 400, workers: int = 1) -> None:
    """Measures a checkpoint folder and writes README.md and skills.json into it."""
    table = skill_table(folder, videos, workers)
    (folder / "README.md").write_text(card_text(made, table, videos))
    (folder / "skills.json").write_text(json.dumps({"made": made, "videos": videos, "skills": table}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=400)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print(markdown(skill_table(options.folder, options.videos, options.workers)))


if __name__ == "__main__":
    main()
