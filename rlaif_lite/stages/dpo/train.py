"""A round's training on its pairs: the reference's log-probs once, then DPO (`rl.dpo`).

With `dpo.spans` the preference is over the parts in which a pair's answers differ (RRPO, arXiv 2504.12083). With
`dpo.kl_weight` the reference reads the chosen answers of every step as well, for the exact KL(reference || policy);
without it no reference adapter is in memory.

Shapes: B pairs, N answer tokens.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ranks
from ...data.records import Record
from ...data.sentences import split_claims
from ...files import by_batches, chunks, read_jsonl
from ...judge.rlif import text_of, token_ends
from ...model.answers import Group
from ...model.base import Base
from ...model.inputs import encode_prompt
from ...model.memory import in_pieces
from ...model.roles import ActiveRole
from ...phases import phase
from ...progress import progress
from ...rl.dpo import DpoStats, Scored, Span, changed_spans, dpo_loss
from ...rollout.score import answer_hidden, token_scores
from ...training.fit import fit, steps_of
from ...training.loop import batches, split_micro
from ...workspace import Workspace
from .altered import OtherVideo, altered_prompts


class Preferred(NamedTuple):
    """A pair to be learnt."""

    record: Record
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float  # by how much the judge prefers the chosen one
    other: OtherVideo | None = None  # what the rejected answer reads; None: the record's own video
    spans: tuple[list[Span], list[Span]] | None = None  # the tokens of each that are compared; None: all

    def row(self) -> dict:
        """The pair as `pairs.jsonl` has it: records by their keys."""
        other = self.other and {"record": self.other.record.key, "kind": self.other.kind}
        return self._asdict() | {"record": self.record.key, "other": other}


class PairScores(NamedTuple):
    """What a role makes of some pairs."""

    compared: Scored  # log-probs, summed over the tokens that are compared
    nll_B: Tensor  # of the whole chosen answer, per token
    kl_B: Tensor | None  # KL(reference || role) over it, where the reference's hidden states were given


@contextmanager
def role_from(work: Workspace, name: str, folder: Path) -> Iterator[str]:
    """The adapter in `folder` as role `name`, in memory for as long as one step needs it."""
    work.roles.load(name, folder)
    try:
        yield name
    finally:
        work.roles.remove(name)


# ------------------------------------------------------------------------------------------- what of a pair is compared


def spans_of(base: Base, by: str, chosen: list[int], rejected: list[int]) -> tuple[list[Span], list[Span]]:
    """The tokens of both answers in which they differ. By claims, a sentence counts from the end of the last one to its
    own, as a whole. The end of an answer is in no span."""
    said = [[i for i in ids if i != base.eos_id] for ids in (chosen, rejected)]
    if by == "tokens":
        return changed_spans(*said)
    claims = [split_claims(text_of(base, ids)) for ids in said]
    ends = [[0, *token_ends(base, ids, found)] for ids, found in zip(said, claims, strict=True)]
    own, other = (
        [(at[start], at[end]) for start, end in spans] for spans, at in zip(changed_spans(*claims), ends, strict=True)
    )
    return own, other


def compared_N(pairs: list[Preferred], device: torch.device) -> Tensor | None:
    """1 for each token of the pairs' answers that is compared and 0 for the others; None where all are."""
    if all(pair.spans is None for pair in pairs):
        return None
    weights = []
    for pair in pairs:
        for ids, spans in zip((pair.chosen_ids, pair.rejected_ids), pair.spans, strict=True):
            weights += [float(any(start <= t < end for start, end in spans)) for t in range(len(ids))]
    return torch.tensor(weights, device=device)


def lengths_of(pairs: list[Preferred], device: torch.device) -> Scored:
    """How many tokens of each answer are compared, at least 1."""
    counts = [
        [len(pair.chosen_ids), len(pair.rejected_ids)]
        if pair.spans is None
        else [max(1, sum(end - start for start, end in spans)) for spans in pair.spans]
        for pair in pairs
    ]
    return Scored(*torch.tensor(counts, device=device).T)


# --------------------------------------------------------------------------------------------------------- the training


def groups_of(work: Workspace, pairs: list[Preferred]) -> list[Group]:
    """The pairs' answers after their prompts: the chosen one, then the rejected one."""
    groups = []
    for pair in pairs:
        if pair.other is None:
            prompt = encode_prompt(work.base(), pair.record.prompt, work.features(pair.record))
            groups.append(Group(prompt, (pair.chosen_ids, pair.rejected_ids)))
        else:
            own, changed = altered_prompts(work, pair.record, pair.other)
            groups += [Group(own, (pair.chosen_ids,)), Group(changed, (pair.rejected_ids,))]
    return groups


def pair_scores(
    work: Workspace, role: ActiveRole, pairs: list[Preferred], reference_hidden_ND: Tensor | None = None
) -> PairScores:
    """What a role makes of pairs, both answers of each in one forward."""
    found, count = token_scores(role, groups_of(work, pairs), reference_hidden_ND), 2 * len(pairs)
    weight_N = compared_N(pairs, work.device)
    whole_B2 = found.per_answer(found.logp_N, count).view(-1, 2)
    compared_B2 = whole_B2 if weight_N is None else found.per_answer(found.logp_N * weight_N, count).view(-1, 2)
    length_B = torch.tensor([len(pair.chosen_ids) for pair in pairs], device=whole_B2.device)
    kl_B = None if found.kl_N is None else found.per_answer(found.kl_N, count).view(-1, 2)[:, 0]
    return PairScores(Scored(*compared_B2.T), -whole_B2[:, 0] / length_B, kl_B)


def reference_logps(work: Workspace, role: str, pairs: list[Preferred], folder: Path) -> list[tuple[float, float]]:
    """(chosen, rejected) of every pair under the reference, kept in `reference.jsonl`."""
    section = work.recipe.dpo

    @torch.no_grad()
    def read(batch: list[Preferred]) -> list[list[float]]:
        with work.roles.use(role) as active, phase("score reference"):
            logps = lambda part: torch.stack(pair_scores(work, active, part).compared, 1).tolist()
            return in_pieces(batch, len(batch), logps)

    with progress(len(pairs), "dpo: reference", unit="pair") as bar:
        size = section.micro_batch or section.batch_size
        return by_batches(folder / "reference.jsonl", chunks(pairs, size), read, bar.advance)


def train(
    work: Workspace,
    number: int,
    before: Path,
    held_to: Path,
    pairs: list[Preferred],
    reference: list[tuple[float, float]],
    folder: Path,
) -> dict:
    """A round's training, from the policy in `before` into `folder`/policy -> what its last quarter of steps was.
    `held_to`: the reference's adapter; `reference`: its log-probs of the pairs."""
    section, roles, label = work.recipe.dpo, work.roles, f"dpo.{number}"
    steps = steps_of(section, len(pairs), section.batch_size)
    order = batches(len(pairs), section.batch_size, steps, work.recipe.seed, label)
    length = lambda i: len(pairs[i].chosen_ids) + len(pairs[i].rejected_ids)
    hidden: list[Tensor] = []  # of the reference, for each micro-batch of the step in hand

    def own_of(step: int) -> list[int]:
        return sorted(ranks.deal(order[step], length), key=length)

    @torch.no_grad()
    def read_reference(step: int, micro: int) -> None:
        hidden.clear()
        if section.kl_weight:
            with roles.use("reference") as active, phase("reference"):
                for part in split_micro(own_of(step), micro):
                    hidden.append(answer_hidden(active, groups_of(work, [pairs[i] for i in part]))[1])

    def step_loss(active: ActiveRole, step: int, micro: int) -> dict[str, float]:
        batch, own = order[step], own_of(step)
        totals = dict.fromkeys(("loss", *DpoStats._fields), 0.0)
        for place, part in enumerate(split_micro(own, micro)):
            of, ref = [pairs[i] for i in part], [reference[i] for i in part]
            loss, stats = backward(work, active, of, ref, len(batch), hidden[place] if hidden else None)
            for name, value in (("loss", loss), *stats._asdict().items()):
                totals[name] += value.item() * len(part) / len(batch)
        said = [id for i in own for id in (*pairs[i].chosen_ids, *pairs[i].rejected_ids)]
        return totals | {"unknown_share": work.base().unknown_share(said) * len(said) / sum(map(length, batch))}

    if not ranks.first((folder / "policy").exists):
        with ExitStack() as held:
            held.enter_context(role_from(work, "policy", before))
            if section.kl_weight:
                held.enter_context(role_from(work, "reference", held_to))
            checkpoint, seed = work.stage("dpo") / "checkpoint" / f"round{number}", work.recipe.seed
            fit(roles, "policy", section, steps, step_loss, label, checkpoint, work.log, seed, read_reference)
            roles.save("policy", folder / "policy")
    lines = ranks.first(lambda: [line for line in read_jsonl(work.log.path) if line["stage"] == label])
    late = lines[-math.ceil(len(lines) / 4) :]
    names = ("loss", "accuracy", "margin", "chosen", "kl")
    return {"steps": steps} | {name: sum(line[name] for line in late) / len(late) for name in names}


def backward(
    work: Workspace,
    active: ActiveRole,
    pairs: list[Preferred],
    reference: list[tuple[float, float]],
    total: int,
    reference_hidden_ND: Tensor | None = None,
) -> tuple[Tensor, DpoStats]:
    """Forward and backward of a micro-batch of a batch of `total` pairs -> its own mean loss."""
    section = work.recipe.dpo
    with phase("forward"):
        scores = pair_scores(work, active, pairs, reference_hidden_ND)
        loss, stats = dpo_loss(
            scores.compared,
            Scored(*torch.tensor(reference, device=work.device).T),
            lengths_of(pairs, work.device),
            beta=section.beta,
            kind=section.loss,
            normalised=section.length_normalised,
            sft_weight=section.sft_weight,
            kl_weight=section.kl_weight,
            nll_B=scores.nll_B,
            kl_B=scores.kl_B,
        )
    with phase("backward"):
        (loss * len(pairs) / total).backward()
    return loss.detach(), stats
