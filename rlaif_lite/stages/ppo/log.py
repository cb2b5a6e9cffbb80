"""What is written down of PPO: the first step's check, the metrics of a step, the summary of a run."""

import torch
from torch import Tensor

from ... import ranks
from ...data.records import Record
from ...errors import StageError
from ...files import read_jsonl, write_json
from ...model.text import decode_answer
from ...rl.losses import explained_variance, repetition
from ...rollout import Trajectory
from ...training.health import FLAT
from ...workspace import Workspace
from .experience import Experience


def check_first_step(experience: Experience, history: list[dict[str, Tensor]]) -> None:
    """Raises StageError unless the policy was exactly the reference and the first ratio exactly 1."""
    kl = experience.kl_BT.abs().max().item()
    low, high = history[0]["ratio_min"].item(), history[0]["ratio_max"].item()
    if kl != 0.0 or low != 1.0 or high != 1.0:
        raise StageError(
            f"At step 0 the largest |KL| of a token is {kl:.3g} and the ratio lies in [{low:.9f}, {high:.9f}]; they "
            "must be exactly 0 and 1. The policy is not a copy of the reference, or sampling and scoring disagree "
            "about the text. Delete the run's `ppo` and `adapters/policy` folders and start again; if it stays, report "
            "it with the recipe."
        )


def step_metrics(
    work: Workspace,
    records: list[Record],
    answers: list[Trajectory],
    experience: Experience,
    history: list[dict[str, Tensor]],
    kl_coef: float,
) -> dict[str, float]:
    """The step's metrics, under TRL's names; `rollout/oracle_score` only where the truth is known (it is never
    trained on)."""
    e, base = experience, work.base()
    mean = {name: torch.stack([h[name] for h in history]).float().mean().item() for name in history[0]}
    lengths = [len(a.ids) for a in answers]
    kl_B = e.kl_BT.sum(1)
    metrics = {
        "objective/kl": kl_B.mean().item(),
        "objective/kl_coef": kl_coef,
        "objective/kl_per_token": (kl_B.sum() / e.mask_BT.sum()).item(),
        "objective/scores": e.raw_B.mean().item(),
        "objective/rlhf_reward": (e.score_B - kl_coef * kl_B).mean().item(),
        "objective/entropy": e.entropy_BT.sum(1).mean().item(),
        "policy/approxkl_avg": mean["approxkl"],
        "policy/clipfrac_avg": mean["clipfrac"],
        "policy/entropy_avg": mean["entropy"],
        "loss/policy_avg": mean["policy_loss"],
        "policy/grad_norm": mean["grad_norm"],
        "val/ratio": mean["ratio"],
        "val/ratio_min": min(h["ratio_min"].item() for h in history),
        "val/ratio_max": max(h["ratio_max"].item() for h in history),
        "val/num_eos_tokens": sum(a.stopped for a in answers),
        "rollout/length": sum(lengths) / len(lengths),
        "rollout/stop_rate": sum(a.stopped for a in answers) / len(answers),
        "rollout/learnt": (e.learn_BT.sum() / e.mask_BT.sum()).item(),
        "rollout/empty_rate": sum(a.ids == [base.eos_id] for a in answers) / len(answers),
        "rollout/repetition": sum(repetition(a.ids) for a in answers) / len(answers),
    }
    bound, size = work.recipe.ppo.kl_bound, work.recipe.ppo.group_size
    if bound is not None:
        metrics["objective/kl_over_bound"] = float(metrics["objective/kl_per_token"] > bound)
    if len(e.score_B) > 1:
        metrics["objective/scores_std"] = e.score_B.std(correction=0).item()
    if size > 1:
        spread_G = e.score_B.view(-1, size).std(1, correction=0)
        metrics["objective/flat_groups"] = (spread_G <= FLAT).float().mean().item()
    if "kl" in mean:
        metrics["loss/kl_avg"] = mean["kl"]
    if "value_loss" in mean:
        metrics["loss/value_avg"] = mean["value_loss"]
        metrics["val/clipfrac_avg"] = mean["value_clipfrac"]
        metrics["val/explained_variance"] = explained_variance(e.value_BT, e.return_BT, e.mask_BT)
    scores = [work.truth.score(decode_answer(base, a.ids), r) for r, a in zip(records, answers, strict=True)]
    truths = [score for score in scores if score is not None]
    if truths:
        metrics["rollout/oracle_score"] = sum(truths) / len(truths)
    return metrics


def summary(work: Workspace, beside: Workspace) -> dict:
    """The summary's `ppo` block, from the log and the roles on the base; `beside` is the run on the base of the judging
    role."""
    lines = ranks.first(lambda: [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"])
    first, last = lines[0], lines[-1]
    out = {
        "steps": len(lines),
        "kl_start": first["objective/kl"],
        "kl_end": last["objective/kl"],
        "reward_start": first["objective/scores"],
        "reward_end": last["objective/scores"],
    }
    if "rollout/oracle_score" in first:
        out |= {"oracle_start": first["rollout/oracle_score"], "oracle_end": last["rollout/oracle_score"]}
    write_json(work.stage("ppo") / "result.json", out)
    sizes = {role: on.roles.size(role)._asdict() for on in (work, beside) for role in on.roles.names}
    own = {} if beside is work else {"reward_base_bytes": beside.base().bytes()}
    return (
        out | own | {"roles": sizes, "base_bytes": work.base().bytes(), "base_fingerprint": work.base().fingerprint()}
    )
