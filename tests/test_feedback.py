"""What answers are worth to PPO beside the reward model's scores: ranks, token rewards, bonuses; the KL in the loss;
advantages without a critic.

Shapes: B answers of a step, T answer tokens, N real tokens, V vocabulary, K answers to a prompt.
"""

import math
import weakref
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from core import shake
from rlaif_lite import pipeline
from rlaif_lite.data.records import question_of
from rlaif_lite.files import read_jsonl
from rlaif_lite.judge.claims import AnswerToJudge, judge_claims
from rlaif_lite.judge.pairwise import AnswerPair, judge_pairs
from rlaif_lite.model.text import decode_answer
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.log import check_first_step
from rlaif_lite.workspace import Workspace
from test_ppo import PLAIN, RAGGED, Step, ragged

GROUPS = {"value": "none", "group_size": 4}
DCG = [1 / ((1 + r) * math.log2(2 + r)) for r in range(4)]


# ---- a run without a reward model


def test_the_stages_of_a_run_without_a_reward_model(recipe):
    ranked = ["ppo.feedback=ranking", "ppo.group_size=4"]
    assert recipe(*ranked).stages == ("data", "features", "sft", "context", "ppo", "evaluate")
    assert recipe(*ranked).narrated == ("rl",)  # the judge reads the narrative in PPO
    assert recipe(*ranked, "ppo.judge_context=false").narrated == ()
    assert recipe().stages[4:7] == ("preference", "reward", "ppo") and recipe().narrated == ("preference",)


@pytest.mark.parametrize("value", ["none", "adapter"])
def test_a_run_that_learns_from_ranks(rerun, value):
    keys = {
        "feedback": "ranking",
        "value": value,
        "baseline": "group",
        "group_size": 4,
        "steps": 2,
        "kl_in": "loss",
        "kl_estimator": "k3",
    }
    recipe = rerun(*(f"ppo.{key}={setting}" for key, setting in keys.items()), "evaluate.temperatures=[]")
    work = Workspace(recipe)
    summary = pipeline.run(recipe)
    assert list(summary["stages"]) == list(recipe.stages) and summary["reward"] == {}
    assert summary["stages"]["sft"]["status"] == "skipped" and summary["stages"]["context"]["status"] == "done"
    trained = {"policy", "value"} if value == "adapter" else {"policy"}
    assert set(summary["ppo"]["roles"]) == {"reference", "sft"} | trained
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    assert lines[0]["objective/kl"] == 0 and lines[1]["objective/kl"] > 0 and lines[1]["loss/kl_avg"] > 0
    assert lines[0]["objective/scores"] != lines[1]["objective/scores"]  # what the judge gave, not places' worth
    assert ("loss/value_avg" in lines[0]) == (value == "adapter")
    assert summary["evaluation"]["ppo"] != summary["evaluation"]["reference"]


# ---- ranks


def judged(step: Step, scores: list[float], logp_B: list[float]) -> list[float]:
    """What ranking makes of a judge's scores and of the policy's log-probs per token."""
    taken = step.feedback.take(step.records, ragged(step), 0)._replace(scores=scores)
    mask_BT = torch.arange(8)[None] < torch.tensor(RAGGED)[:, None]
    return step.feedback.score(taken, [], torch.tensor(logp_B)[:, None] * mask_BT, mask_BT).score_B.tolist()


def test_what_ranks_are_worth_by_hand(rerun):
    """First group: the policy takes the judge's second for the best. Second: of one mind, two answers alike."""
    scores, logp_B = [3.0, 2.0, 1.0, 0.0, 5.0, 7.0, 5.0, 1.0], [-2.0, -1.0, -3.0, -4.0, -0.2, -0.1, -0.2, -0.9]
    recipe = rerun("ppo.feedback=ranking", "ppo.group_size=4", "ppo.judge_context=false")
    worth = {kind: judged(Step(recipe, rank_reward=kind), scores, logp_B) for kind in ("reported", "place")}
    delta = [1 - DCG[1] / DCG[0], 1 - DCG[0] / DCG[1], 0, 0, 0, 0, 0, 0]
    assert worth["reported"] == pytest.approx([-each for each in delta], abs=1e-6)
    shared = (DCG[1] + DCG[2]) / 2
    assert worth["place"] == pytest.approx([*DCG, shared, DCG[0], shared, DCG[3]])


def test_the_judge_ranks_by_claims_or_by_comparing_all(rerun):
    recipe = rerun("ppo.feedback=ranking", "ppo.group_size=4", "ppo.judge_context=false")
    step = Step(recipe)
    work, texts = step.work, [decode_answer(step.work.base(), a.ids) for a in ragged(step)]
    asked = [(work.features(r), question_of(r)) for r in step.records]
    section, duels = work.recipe.preference, {}
    with work.roles.use("sft") as judge:
        alone = judge_claims(
            judge, [AnswerToJudge(*a, t, None) for a, t in zip(asked, texts, strict=True)], section.claims, 1
        )
        for i, j in permutations(range(4), 2):
            [duels[i, j]] = judge_pairs(judge, [AnswerPair(*asked[i], texts[i], texts[j], None)], section.pairwise, 1)
    assert step.feedback.by_claims(step.records, texts) == pytest.approx([v.score for v in alone], abs=1e-4)
    margins = [sum(duels[i, j].margin for j in range(4) if j != i) / 3 for i in range(4)]
    assert step.feedback.by_pairs(step.records, texts)[:4] == pytest.approx(margins, abs=1e-4)
    assert max(margins) > 1e-3


# ---- the KL


@pytest.mark.parametrize(("where", "kind"), [("loss", "k3"), ("loss", "exact"), ("reward", "exact"), ("reward", "k3")])
def test_every_kl_is_exactly_nothing_at_the_start(finished, where, kind):
    step = Step(finished, kl_in=where, kl_estimator=kind, micro_batch=3)
    _, experience = step.score(step.answers())
    history = step.update(experience)
    check_first_step(experience, history)
    if where == "loss":
        assert history[0]["kl"] == 0 and history[-1]["kl"] > 0
    else:
        assert "kl" not in history[0]


def test_the_exact_kl_is_the_sum_over_the_vocabulary(finished):
    step = Step(finished, **{**PLAIN, "kl_estimator": "exact", "temperature": 0.7})
    shake(step.work.roles, "policy")
    minibatches, experience = step.score(ragged(step), kl_coef=0.5)
    for micro in (m for minibatch in minibatches for m in minibatch):
        logp_NV, ref_NV = (log_softmax(step, role, micro) for role in ("policy", "reference"))
        kl_N = (logp_NV.exp() * (logp_NV - ref_NV)).sum(1)
        mask_bT = experience.mask_BT[micro.index_b]
        assert torch.allclose(experience.kl_BT[micro.index_b][mask_bT].double(), kl_N.detach(), atol=1e-4)
    to_go_BT = experience.kl_BT.flip(1).cumsum(1).flip(1)
    want_BT = (experience.score_B[:, None] - 0.5 * to_go_BT) * experience.mask_BT
    assert experience.kl_BT.max() > 1e-3 and torch.allclose(experience.return_BT, want_BT, atol=1e-4)


def log_softmax(step: Step, role: str, micro) -> torch.Tensor:
    """logp_NV in float64 of a micro-batch's answer tokens; the role's scope is closed, so for values only."""
    with step.work.roles.use(role) as active:
        return log_softmax_in(step, active, micro)


def log_softmax_in(step: Step, active, micro) -> torch.Tensor:
    base = step.work.base()
    hidden_ND = active.hidden(micro.policy.batch).flatten(0, 1)[micro.policy.before_N].double()
    logits_NV = hidden_ND @ base.head_weight_VD.T.double() + base.ban_bias_V.double()
    return torch.log_softmax(logits_NV / step.section.temperature, -1)


@pytest.mark.parametrize("kind", ["k3", "exact"])
def test_the_kl_in_the_loss_is_what_autograd_makes_of_it(finished, kind):
    """No advantages: one step of gradient descent goes down the KL's own gradient, times its weight; and rewards hold
    no KL."""
    keys = {"minibatch": 8, "micro_batch": 3, "epochs": 1, "max_grad_norm": 1e9}
    step = Step(finished, **PLAIN, **keys, kl_in="loss", kl_estimator=kind)
    roles = step.work.roles
    shake(roles, "policy")
    minibatches, experience = step.score(ragged(step), kl_coef=0.7)
    assert torch.allclose(experience.return_BT, experience.score_B[:, None] * experience.mask_BT, atol=1e-4)
    roles.trainable("policy")
    for micro in minibatches[0]:
        ref_NV, target_N = log_softmax(step, "reference", micro), micro.policy.token_N[:, None]
        with roles.use("policy") as active:
            logp_NV = log_softmax_in(step, active, micro)
            if kind == "exact":
                kl_N = (logp_NV.exp() * (logp_NV - ref_NV)).sum(1)
            else:
                gap_N = (ref_NV - logp_NV).gather(1, target_N)[:, 0]
                kl_N = gap_N.exp() - 1 - gap_N
            (0.7 * kl_N.sum() / sum(RAGGED)).backward()
    want = [-p.grad.clone() for p in roles.parameters("policy")]
    before = [p.detach().clone() for p in roles.parameters("policy")]
    for p in roles.parameters("policy"):
        p.grad = None
    history = step.update(experience._replace(advantage_BT=torch.zeros_like(experience.advantage_BT)), kl_coef=0.7)
    for old, new, move in zip(before, roles.parameters("policy"), want, strict=True):
        assert (new - old - move).abs().max() <= 1e-6 + 1e-3 * move.abs().max()
    assert max(move.abs().max() for move in want) > 1e-5
    if kind == "k3":
        assert history[0]["kl"].item() == pytest.approx(experience.kl_BT.sum().item() / sum(RAGGED), rel=1e-3)


def test_the_exact_kl_in_the_loss_holds_the_reference_of_one_micro_batch(finished, monkeypatch):
    step = Step(finished, minibatch=8, micro_batch=2, epochs=1, kl_in="loss", kl_estimator="exact")
    _, experience = step.score(ragged(step))
    backward, given, held = ppo.policy_backward, [], []

    def watched(section, policy, micro, experience, weight_bT, ref_hidden_ND, kl_coef):
        given.append(weakref.ref(ref_hidden_ND))
        held.append(sum(hidden() is not None for hidden in given))
        return backward(section, policy, micro, experience, weight_bT, ref_hidden_ND, kl_coef)

    monkeypatch.setattr(ppo, "policy_backward", watched)
    step.update(experience)
    assert held == [1] * 4


# ---- advantages without a critic


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_is_the_baseline(finished, scale):
    step = Step(finished, **PLAIN, **GROUPS, baseline="group", group_std=scale)
    shake(step.work.roles, "policy")
    _, experience = step.score(ragged(step), kl_coef=0.5)
    total_GK = (experience.score_B - 0.5 * experience.kl_BT.sum(1)).double().view(2, 4)
    for i, length in enumerate(RAGGED):
        group = total_GK[i // 4]
        want = (group[i % 4] - group.mean()).item() / (group.std().item() + 1e-4 if scale else 1)
        assert experience.advantage_BT[i].tolist() == pytest.approx([want] * length + [0.0] * (8 - length), abs=1e-3)


def test_the_whole_step_is_the_baseline(finished):
    """REINFORCE++: every token's rewards to come, discounted, whitened over all real tokens; no groups."""
    step = Step(finished, **{**PLAIN, "gamma": 0.9, "whiten_advantages": True}, value="none", baseline="batch")
    shake(step.work.roles, "policy")
    _, experience = step.score(ragged(step), kl_coef=0.5)
    to_come = []
    for i, length in enumerate(RAGGED):
        rewards = (-0.5 * experience.kl_BT[i, :length]).tolist()
        rewards[-1] += experience.score_B[i].item()
        to_come.append([sum(0.9 ** (k - t) * rewards[k] for k in range(t, length)) for t in range(length)])
    flat_N = torch.tensor(sum(to_come, []), dtype=torch.float64)
    white_N = (flat_N - flat_N.mean()) / flat_N.std()
    assert torch.allclose(experience.advantage_BT[experience.mask_BT].double(), white_N, atol=1e-4)
    assert (experience.advantage_BT[~experience.mask_BT] == 0).all()


# ---- what stands on tokens, and what the policy did not say


def test_token_rewards_and_tokens_that_a_judge_put_in(finished):
    """A reward of -1 on the third token counts for the tokens up to it; tokens that are not the policy's have no
    advantage and no KL, and what is known of them moves nothing."""
    step = Step(finished, **PLAIN, minibatch=8, epochs=1, max_grad_norm=1e9, kl_in="loss", kl_estimator="k3")
    roles = step.work.roles
    shake(roles, "policy")
    answers = ragged(step)
    plain = step.feedback.take(step.records, answers, 0)
    own = [[t != 1 for t in range(len(a.ids))] for a in answers]
    rewards = [[-1.0 * (t == 2) for t in range(len(a.ids))] for a in answers]
    _, experience = step.score(plain._replace(own=own, rewards=rewards))
    for i, length in enumerate(RAGGED):
        score = experience.score_B[i].item() + (length > 2)
        want = [score - (t <= 2 < length) for t in range(length)]
        assert experience.return_BT[i, :length].tolist() == pytest.approx(want, abs=1e-4)
        assert (experience.kl_BT[i, 1], experience.advantage_BT[i, 1]) == (0, 0)
    found = []
    start = [p.detach().clone() for p in roles.parameters("policy")]
    for shift in (0.0, 5.0):  # in what is known of the tokens that were put in
        for p, old in zip(roles.parameters("policy"), start, strict=True):
            p.data.copy_(old)
        shift_BT = shift * (experience.mask_BT & ~experience.learn_BT)
        logp_BT, ref_logp_BT = experience.logp_BT + shift_BT, experience.ref_logp_BT + shift_BT
        history = step.update(experience._replace(logp_BT=logp_BT, ref_logp_BT=ref_logp_BT))
        assert history[0]["ratio_min"] == history[0]["ratio_max"] == 1
        found.append([p.detach().clone() for p in roles.parameters("policy")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert any((a != b).any() for a, b in zip(found[0], start, strict=True))


# ---- LLaVA-RLHF's bonuses


def test_bonuses_and_weights_of_a_record(finished, monkeypatch):
    """The world's answers name no option, so the texts are given: A for type 2, "No" for type 6."""
    step = Step(finished, **{**PLAIN, "length_penalty": 2.0}, length_weights=True, symbolic_bonus=2.0)
    texts = iter(["A. red", "B. red", "the correct option is A.", "No, it is", "Yes, it is", "Yes", "a circle", "No"])
    kinds, weights = [2, 2, 2, 6, 6, 7, None, 1], [1.0, 0.5, None, 2.0, 0.0, 1.0, 1.0, 1.0]
    step.records = [
        replace(r, caption_type=k, length_bonus=w) for r, k, w in zip(step.records, kinds, weights, strict=True)
    ]
    answers = ragged(step)
    monkeypatch.setattr(ppo, "decode_answer", lambda base, ids: next(texts))
    _, experience = step.score(answers)
    bonus = [2.0, 0.0, 2.0, 1.0, -1.0, 0.0, 0.0, 0.0]
    want = [
        rm + more - 2.0 * (1.0 if w is None else w) * length / 8
        for rm, more, w, length in zip(step.reward_scores(answers), bonus, weights, RAGGED, strict=True)
    ]
    assert experience.score_B.tolist() == pytest.approx(want, abs=1e-4)
