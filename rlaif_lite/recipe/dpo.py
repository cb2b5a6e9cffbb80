"""The section of a recipe that says how direct preference optimisation learns, round by round."""

from __future__ import annotations

from pydantic import Field

from .sections import Count, Positive, Training


class Dpo(Training):
    """Preferences learnt without a reward model: each round the policy answers, a judge prefers, and the next policy
    is trained on that."""

    rounds: Count = Field(1, description="rounds of answering, judging and training (RLAIF-V 4, i-SRT 9)")
    beta: Positive = Field(0.1, description="how strongly the policy is held to the reference")
