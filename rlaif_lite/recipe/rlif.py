"""The section of a recipe that says when a judge intervenes on the policy's answers, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .sections import Count, Section, Share, Words


class Checklist(Section):
    """What of the narrative an answer leaves out: the weight against saying nothing."""

    by: Literal["ask", "words"] = Field("ask", description="the judge is asked, or words are looked up")
    prompt: str = Field(
        "Text: {context}\nDoes the text say this? {claim} Answer yes or no.",
        description="ask: the prompt; {context}: the answer, {claim}: a statement of the narrative",
    )
    joints: Words = Field((), description="where a narrative's sentence is cut into statements, such as ' and '")


class Interventions(Section):
    """A judge reads the policy's answers claim by claim and intervenes (RLIF). It is the SFT role with
    `preference.claims`, and with the narrative where `ppo.judge_context` says so."""

    takeover: Literal["label", "stop", "replace"] = Field(
        "label", description="mark unsupported claims; end the answer at the first; or have it written anew"
    )
    tau: float = Field(0.0, description="log-odds of no over yes above which a claim is unsupported, nats")
    beta: Share = Field(0.95, description="chance of intervening on an unsupported claim (published)")
    spurious: Share = Field(0.05, description="chance of intervening on any other (published)")
    takeovers: Count = Field(3, description="replace: at most so many in an answer; further claims are marked")
    candidates: Count = Field(4, description="replace: claims that the reference writes for the judge to choose from")
    claim_tokens: Count = Field(64, description="replace: longest claim that is written")
    omission: float = Field(0.5, ge=0, description="cost of a statement left out, at the answer's end")
    checklist: Checklist = Checklist()
    length_floor: int = Field(0, ge=0, description="tokens below which an answer pays its missing share; 0: none")
