"""Supervised fine-tuning: easy data, then hard data, then the policy's initialisation on the RL domain (VLM-RLAIF
section 3.1).

`sft`        one LoRA adapter trained on short answers first and on long ones after (the curriculum). It is the judge
             later, and the reward model starts from it.
`reference`  the same adapter trained on, on the RL domain's prompts with reference answers (the release's policy
             initialisation). It seeds the policy and, frozen, is what the KL is measured against. Without
             `sft.policy_init` it is a copy of `sft`.

With `sft.adapter` training goes on from that adapter; with no phase at all it simply is what both roles are.

The loss is on answers only: on every answer of a conversation, as LLaVA trains, or on the last (`sft.train_on`). A
record with verdicts (process supervision) is trained on the verdict at each marked word instead: that keeps the judge's
skill in the adapter. Departures from the release: it starts a fresh adapter on merged weights for the initialisation,
here the same adapter is trained further; a share of easy records can be replayed in the later phases (`sft.replay`),
and `sft.loss_per: record` weighs every record alike instead of every token.

Shapes: B records, S positions, N answer tokens.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rlaif_kernels import linear_logprob

from .. import ranks
from ..data.records import Record
from ..errors import DataError
from ..model.base import Base
from ..model.inputs import IGNORE, Sequence, collate, encode_prompt
from ..model.roles import ActiveRole
from ..model.text import Opening, answer_offsets, encode_answer, word_tokens
from ..phases import phase
from ..recipe import Training
from ..rl.losses import sft_loss
from ..training.fit import fit, steps_of
from ..training.loop import batches, split_micro
from ..workspace import Workspace

READS = (
    "seed",
    "model",
    "sft",
    "data.sft",
    "data.sft_easy",
    "data.sft_hard",
    "data.policy_init",
    "data.max_easy_words",
    "features.clip_frames",  # of records that are about a clip
)
NEEDS = ("data", "features")


class Example(NamedTuple):
    """A record ready for training."""

    row: Sequence
    targets_S: list[int]  # the token that each position should predict, IGNORE where there is no loss
    weight: float  # of each of its targets


def run(work: Workspace) -> dict:
    """Train `sft` and `reference`; returns records and steps of each phase."""
    recipe = work.recipe
    if recipe.sft.adapter is None:
        work.roles.add("sft", seed=work.seed("sft", "init"))
    else:
        work.roles.load("sft", Path(recipe.sft.adapter))
    easy = work.records("sft_easy") if "sft_easy" in work.split_names() else []
    result = {}
    if recipe.sft.easy is not None:
        result["easy"] = train(work, "sft", "easy", recipe.sft.easy, work.records("sft_easy"), replay=[])
    if recipe.sft.hard is not None:
        result["hard"] = train(work, "sft", "hard", recipe.sft.hard, work.records("sft_hard"), replay=easy)
    work.roles.save("sft", work.adapter("sft"))
    work.roles.add("reference", copy_of="sft")
    if recipe.sft.policy_init is not None:
        records = work.records("policy_init")
        result["policy_init"] = train(work, "reference", "policy_init", recipe.sft.policy_init, records, replay=easy)
    work.roles.save("reference", work.adapter("reference"))
    return result


def train(
    work: Workspace, role: str, phase: str, section: Training, records: list[Record], replay: list[Record]
) -> dict:
    """One phase on one role; each batch draws `sft.replay` of its records from `replay` (when there are any)."""
    recipe, base = work.recipe, work.base()
    label = f"sft.{phase}"
    old = round(section.batch_size * recipe.sft.replay) if replay else 0
    steps = steps_of(section, len(records), section.batch_size - old)
    fresh = batches(len(records), section.batch_size - old, steps, recipe.seed, label)
    again = batches(len(replay), old, steps, recipe.seed, f"{label}.replay") if old else [[]] * steps

    def step_loss(active: ActiveRole, step: int, micro: int) -> dict[str, float]:
        chosen = [records[i] for i in fresh[step]] + [replay[i] for i in again[step]]
        rows = [
            e
            for r in ranks.deal(chosen, size=lambda r: sum(len(message.content) for message in r.messages))
            for e in examples(base, r, work.features(r), recipe.sft.loss_per, recipe.sft.train_on)
        ]
        rows.sort(key=lambda e: len(e.row.ids_S))  # little padding in each micro-batch
        targets = [t for e in rows for t in e.targets_S if t != IGNORE]
        weight = sum(e.weight * scored(e.targets_S) for e in rows)
        whole = ranks.totals({"weight": weight, "targets": len(targets)})  # of the batch, all ranks' rows
        loss = sum(backward(active, part, whole["weight"]) for part in split_micro(rows, micro))
        return {"loss": loss, "unknown_share": base.unknown_share(targets) * len(targets) / whole["targets"]}

    checkpoint = work.stage("sft") / "checkpoint" / phase
    fit(work.roles, role, section, steps, step_loss, label, checkpoint, work.log, recipe.seed)
    return {"records": len(records), "steps": steps}


def backward(active: ActiveRole, rows: list[Example], total: float) -> float:
    """Forward and backward of a micro-batch; `total` is the weight of all targets of the whole batch. Returns its
    loss."""
    base = active.roles.base
    batch = collate(base, [e.row for e in rows])
    length = batch.ids_BS.shape[1]
    target_BS = torch.tensor([e.targets_S + [IGNORE] * (length - len(e.targets_S)) for e in rows], device=base.device)
    weight_BS = torch.tensor([[e.weight] for e in rows], device=base.device).expand_as(target_BS)
    scored_BS = target_BS != IGNORE
    with phase("forward", batch.ids_BS.numel()):
        hidden_ND = active.hidden(batch)[scored_BS]
        found = linear_logprob(hidden_ND, base.head_weight_VD, target_BS[scored_BS], bias_V=base.ban_bias_V)
        loss = sft_loss(found.logp_N, weight_BS[scored_BS], total)
    with phase("backward", batch.ids_BS.numel()):
        loss.backward()
    return loss.item()


def examples(base: Base, record: Record, features, loss_per: str, train_on: str) -> list[Example]:
    """The rows that a record is trained on. Raises DataError when it has no answer.

    One row holds the whole conversation. An earlier answer is trained in it where the chat template writes that answer
    as it would be sampled, and its end where the template writes EOS there. Where a template changes an earlier answer,
    that answer gets a row of its own."""
    whole = last_answer(base, record, features, loss_per)
    earlier = [i for i, message in enumerate(record.prompt) if message.role == "assistant"]
    if train_on == "last" or record.verdicts or not earlier:
        return [whole]
    targets_S, apart = list(whole.targets_S), []
    for i in earlier:
        each = last_answer(base, replace(record, messages=record.messages[: i + 1]), features, loss_per)
        *said, end = each.row.ids_S
        if whole.row.ids_S[: len(said)] != said:
            apart.append(each)
            continue
        for at, target in enumerate(each.targets_S):
            ended = at < len(said) - 1 or whole.row.ids_S[len(said)] == end
            targets_S[at] = target if target != IGNORE and ended else targets_S[at]
    rows = [whole._replace(targets_S=targets_S), *apart]
    total = sum(scored(each.targets_S) for each in rows)
    return [each._replace(weight=1.0 / total if loss_per == "record" else 1.0) for each in rows]


def example(base: Base, record: Record, features, loss_per: str, train_on: str = "all") -> Example:
    """The row of the whole record; the only one, unless the template changes earlier answers (see `examples`)."""
    return examples(base, record, features, loss_per, train_on)[0]


def scored(targets_S: list[int]) -> int:
    """How many positions have a loss."""
    return sum(target != IGNORE for target in targets_S)


def last_answer(base: Base, record: Record, features, loss_per: str) -> Example:
    """Tokenise a record, to train on its last answer; raises DataError when it has none."""
    if record.answer is None:
        raise DataError(f"{record.source}: a record for SFT needs an answer; its last turn is the user's.")
    prompt = encode_prompt(base, record.prompt, features)
    if record.verdicts:
        ids = encode_answer(base, prompt.opening, record.answer, end=False)
        row = prompt.extend(ids)
        targets_S = [IGNORE] * len(prompt.ids_S) + verdict_targets(base, prompt.opening, record)
    else:
        ids = encode_answer(base, prompt.opening, record.answer)
        row = prompt.extend(ids)
        # The last token of the prompt predicts the first of the answer; the EOS predicts nothing.
        targets_S = [IGNORE] * (len(prompt.ids_S) - 1) + ids + [IGNORE]
    return Example(row, targets_S, 1.0 / scored(targets_S) if loss_per == "record" else 1.0)


def verdict_targets(base: Base, opening: Opening, record: Record) -> list[int]:
    """The verdict's token at the last token of each judged span of the answer, IGNORE elsewhere. Raises DataError for a
    verdict whose end lies in no token."""
    spans = answer_offsets(base, opening, record.answer)
    targets = [IGNORE] * len(spans)
    for place, word in record.verdicts:
        at = next((t for t, (start, end) in enumerate(spans) if start < place <= end), None)
        if at is None:
            raise DataError(
                f"{record.source}: the verdict {word!r} ends at character {place} of the answer, where no word ends. "
                "An offset counts the characters up to the end of the judged word."
            )
        targets[at] = word_tokens(base, opening, word, record.source)[0]
    return targets
