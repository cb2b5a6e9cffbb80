"""Teach the vision tower and the connector of an assembled checkpoint to read single frames, without the decoder.

The four tokens of a frame are pulled to the decoder's own embeddings of four words: the object's colour, its shape, the
corner star's colour, and "star". A word that has nothing to say is "nothing". So the decoder finds words that it knows
where a video is, and little adaptation is left to do. Heads that are thrown away read colour, shape and place from all
patches together. Labels come from the renderer; frames are decoded from the files.

The tower starts from the embedded base's, which has read this world's frames for longer. That one is CLIP's: it has a
class token and a norm before its layers, which SmolVLM's has not. The token is left out, and the norm is put into the
patch weights at its mean scale. Training mends what that costs.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, SmolVLMForConditionalGeneration

from rlaif_lite.data.world import EVENTS, WorldConfig, facts_of, pixels_rng, render
from rlaif_lite.data.world_text import COLOURS, SHAPES
from rlaif_lite.model.base import resolve_base
from rlaif_lite.video.decode import decode

from .checkpoint import FRAME
from .records import DROPOUT

NOTHING = "nothing"
SLOTS = ((*COLOURS, NOTHING), (*SHAPES, NOTHING), (*COLOURS, NOTHING), ("star", NOTHING))
BATCH, RATE = 128, 2e-3
HELD_OUT = 24  # videos that are measured on


def labelled(folder: Path, seed: int, videos: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames (N,3,H,W) uint8 of a world's `sft` videos, which word each slot holds (N,4), and of the object whether it
    is visible, x, y and radius, as shares of the frame (N,4)."""
    config = WorldConfig(dropout=DROPOUT)
    per = config.frames_per_event
    frames, labels, places = [], [], []
    for index in range(videos):
        facts = facts_of(seed, "sft", index, config)
        _, placed_F4 = render(facts, pixels_rng(seed, "sft", index), config)
        path = folder / f"world/videos/sft/{index:05d}.mp4"
        frames.append(decode(str(path), count=EVENTS * per, size=(FRAME, FRAME)).rgb_THWC)
        places.append(placed_F4 / [1, config.size, config.size, config.size])
        star = facts["star"]
        for at, visible in enumerate(placed_F4[:, 0]):
            colour, shape, _ = facts["events"][at // per] if visible else (NOTHING, NOTHING, "")
            words = (colour, shape, star or NOTHING, "star" if star else NOTHING)
            labels.append([slot.index(word) for slot, word in zip(SLOTS, words, strict=True)])
    frames_NCHW = torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2)
    return frames_NCHW, torch.tensor(labels), torch.from_numpy(np.concatenate(places)).float()


def start(tower: nn.Module, frames_NCHW: torch.Tensor) -> None:
    """Give a tower the weights of the embedded base's."""
    prefix = "vision_tower."
    found = {
        key.removeprefix(prefix): tensor
        for key, tensor in load_file(Path(resolve_base("embedded")) / "model.safetensors").items()
        if key.startswith(prefix)
    }
    wanted = tower.state_dict()
    wanted |= {key: found[key] for key in wanted if key in found and key.startswith("encoder")}
    patch, place = found["embeddings.patch_embedding.weight"], found["embeddings.position_embedding.weight"][1:]
    gain, shift = found["pre_layrnorm.weight"], found["pre_layrnorm.bias"]
    pixels_NCHW = frames_NCHW[:512].float() / 127.5 - 1
    scale_D = gain / (F.conv2d(pixels_NCHW, patch, stride=patch.shape[2]).flatten(2).mT + place).std(2).mean()
    wanted["embeddings.patch_embedding.weight"] = (patch - patch.mean(0)) * scale_D[:, None, None, None]
    wanted["embeddings.patch_embedding.bias"] = shift
    wanted["embeddings.position_embedding.weight"] = (place - place.mean(1, keepdim=True)) * scale_D
    tower.load_state_dict(wanted)


def train(folder: Path, world: Path, seed: int, videos: int, steps: int) -> float:
    """Train the checkpoint in `folder` on a world's videos and save it there -> share of right words, held out."""
    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    embeddings_VD = model.get_input_embeddings().weight.detach()
    words = [[tokenizer.encode(f" {word}", add_special_tokens=False) for word in slot] for slot in SLOTS]
    targets = [torch.stack([embeddings_VD[ids].mean(0) for ids in slot]) for slot in words]
    size = torch.cat(targets).square().sum(1).mean()
    frames_NCHW, labels_N4, places_N4 = labelled(world, seed, videos)
    trained = len(frames_NCHW) * (videos - HELD_OUT) // videos
    start(model.model.vision_model, frames_NCHW)
    parts = [model.model.vision_model, model.model.connector]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    with torch.no_grad():  # tokens begin as large as the words that they shall become
        (projection,) = model.model.connector.parameters()
        projection.mul_((size / projection.square().sum()).sqrt())
    vision = model.config.vision_config
    torch.manual_seed(seed)
    heads = nn.Sequential(
        nn.Linear(vision.hidden_size * (FRAME // vision.patch_size) ** 2, 256),
        nn.GELU(),
        nn.Linear(256, sum(map(len, SLOTS[:2])) + 3),
    )
    weights = [weight for part in [*parts, heads] for weight in part.parameters()]
    optimiser = torch.optim.AdamW(weights, RATE, (0.9, 0.98), weight_decay=0.01)
    rng = random.Random(seed)

    def read(picked: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, right words (B,4))"""
        pixels_BCHW = frames_NCHW[picked].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            hidden_BPD = model.model.vision_model(pixel_values=pixels_BCHW).last_hidden_state
            found_B4D = model.model.connector(hidden_BPD).float()
            colour, shape, place_B3 = heads(hidden_BPD.flatten(1)).float().split([*map(len, SLOTS[:2]), 3], 1)
        label_B4, place_B4 = labels_N4[picked], places_N4[picked]
        away_B = (place_B3 - 4 * (place_B4[:, 1:] - 0.5)).square().mean(1)
        loss, right = 2 * (away_B * place_B4[:, 0]).mean(), []
        loss = loss + F.cross_entropy(colour, label_B4[:, 0]) + 2 * F.cross_entropy(shape, label_B4[:, 1])
        for slot, target_WD in enumerate(targets):
            label_B, found_BD = label_B4[:, slot], found_B4D[:, slot]
            near_BW = 10 * F.normalize(found_BD, dim=1) @ F.normalize(target_WD, dim=1).T
            apart = (found_BD - target_WD[label_B]).square().sum(1).mean() / size
            loss = loss + F.cross_entropy(near_BW, label_B) + apart
            right.append(near_BW.argmax(1) == label_B)
        return loss, torch.stack(right, 1).float()

    for step in range(steps):
        rate = RATE * min(1, (step + 1) / 40, 0.02 + 1.3 * (1 - step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss, right_B4 = read(rng.choices(range(trained), k=BATCH))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        if step % 100 == 99:
            print(f"tower {step + 1}/{steps}: loss {loss.item():.2f}, words {right_B4.mean(0).tolist()}", flush=True)
    with torch.no_grad():
        right_B4 = read(list(range(trained, len(frames_NCHW))))[1]
    print(f"tower, held out: {[round(share, 3) for share in right_B4.mean(0).tolist()]}", flush=True)
    model.save_pretrained(folder)
    return right_B4.mean().item()
