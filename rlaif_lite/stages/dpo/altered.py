"""VDPO's pairs (PaMi-VDPO, arXiv 2504.05810): one answer, preferred on its own video to the same answer on an altered
one. Nothing is sampled and nobody judges.

The answers are those of the records of `data.preference`. The altered video has its frames shuffled, reversed or
dropped, or is another record's; `dpo.altered` lists which, and each pair draws one of them. Held out, the score is the
share of records whose answer is likelier on its own video.
"""

import random
from typing import NamedTuple

import torch

from ...data.records import Record
from ...errors import DataError
from ...files import by_batches, chunks
from ...model.answers import Group
from ...model.inputs import Sequence, encode_prompt
from ...model.memory import in_pieces
from ...model.text import encode_answer
from ...rollout.score import answer_logps
from ...workspace import Workspace


class OtherVideo(NamedTuple):
    """What the rejected answer of a pair reads in place of the record's video."""

    record: Record  # whose video
    kind: str  # how it is altered; "" for another record's as it is


def altered_prompts(work: Workspace, record: Record, other: OtherVideo) -> tuple[Sequence, Sequence]:
    """(the record's prompt on its own video, the same words on the other)."""
    features = (work.features(record), work.features(other.record, other.kind))
    own, changed = (encode_prompt(work.base(), record.prompt, video) for video in features)
    return own, changed


def draw_videos(work: Workspace, records: list[Record], *stream: str | int) -> list[OtherVideo]:
    """For each record what its answer is held against: a function of the seed, `stream` and the record. Another video
    is any of `data.preference`.

    Raises DataError for records without an answer or a video, and where no other video is there to draw."""
    if bad := [r.source or r.key for r in records if not r.answer or r.video is None]:
        raise DataError(
            f"data.preference: {len(bad)} of {len(records)} records have no answer or no video, the first {bad[0]}. "
            "`dpo.altered` learns from the answers that the data carry. Leave such records out."
        )
    videos = {work.name_of(record): record for record in work.records("preference") if record.video is not None}
    drawn = []
    for record in records:
        rng = random.Random(work.seed("dpo.altered", *stream, record.key))
        kind = rng.choice(work.recipe.dpo.altered)
        if kind != "other":
            drawn.append(OtherVideo(record, kind))
            continue
        names = [name for name in videos if name != work.name_of(record)]
        if not names:
            raise DataError(
                f"data.preference: `dpo.altered` has other, but all {len(work.records('preference'))} records are "
                f"about one video, {next(iter(videos))}. Give records of other videos, or leave `other` out."
            )
        drawn.append(OtherVideo(videos[rng.choice(names)], ""))
    return drawn


def answer_ids(work: Workspace, record: Record) -> list[int]:
    """The record's answer as tokens, its end included."""
    prompt = encode_prompt(work.base(), record.prompt, work.features(record))
    return encode_answer(work.base(), prompt.opening, record.answer or "")


def prefers_own_video(work: Workspace, role: str, records: list[Record], others: list[OtherVideo], path) -> float:
    """The share of records whose answer is likelier, under `role`, on its own video than on the other; kept in `path`
    as it goes."""
    section = work.recipe.dpo

    @torch.no_grad()
    def read(batch: list[tuple[Record, OtherVideo]]) -> list[float]:
        def gaps(part: list[tuple[Record, OtherVideo]]) -> list[float]:
            groups = [
                Group(prompt, (answer_ids(work, record),))
                for record, other in part
                for prompt in altered_prompts(work, record, other)
            ]
            logp_B2 = answer_logps(active, groups).view(-1, 2)
            return (logp_B2[:, 0] - logp_B2[:, 1]).tolist()

        with work.roles.use(role) as active:
            return in_pieces(batch, len(batch), gaps)

    size = section.micro_batch or section.batch_size
    found = by_batches(path, chunks(list(zip(records, others, strict=True)), int(size)), read)
    return sum(gap > 0 for gap in found) / len(found)
