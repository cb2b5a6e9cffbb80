"""Forward passes that pretraining and measuring share: pooled vision features, and the language model over sheets.

B sheets, L columns, D width, N videos, F frames, K tokens per frame, V vocabulary, P columns picked.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import LlavaNextVideoForConditionalGeneration

from lab.embedded_base.sheet import VIDEO_TOKENS, Batch

VERDICT_LAYER = 4  # verdicts of a pair are complete after this many layers,
VOTE_LAYER = 5  # after one more each word votes for A or B, and the last layer counts


class Hidden(NamedTuple):
    """Hidden states of the language model, before the final norm except for `last`."""

    verdict_BLD: torch.Tensor
    vote_BLD: torch.Tensor
    last_BLD: torch.Tensor


def tower_features(model: LlavaNextVideoForConditionalGeneration, frames: torch.Tensor) -> torch.Tensor:
    """Frames (...,H,W,3) uint8 -> pooled features (...,K,D) of the tower, before the projector."""
    pixels = (frames.flatten(0, -4).float() / 127.5 - 1).permute(0, 3, 1, 2)
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return model.model.vision_resampler(hidden).unflatten(0, frames.shape[:-3])


@torch.no_grad()
def pooled_features(
    model: LlavaNextVideoForConditionalGeneration, frames_NFHWC: np.ndarray, batch: int = 32
) -> torch.Tensor:
    """Features (N,F,K,D), bfloat16, of whole videos."""
    parts = [
        tower_features(model, torch.from_numpy(np.ascontiguousarray(frames_NFHWC[i : i + batch]))).bfloat16()
        for i in range(0, len(frames_NFHWC), batch)
    ]
    return torch.cat(parts)


class Bf16Linear(torch.autograd.Function):
    """y = x W^T with all three products in bfloat16, float32 outside: four times as fast on a CPU with AVX512-BF16."""

    @staticmethod
    def forward(ctx, x, weight):
        x, w = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(x, w)
        return (x @ w.t()).float()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = grad.bfloat16()
        return (grad @ w).float(), (grad.flatten(0, -2).t() @ x.flatten(0, -2)).float()


def use_bf16_products(model: LlavaNextVideoForConditionalGeneration) -> None:
    """Lets the linear layers of the decoder multiply in bfloat16; weights and everything between stay float32."""
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(lambda self, x: Bf16Linear.apply(x, self.weight), module)


def forward(model: LlavaNextVideoForConditionalGeneration, batch: Batch, pooled_NFKD: torch.Tensor) -> Hidden:
    """The language model over sheets."""
    decoder = model.model.language_model
    embedded_BLD = decoder.embed_tokens(batch.tokens_BL)
    if batch.views:
        video = torch.tensor([view.video for view in batch.views])[:, None]
        frames = torch.tensor([view.frames for view in batch.views])
        visual = model.model.multi_modal_projector(pooled_NFKD[video, frames].float().flatten(1, 2))
        rows = torch.tensor([view.row for view in batch.views])[:, None]
        columns = torch.tensor([view.column for view in batch.views])[:, None] + torch.arange(VIDEO_TOKENS)
        embedded_BLD = embedded_BLD.index_put((rows, columns), visual)
    turned = decoder.rotary_emb(embedded_BLD, position_ids=batch.positions_BL)
    states, hidden_BLD = [], embedded_BLD
    for layer in decoder.layers:
        hidden_BLD = layer(hidden_BLD, attention_mask=batch.mask_B1LL, position_embeddings=turned)
        states.append(hidden_BLD)
    return Hidden(states[VERDICT_LAYER - 1], states[VOTE_LAYER - 1], decoder.norm(hidden_BLD))
