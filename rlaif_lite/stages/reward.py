"""The reward model: the SFT adapter with a scalar head, trained on the preference pairs (VLM-RLAIF section 3.3).

Loss: -log sigmoid(r_chosen - r_rejected), plus the published centring term. The score is the head read at the last
token (published), or summed over chosen tokens and the last one (`reward.pool: tokens`), which lets each claim earn
its own share. Pairs of a held-out share of the VIDEOS are never trained on; accuracy and calibration are measured
there. Departures from the release: held out by video instead of by pair, the SFT adapter as the start, no written
rating request unless `reward.prompt` asks for one.

Shapes: B answers, N answer tokens.
"""

import math
import random
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from .. import ranks
from ..data.records import VIDEO_MARK, Message, Record, question_of
from ..data.splits import hold_out_videos
from ..data.truth import TRUTH
from ..errors import StageError
from ..files import write_json, write_jsonl
from ..model.answers import Group, lay_out
from ..model.base import Base
from ..model.inputs import Sequence, encode_prompt
from ..model.memory import in_pieces_together
from ..model.roles import ActiveRole
from ..model.text import RUNNING, decode_answer, encode_answer, word_tokens
from ..phases import phase
from ..progress import say
from ..recipe import Recipe
from ..rl.losses import pairwise_loss
from ..training.fit import fit, steps_of
from ..training.loop import batches, split_micro
from ..workspace import Workspace
from .preference import read_pairs

READS = ("seed", "model", "reward", *TRUTH)
NEEDS = ("features", "sft", "preference")
BINS = 5  # of the calibration table: P(chosen) from 0.5 to 1


def reward_prompt(work: Workspace, record: Record) -> Sequence:
    """The prompt that an answer follows for the reward and the value role, as the base of `work` reads it."""
    base, template = work.base(), work.recipe.reward.prompt
    if template is None:
        return encode_prompt(base, record.prompt, work.features(record))
    mark = f"{VIDEO_MARK}\n" if record.video is not None else ""
    context = facts_of(work, record) if work.recipe.reward.context else ""
    text = template.format(question=question_of(record), context=context)
    return encode_prompt(base, [Message("user", mark + text)], work.features(record))


def facts_of(work: Workspace, record: Record) -> str:
    """What the reward and the value role are told of a video: the captions that the data carry (LLaVA-RLHF), or its
    narrative."""
    if record.captions:
        return "\n".join(f"- {caption}" for caption in record.captions)
    return work.narratives()[work.name_of(record)] if record.video is not None else ""


class RewardInput:
    """How an answer is laid out for the reward role, and which tokens the head is read at."""

    def __init__(self, work: Workspace):
        self.work = work
        self.base = work.base()
        self.section = work.recipe.reward
        words = [
            word_tokens(self.base, RUNNING, word, "reward.pool_tokens", capitals=False)
            for word in self.section.pool_tokens
        ]
        self.pooled = torch.tensor([token for spelled in words for token in spelled], dtype=torch.long)

    def prompt(self, record: Record) -> Sequence:
        return reward_prompt(self.work, record)

    def answer(self, prompt: Sequence, ids: Seq[int], base: Base) -> Seq[int]:
        """Token ids of an answer that `base` gave, in the reward role's own tokens; EOS where the answer has one."""
        if base is self.base:
            return ids
        return encode_answer(self.base, prompt.opening, decode_answer(base, ids), end=ids[-1] == base.eos_id)

    def score(self, role: ActiveRole, groups: Seq[Group]) -> Tensor:
        """Scores of all answers of the groups (token ids, EOS included where the answer has one) -> score_B float32."""
        rows = lay_out(self.base, groups)
        count = sum(len(group.answers) for group in groups)
        value_N = role.scalar(role.hidden(rows.batch).flatten(0, 1).index_select(0, rows.at_N))
        # each answer's last token among the tokens of all answers
        last_B = torch.tensor([len(ids) for group in groups for ids in group.answers]).cumsum(0) - 1
        read_N = torch.zeros_like(value_N).index_fill(0, last_B.to(value_N.device), 1.0)
        if self.section.pool == "tokens":
            read_N = read_N.masked_fill(torch.isin(rows.token_N, self.pooled.to(value_N.device)), 1.0)
        return torch.zeros(count, device=value_N.device).index_add(0, rows.answer_N, value_N * read_N)


def run(work: Workspace) -> dict:
    """Train the `reward` role and measure it; writes its adapter, head and `reward/heldout.json`. On a base of its own
    (`model.reward_base`) the adapter is a fresh one, as published: that base is an SFT model already."""
    section = work.recipe.reward
    shared, work = work, work.for_reward
    if section.adapter is not None:
        return use_given(work, Path(section.adapter))
    if work is shared:
        work.load_role("sft")
        work.roles.add("reward", copy_of="sft")
        work.roles.remove("sft")
    else:
        work.roles.add("reward", seed=work.seed("reward", "init"))
    work.roles.add_head("reward", zero=False, seed=work.seed("reward", "head"))
    train, held = hold_out_videos(
        read_pairs(work), section.heldout, lambda pair: work.name_of(pair[0]), lambda name: work.seed("heldout", name)
    )
    train = train[: section.pairs] if section.pairs else train
    if not train or not held:
        raise StageError(
            f"The reward model has {len(train)} pairs to train on and {len(held)} held out. "
            "More prompts, more `preference.samples`, or another `reward.heldout` would give both."
        )
    train += stumbling(train, section.stumbles, work.seed("reward", "stumbles"))
    layout = RewardInput(work)
    steps = steps_of(section, len(train), section.batch_size)
    order = batches(len(train), section.batch_size, steps, work.recipe.seed, "reward")
    tokens = layout.base.tokenizer([f"{a} {b}" for _, a, b in train], add_special_tokens=False)["input_ids"]
    unknown = [layout.base.unknown_share(ids) for ids in tokens]

    def step_loss(active: ActiveRole, step: int, micro: int) -> dict[str, float]:
        own = ranks.deal(order[step], size=lambda i: len(tokens[i]))
        parts = split_micro([train[i] for i in own], micro)
        with phase("forward"):
            read, scores = read_for_centre(layout, active, parts)
        centre = ranks.totals({"scores": scores})["scores"] / len(order[step])
        totals = {"loss": 0.0, "accuracy": 0.0, "margin": 0.0}
        for part in parts:
            share = len(part) / len(order[step])
            with phase("forward"):
                score_B2 = score_pairs(layout, active, part) if read is None else read
                loss, stats = pairwise_loss(score_B2[:, 0], score_B2[:, 1], section.centering, centre)
            with phase("backward"):
                (loss * share).backward()
            for name, value in (("loss", loss), ("accuracy", stats.accuracy), ("margin", stats.margin)):
                totals[name] += value.item() * share
        return totals | {"unknown_share": sum(unknown[i] for i in own) / len(order[step])}

    checkpoint, seed = work.stage("reward") / "checkpoint", work.recipe.seed
    fit(work.roles, "reward", section, steps, step_loss, "reward", checkpoint, work.log, seed)
    work.roles.save("reward", work.adapter("reward"))
    result = measure(work, layout, held) | {"train_pairs": len(train), "heldout_pairs": len(held), "steps": steps}
    write_json(work.stage("reward") / "heldout.json", result)
    return result


def use_given(work: Workspace, folder: Path) -> dict:
    """A trained reward role used as it is (`reward.adapter`), measured on all pairs, as this run trained on none. Where
    there are none, `heldout_accuracy` is None: not measured."""
    work.roles.load("reward", folder)
    if "reward" not in work.roles.heads:
        raise StageError(f"`reward.adapter`: {folder} has no head.safetensors, so it is no reward role.")
    work.roles.save("reward", work.adapter("reward"))
    pairs = read_pairs(work)
    result = measure(work, RewardInput(work), pairs) if pairs else {"heldout_accuracy": None}
    if not pairs:
        say("reward: there are no pairs, so the given role was not measured and `reward.floor` cannot be checked")
    result |= {"train_pairs": 0, "heldout_pairs": len(pairs), "steps": 0}
    write_json(work.stage("reward") / "heldout.json", result)
    return result


def read_for_centre(
    layout: RewardInput, active: ActiveRole, parts: list[list[tuple[Record, str, str]]]
) -> tuple[Tensor | None, float]:
    """(score_B2 of the only micro-batch, differentiable; None where there are several, or nothing is centred; the sum
    of all scores). The centring term's gradient needs the sign of the whole batch's mean before any backward, so
    several micro-batches are read once more, without gradients."""
    if not layout.section.centering or not parts:
        return None, 0.0
    if len(parts) == 1:
        score_B2 = score_pairs(layout, active, parts[0])
        return score_B2, score_B2.detach().sum().item()
    with torch.no_grad():
        return None, sum(score_pairs(layout, active, part).sum().item() for part in parts)


def score_pairs(layout: RewardInput, active: ActiveRole, pairs: Seq[tuple[Record, str, str]]) -> Tensor:
    """score_B2 of (chosen, rejected), both in one forward."""
    groups = []
    for record, *both in pairs:
        prompt = layout.prompt(record)
        groups.append(Group(prompt, [encode_answer(layout.base, prompt.opening, text) for text in both]))
    return layout.score(active, groups).view(-1, 2)


def stumbling(pairs: list[tuple[Record, str, str]], share: float, seed: int) -> list[tuple[Record, str, str]]:
    """As many extra pairs as `share` of `pairs`: a chosen answer against itself with one to three words doubled,
    dropped or put elsewhere. Answers that stumble are too rare among a model's samples for the reward model to learn
    what they are worth, and PPO drifts to where it is not told."""
    rng = random.Random(seed)
    extra = []
    worded = [pair for pair in pairs if pair[1].split()]  # an answer of no words may be the better one
    for record, chosen, _ in rng.sample(worded, round(share * len(worded))):
        words = chosen.split()
        start = rng.randrange(len(words))
        run = words[start : start + rng.randint(1, 3)]
        rest = words[start + len(run) :]
        elsewhere = rng.randrange(len(words) + 1)
        worse = rng.choice(
            (words[:start] + run + run + rest, words[:start] + rest, words[:elsewhere] + run + words[elsewhere:])
        )
        extra.append((record, chosen, " ".join(worse)))
    return extra


@torch.no_grad()
def measure(work: Workspace, layout: RewardInput, held: list[tuple[Record, str, str]]) -> dict:
    """Held-out accuracy against the labels and, where it is known, against the truth; calibration of P(chosen).
    `reward/heldout.jsonl` keeps each pair with the difference of its scores."""
    with work.roles.use("reward") as active:

        def read(part: Seq[tuple[Record, str, str]]) -> list[float]:
            score_B2 = score_pairs(layout, active, part)
            return (score_B2[:, 0] - score_B2[:, 1]).tolist()

        gaps = in_pieces_together(held, layout.section.micro_batch or layout.section.batch_size, read)
    rows = [
        {"key": record.key, "chosen": chosen, "rejected": rejected, "gap": gap}
        for (record, chosen, rejected), gap in zip(held, gaps, strict=True)
    ]
    write_jsonl(work.stage("reward") / "heldout.jsonl", rows)
    result = {"heldout_accuracy": sum(gap > 0 for gap in gaps) / len(gaps), "calibration": calibration(gaps)}
    decided = [(gap, true) for gap, pair in zip(gaps, held, strict=True) if (true := work.truth.gap(*pair))]
    if decided:
        result["heldout_accuracy_truth"] = sum((g > 0) == (t > 0) for g, t in decided) / len(decided)
    return result


def calibration(gaps: Seq[float]) -> list[dict]:
    """When the model says with probability p that an answer is the better one, how often is it? Equal bins of p >=
    0.5."""
    table: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for gap in gaps:
        p = 1 / (1 + math.exp(-abs(gap)))
        table[min(BINS - 1, int((p - 0.5) * 2 * BINS))].append((p, gap > 0))
    width = 0.5 / BINS
    return [
        {
            "low": 0.5 + i * width,
            "high": 0.5 + (i + 1) * width,
            "predicted": sum(p for p, _ in found) / len(found),
            "observed": sum(right for _, right in found) / len(found),
            "count": len(found),
        }
        for i, found in enumerate(table)
        if found
    ]


def check_floor(recipe: Recipe, accuracy: float | None) -> None:
    """Raises StageError when the reward model is too weak for PPO, or a floor is asked for and nothing was measured."""
    if accuracy is None:
        if recipe.reward.floor > 0:
            raise StageError(
                f"`reward.floor: {recipe.reward.floor}` cannot be checked: there are no pairs to measure "
                f"`reward.adapter` on. "
                "Give some in `data.pairs`, or set the floor to 0 to go on with a reward model that was not measured."
            )
    elif accuracy < recipe.reward.floor:
        raise StageError(
            f"The reward model decides {accuracy:.3f} of held-out pairs as labelled, below `reward.floor: "
            f"{recipe.reward.floor}`: PPO would optimise noise. More or cleaner pairs help (`preference.samples`, "
            "`preference.min_margin`); to go on all the same, lower the floor."
        )
