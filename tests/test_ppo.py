"""PPO: exact start, where rewards stand, advantages by hand, micro-batches, schedules.

Shapes: B answers of a step, T answer tokens, N real tokens.
"""

import pytest
import torch

from core import shake
from rlaif_lite.errors import StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.rollout import Trajectory
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import cut, place
from rlaif_lite.stages.ppo.feedback import Taken
from rlaif_lite.stages.ppo.log import check_first_step
from rlaif_lite.workspace import Workspace


class Step:
    """The first step of PPO on the finished run's adapters, up to the update."""

    def __init__(self, recipe, **keys):
        self.work = work = Workspace(recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update=keys)}))
        self.section = work.recipe.ppo
        self.feedback = ppo.FEEDBACK[work.recipe.ppo.feedback](work)
        work.load_role("reference")
        work.roles.add("policy", copy_of="reference")
        work.roles.add("value", copy_of=self.feedback.critic_from)
        work.roles.add_head("value", zero=True)
        records = work.records("rl")[: self.section.rollouts // self.section.group_size]
        self.records = [r for r in records for _ in range(self.section.group_size)]

    def answers(self) -> list[Trajectory]:
        return ppo.rollout(self.work, self.records, 0)

    def score(self, answers: list[Trajectory] | Taken, kl_coef: float = 0.1):
        """(minibatches, experience)"""
        size = self.section.micro_batch or self.section.minibatch
        taken = answers if isinstance(answers, Taken) else self.feedback.take(self.records, answers, 0)
        self.minibatches = cut(self.work, self.feedback.critic_prompt, self.records, taken.answers, 0, size)
        return self.minibatches, ppo.score(
            self.work.roles, self.section, self.feedback, self.minibatches, taken, kl_coef
        )

    def update(self, experience, lr: float = 1.0, roles=("policy", "value"), kl_coef: float = 0.1):
        """By plain gradient descent, so that a step is the gradient itself."""
        for role in roles:
            self.work.roles.trainable(role)
        optimizers = {role: torch.optim.SGD(self.work.roles.parameters(role), lr=lr) for role in roles}
        return ppo.update(self.work.roles, self.work.recipe, self.minibatches, experience, optimizers, 0, kl_coef)

    def reward_scores(self, answers: list[Trajectory]) -> list[float]:
        out = []
        for record, answer in zip(self.records, answers, strict=True):
            with torch.no_grad():
                out.append(self.feedback.read([record], [answer]).item())
        return out


RAGGED = [3, 8, 1, 5, 8, 2, 6, 4]  # tokens of the eight answers; 8 is the length limit


def ragged(step: Step, lengths: list[int] = RAGGED) -> list[Trajectory]:
    """Answers of known lengths; those at the limit did not stop."""
    base = step.work.base()
    words = base.tokenizer.convert_tokens_to_ids(["first", "a", "red", "circle", "left", ".", "also", "star"])
    out = []
    for i, length in enumerate(lengths):
        stopped = length < step.section.max_new_tokens
        ids = [words[(i + t) % 8] for t in range(length - stopped)] + [base.eos_id] * stopped
        out.append(Trajectory(i // step.section.group_size, ids, stopped, [0.0] * length))
    return out


# ---- the start


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_first_step_starts_from_exactly_nothing(rerun, micro_batch, checkpointing):
    """Policy = reference and new = old log-probs, bit for bit, however the step is cut."""
    step = Step(rerun(f"model.gradient_checkpointing={checkpointing}"), micro_batch=micro_batch)
    _, experience = step.score(step.answers())
    history = step.update(experience)
    assert experience.kl_BT.abs().max() == 0 and (experience.logp_BT[experience.mask_BT] < 0).all()
    assert history[0]["ratio_min"] == history[0]["ratio_max"] == 1
    assert history[-1]["ratio_max"] != 1  # after an update it is not
    check_first_step(experience, history)


def test_a_policy_that_is_not_the_reference_is_refused(finished):
    step = Step(finished)
    next(iter(step.work.roles.parameters("policy"))).data[0, 0] += 1e-3
    shake(step.work.roles, "policy", size=1e-5)
    _, experience = step.score(step.answers())
    history = step.update(experience)
    with pytest.raises(StageError, match="At step 0 the largest .KL. of a token is"):
        check_first_step(experience, history)


def test_stale_log_probs_are_refused(finished):
    step = Step(finished)
    _, experience = step.score(step.answers())
    history = step.update(experience._replace(logp_BT=experience.logp_BT + 1e-6 * experience.mask_BT))
    with pytest.raises(StageError, match="the ratio lies in"):
        check_first_step(experience, history)


# ---- layout


def test_place_by_hand():
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    out_BT = torch.zeros(3, 3)
    place(out_BT, torch.tensor([2, 0]), mask_BT, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert out_BT.tolist() == [[4, 5, 0], [0, 0, 0], [1, 2, 3]]
    place(out_BT, torch.tensor([1]), mask_BT, torch.tensor([9.0]))
    assert out_BT.tolist() == [[4, 5, 0], [9, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_every_answer_is_cut_once_and_aligned(finished, micro_batch):
    step = Step(finished, micro_batch=micro_batch)
    answers, base = ragged(step), step.work.base()
    minibatches = cut(
        step.work, step.feedback.critic_prompt, step.records, answers, 0, micro_batch or step.section.minibatch
    )
    assert [sum(len(m.index_b) for m in minibatch) for minibatch in minibatches] == [4, 4]
    assert [len(minibatch) for minibatch in minibatches] == ([1, 1] if micro_batch is None else [2, 2])
    micros = [m for minibatch in minibatches for m in minibatch]
    assert sorted(i for m in micros for i in m.index_b.tolist()) == list(range(8))
    for micro in micros:
        for row, i in enumerate(micro.index_b.tolist()):
            ids = answers[i].ids
            prompt = encode_prompt(base, step.records[i].prompt, step.work.features(step.records[i]))
            for rows, start in (
                (micro.policy, len(prompt.ids_S)),
                (micro.value, len(step.feedback.critic_prompt(step.records[i]).ids_S)),
            ):
                batch, of_answer_N = rows.batch, rows.answer_N == row
                assert batch.ids_BS[row][batch.mask_BS[row]].tolist()[start:] == ids
                assert rows.token_N[of_answer_N].tolist() == ids
                first = row * batch.ids_BS.shape[1] + start
                assert rows.at_N[of_answer_N].tolist() == list(range(first, first + len(ids)))
                assert torch.equal(rows.before_N, rows.at_N - 1)


def test_log_probs_are_of_the_answers_tokens(finished):
    """Against one softmax per answer in float64, at the sampling temperature."""
    step = Step(finished, temperature=0.7)
    shake(step.work.roles, "policy")
    answers, base = ragged(step), step.work.base()
    _, experience = step.score(answers)
    for i, (record, answer) in enumerate(zip(step.records, answers, strict=True)):
        for role, want_BT in (("policy", experience.logp_BT), ("reference", experience.logp_BT - experience.kl_BT)):
            from rlaif_lite.model.inputs import collate

            row = encode_prompt(base, record.prompt, step.work.features(record)).extend(answer.ids)
            with torch.no_grad(), step.work.roles.use(role) as active:
                hidden_SD = active.hidden(collate(base, [row]))[0].double()
            logp_SV = torch.log_softmax(
                (hidden_SD @ base.head_weight_VD.T.double() + base.ban_bias_V.double()) / 0.7, -1
            )
            start = len(row.ids_S) - len(answer.ids)
            logp_T = torch.stack([logp_SV[start - 1 + t, token] for t, token in enumerate(answer.ids)])
            assert (want_BT[i, : len(answer.ids)] - logp_T).abs().max() <= 1e-4
        assert (experience.logp_BT[i, len(answer.ids) :] == 0).all()
    assert experience.kl_BT.abs().max() > 1e-3


# ---- rewards and advantages, through `score`


PLAIN = {
    "gamma": 1.0,
    "lam": 1.0,
    "whiten_advantages": False,
    "whiten_rewards": False,
    "stop_penalty": 0.0,
    "length_penalty": 0.0,
}


def test_the_score_stands_on_the_last_real_token(finished):
    """No KL at the start and no discount: the return of every real token is the answer's score; after its end there
    is nothing."""
    step = Step(finished, **PLAIN)
    answers = ragged(step)
    step.feedback.mean, step.feedback.std = 0.25, 2.0
    _, experience = step.score(answers)
    want_B = [(score - 0.25) / 2.0 for score in step.reward_scores(answers)]
    assert experience.mask_BT.sum(1).tolist() == RAGGED
    assert experience.score_B.tolist() == pytest.approx(want_B, abs=1e-4)
    for i, length in enumerate(RAGGED):
        assert experience.return_BT[i].tolist() == pytest.approx([want_B[i]] * length + [0.0] * (8 - length), abs=1e-4)
        assert (experience.advantage_BT[i, length:] == 0).all()
    # a value of 0 everywhere (fresh head): the advantage is the return; without lambda only the last token has one
    assert torch.allclose(experience.advantage_BT, experience.return_BT)
    _, myopic = Step.score(_with(step, lam=0.0), answers)
    for i, length in enumerate(RAGGED):
        assert myopic.advantage_BT[i].tolist() == pytest.approx(
            [0.0] * (length - 1) + [want_B[i]] + [0.0] * (8 - length), abs=1e-4
        )


def _with(step: Step, **keys) -> Step:
    step.work.recipe = step.work.recipe.model_copy(update={"ppo": step.work.recipe.ppo.model_copy(update=keys)})
    step.section = step.work.recipe.ppo
    return step


def test_the_kl_is_taken_off_token_by_token(finished):
    step = Step(finished, **PLAIN)
    shake(step.work.roles, "policy")
    answers = ragged(step)
    _, experience = step.score(answers, kl_coef=0.5)
    assert experience.kl_BT.abs().max() > 1e-3 and (experience.kl_BT[~experience.mask_BT] == 0).all()
    for i, length in enumerate(RAGGED):
        to_go_T = experience.kl_BT[i, :length].flip(0).cumsum(0).flip(0)
        want_T = experience.score_B[i] - 0.5 * to_go_T
        assert torch.allclose(experience.return_BT[i, :length], want_T, atol=1e-4)


def test_penalties_change_the_score(finished):
    step = Step(finished, **{**PLAIN, "stop_penalty": 3.0, "length_penalty": 2.0})
    answers = ragged(step)
    _, experience = step.score(answers)
    want = [
        rm - 3.0 * (length == 8) - 2.0 * length / 8
        for rm, length in zip(step.reward_scores(answers), RAGGED, strict=True)
    ]
    assert experience.score_B.tolist() == pytest.approx(want, abs=1e-4)


def test_values_are_of_the_state_before_each_token(finished):
    """By the value role's head on one row at a time: the value of token t is read where t is predicted."""
    from rlaif_lite.model.inputs import collate

    step = Step(finished, **PLAIN)
    shake(step.work.roles, "value")
    answers, base = ragged(step), step.work.base()
    _, experience = step.score(answers)
    for i, (record, answer) in enumerate(zip(step.records, answers, strict=True)):
        row = step.feedback.critic_prompt(record).extend(answer.ids)
        with torch.no_grad(), step.work.roles.use("value") as value:
            value_S = value.scalar(value.hidden(collate(base, [row])))[0]
        start = len(row.ids_S) - len(answer.ids)
        assert torch.allclose(experience.value_BT[i, : len(answer.ids)], value_S[start - 1 : -1], atol=1e-4)
    # lambda 1: advantage = return to go - value
    want_BT = (experience.score_B[:, None] - experience.value_BT) * experience.mask_BT
    assert torch.allclose(experience.advantage_BT, want_BT, atol=1e-4)


def test_without_a_critic_answers_to_one_prompt_are_compared(finished):
    """RLOO: (score - kl_coef * KL of the answer) minus the mean of the same prompt's others, the same for every real
    token."""
    step = Step(finished, **{**PLAIN, "value": "none", "group_size": 4})
    shake(step.work.roles, "policy")
    answers = ragged(step)
    assert [r.id for r in step.records] == [r.id for r in step.work.records("rl")[:2] for _ in range(4)]
    _, experience = step.score(answers, kl_coef=0.5)
    total = [
        rm - 0.5 * kl for rm, kl in zip(step.reward_scores(answers), experience.kl_BT.sum(1).tolist(), strict=True)
    ]
    for i, length in enumerate(RAGGED):
        group = [total[j] for j in range(4 * (i // 4), 4 * (i // 4) + 4) if j != i]
        want = total[i] - sum(group) / 3
        assert experience.advantage_BT[i].tolist() == pytest.approx([want] * length + [0.0] * (8 - length), abs=1e-4)
    assert (experience.value_BT == 0).all()
    history = step.update(experience, roles=("policy",))
    assert "value_loss" not in history[0]


# ---- the update


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_micro_batches_update_as_the_whole_minibatch(rerun, value_clip):
    """One step of gradient descent on policy and value; statistics add up too."""
    recipe = rerun()
    found = {}
    for micro_batch in (None, 2):
        step = Step(
            recipe,
            micro_batch=micro_batch,
            minibatch=8,
            epochs=1,
            value_clip=value_clip,
            max_grad_norm=1e9,
            value_coef=0.7,
        )
        shake(step.work.roles, "value")
        answers = ragged(step)
        _, experience = step.score(answers)
        old_BT = experience.logp_BT - 0.3 * torch.randn(
            experience.logp_BT.shape, generator=torch.Generator().manual_seed(0)
        )
        before = {role: [p.clone() for p in step.work.roles.parameters(role)] for role in ("policy", "value")}
        history = step.update(experience._replace(logp_BT=old_BT * experience.mask_BT))
        moves = {
            role: [now - then for now, then in zip(step.work.roles.parameters(role), before[role], strict=True)]
            for role in before
        }
        found[micro_batch] = (moves, history[0])
    (whole, stats), (micro, micro_stats) = found[None], found[2]
    for role in whole:
        for a, b in zip(whole[role], micro[role], strict=True):
            assert (a - b).abs().max() <= 1e-6 + 1e-4 * a.abs().max()
        assert max(a.abs().max() for a in whole[role]) > 1e-4
    assert stats.keys() == micro_stats.keys()
    for name in stats:
        assert float(stats[name]) == pytest.approx(float(micro_stats[name]), abs=1e-5), name
    assert stats["clipfrac"] > 0


def test_pads_and_other_minibatches_reach_no_gradient(finished):
    """Advantages of NaN at pads change nothing."""
    step = Step(finished, minibatch=8, epochs=1)
    _, experience = step.score(ragged(step))
    poisoned = experience._replace(
        advantage_BT=experience.advantage_BT.masked_fill(~experience.mask_BT, torch.nan),
        return_BT=experience.return_BT.masked_fill(~experience.mask_BT, torch.nan),
    )
    history = step.update(poisoned)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in history[0].values())
    assert all(p.isfinite().all() for role in ("policy", "value") for p in step.work.roles.parameters(role))


def test_epochs_and_minibatches(finished):
    step = Step(finished, epochs=3)
    _, experience = step.score(ragged(step))
    assert len(step.update(experience)) == 3 * 2


def test_only_policy_and_value_move(finished):
    step = Step(finished)
    _, experience = step.score(ragged(step))
    roles = step.work.roles
    before = {name: [p.clone() for p in roles.parameters(name)] for name in roles.names}
    fingerprint = step.work.base().fingerprint()
    step.update(experience)
    moved = {
        name
        for name in roles.names
        if any((a != b).any() for a, b in zip(before[name], roles.parameters(name), strict=True))
    }
    assert moved == {"policy", "value"} and step.work.base().fingerprint() == fingerprint


def test_the_share_of_the_rate_by_hand(recipe):
    """Up over warmup_steps, and down linearly to lr_end: the lower of the paths multiplied."""
    section = recipe("ppo.steps=10", "ppo.warmup_steps=3", "ppo.lr_end=0.25").ppo
    want = [1 / 4 * 1.0, 2 / 4 * 0.9, 3 / 4 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25]
    assert [ppo.lr_share(section, step) for step in range(10)] == pytest.approx(want)
    flat = recipe("ppo.steps=4", "ppo.warmup_steps=0", "ppo.lr_end=1.0").ppo
    assert [ppo.lr_share(flat, step) for step in range(4)] == [1.0] * 4


def test_the_reward_is_standardised_on_the_references_answers(finished):
    """Mean and deviation of the reward model over the reference's samples to RL prompts; the policy plays no part."""
    step = Step(finished)
    mean, std = step.feedback.scale()
    shake(step.work.roles, "policy")
    assert step.feedback.scale() == (mean, std)
    assert std > 1e-6 and abs(mean) < 100
    step.work.roles.remove("reference")
    step.work.roles.add("reference", seed=8)
    shake(step.work.roles, "reference")
    assert step.feedback.scale() != (mean, std)


# ---- the stage


def test_what_a_run_logs(finished):
    lines = [line for line in read_jsonl(Workspace(finished).log.path) if line["stage"] == "ppo"]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    names = {
        "objective/kl",
        "objective/scores",
        "objective/rlhf_reward",
        "objective/entropy",
        "policy/approxkl_avg",
        "policy/clipfrac_avg",
        "loss/policy_avg",
        "loss/value_avg",
        "val/ratio",
        "val/num_eos_tokens",
        "val/explained_variance",
        "rollout/length",
        "rollout/stop_rate",
        "rollout/repetition",
        "rollout/oracle_score",
    }
    assert all(names <= line.keys() for line in lines)
    assert lines[0]["objective/kl"] == 0 and lines[1]["objective/kl"] != 0
    assert abs(lines[0]["objective/scores"]) < 3  # standardised: near 0 at the start


def test_the_light_option_trains_no_critic(rerun):
    work = Workspace(rerun("ppo.value=none", "ppo.group_size=2", "ppo.steps=2"))
    (work.folder / "adapters" / "value").rename(work.folder / "old_value")
    result = ppo.run(work)
    assert set(result["roles"]) == {"policy", "reference", "reward"} and not work.adapter("value").exists()
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    assert len(lines) == 2 and "loss/value_avg" not in lines[0] and lines[0]["objective/kl"] == 0


def test_a_weak_reward_model_stops_ppo_before_it_starts(rerun):
    work = Workspace(rerun("reward.floor=1.0"))
    (work.folder / "reward" / "heldout.json").write_text('{"heldout_accuracy": 0.99}')
    with pytest.raises(StageError, match="below `reward.floor: 1.0`"):
        ppo.run(work)
