"""The sections of a recipe that say who judges: preferences and the reward model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from .sections import NEUTRAL, Count, FilePath, Positive, Rows, Section, Share, Training, Words

NARRATIVE = "Video description (may be incomplete): {context}\n"


class Claims(Section):
    """The judge that checks an answer claim by claim."""

    mode: Literal["ask", "inline"] = Field("ask", description="ask per sentence, or read verdicts inside the answer")
    prompt: str = Field(
        "{context}Is this statement about the video true? {claim} Answer yes or no.",
        description="the prompt; {context}: where the narrative goes, {claim}: the sentence; {question} may stand",
    )
    context_prefix: str = Field(NARRATIVE, description="how the narrative is put")
    yes: str = Field("yes", min_length=1, description="word for true")
    no: str = Field("no", min_length=1, description="word for false")


class Pairwise(Section):
    """The judge that compares two answers (the published form)."""

    prompt: str = Field(
        "{context}Question: {question}\nResponse A: {a}\nResponse B: {b}\nWhich response is more accurate to the "
        "video, helpful, natural and concise? Answer with A or B.",
        description="the prompt; the answers go to {a} and {b}, the rest as for claims; `<|>` before each answer and "
        "before the rest lays the answers side by side, neither seeing the other",
    )
    context_prefix: str = Field(NARRATIVE, description="how the narrative is put")
    choices: Annotated[tuple[str, str], Strict(False)] = Field(("A", "B"), description="words for first and second")


class Outside(Section):
    """A judge from outside the run: a language model that reads text and scores answers from 0 to 10."""

    url: str | None = Field(
        None, description="base URL of an OpenAI-compatible endpoint; null: `model` is on this machine"
    )
    model: FilePath | None = Field(
        None, description="its name at the endpoint; on this machine a folder or a Hugging Face id"
    )
    key: str | None = Field(None, description="environment variable with the endpoint's API key; null: it needs none")
    body: str | None = Field(
        None, description="JSON of settings for the endpoint's requests; a null in it leaves one of ours out"
    )
    rubric: str = Field(
        "10 is true in everything it says of the video, answers the question, and leaves out nothing that matters. "
        "Take off most for what is not in the video, and some for what is missing.",
        description="what a good answer is, in the judge's prompt",
    )
    budget: Count | None = Field(
        None, description="tokens that the run may use, as the endpoint counts; null: any", json_schema_extra=NEUTRAL
    )
    concurrency: Count = Field(8, description="requests at a time", json_schema_extra=NEUTRAL)


class Preference(Section):
    """The model answers each prompt several times and judges its own answers."""

    samples: int = Field(2, ge=2, description="answers per prompt; neighbours form a pair, so an even number")
    temperature: Positive = Field(1.0, description="temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    top_k: int = Field(0, ge=0, description="sample among so many most likely tokens; 0: all")
    max_new_tokens: Count = Field(256, description="longest answer")
    batch_size: Count = Field(32, description="answers in flight")
    judge: Literal["claims", "pairwise", "outside"] = Field(
        "claims", description="who labels the pairs (published: pairwise); outside: another model, see `outside`"
    )
    context: bool = Field(True, description="the narrative stands in the judge's prompt")
    compare_context: bool = Field(True, description="also judge the other way, to report what context is worth")
    compare_pairs: int = Field(0, ge=0, description="pairs that the other judge decides as well, to compare; 0: none")
    min_margin: float = Field(0.0, ge=0, description="drop pairs whose scores differ by no more than this")
    consistent_only: bool = Field(False, description="pairwise: drop pairs that the two orders decide differently")
    claims: Claims = Claims()
    pairwise: Pairwise = Pairwise()
    outside: Outside = Outside()


class Reward(Training):
    """The reward model: an adapter and a scalar head, trained on the pairs (published: constant rate, norm 0.3)."""

    adapter: FilePath | None = Field(
        None, description="folder of a trained reward role, used as it is; null: train one"
    )
    lr: Positive = Field(2e-5, description="highest learning rate")
    batch_size: Count = Field(16, description="pairs per optimiser step")
    micro_batch: Rows | None = Field(None, description="pairs per forward; auto: most that fit; null: the whole batch")
    schedule: Literal["cosine", "linear", "constant"] = Field("constant", description="the rate after the warm-up")
    centering: float = Field(1e-3, ge=0, description="weight of the term that keeps the mean reward near 0")
    pool: Literal["last", "tokens"] = Field("last", description="the last token, or the sum over `pool_tokens` and it")
    pool_tokens: Words = Field((), description="words whose tokens `pool: tokens` reads")
    prompt: str | None = Field(None, description="template with {question}; null: the question as asked")
    context: bool = Field(
        False, description="the narrative stands in `prompt` at {context}, in PPO as well (LLaVA-RLHF's facts)"
    )
    heldout: float = Field(0.15, gt=0, lt=1, description="share of prompts whose pairs are held out")
    floor: Share = Field(0.6, description="held-out accuracy below which PPO does not start")
    pairs: Count | None = Field(None, description="use at most so many pairs")
    stumbles: Share = Field(
        0.0,
        description="share of extra pairs, the chosen answer against itself with words doubled, dropped or misplaced",
    )
