"""The section of a recipe that says how PPO, and what shares its trajectories, learns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .rlif import Interventions
from .rules import Rules
from .sections import NEUTRAL, Count, Positive, Rows, Section, Share


class Ppo(Section):
    """Reinforcement learning against feedback, the reward model's by default, held near the reference by the KL."""

    feedback: Literal["reward_model", "interventions", "ranking", "rules", "outside"] = Field(
        "reward_model",
        description="what says how good an answer is: a reward model, the SFT role as judge, `rules`, or the model of "
        "`preference.outside`",
    )
    judge_context: bool = Field(True, description="that judge reads the narrative of every RL video")
    interventions: Interventions = Interventions()
    rules: Rules = Rules()
    rank_reward: Literal["place", "reported"] = Field(
        "place", description="ranking; the judge's place, or it beside the policy's own (Oracle-RLAIF as reported)"
    )
    steps: Count = Field(20, description="rounds of rollout and update")
    rollouts: Count = Field(96, description="answers per step (published 256)")
    slots: Rows | None = Field(
        None, description="answers in flight while sampling; auto: most that fit; null: all `rollouts`"
    )
    group_size: Count = Field(1, description="answers per prompt; 2 or more for `value: none`")
    epochs: Count = Field(2, description="passes over each step's answers")
    minibatch: Count = Field(48, description="answers per optimiser step (published 128)")
    micro_batch: Rows | None = Field(None, description="answers per forward; auto: most that fit; null: the minibatch")
    lr: Positive = Field(3e-5, description="highest learning rate of the policy")
    value_lr: Positive | None = Field(None, description="the value role's rate; null: as `lr`")
    warmup_steps: int = Field(3, ge=0, description="steps in which the rate rises (published 5)")
    lr_end: Share = Field(0.1, description="share of the rate that is left at the last step, falling linearly")
    kl_coef: float = Field(0.1, ge=0, description="weight of the KL to the reference in the reward")
    kl_target: Positive | None = Field(None, description="KL per answer aimed at by adapting the weight; null: fixed")
    kl_horizon: Count = Field(10000, description="answers over which the adaptive weight moves")
    kl_bound: Positive | None = Field(
        2.0,
        description="KL per token above which a step is reported as unhealthy; null: none",
        json_schema_extra=NEUTRAL,
    )
    kl_estimator: Literal["k1", "k3", "exact"] = Field(
        "k1", description="log ratio, Schulman's non-negative estimator, or the sum over the vocabulary"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL is weighed in (GRPO: loss, k3)")
    policy_loss: Literal["clip", "gspo", "cispo"] = Field(
        "clip", description="PPO's clipped ratio of each token, that of the whole answer, or a clipped weight on logp"
    )
    clip: float = Field(0.2, gt=0, lt=1, description="range of the policy's probability ratio below 1, and above it")
    clip_high: Positive | None = Field(None, description="range above 1 (DAPO 0.28); null: as `clip`")
    dual_clip: float | None = Field(
        None, gt=1, description="highest ratio that a bad token is charged for (3); null: any"
    )
    loss_mean: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="tokens of a minibatch weigh alike (DAPO), answers do (GRPO), or each is divided by max_new_tokens "
        "(Dr. GRPO)",
    )
    mask_unstopped: bool = Field(False, description="learn nothing from answers cut at max_new_tokens (DAPO)")
    order_bonus: float = Field(
        0.0, ge=0, description="rules; for right answers that need the frames' order (T-GRPO 0.3); 0: none"
    )
    resample: int = Field(
        0,
        ge=0,
        description="rounds in which groups of equal scores are replaced by other prompts' (DAPO); rules and outside",
    )
    skip_equal_groups: bool = Field(False, description="leave groups of equal scores out of the mean (DAPO)")
    value_clip: Positive | None = Field(0.2, description="range of a value's change; null: not clipped")
    value_coef: float = Field(0.1, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    gamma: Share = Field(1.0, description="discount")
    lam: Share = Field(0.95, description="GAE's lambda (published 1)")
    whiten_rewards: bool = Field(False, description="scale rewards to unit variance before GAE")
    whiten_advantages: bool = Field(True, description="scale advantages to mean 0, variance 1 over real tokens")
    normalize_reward: bool = Field(True, description="standardise on the reference's answers (published: no)")
    stop_penalty: float = Field(3.0, ge=0, description="taken off an answer without end (published 8)")
    stop_buffer: int = Field(
        0, ge=0, description="tokens before max_new_tokens over which stop_penalty rises (DAPO); 0: at the limit only"
    )
    length_penalty: float = Field(0.0, ge=0, description="times length / max_new_tokens, taken off (published 10)")
    length_weights: bool = Field(False, description="times the record's `length_bonus`, too (LLaVA-RLHF)")
    symbolic_bonus: float = Field(
        0.0, ge=0, description="for the answer that the record's `caption_type` names (LLaVA-RLHF 2)"
    )
    temperature: Positive = Field(1.0, description="temperature of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of sampling")
    top_k: int = Field(0, ge=0, description="sample among so many most likely tokens; 0: all")
    max_new_tokens: Count = Field(64, description="longest answer (published 896)")
    value: Literal["adapter", "none"] = Field("adapter", description="an adapter of its own, or none: see baseline")
    baseline: Literal["leave_one_out", "group", "batch"] = Field(
        "leave_one_out",
        description="value: none; the prompt's other answers (RLOO), its group's mean (GRPO), or token by token the "
        "step's (REINFORCE++)",
    )
    group_std: bool = Field(True, description="baseline: group; divide by the group's deviation (Dr. GRPO: no)")
    task_std: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="divide by a running deviation per task instead, that keeps this share a step (EMA-GRPO 0.99)",
    )
    max_grad_norm: Positive = Field(1.0, description="gradients are clipped to this norm")
    checkpoint_every: Count = Field(5, description="steps between checkpoints", json_schema_extra=NEUTRAL)
