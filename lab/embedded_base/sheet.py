"""Sheets: many tasks about one video packed into one row, each exactly as if it stood alone.

A sheet is a tree of segments. The root is `<s>` and the video; a context may follow; questions, claims and answers to
be checked branch off. A segment attends to its ancestors and, causally, to itself, and its positions go on where its
last ancestor ended, so every path through the tree is the same sequence to the model as the path alone. One forward
over a video of 24 tokens then trains a dozen tasks instead of one. The parallel layout of the pairwise judge is the
same thing with one segment that has two branches for parents.

B sheets, L columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lab.embedded_base.architecture import TOKENS_PER_FRAME, VOCABULARY

VIEW_FRAMES = 6
VIDEO_TOKENS = VIEW_FRAMES * TOKENS_PER_FRAME
NUMBER = {word: index for index, word in enumerate(VOCABULARY)}
MASKED = -1e9


def encode(text: str) -> list[int]:
    """Token ids of white-space separated words; KeyError on a word that is not in the vocabulary."""
    return [NUMBER[word] for word in text.split()]


class Span(NamedTuple):
    """Columns of one task's answer, to measure a skill."""

    kind: str  # name of the skill
    row: int
    columns: range  # columns whose OUTPUT is the answer


class Letter(NamedTuple):
    """The place where a pairwise verdict is read."""

    row: int
    column: int
    margin: int  # score(A) - score(B)
    order: int  # 0 as drawn, 1 swapped; the pair's two letters follow each other


class View(NamedTuple):
    """Frames of a video at a place in a sheet."""

    row: int
    column: int  # first of VIDEO_TOKENS columns
    video: int
    frames: tuple[int, ...]


class Batch(NamedTuple):
    """Sheets as tensors."""

    tokens_BL: torch.Tensor
    positions_BL: torch.Tensor
    mask_B1LL: torch.Tensor  # float32, additive
    target_BL: torch.Tensor  # token that the output of a column shall be
    weight_BL: torch.Tensor  # float32; 0 = no target
    verdict_BL: torch.Tensor  # inside a pair: 1 true, 0 false, -1 no attribute word
    vote_BL: torch.Tensor  # inside a pair: float32 probability that this word speaks for A; -1 no attribute word
    views: list[View]
    letters: list[Letter]
    spans: list[Span]


class Sheet:
    """One row under construction."""

    def __init__(self, length: int):
        self.length = length
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segment: list[int] = []
        self.target = np.zeros(length, np.int64)
        self.weight = np.zeros(length, np.float32)
        self.verdict = np.full(length, -1, np.int64)
        self.vote = np.full(length, -1, np.float32)
        self.ancestors: list[tuple[int, ...]] = []  # per segment, itself included
        self.ends: list[int] = []  # per segment, the position after its last token
        self.views: list[tuple[int, int, tuple[int, ...]]] = []
        self.letters: list[tuple[int, int, int]] = []
        self.spans: list[tuple[str, range]] = []

    @property
    def room(self) -> int:
        return self.length - len(self.tokens)

    def add(self, tokens: list[int], parents: tuple[int, ...] = ()) -> tuple[int, int]:
        """Appends a segment below `parents`; returns its number and its first column."""
        if len(tokens) > self.room:
            raise ValueError(
                f"a segment of {len(tokens)} tokens does not fit into the {self.room} free columns of the sheet"
            )
        number, column = len(self.ends), len(self.tokens)
        start = max((self.ends[p] for p in parents), default=0)
        self.tokens += tokens
        self.positions += range(start, start + len(tokens))
        self.segment += [number] * len(tokens)
        self.ancestors.append(tuple({a for p in parents for a in self.ancestors[p]} | {number}))
        self.ends.append(start + len(tokens))
        return number, column

    def root(self, video: int | None, frames: tuple[int, ...] = ()) -> int:
        """`<s>` and, where `video` is given, its visual tokens."""
        number, column = self.add([NUMBER["<s>"]] + [NUMBER["<video>"]] * (0 if video is None else VIDEO_TOKENS))
        if video is not None:
            self.views.append((column + 1, video, frames))
        return number

    def text(self, text: str, parent: int, weight: float = 0.0) -> int:
        """Plain words; `weight` > 0 also predicts each from the one before."""
        tokens = encode(text)
        number, column = self.add(tokens, (parent,))
        self.aim(column, tokens[1:], weight)
        return number

    def aim(self, column: int, targets: list[int], weight: float | list[float]) -> None:
        """Sets what the outputs from `column` on shall be."""
        self.target[column : column + len(targets)] = targets
        self.weight[column : column + len(targets)] = weight

    def ask(
        self, kind: str, prompt: str, answer: str, parent: int, prompt_weight: float = 0.0, weight: float = 1.0
    ) -> None:
        """A prompt and its answer: the first answer word weighs `weight`, a closing `.` and `</s>` a tenth of it."""
        before, after = encode(prompt) + [NUMBER["<ans>"]], encode(answer) + [NUMBER["</s>"]]
        _, column = self.add(before + after, (parent,))
        self.aim(column, before[1:-1], prompt_weight)
        small = [weight * (0.1 if token in (NUMBER["."], NUMBER["</s>"]) else 1.0) for token in after]
        self.aim(column + len(before) - 1, after, small)
        self.spans.append((kind, range(column + len(before) - 1, column + len(before) - 1 + len(after))))

    def check(self, kind: str, answer: str, labels: list[str], parent: int, dash_weight: float = 0.1) -> None:
        """`response : <ans> answer </s>`, whose outputs are verdicts: yes/no at attribute words, `-` elsewhere."""
        before, after = encode("response : <ans>"), encode(answer) + [NUMBER["</s>"]]
        _, column = self.add(before + after, (parent,))
        words = labels + ["-"]
        self.aim(column + len(before), [NUMBER[w] for w in words], [dash_weight if w == "-" else 1.0 for w in words])
        self.spans.append((kind, range(column + len(before), column + len(before) + len(after))))

    def branch(self, letter: str, answer: str, labels: list[str], parent: int, weight: float) -> int:
        """One of the two responses of a pair."""
        tokens = encode(f"response {letter} : {answer}")
        number, column = self.add(tokens, (parent,))
        self.aim(column, tokens[1:], weight)
        sign = 1 if letter == "A" else -1
        for offset, label in enumerate(labels, column + 3):
            if label != "-":
                value = 1 if label == "yes" else -1
                self.verdict[offset] = value > 0
                self.vote[offset] = 1 / (1 + np.exp(-1.5 * sign * value))
        return number

    def better(self, branches: tuple[int, int], margin: int, order: int) -> None:
        """The closing question of a pair: below both branches, its verdict is read at `<ans>`."""
        _, column = self.add(encode("better ? <ans>"), branches)
        self.letters.append((column + 2, margin, order))


def collate(sheets: list[Sheet]) -> Batch:
    """Stacks sheets of one length. Unused columns attend to themselves only."""
    length = sheets[0].length
    shape = (len(sheets), length)
    tokens, positions = np.full(shape, NUMBER["<pad>"], np.int64), np.zeros(shape, np.int64)
    allowed = np.zeros((*shape, length), bool)
    for row, sheet in enumerate(sheets):
        used = len(sheet.tokens)
        tokens[row, :used], positions[row, :used] = sheet.tokens, sheet.positions
        below = np.zeros((len(sheet.ends), len(sheet.ends)), bool)
        for number, ancestors in enumerate(sheet.ancestors):
            below[number, list(ancestors)] = True
        segment = np.asarray(sheet.segment)
        allowed[row, :used, :used] = below[segment[:, None], segment[None, :]]
    allowed &= np.tri(length, dtype=bool)
    allowed |= np.eye(length, dtype=bool)
    mask = torch.from_numpy(np.where(allowed, np.float32(0), np.float32(MASKED)))
    stack = lambda name: torch.from_numpy(np.stack([getattr(sheet, name) for sheet in sheets]))  # noqa: E731
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(positions),
        mask[:, None],
        stack("target"),
        stack("weight"),
        stack("verdict"),
        stack("vote"),
        [View(row, *view) for row, sheet in enumerate(sheets) for view in sheet.views],
        [Letter(row, *letter) for row, sheet in enumerate(sheets) for letter in sheet.letters],
        [Span(kind, row, columns) for row, sheet in enumerate(sheets) for kind, columns in sheet.spans],
    )
