"""One token for every slot, in buffers that stay where they are.

Everything the step reads and writes lives in tensors made once: on a GPU it is captured as a CUDA graph, one per
number of positions that attention reads, and replayed with one launch. With LoRA on seven linears of 32 layers a step
is some 2,200 kernels (by `profile --dry`); launched one by one, they cost more than they compute. The capture is a thin
layer: `_advance` is the same code, run eagerly; where a step cannot be captured, that is what happens, and it is said.

Shapes: R slots, C channels of a position, T new tokens, L positions read, D width.
"""

import contextlib
import logging

import torch
from torch import Tensor

from ..model.base import Base
from ..model.inputs import rope_positions
from ..model.memory import out_of_memory
from .sampling import Sampling, draw
from .slots import ALIGN, SlotCache, round_up

log = logging.getLogger(__name__)

WORTH = 8  # replays that pay for a capture, which launches every kernel of a step once from Python
GRAPH_LIMIT = 128  # positions that a captured step reads are a multiple of it: a handful of captures per rollout


class DecodeStep:
    """The state of the slots beside their keys and values, and the step that moves all of it on by one token.

    `fixed`: every step runs over all slots, whether or not they hold an answer, as a graph must; such rows compute
    something that nobody reads."""

    def __init__(self, base: Base, cache: SlotCache, sampling: Sampling, channels: int, fixed: bool):
        slots, device = len(cache.row_R), base.device
        self.base = base
        self.cache = cache
        self.sampling = sampling
        self.fixed = fixed
        self.token_R = torch.zeros(slots, dtype=torch.int64, device=device)  # last one drawn
        self.logp_R = torch.zeros(slots, dtype=torch.float32, device=device)  # its log-prob
        self.position_CR = torch.zeros(channels, slots, dtype=torch.int64, device=device)  # its position
        self.count_R = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens drawn so far
        self.uniform_RT = torch.zeros(slots, sampling.max_new_tokens, dtype=torch.float64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" and fixed else None

    def start(self, rows: list[int], hidden_RD: Tensor, next_position_CR: Tensor, uniform_RT: Tensor) -> list[tuple]:
        """Draw the first tokens of answers that begin in slots `rows` -> their (token, logp).

        hidden_RD is the prompts' last hidden state."""
        to = torch.tensor(rows, device=self.token_R.device)
        token_R, logp_R = draw(
            self.base.head_weight_VD, self.base.ban_bias_V, hidden_RD, uniform_RT[:, 0], self.sampling
        )
        self.token_R[to] = token_R
        self.position_CR[:, to] = next_position_CR
        self.uniform_RT[to] = uniform_RT
        self.count_R[to] = 1
        return _read(token_R, logp_R)

    def run(self, rows: int, longest: int) -> list[tuple[int, float]]:
        """One more token for the first `rows` slots -> their (token, logp); `longest` is the most that one holds."""
        limit = min(round_up(longest + 1, GRAPH_LIMIT if self.fixed else ALIGN), self.cache.keys.shape[3])
        self.cache.limit = limit
        if not self.fixed:
            self._advance(rows)
        elif limit in self._graphs:
            self._graphs[limit].replay()
        else:
            # the first step at this limit is run as it is, which also warms up what a capture must not allocate
            self._advance(len(self.token_R))
            if self._pool is not None and limit - longest >= WORTH:
                self._capture(limit)
        return _read(self.token_R[:rows], self.logp_R[:rows])

    def _capture(self, limit: int) -> None:
        """Record the step at this limit, without running it."""
        stream = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._advance(len(self.token_R))
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that ends badly leaves its own
            with contextlib.suppress(RuntimeError):  # torch has done it
                # else the allocator still gives to the graph's pool, and `empty_cache` raises ever after
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            cause = error.__context__  # the end of a capture may hide what broke it
            for found in (error, cause):
                if isinstance(found, RuntimeError) and out_of_memory(found):
                    raise found from None
            log.warning("The decode step cannot be captured, so it is launched kernel by kernel: %s", cause or error)
            self._pool = None
        else:
            self._graphs[limit] = graph

    def move(self, rows: list[int], to: list[int]) -> None:
        """Copy the answers in slots `rows` into the slots `to`."""
        self.cache.move(rows, to)
        source, target = (torch.tensor(numbers, device=self.token_R.device) for numbers in (rows, to))
        for state in (self.token_R, self.count_R, self.uniform_RT, self.position_CR.T):
            state[target] = state[source]

    def _advance(self, rows: int) -> None:
        base, cache = self.base, self.cache
        length_R, count_R = cache.length_R[:rows], self.count_R[:rows]
        seen_RL = torch.arange(cache.limit, device=length_R.device) <= length_R[:, None]
        blocked = torch.finfo(base.dtype).min
        mask_R11L = torch.zeros(seen_RL.shape, dtype=base.dtype, device=length_R.device)
        mask_R11L = mask_R11L.masked_fill_(~seen_RL, blocked)[:, None, None]
        hidden_RD = base.decoder(
            inputs_embeds=base.model.get_input_embeddings()(self.token_R[:rows, None]),
            attention_mask=mask_R11L,
            position_ids=rope_positions(self.position_CR[:, :rows, None]),
            use_cache=True,
            **{base.cache_argument: cache},
        ).last_hidden_state[:, 0]
        uniform_R = self.uniform_RT[:rows].gather(1, count_R[:, None])[:, 0]
        token_R, logp_R = draw(base.head_weight_VD, base.ban_bias_V, hidden_RD, uniform_R, self.sampling)
        self.token_R[:rows] = token_R
        self.logp_R[:rows] = logp_R
        self.position_CR[:, :rows] += 1
        # rows without an answer stay within their slot
        length_R.add_(1).clamp_(max=cache.keys.shape[3] - 1)
        count_R.add_(1).clamp_(max=self.sampling.max_new_tokens - 1)


def _read(token_R: Tensor, logp_R: Tensor) -> list[tuple[int, float]]:
    """One transfer for both; float64 holds either without loss."""
    tokens, logps = torch.stack([token_R.double(), logp_R.double()]).tolist()
    return [(int(token), logp) for token, logp in zip(tokens, logps, strict=True)]
