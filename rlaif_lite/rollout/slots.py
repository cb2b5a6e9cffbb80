"""Key/value slots of a fixed size, one per answer in flight.

A slot holds a prompt and its answer without padding: each row writes at its own length and sees what stands before it.

Shapes: R slots, P prompts, L length of a slot, H key/value heads, E width of a head.
"""

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig

ALIGN = 16  # positions: lengths are a multiple of it, as the attention kernels of a GPU like them


def slot_length(prompt_tokens: int, new_tokens: int) -> int:
    """Positions of a slot that holds the longest prompt and answer, whose last token is never read back."""
    return round_up(prompt_tokens + new_tokens - 1, ALIGN)


def slot_bytes(text_config: PretrainedConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of one slot of `length` positions: keys and values of every layer of a decoder of this configuration."""
    heads, width = _heads(text_config)
    return 2 * text_config.num_hidden_layers * heads * length * width * dtype.itemsize


def round_up(length: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `length`."""
    return -(-length // unit) * unit


def _heads(text_config: PretrainedConfig) -> tuple[int, int]:
    """(key/value heads, width of a head); configurations without `head_dim` divide the width evenly."""
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return text_config.num_key_value_heads, width


class SlotCache(Cache):
    """Takes the place of transformers' cache in the decode step: one new token for each of the first rows."""

    def __init__(
        self, text_config: PretrainedConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(layers=[])  # the layers of transformers are not used: `update` is all that attention calls
        heads, width = _heads(text_config)
        # zeros, because attention multiplies what it masks by 0, and memory that was never written may hold a NaN
        made = torch.zeros(2, text_config.num_hidden_layers, slots, heads, length, width, dtype=dtype, device=device)
        self.keys, self.values = made.unbind(0)  # each (layers,R,H,L,E)
        self.row_R = torch.arange(slots, device=device)
        self.length_R = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens held = where the next one goes
        self.limit = length  # positions that attention reads

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append key_states, value_states (rows,H,1,E) -> keys and values (rows,H,limit,E) of these rows."""
        rows = len(key_states)
        at = self.row_R[:rows], slice(None), self.length_R[:rows]
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[at] = key_states[:, :, 0]
        values[at] = value_states[:, :, 0]
        return keys[:rows, :, : self.limit], values[:rows, :, : self.limit]

    def fill(self, rows: list[int], prompts: Cache, source: list[int], length: list[int]) -> None:
        """Start slot rows[i] with a copy of prompt source[i] of a prefilled cache, which is length[i] tokens long."""
        to, take = self._index(rows), self._index(source)
        for layer, prefilled in enumerate(prompts.layers):
            width = prefilled.keys.shape[2]
            self.keys[layer, to, :, :width] = prefilled.keys[take]
            self.values[layer, to, :, :width] = prefilled.values[take]
        self.length_R[to] = self._index(length)

    def move(self, rows: list[int], to: list[int]) -> None:
        """Copy slots `rows` into the slots `to`."""
        source, target = self._index(rows), self._index(to)
        for held in (*self.keys, *self.values):
            held[target, :, : self.limit] = held[source, :, : self.limit]
        self.length_R[target] = self.length_R[source]

    def _index(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.row_R.device)
