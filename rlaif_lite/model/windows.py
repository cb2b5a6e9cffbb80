"""Attention of a vision tower over windows, those of one length together.

transformers' own loop calls attention once a window: for Qwen2.5-VL thousands of times a video. A name with "flash" in
it is given all windows at once, with where each begins.

Shapes: H heads, S tokens, E width of a head, W windows of one length, L tokens of each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "flash_by_windows"


def attend(
    module: nn.Module,
    query_1HSE: Tensor,
    key_1HSE: Tensor,
    value_1HSE: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of every token to those of its window -> (1,S,H,E). `cu_seq_lens_q`: where each ends, from 0 on."""
    ends = cu_seq_lens_q.tolist()
    starts: dict[int, list[int]] = {}
    for start, end in zip(ends, ends[1:], strict=False):
        starts.setdefault(end - start, []).append(start)
    out_SHE = torch.empty_like(query_1HSE[0].transpose(0, 1), memory_format=torch.contiguous_format)
    for length, found in starts.items():
        at_WL = torch.tensor(found)[:, None] + torch.arange(length)
        at_WL = at_WL.to(query_1HSE.device)
        qkv_WHLE = (each_1HSE[0][:, at_WL].transpose(0, 1) for each_1HSE in (query_1HSE, key_1HSE, value_1HSE))
        attended_WHLE = F.scaled_dot_product_attention(*qkv_WHLE, scale=scaling)
        out_SHE[at_WL] = attended_WHLE.transpose(1, 2)
    return out_SHE[None], None


def batch_windows(tower: nn.Module) -> None:
    """Let a tower of that kind attend so."""
    AttentionInterface.register(NAME, attend)
    for module in tower.modules():
        if "config" in vars(module):
            module.config._attn_implementation = NAME
