"""Where text and video meet: messages and cached features become one batch of embeddings with explicit positions.

A video's placeholder in the text becomes as many positions as the video has tokens AFTER pruning, but the positions
are those of the unpruned layout: a pruned sequence is then exactly the full one with the dropped tokens masked out.
Batches are padded on the right; with causal attention no real token ever sees the padding.

A sequence may end in branches: several continuations of one prefix that do not see each other and all start at the
position right after the prefix, and a closing part that sees everything. It is how many claims are asked about one
video in a single forward, and how two responses are compared without one of them coming first.

Shapes: B rows, S positions, K video tokens, D width.
"""

from typing import NamedTuple, Sequence as Seq

import torch
from torch import Tensor

from ..data.records import Message
from ..errors import ModelError
from ..video.cache import FeatureRecord
from .base import Base

VIDEO_MARK = "<video>"
BRANCH_MARK = "<|>"  # in a message: prefix <|> branch <|> branch <|> closing
CLOSING = -1  # group of the tokens that see every branch
IGNORE = -100


class Sequence(NamedTuple):
    """One row before padding."""

    ids_S: list[int]
    position_S: list[int]
    features_KD: Tensor | None  # the video's tokens; as many as ids_S has placeholders
    next_position: int  # position of the token that would follow
    group_S: list[int] | None = None  # branch of each token: 0 prefix, 1.. branches, CLOSING; None = no branches

    def extend(self, ids: Seq[int]) -> "Sequence":
        """The same row with `ids` appended; after branches they see everything, as the closing part does."""
        end = self.next_position + len(ids)
        groups = None if self.group_S is None else self.group_S + [CLOSING] * len(ids)
        positions = self.position_S + list(range(self.next_position, end))
        return Sequence(self.ids_S + list(ids), positions, self.features_KD, end, groups)


class Batch(NamedTuple):
    """Rows padded on the right."""

    ids_BS: Tensor  # int64
    mask_BS: Tensor  # bool, true on real tokens
    position_BS: Tensor  # int64
    attention: Tensor  # (B,S) bool, or (B,1,S,S) additive when a row has branches
    features: list[Tensor]  # features_KD of the rows that have a video, in order

    def embed(self, base: Base) -> Tensor:
        """Token embeddings with the videos' features in their places -> embeds_BSD."""
        embeds_BSD = base.model.get_input_embeddings()(self.ids_BS)
        place_BS = self.ids_BS == base.placeholder_id
        if not self.features:
            return embeds_BSD
        features_ND = torch.cat(self.features).to(embeds_BSD.device, embeds_BSD.dtype)
        return embeds_BSD.masked_scatter(place_BS[..., None], features_ND)


def encode_prompt(base: Base, messages: Seq[Message], video: FeatureRecord | None) -> Sequence:
    """Apply the tokenizer's chat template, up to where the assistant speaks, and put the video's tokens in.

    `<video>` in a message marks the place; two or more `<|>` make branches (see the module). Raises ModelError when a
    video is given but not marked, or marked but not given: a placeholder that reaches a forward without features
    would silently be read as a word.
    """
    text = base.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    head, *parts = text.split(BRANCH_MARK)
    if not parts:
        return place_video(base, base.tokenizer.encode(text, add_special_tokens=False), video, text)
    prefix = place_video(base, base.tokenizer.encode(head.rstrip(), add_special_tokens=False), video, text)
    *branches, closing = [encode_text(base, part.lstrip() if part is parts[-1] else part.strip()) for part in parts]
    return branch(prefix, branches, closing)


def split_prompt(base: Base, content: str, video: FeatureRecord | None) -> tuple[Sequence, list[int]]:
    """A user message with ONE `<|>` at its end -> (the row up to the mark, the ids of the template's rest).

    For several continuations of one prefix, each to be ended by the same rest (see `judge.claims`)."""
    text = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    head, tail = text.split(BRANCH_MARK)
    prefix = place_video(base, base.tokenizer.encode(head.rstrip(), add_special_tokens=False), video, text)
    return prefix, encode_text(base, tail.lstrip())


def place_video(base: Base, ids: list[int], video: FeatureRecord | None, text: str) -> Sequence:
    """Token ids with at most one placeholder -> a row with the video's tokens in its place."""
    marks = ids.count(base.placeholder_id)
    if marks != (video is not None):
        raise ModelError(
            f"The prompt marks {marks} videos with `{VIDEO_MARK}` and {int(video is not None)} was given: {text[:200]!r}. "
            "Write `<video>` exactly once in the first user message of a record that has a video."
        )
    if video is None:
        return Sequence(list(ids), list(range(len(ids))), None, len(ids))
    at = ids.index(base.placeholder_id)
    tokens = video.features_KD.shape[0]
    after = at + video.layout_tokens
    tail = len(ids) - at - 1
    return Sequence(
        ids_S=ids[:at] + [base.placeholder_id] * tokens + ids[at + 1 :],
        position_S=[*range(at), *(at + video.position_K).tolist(), *range(after, after + tail)],
        features_KD=video.features_KD,
        next_position=after + tail,
    )


def encode_text(base: Base, text: str) -> list[int]:
    """Plain text -> ids, without special tokens; refuses a text that holds the video's placeholder."""
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    if base.placeholder_id in ids:
        raise ModelError(
            f"A text holds the video placeholder: {text[:200]!r}. Remove it: only prompts may mark a video."
        )
    return ids


def encode_answer(base: Base, text: str) -> list[int]:
    """An answer -> ids, ended by EOS."""
    return [*encode_text(base, text), base.eos_id]


def decode_answer(base: Base, ids: Seq[int]) -> str:
    """Ids of an answer -> text, without EOS."""
    return base.tokenizer.decode([i for i in ids if i != base.eos_id], clean_up_tokenization_spaces=False).strip()


def branch(prefix: Sequence, branches: Seq[Seq[int]], closing: Seq[int] = ()) -> Sequence:
    """A row of one prefix, several branches that do not see each other, and a closing part that sees all of it."""
    ids, positions, groups = list(prefix.ids_S), list(prefix.position_S), [0] * len(prefix.ids_S)
    start = end = prefix.next_position
    for number, tokens in enumerate(branches, start=1):
        ids += tokens
        positions += range(start, start + len(tokens))
        groups += [number] * len(tokens)
        end = max(end, start + len(tokens))
    ids += closing
    positions += range(end, end + len(closing))
    groups += [CLOSING] * len(closing)
    return Sequence(ids, positions, prefix.features_KD, end + len(closing), groups)


def collate(base: Base, rows: Seq[Sequence], length: int | None = None) -> Batch:
    """Pad rows on the right to the longest (or to `length`) and move them to the base's device."""
    length = max(len(row.ids_S) for row in rows) if length is None else length
    pad = base.tokenizer.pad_token_id
    ids_BS = torch.tensor([row.ids_S + [pad] * (length - len(row.ids_S)) for row in rows])
    position_BS = torch.tensor([row.position_S + [0] * (length - len(row.position_S)) for row in rows])
    mask_BS = torch.arange(length)[None] < torch.tensor([len(row.ids_S) for row in rows])[:, None]
    attention = mask_BS if all(row.group_S is None for row in rows) else _branched_attention(rows, mask_BS, base.dtype)
    features = [row.features_KD for row in rows if row.features_KD is not None]
    device = base.device
    return Batch(ids_BS.to(device), mask_BS.to(device), position_BS.to(device), attention.to(device), features)


def _branched_attention(rows: Seq[Sequence], mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention (B,1,S,S): causal; a branch sees the prefix and itself; the closing part sees everything."""
    length = mask_BS.shape[1]
    groups_BS = torch.tensor([(row.group_S or [0] * len(row.ids_S)) + [0] * (length - len(row.ids_S)) for row in rows])
    query_BS1, key_B1S = groups_BS[:, :, None], groups_BS[:, None, :]
    allowed_BSS = (key_B1S == 0) | (key_B1S == query_BS1) | (query_BS1 == CLOSING)
    allowed_BSS &= torch.ones(length, length, dtype=torch.bool).tril()
    allowed_BSS &= mask_BS[:, None, :] | torch.eye(length, dtype=torch.bool)
    blocked = torch.finfo(dtype).min
    return torch.zeros(allowed_BSS.shape, dtype=dtype).masked_fill_(~allowed_BSS, blocked)[:, None]


def target_rows(rows: Seq[Sequence], answers: Seq[Seq[int]], length: int) -> Tensor:
    """Next-token targets_BS for answers that END their rows: the token before each answer token predicts it.

    Everything else is IGNORE. `rows` hold the answers already (see `Sequence.extend`).
    """
    targets_BS = torch.full((len(rows), length), IGNORE)
    for b, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        start = len(row.ids_S) - len(answer)
        targets_BS[b, start - 1 : start - 1 + len(answer)] = torch.tensor(answer)
    return targets_BS
