"""The queue of answers and the slots they pass through.

Shapes: A answers, P prompts prefilled together, R slots, S prompt positions, C channels of a position, D width,
T new tokens.
"""

import contextlib
import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .. import ranks
from ..model.inputs import Sequence, collate, decode
from ..model.memory import halving
from ..model.roles import ActiveRole
from ..model.text import decode_answer
from ..phases import phase
from .dense import dense_copy
from .sampling import Sampling, Trajectory, uniforms
from .slots import SlotCache, slot_length
from .step import DecodeStep

log = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # positions of the prompts prefilled together; their keys and values wait beside the slots


@torch.no_grad()
def sample(
    role: ActiveRole,
    prompts: Seq[Sequence],
    sampling: Sampling,
    *,
    seeds: Seq[int],
    per_prompt: int = 1,
    batch_size: int = 64,
    dense: bool | str | None = None,
    graph: bool | None = None,
) -> list[Trajectory]:
    """Draw `per_prompt` answers to every prompt; answer j of prompt i uses seeds[i * per_prompt + j].

    Returns len(prompts) * per_prompt trajectories, those of one prompt next to each other. `batch_size` counts the
    answers in flight; where they do not fit into memory, half as many are tried, and so on.
    `dense` computes with a dense copy of the linears ("attention": of some; see `dense.py`), "auto" on a CPU only;
    None: as `model.dense_rollouts` has it.
    `graph` runs every step over all slots, captured on a GPU (None: on a GPU only).
    Raises ValueError when seeds and answers differ in number, what torch raises when not even one slot fits.
    """
    if len(seeds) != len(prompts) * per_prompt:
        raise ValueError(f"sample: {len(seeds)} seeds for {len(prompts)} prompts x {per_prompt} answers.")
    base = role.roles.base
    on_gpu = base.device.type == "cuda"
    graph = on_gpu if graph is None else graph
    dense = base.dense_rollouts if dense is None else dense
    dense = not on_gpu if dense == "auto" else dense
    slots = min(batch_size, len(seeds))
    with dense_copy(role, dense == "attention") if dense else contextlib.nullcontext():
        if not slots:
            return []
        draw = lambda slots: Rollout(role, prompts, sampling, seeds, per_prompt, slots, graph).run()
        say = "%d answers in flight do not fit (%s): going on with %d."
        found, _ = halving(slots, draw, lambda slots, reason: log.warning(say, slots, reason, slots // 2))
        return found


def greedy_texts(role: ActiveRole, prompts: Seq[Sequence], max_new_tokens: int, batch_size: int) -> list[str]:
    """The likeliest answer to every prompt, as text."""
    sampling = Sampling(max_new_tokens, temperature=0.0)
    found = sample(role, prompts, sampling, seeds=[0] * len(prompts), batch_size=batch_size)
    return [decode_answer(role.roles.base, answer.ids) for answer in found]


def sample_together(
    role: ActiveRole,
    prompts: int,
    prompt_of: Callable[[int], Sequence],
    sampling: Sampling,
    *,
    seeds: Seq[int],
    per_prompt: int = 1,
    batch_size: int = 64,
) -> list[Trajectory]:
    """As `sample`, by all ranks: each answers its share of the prompts, and has all answers in the end. `prompt_of(i)`
    lays out prompt i, on the rank that answers it."""

    def answer(own: list[int]) -> list[list[Trajectory]]:
        rows = [prompt_of(i) for i in own]
        drawn = [seeds[i * per_prompt + j] for i in own for j in range(per_prompt)]
        found = sample(role, rows, sampling, seeds=drawn, per_prompt=per_prompt, batch_size=batch_size)
        return [
            [each._replace(prompt=i) for each in found[at * per_prompt : (at + 1) * per_prompt]]
            for at, i in enumerate(own)
        ]

    return [each for found in ranks.spread(range(prompts), answer) for each in found]


class Prefilled(NamedTuple):
    """Prompts whose keys and values are known, and whose answers wait for slots."""

    first: int  # number of the first of them
    end: int  # and of the one after the last
    cache: Cache
    hidden_PD: Tensor  # at each prompt's last token
    next_position_CP: Tensor


class Rollout:
    """One call of `sample`. Answers are numbered in the order of the seeds, and enter the slots in this order."""

    def __init__(
        self,
        role: ActiveRole,
        prompts: Seq[Sequence],
        sampling: Sampling,
        seeds: Seq[int],
        per_prompt: int,
        slots: int,
        graph: bool,
    ):
        base = role.roles.base
        length = slot_length(max(len(p.ids_S) for p in prompts), sampling.max_new_tokens)
        cache = SlotCache(base.decoder.config, slots, length, base.dtype, base.device)
        self.base = base
        self.prompts = prompts
        self.sampling = sampling
        self.per_prompt = per_prompt
        self.uniform_AT = uniforms(seeds, sampling.max_new_tokens).to(base.device)
        self.step = DecodeStep(base, cache, sampling, len(prompts[0].position_CS), fixed=graph)
        self.drawn: list[list[tuple[int, float]]] = [[] for _ in seeds]  # (token, logp) of each answer
        self.owner: list[int | None] = [None] * slots  # the answer in each slot
        self.queued = 0  # next answer to enter a slot
        self.prefilled: Prefilled | None = None

    def run(self) -> list[Trajectory]:
        while self._refill():
            busy = [row for row, answer in enumerate(self.owner) if answer is not None]
            with phase("decode", len(busy)):
                found = self.step.run(busy[-1] + 1, max(self._length(row) for row in busy))
            for row in busy:
                self._append(row, found[row])
        out = []
        for answer, pairs in enumerate(self.drawn):
            ids, logp = map(list, zip(*pairs, strict=True))
            out.append(Trajectory(answer // self.per_prompt, ids, ids[-1] == self.base.eos_id, logp))
        return out

    def _refill(self) -> bool:
        """Let queued answers into free slots, or else close the gaps; false when nothing is left to decode."""
        while self.queued < len(self.drawn) and None in self.owner:
            self._enter([row for row, answer in enumerate(self.owner) if answer is None])
        if not self.step.fixed:
            self._close_gaps()
        return any(answer is not None for answer in self.owner)

    def _enter(self, free: list[int]) -> None:
        """Start as many answers as there are free slots and prefilled prompts."""
        if self.prefilled is None or self.queued == self.prefilled.end * self.per_prompt:
            self.prefilled = None  # free the memory first
            self.prefilled = self._prefill(self.queued // self.per_prompt)
        ready = self.prefilled
        answers = range(self.queued, min(self.queued + len(free), ready.end * self.per_prompt))
        rows = free[: len(answers)]
        prompts = [answer // self.per_prompt for answer in answers]
        source = [prompt - ready.first for prompt in prompts]
        uniform_RT = self.uniform_AT[answers.start : answers.stop]
        with phase("fill slots", len(rows)):
            self.step.cache.fill(rows, ready.cache, source, [len(self.prompts[prompt].ids_S) for prompt in prompts])
            found = self.step.start(rows, ready.hidden_PD[source], ready.next_position_CP[:, source], uniform_RT)
        for row, answer, pair in zip(rows, answers, found, strict=True):
            self.owner[row] = answer
            self._append(row, pair)
        self.queued = answers.stop

    def _prefill(self, first: int) -> Prefilled:
        """Run the decoder over the next prompts, padded on the right among themselves; slots take no padding over."""
        end, widest = first, 0
        while end < len(self.prompts):
            widest = max(widest, len(self.prompts[end].ids_S))
            if end > first and (
                widest * (end + 1 - first) > PREFILL_TOKENS or (end - first) * self.per_prompt >= len(self.owner)
            ):
                break
            end += 1
        rows = self.prompts[first:end]
        cache = DynamicCache()
        batch = collate(self.base, rows)
        with phase("prefill", batch.ids_BS.numel()):
            hidden_PSD = decode(self.base, batch, cache)
        last_P = batch.mask_BS.sum(1) - 1
        next_position_CP = torch.stack([row.next_position_C for row in rows], 1).to(self.base.device)
        hidden_PD = hidden_PSD[torch.arange(len(rows), device=last_P.device), last_P]
        return Prefilled(first, end, cache, hidden_PD, next_position_CP)

    def _append(self, row: int, pair: tuple[int, float]) -> None:
        """Add a token to the answer in a slot; at its end the slot becomes free."""
        drawn = self.drawn[self.owner[row]]
        drawn.append(pair)
        if pair[0] == self.base.eos_id or len(drawn) == self.sampling.max_new_tokens:
            self.owner[row] = None

    def _close_gaps(self) -> None:
        """Move the last answers into the free slots before them, so that the step runs over no empty row."""
        busy = [row for row, answer in enumerate(self.owner) if answer is not None]
        gaps = [row for row in range(len(busy)) if self.owner[row] is None]
        if gaps:
            movers = busy[-len(gaps) :]
            self.step.move(movers, gaps)
            for row, to in zip(movers, gaps, strict=True):
                self.owner[to], self.owner[row] = self.owner[row], None

    def _length(self, row: int) -> int:
        """Tokens that the next step finds in a slot: the prompt and all of the answer but its last token."""
        answer = self.owner[row]
        return len(self.prompts[answer // self.per_prompt].ids_S) + len(self.drawn[answer]) - 1
