"""The section of a recipe that says how direct preference optimisation learns, round by round.

How answers are sampled and judged is the section `preference`'s; what RLAIF-V (`divide`) and i-SRT (`describe`) do
otherwise stands here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from .sections import Count, FilePath, Positive, Rows, Section, Share, Training


class Divide(Section):
    """RLAIF-V's judge: an answer's score is minus the number of its claims that are rejected. Claims are asked about by
    `preference.claims` (`mode: ask`), whose {claim} is the question."""

    model: FilePath | None = Field(
        None, description="who splits and asks: a text model (a folder or a Hugging Face id); null: the run's own base"
    )
    train: Training | None = Field(
        None, description="train an adapter of the base to do it, on the synthetic world's texts; null: the bare base"
    )
    split: str | None = Field(
        "Question: {question}\nAnswer: {answer}\nRewrite the facts that the answer states as self-contained sentences, "
        "one per line. Leave out opinions.",
        description="asks for the claims of an answer; null: its sentences are its claims",
    )
    ask: str | None = Field(
        "{claim}\nRewrite this statement as a question to be answered by yes or no. Keep its tense and its negations.",
        description="turns a claim into a question; null: claims are asked about as they are",
    )
    separator: str = Field("\n", min_length=1, description="stands between claims")
    max_new_tokens: Count = Field(256, description="longest list of claims")
    batch_size: Count = Field(16, description="texts in flight")


class Describe(Section):
    """i-SRT's context: each round the policy describes the clips of every video anew while it reads its last
    description; the first one is the narrative. How long and how many at once stands in `context`."""

    prompt: str = Field(
        "Your description of the video so far: {context}\nLook at it again and describe it in detail.",
        description="asks for the next description; {context}: where the last one goes",
    )
    examples: int = Field(3, ge=0, description="videos whose descriptions stand in the summary, round by round")


class Dpo(Training):
    """Preferences learnt without a reward model: each round the policy answers, a judge prefers, and the next policy
    is trained on that."""

    rounds: Count = Field(1, description="rounds of answering, judging and training (RLAIF-V 4, i-SRT 9)")
    prompts: Count | None = Field(None, description="prompts per round; null: all that are not held out")
    generator: Literal["policy", "start"] = Field(
        "policy", description="who answers: the last round's policy, or always the model that round 1 starts from"
    )
    judge_role: Literal["policy", "sft"] = Field(
        "sft", description="who judges: the SFT adapter, or the last round's policy (i-SRT)"
    )
    reference: Literal["previous", "start"] = Field(
        "previous", description="what the policy is held to: the last round's, or the model that round 1 starts from"
    )
    pairs: Count = Field(2, description="most pairs of one prompt's answers")
    balance_lengths: bool = Field(True, description="drop pairs with much longer rejected answers (RLAIF-V's search)")
    beta: Positive = Field(0.1, description="how strongly the policy is held to the reference")
    altered: Annotated[tuple[Literal["shuffled", "reversed", "dropped", "other"], ...], Strict(False)] = Field(
        (), description="VDPO: the data's own answers, on their video against an altered or another one; no judge"
    )
    loss: Literal["sigmoid", "ipo"] = Field("sigmoid", description="DPO's, or IPO's squared one")
    length_normalised: bool = Field(False, description="divide an answer's log-ratio by its length inside the loss")
    sft_weight: float = Field(0.0, ge=0, description="weight of the chosen answer's negative log-prob per token")
    spans: Literal["claims", "tokens"] | None = Field(
        None, description="prefer only the claims, or tokens, in which the answers differ (RRPO); null: whole answers"
    )
    kl_weight: float = Field(
        0.0, ge=0, description="weight of the exact KL(reference || policy) over the chosen answer (RRPO 0.01)"
    )
    lr: Positive = Field(1e-5, description="highest learning rate (RLAIF-V's for LoRA)")
    batch_size: Count = Field(8, description="pairs per optimiser step")
    micro_batch: Rows | None = Field(None, description="pairs per forward; auto: most that fit; null: the whole batch")
    warmup_ratio: Share = Field(0.05, description="share of a round's steps in which the rate rises")
    heldout: float = Field(0.1, gt=0, lt=1, description="share of the videos whose prompts only choose among rounds")
    select: Literal["best", "last"] = Field("best", description="the policy: of the best round held out, or the last")
    divide: Divide | None = Field(None, description="judge by divided claims (RLAIF-V), not by `preference.judge`")
    describe: Describe | None = Field(None, description="judge with the policy's own description (i-SRT) as context")
