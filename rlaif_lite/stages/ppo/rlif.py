"""A judge that intervenes on the policy's answers, as feedback to PPO (RLIF, arXiv 2311.12996, put on answers).

The judge is the SFT role. It reads what the policy said claim by claim (`judge.rlif`) and decides which claims it
takes over (`rl.rlif`); the policy's last token before a takeover gets -1. What then happens is the recipe's:

    label     nothing: the answer stands as it was said, with a -1 at each such claim
    stop      the answer, and the episode, end with the first such claim
    replace   the first such claim is taken back: the reference writes it anew a few times, the judge's favourite is put
              in its place, and the policy speaks on from there, until it is taken over again

`replace` makes of one answer several rows for the update, one for each time the policy spoke. A row holds everything
before as context that is not learnt from, and ends with the claim that was taken back or with the answer. So each token
that the policy sampled is learnt from once, where it was sampled (but what it said after such a claim, which nobody
judged), and blame falls on the words that earned it, which the answer no longer holds. Nothing is bootstrapped beyond a
row's end: what is taken back costs 1, whatever would have come.

What an answer leaves out of the narrative is counted at its end, wherever that is: at its EOS, at the length limit, or
where the judge stopped it, or stopping would be the cheap way out. An answer that ends with what was put in (`replace`)
is charged nothing: no token of the policy's stands there.

Departures from RLIF: on-policy PPO instead of off-policy actor-critic with prior data; a judge's log-odds instead of a
reference critic's values; a takeover lasts one claim instead of a fixed number of steps.
"""

from collections.abc import Sequence as Seq
from math import inf
from typing import NamedTuple

from ... import ranks
from ...data.records import Record, question_of
from ...judge.claims import MIN_MASS
from ...judge.rlif import Claim, omissions, read_claims, sampled_answer
from ...model.inputs import Sequence, encode_prompt
from ...model.text import decode_answer
from ...phases import phase
from ...rl.rlif import end_reward, takeovers, token_rewards
from ...rollout import Trajectory
from ...rollout.sampling import uniforms
from ...workspace import Workspace
from .experience import answers_of
from .feedback import Feedback, Taken


class Draft(NamedTuple):
    """An answer so far, with what the policy said last."""

    answer: int  # number of the answer in the step
    said: Trajectory
    since: int  # tokens before this one are not the policy's, or have been learnt from: a row's context


class JudgedDraft(NamedTuple):
    """What the judge made of a draft."""

    claims: list[Claim]  # those that end in what the policy said last
    taken: list[int]  # numbers of those that are taken over

    def taken_ends(self) -> list[int]:
        return [self.claims[i].end for i in self.taken]


class InterventionFeedback(Feedback):
    """Rewards on tokens from the SFT role's reading of the answers; no score."""

    def __init__(self, work: Workspace):
        super().__init__(work)
        work.load_role("sft")
        self.section = work.recipe.ppo.interventions
        self.narratives = work.narratives()

    def take(self, records: list[Record], answers: list[Trajectory], step: int) -> Taken:
        drafts = [Draft(i, said, 0) for i, said in enumerate(answers)]
        judged = self.judge(records, drafts, step, 0)
        omitted = self.omitted(records, drafts)
        metrics = figures(judged, omitted, self.section.tau) | {"judge/without_mass": self.without_mass(drafts, judged)}
        if self.section.takeover == "label":
            rows = [self.row(s, h.taken_ends(), left) for s, h, left in zip(drafts, judged, omitted, strict=True)]
        elif self.section.takeover == "stop":
            cut = [cut_short(s, h) for s, h in zip(drafts, judged, strict=True)]
            left_out = self.omitted(records, cut)
            rows = [self.row(s, h.taken_ends()[:1], left) for s, h, left in zip(cut, judged, left_out, strict=True)]
        else:
            rows = self.replace(records, drafts, judged, step)
        of_row = [records[draft.answer] for draft, _ in rows]
        said = [draft.said for draft, _ in rows]
        own = [[t >= draft.since for t in range(len(draft.said.ids))] for draft, _ in rows]
        return Taken(of_row, said, own, [0.0] * len(rows), [rewards for _, rewards in rows], metrics)

    # ---- what the judge hears

    def judge(self, records: list[Record], drafts: list[Draft], step: int, turn: int) -> list[JudgedDraft]:
        """The claims of what the policy said last, and which of them are taken over: a function of (seed, step, answer,
        turn)."""
        work, section = self.work, self.section
        claims = self.read(records, drafts)
        seeds = [work.seed("ppo", "interventions", step, draft.answer, turn) for draft in drafts]
        uniform_AT = uniforms(seeds, work.recipe.ppo.max_new_tokens).tolist() if seeds else []
        judged = []
        for draft, found, uniform_T in zip(drafts, claims, uniform_AT, strict=True):
            new = [claim for claim in found if claim.end > draft.since]
            odds, ends = [claim.odds for claim in new], [claim.end for claim in new]
            judged.append(
                JudgedDraft(new, takeovers(odds, ends, uniform_T, section.tau, section.beta, section.spurious))
            )
        return judged

    def read(self, records: list[Record], drafts: list[Draft]) -> list[list[Claim]]:
        work, judge = self.work, self.work.recipe.preference
        items = []
        for draft in drafts:
            record = records[draft.answer]
            context = self.narrative(record) if work.recipe.ppo.judge_context else None
            items.append(
                sampled_answer(work.base(), work.features(record), question_of(record), draft.said.ids, context)
            )
        with work.roles.use("sft") as role, phase("judge claims", sum(len(s.said.ids) for s in drafts)):
            return ranks.spread(items, lambda own: read_claims(role, own, judge.claims, judge.batch_size))

    def without_mass(self, drafts: list[Draft], judged: list[JudgedDraft]) -> float:
        """The share of the answers that say something in which the judge says neither of its words."""
        heard = [
            any(claim.mass >= MIN_MASS for claim in h.claims)
            for s, h in zip(drafts, judged, strict=True)
            if any(i != self.work.base().eos_id for i in s.said.ids)
        ]
        return heard.count(False) / max(1, len(heard))

    def omitted(self, records: list[Record], drafts: list[Draft]) -> list[float]:
        """How many statements of the narrative each draft leaves out."""
        work, judge = self.work, self.work.recipe.preference
        answers = [decode_answer(work.base(), draft.said.ids) for draft in drafts]
        narratives = [self.narrative(records[draft.answer]) for draft in drafts]
        with work.roles.use("sft") as role, phase("judge omissions"):

            def left_out(own: list[tuple[str, str | None]]) -> list[float]:
                said, told = zip(*own, strict=True)
                return omissions(role, said, told, judge.claims, self.section.checklist, judge.batch_size)

            return ranks.spread(list(zip(answers, narratives, strict=True)), left_out)

    def narrative(self, record: Record) -> str | None:
        known = record.video is not None and "rl" in self.work.recipe.narrated
        return self.narratives[self.work.name_of(record)] if known else None

    # ---- what follows from it

    def row(self, draft: Draft, ends: Seq[int], omitted: float | None) -> tuple[Draft, list[float]]:
        """A draft and the rewards on its tokens: for the claims that end at `ends`, and at the answer's end, which
        this is where `omitted` is given."""
        length = len(draft.said.ids)
        rewards = token_rewards(length, ends)
        if omitted is not None:
            rewards[-1] += end_reward(omitted, length, self.section.omission, self.section.length_floor)
        return draft, rewards

    def replace(
        self, records: list[Record], drafts: list[Draft], judged: list[JudgedDraft], step: int
    ) -> list[tuple[Draft, list[float]]]:
        """Take claims back and let the policy speak on, `takeovers` times at most; claims after that are marked."""
        rows, ended, heard_now = [], [], list(zip(drafts, judged, strict=True))
        for turn in range(1, self.section.takeovers + 1):
            ended += [(s, h) for s, h in heard_now if not h.taken]
            over = [(s, h) for s, h in heard_now if h.taken]
            rows += [self.row(cut_short(s, h), h.taken_ends()[:1], None) for s, h in over]
            kept = [Draft(s.answer, first(s.said, h.claims[h.taken[0]].start), s.since) for s, h in over]
            # The policy goes on after what was put in; answers that ended with it, or have no room left, are over.
            eos, longest = self.work.base().eos_id, self.work.recipe.ppo.max_new_tokens
            put_in = self.written(records, kept, step, turn)
            open_ = [s for s in put_in if s.said.ids[-1] != eos and len(s.said.ids) < longest]
            drafts = self.sample("policy", records, open_, "resumed", step, turn, 1, longest)
            heard_now = list(zip(drafts, self.judge(records, drafts, step, turn), strict=True))
        ended += heard_now
        left = self.omitted(records, [s for s, _ in ended])
        return rows + [self.row(s, h.taken_ends(), out) for (s, h), out in zip(ended, left, strict=True)]

    def written(self, records: list[Record], kept: list[Draft], step: int, turn: int) -> list[Draft]:
        """The next claim of each answer, or its end, as the reference writes it and the judge likes it best."""
        section, eos = self.section, self.work.base().eos_id
        found = self.sample(
            "reference", records, kept, "candidates", step, turn, section.candidates, section.claim_tokens
        )
        best: dict[int, tuple[float, Draft]] = {}
        for draft, claims in zip(found, self.read(records, found), strict=True):
            new = next((claim for claim in claims if claim.end > draft.since), None)
            if new is None:  # an end is neither true nor false; what neither ends nor claims is the last choice
                odds, piece = (0.0 if draft.said.ids[-1] == eos else inf), draft
            else:
                odds, piece = new.odds, draft._replace(said=first(draft.said, new.end))
            if draft.answer not in best or odds < best[draft.answer][0]:
                best[draft.answer] = (odds, piece)
        return [piece for _, piece in best.values()]

    def sample(
        self,
        role: str,
        records: list[Record],
        kept: list[Draft],
        stream: str,
        step: int,
        turn: int,
        count: int,
        most: int,
    ) -> list[Draft]:
        """`count` continuations of each answer by `role`, of at most `most` tokens and within `ppo.max_new_tokens`."""
        if not kept:
            return []
        work, section = self.work, self.work.recipe.ppo
        room = [min(most, section.max_new_tokens - len(s.said.ids)) for s in kept]

        def prompt_of(i: int) -> Sequence:
            record, said = records[kept[i].answer], kept[i].said
            return encode_prompt(work.base(), record.prompt, work.features(record)).extend(said.ids)

        seeds = [work.seed("ppo", stream, step, s.answer, turn, j) for s in kept for j in range(count)]
        out = []
        for more in answers_of(work, role, len(kept), prompt_of, seeds, count, max(room)):
            before, new = kept[more.prompt], first(more, room[more.prompt])
            ids, logp = before.said.ids + new.ids, before.said.logp + new.logp
            said = before.said._replace(ids=ids, logp=logp, stopped=new.stopped)
            out.append(Draft(before.answer, said, len(before.said.ids)))
        return out


def first(said: Trajectory, count: int) -> Trajectory:
    """The first `count` tokens; an answer cut short has not stopped."""
    return said._replace(ids=said.ids[:count], logp=said.logp[:count], stopped=said.stopped and count >= len(said.ids))


def cut_short(draft: Draft, judged: JudgedDraft) -> Draft:
    """Up to the end of the first claim that was taken over. It counts as stopped: no fault of the policy's that there
    is no EOS."""
    if not judged.taken:
        return draft
    return draft._replace(said=first(draft.said, judged.taken_ends()[0])._replace(stopped=True))


def figures(judged: list[JudgedDraft], omitted: list[float], tau: float) -> dict[str, float]:
    """Of answers as they were sampled: how much they claim, how much of it is taken over, how much they leave out. None
    of the three says anything without the others: who says nothing is never interrupted."""
    claims = sum(len(h.claims) for h in judged)
    taken = sum(len(h.taken) for h in judged)
    unsupported = sum(claim.odds > tau for h in judged for claim in h.claims)
    return {
        "interventions/claims": claims / len(judged),
        "interventions/rate": taken / max(1, claims),
        "interventions/unsupported": unsupported / max(1, claims),
        "interventions/answers": sum(bool(h.taken) for h in judged) / len(judged),
        "interventions/omitted": sum(omitted) / len(omitted),
    }
