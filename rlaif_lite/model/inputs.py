"""Where text and video meet: messages and cached features become one batch of embeddings with explicit positions.

A video's placeholder in the text becomes as many positions as the video has tokens AFTER pruning, but the positions
are those of the unpruned layout: a pruned sequence is then exactly the full one with the dropped tokens masked out.
Batches are padded on the right; with causal attention no real token ever sees the padding.

Positions have C channels: one, or four where the rope is three-dimensional (mrope). The first of the four counts
tokens, for the causal mask; the other three are time, row and column, where a text token has the same number in each.

A sequence may end in branches: several continuations of one prefix that do not see each other and all start at the
position right after the prefix, and a closing part that sees everything. It is how many claims are asked about one
video in a single forward, and how two responses are compared without one of them coming first.

`decode` is the one door to the decoder.

Shapes: B rows, S positions, C channels of a position, K video tokens, R runs of video tokens, D width, L deepstack
layers.
"""

import re
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from ..data.records import Message
from ..errors import ModelError
from ..video.cache import FeatureRecord
from .base import Base
from .text import RUNNING, Opening, encode_after, encode_start, write_prompt

BRANCH_MARK = "<|>"  # in a message: prefix <|> branch <|> branch <|> closing
MARK_WITH_BLANKS = re.compile(rf" *{re.escape(BRANCH_MARK)} *")
CLOSING = -1  # group of the tokens that see every branch
IGNORE = -100  # target of a position that predicts nothing
ALIGNED = 8  # values, see `_branched_attention`


class Sequence(NamedTuple):
    """One row before padding."""

    ids_S: list[int]
    position_CS: Tensor  # int64
    features_KD: Tensor | None  # the video's tokens; as many as ids_S has placeholders
    next_position_C: Tensor  # int64, of the token that would follow; each further one is 1 more in every channel
    group_S: list[int] | None = None  # branch of each token: 0 prefix, 1.. branches, CLOSING; None = no branches
    deepstack_LKD: Tensor | None = None  # what a deepstack family adds to the video's tokens after its first layers
    opening: Opening = RUNNING  # where an answer begins, for `text.encode_answer`

    def extend(self, ids: Seq[int]) -> "Sequence":
        """The same row with `ids` appended; after branches they see everything, as the closing part does."""
        return self._replace(
            ids_S=self.ids_S + list(ids),
            position_CS=torch.cat([self.position_CS, _count_on(self.next_position_C, len(ids))], 1),
            next_position_C=self.next_position_C + len(ids),
            group_S=None if self.group_S is None else self.group_S + [CLOSING] * len(ids),
        )


def _count_on(start_C: Tensor, count: int) -> Tensor:
    """Positions of `count` text tokens from `start_C` on -> (C,count)."""
    return start_C[:, None] + torch.arange(count)


class Batch(NamedTuple):
    """Rows padded on the right."""

    ids_BS: Tensor  # int64
    mask_BS: Tensor  # bool, true on real tokens
    position_CBS: Tensor  # int64
    attention: Tensor  # (B,S) of ones, or (B,1,S,S) additive when a row has branches
    features: list[Tensor]  # features_KD of the rows that have a video, in order
    deepstack: list[Tensor]  # their deepstack_LKD, where the family has it

    def embed(self, base: Base) -> Tensor:
        """Token embeddings with the videos' features in their places -> embeds_BSD."""
        embeds_BSD = base.model.get_input_embeddings()(self.ids_BS)
        place_BS = self.ids_BS == base.placeholder_id
        if not self.features:
            return embeds_BSD
        features_ND = torch.cat(self.features).to(embeds_BSD.device, embeds_BSD.dtype)
        return embeds_BSD.masked_scatter(place_BS[..., None], features_ND)


def decode(base: Base, batch: Batch, cache: Cache | None = None) -> Tensor:
    """Run the decoder over a batch -> hidden_BSD after its final norm; `cache` is filled with the keys and values."""
    embeds_BSD = batch.embed(base)
    deepstack = {}
    if batch.deepstack:
        layers_LND = torch.cat(batch.deepstack, 1).to(embeds_BSD.device, embeds_BSD.dtype)
        place_BS = batch.ids_BS == base.placeholder_id
        deepstack = {"visual_pos_masks": place_BS, "deepstack_visual_embeds": list(layers_LND)}
    return base.decoder(
        inputs_embeds=embeds_BSD,
        attention_mask=batch.attention,
        position_ids=rope_positions(batch.position_CBS),
        use_cache=cache is not None,
        **{base.cache_argument: cache},
        **deepstack,
    ).last_hidden_state


def rope_positions(position_CBS: Tensor) -> Tensor:
    """`position_ids` as transformers' decoders take them: (B,S), or (4,B,S) for mrope."""
    return position_CBS[0] if len(position_CBS) == 1 else position_CBS


def encode_prompt(base: Base, messages: Seq[Message], video: FeatureRecord | None) -> Sequence:
    """Apply the base's chat template, up to where the assistant speaks, and put the video's tokens in.

    `<video>` in a message marks the place, and the family's own layout of a video takes it; two or more `<|>` make
    branches (see the module). Raises ModelError when a video is given but not marked, or marked but not given: a
    placeholder that reaches a forward without features would silently be read as a word.
    """
    text, opening = write_prompt(base, messages, video)
    # a blank next to a mark belongs to the text after it, as it does in a tokenizer's words
    head, *parts = MARK_WITH_BLANKS.sub(lambda m: BRANCH_MARK + " " * (m[0] != BRANCH_MARK), text).split(BRANCH_MARK)
    row = place_video(base, encode_start(base, head), video, text)
    if parts:
        branches = [encode_after(base, head, part) for part in parts[:-1]]
        row = branch(row, branches, encode_after(base, [head, *parts][-2], parts[-1]))
    return row._replace(opening=opening)


class SplitPrompt(NamedTuple):
    """A prompt for several continuations of one prefix, each ended by the same rest of the template."""

    prefix: Sequence
    before: str  # the prefix's text
    joint: str  # the blank before a continuation
    rest: str  # the template's text after it
    opening: Opening  # where the answer to each begins

    def branch(self, base: Base, text: str) -> list[int]:
        """The ids of one continuation, with the template's rest."""
        return encode_after(base, self.before, self.joint + text + self.rest)


def split_prompt(base: Base, content: str, video: FeatureRecord | None) -> SplitPrompt:
    """A user message with ONE `<|>` at its end, split there (see `judge.claims`)."""
    text, opening = write_prompt(base, [Message("user", content)], video)
    head, rest = text.split(BRANCH_MARK)
    before = head.rstrip(" ")
    return SplitPrompt(
        place_video(base, encode_start(base, before), video, text), before, head[len(before) :], rest, opening
    )


def place_video(base: Base, ids: list[int], video: FeatureRecord | None, text: str) -> Sequence:
    """Ids with one placeholder for each run of the video's tokens -> a row with the tokens in their places."""
    runs = 0 if video is None else len(video.kept_R)
    if ids.count(base.placeholder_id) != runs:
        raise ModelError(
            f"The prompt holds {ids.count(base.placeholder_id)} video placeholders, the video's layout has {runs}: "
            f"{text[:200]!r}. Remove the placeholder from the text, or give the base its own chat template "
            f"(`model.chat_template: null`)."
        )
    sizes = iter(()) if video is None else zip(video.kept_R.tolist(), video.span_R.tolist(), strict=True)
    ids_S: list[int] = []
    at_C1 = torch.zeros(3 if base.family.mrope else 1, 1, dtype=torch.int64)
    parts, used = [], 0
    for token in ids:
        if token != base.placeholder_id:
            ids_S.append(token)
            parts.append(at_C1)
            at_C1 = at_C1 + 1
        else:
            kept, span = next(sizes)
            ids_S += [token] * kept
            parts.append(at_C1 + video.position_CK[:, used : used + kept])
            used, at_C1 = used + kept, at_C1 + span
    position_CS, next_C = torch.cat(parts, 1), at_C1[:, 0]
    if base.family.mrope:
        position_CS = torch.cat([torch.arange(len(ids_S))[None], position_CS])
        next_C = torch.cat([torch.tensor([len(ids_S)]), next_C])
    if video is None:
        return Sequence(ids_S, position_CS, None, next_C)
    return Sequence(ids_S, position_CS, video.features_KD, next_C, deepstack_LKD=video.deepstack_LKD)


def branch(prefix: Sequence, branches: Seq[Seq[int]], closing: Seq[int] = ()) -> Sequence:
    """A row of one prefix, several branches that do not see each other, and a closing part that sees all of it."""
    ids, groups, positions = list(prefix.ids_S), [0] * len(prefix.ids_S), [prefix.position_CS]
    for number, tokens in enumerate(branches, start=1):
        ids += tokens
        positions.append(_count_on(prefix.next_position_C, len(tokens)))
        groups += [number] * len(tokens)
    end_C = prefix.next_position_C + max(map(len, branches), default=0)
    ids += closing
    groups += [CLOSING] * len(closing)
    positions.append(_count_on(end_C, len(closing)))
    return prefix._replace(
        ids_S=ids, position_CS=torch.cat(positions, 1), next_position_C=end_C + len(closing), group_S=groups
    )


def collate(base: Base, rows: Seq[Sequence], length: int | None = None) -> Batch:
    """Pad rows on the right to the longest (or to `length`) and move them to the base's device."""
    length = max(len(row.ids_S) for row in rows) if length is None else length
    pad = base.eos_id if base.tokenizer.pad_token_id is None else base.tokenizer.pad_token_id
    ids_BS = torch.tensor([row.ids_S + [pad] * (length - len(row.ids_S)) for row in rows])
    position_CBS = torch.zeros(len(rows[0].position_CS), len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        position_CBS[:, b, : len(row.ids_S)] = row.position_CS
    mask_BS = torch.arange(length)[None] < torch.tensor([len(row.ids_S) for row in rows])[:, None]
    features = [row.features_KD for row in rows if row.features_KD is not None]
    deepstack = [row.deepstack_LKD for row in rows if row.deepstack_LKD is not None]
    on = base.device
    ids_BS, mask_BS, position_CBS = ids_BS.to(on), mask_BS.to(on), position_CBS.to(on)
    # Padding is on the right and attention is causal, so no mask is needed. None would not do: where positions have
    # gaps, as after pruning, transformers takes it for a sign of packed sequences. It drops a mask of ones.
    attention = torch.ones_like(mask_BS)
    if any(row.group_S is not None for row in rows):
        attention = _branched_attention(rows, length, base)
    return Batch(ids_BS, mask_BS, position_CBS, attention, features, deepstack)


def _branched_attention(rows: Seq[Sequence], length: int, base: Base) -> Tensor:
    """Additive attention (B,1,S,S): causal; a branch sees the prefix and itself; the closing part sees everything."""
    groups_BS = torch.tensor([(row.group_S or [0] * len(row.ids_S)) + [0] * (length - len(row.ids_S)) for row in rows])
    groups_BS, place_S = groups_BS.to(base.device), torch.arange(length, device=base.device)
    query_BS1, key_B1S = groups_BS[:, :, None], groups_BS[:, None, :]
    allowed_BSS = (key_B1S == 0) | (key_B1S == query_BS1) | (query_BS1 == CLOSING)
    allowed_BSS &= place_S[:, None] >= place_S  # which also hides the padding, as it is on the right
    blocked = torch.finfo(base.dtype).min
    # Rows begin at multiples of 8 values. Of others torch's attention on a GPU makes a copy, in every layer, and
    # keeps each for the backward.
    aligned = length + -length % ALIGNED
    attention_BSS = torch.zeros(len(rows), length, aligned, dtype=base.dtype, device=base.device)[..., :length]
    return attention_BSS.masked_fill_(~allowed_BSS, blocked)[:, None]
