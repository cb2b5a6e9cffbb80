"""Supervised training: where the loss stands, what weighs how much, phases, replay, micro-batches.

Shapes: B records, S positions, V vocabulary.
"""

import json
from dataclasses import replace

import pytest
import torch

from core import record, shake, video_of
from rlaif_lite.data.records import from_json
from rlaif_lite.errors import DataError, ModelError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.inputs import IGNORE, collate
from rlaif_lite.recipe import Training
from rlaif_lite.stages import sft
from rlaif_lite.training import fit as training
from rlaif_lite.training.fit import fit, steps_of
from rlaif_lite.training.loop import MetricsLog
from rlaif_lite.workspace import Workspace

HARD = "first a red circle left . then a blue square up ."


def words(base, ids: list[int]) -> list[str]:
    return ["-" if i == IGNORE else base.tokenizer.convert_ids_to_tokens(i) for i in ids]


def examples(base, loss_per: str) -> list[sft.Example]:
    """A short and a long answer about videos, and one with verdicts."""
    return [
        sft.example(base, record("<video> what is the colour first ?", "red ."), video_of(base, 8), loss_per),
        sft.example(
            base, record("<video> describe the video", HARD), video_of(base, layout=12, keep=[0, 5, 9]), loss_per
        ),
        sft.example(
            base, record("response :", "a red star .", video=None, verdicts=[[5, "yes"], [10, "no"]]), None, loss_per
        ),
    ]


def test_targets_are_the_answer_and_its_end(base):
    row, targets_S, weight = sft.example(
        base, record("<video> describe", "red star ."), video_of(base, 2, layout=4, keep=[0, 1]), "token"
    )
    assert words(base, row.ids_S) == ["<s>", "<video>", "<video>", "describe", "<ans>", "red", "star", ".", "</s>"]
    assert words(base, targets_S) == ["-", "-", "-", "-", "red", "star", ".", "</s>", "-"] and weight == 1


ROUNDS = [("user", "what ?"), ("assistant", "red ."), ("user", "shape ?"), ("assistant", "cross .")]
CONVERSATION = from_json({"id": "x", "messages": [{"role": r, "content": c} for r, c in ROUNDS]}, "made up")


def test_every_answer_of_a_conversation_is_learnt(base):
    """In one row, where the template writes an earlier answer as it would be sampled."""
    ((row, targets_S, weight),) = sft.examples(base, CONVERSATION, None, "record", "all")
    said = ["<s>", "what", "?", "<ans>", "red", ".", "</s>", "shape", "?", "<ans>", "cross", ".", "</s>"]
    assert words(base, row.ids_S) == said and weight == 1 / 6
    assert words(base, targets_S) == ["-"] * 3 + ["red", ".", "</s>"] + ["-"] * 3 + ["cross", ".", "</s>", "-"]


def test_only_the_last_answer_is_learnt_where_the_recipe_says_so(base):
    ((row, targets_S, _),) = sft.examples(base, CONVERSATION, None, "token", "last")
    assert words(base, row.ids_S)[-4:] == ["<ans>", "cross", ".", "</s>"]
    assert words(base, targets_S) == ["-"] * 9 + ["cross", ".", "</s>", "-"]


def test_a_template_without_an_end_of_earlier_answers(load):
    """As LLaVA-1.5's own on the hub: the answers are trained, and the end of the last one."""
    base = load()
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace("eos_token", "''").replace("</s>", "")
    ((_, targets_S, weight),) = sft.examples(base, CONVERSATION, None, "record", "all")
    learnt = [w for w in words(base, targets_S) if w != "-"]
    assert learnt == ["red", ".", "cross", ".", "</s>"] and weight == 1 / 5


def test_a_template_that_changes_earlier_answers_gets_a_row_for_each(load):
    """As templates that drop the thinking of earlier rounds: every answer is trained, with the weight of one record."""
    base = load()
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace("{{ text }} </s>", "star </s>")
    rows = sft.examples(base, CONVERSATION, None, "record", "all")
    learnt = [[w for w in words(base, targets_S) if w != "-"] for _, targets_S, _ in rows]
    assert learnt == [["cross", ".", "</s>"], ["red", ".", "</s>"]]
    assert sum(weight * sft.scored(targets_S) for _, targets_S, weight in rows) == pytest.approx(1)


def test_the_loss_of_a_conversation_is_that_of_its_rounds(roles):
    """One row with all answers gives the log-probabilities that each round gives by itself."""
    roles.add("sft")
    shake(roles, "sft")
    together = sft.examples(roles.base, CONVERSATION, None, "token", "all")
    alone = [
        sft.last_answer(roles.base, replace(CONVERSATION, messages=CONVERSATION.messages[:n]), None, "token")
        for n in (2, 4)
    ]
    (one,) = by_hand(roles, together)
    assert one == pytest.approx([value for each in by_hand(roles, alone) for value in each], abs=1e-5)


def test_verdicts_stand_at_the_words_they_judge(base):
    """Read AT the word: the target of the token that ends where the verdict's span ends."""
    given = record(
        "response :", "a red circle left .", video=None, verdicts=[[1, "-"], [5, "yes"], [12, "no"], [17, "yes"]]
    )
    row, targets_S, weight = sft.example(base, given, None, "record")
    assert words(base, row.ids_S) == ["<s>", "response", ":", "<ans>", "a", "red", "circle", "left", "."]
    assert targets_S[:4] == [IGNORE] * 4 and targets_S[-1] == IGNORE
    assert words(base, targets_S[4:8]) == ["-", "yes", "no", "yes"]
    assert targets_S[4] == base.tokenizer.convert_tokens_to_ids("-") and weight == 1 / 4


def test_a_verdict_that_is_no_token_is_named(base):
    given = record("response :", "a red circle", video=None, verdicts=[[5, "very true"]])
    with pytest.raises(ModelError, match="made up.*'very true' is 2 tokens"):
        sft.example(base, given, None, "token")


def test_a_record_without_an_answer_is_named(base):
    with pytest.raises(DataError, match="made up.*needs an answer"):
        sft.example(base, record("<video> describe"), video_of(base), "token")


def by_hand(roles, given: list[sft.Example]) -> list[list[float]]:
    """-log p of every target, one record at a time, by the softmax over the whole vocabulary in float64."""
    base, out = roles.base, []
    for row, targets_S, _ in given:
        with torch.no_grad(), roles.use("sft") as role:
            hidden_SD = role.hidden(collate(base, [row]))[0].double()
        logp_SV = torch.log_softmax(hidden_SD @ base.head_weight_VD.T.double() + base.ban_bias_V.double(), -1)
        out.append([-logp_SV[s, target].item() for s, target in enumerate(targets_S) if target != IGNORE])
    return out


@pytest.mark.parametrize("loss_per", ["token", "record"])
def test_the_loss_is_the_mean_over_tokens_or_over_records(roles, loss_per):
    roles.add("sft")
    shake(roles, "sft")
    given = examples(roles.base, loss_per)
    nll = by_hand(roles, given)
    assert [len(part) for part in nll] == [3, 13, 2]
    if loss_per == "token":
        want, total = sum(map(sum, nll)) / 18, 18.0
    else:
        want, total = sum(sum(part) / len(part) for part in nll) / 3, 3.0
    assert sum(e.weight * sum(t != IGNORE for t in e.targets_S) for e in given) == pytest.approx(total)
    with roles.use("sft") as role:
        roles.trainable("sft")
        assert sft.backward(role, given, total) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("loss_per", ["token", "record"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(load, loss_per, checkpointing):
    from rlaif_lite.model.roles import Roles
    from rlaif_lite.recipe import Lora

    roles = Roles(load(gradient_checkpointing=checkpointing), Lora(rank=4, alpha=8.0))
    roles.add("sft")
    shake(roles, "sft")
    roles.trainable("sft")
    given = examples(roles.base, loss_per)
    total = sum(e.weight * sum(t != IGNORE for t in e.targets_S) for e in given)

    def gradients(parts: list[list[sft.Example]]) -> tuple[float, list[torch.Tensor]]:
        with roles.use("sft") as role:
            loss = sum(sft.backward(role, part, total) for part in parts)
        found = [p.grad.clone() for p in roles.parameters("sft")]
        for p in roles.parameters("sft"):
            p.grad = None
        return loss, found

    loss, whole = gradients([given])
    micro_loss, micro = gradients([given[:2], given[2:]])
    assert loss == pytest.approx(micro_loss, abs=1e-6)
    for a, b in zip(whole, micro, strict=True):
        assert a.norm() > 0 and (a - b).norm() <= 1e-5 * a.norm()


def test_prompt_tokens_have_no_gradient_of_their_own(roles):
    """The loss is a function of the answer's positions alone: its gradient at the hidden states is 0 everywhere
    else."""
    roles.add("sft")
    shake(roles, "sft")
    roles.trainable("sft")
    given = examples(roles.base, "token")[:2]
    seen = {}
    with roles.use("sft") as role:
        original = role.hidden

        def spy(batch):
            hidden_BSD = original(batch)
            hidden_BSD.register_hook(lambda gradient: seen.update(gradient_BSD=gradient))
            return hidden_BSD

        role.hidden = spy
        sft.backward(role, given, 16.0)
    touched_BS = seen["gradient_BSD"].abs().sum(-1) > 0
    for row_S, (_, targets_S, _) in zip(touched_BS, given, strict=True):
        assert row_S.tolist() == [t != IGNORE for t in targets_S] + [False] * (len(row_S) - len(targets_S))


def test_steps_and_epochs():
    assert steps_of(Training(steps=7, epochs=3.0), 1000, 32) == 7
    assert steps_of(Training(epochs=3.0, batch_size=32), 640, 32) == 60
    assert steps_of(Training(epochs=3.0, batch_size=32), 640, 16) == 120  # half of each batch is replayed
    assert steps_of(Training(epochs=0.5, batch_size=32), 10, 32) == 1  # at least one


def test_fit_learns_and_goes_on_where_it_was(roles, load, tmp_path, monkeypatch):
    """Loss falls; stopped after its checkpoint and run again, it ends with the same bits and the same log."""
    from rlaif_lite.model.roles import Roles
    from rlaif_lite.recipe import Lora

    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    section = Training(lr=5e-3, batch_size=3, warmup_ratio=0.2, schedule="linear")
    given = examples(roles.base, "record")

    def run(roles, folder, stop: int | None):
        def step_loss(active, step, micro):
            if step == stop:
                raise KeyboardInterrupt
            return {"loss": sft.backward(active, given, 3.0) + 0 * torch.rand(()).item()}

        log = MetricsLog(folder / "metrics.jsonl")
        fit(roles, "sft", section, 6, step_loss, "x", folder / "checkpoint", log, 1)
        return [p.detach().clone() for p in roles.parameters("sft")], [
            {k: v for k, v in line.items() if k != "time"} for line in read_jsonl(folder / "metrics.jsonl")
        ]

    roles.add("sft", seed=3)
    whole, lines = run(roles, tmp_path / "whole", None)
    assert lines[-1]["loss"] < lines[0]["loss"] and [line["step"] for line in lines] == list(range(6))
    assert [line["lr"] for line in lines] == pytest.approx([2.5e-3, 5e-3, 5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    assert not any(p.requires_grad for p in roles.parameters("sft"))

    for stop in (5, None):  # killed in step 5, after the checkpoint of step 4
        again = Roles(load(), Lora(rank=4, alpha=8.0))
        again.add("sft", seed=3)
        if stop:
            with pytest.raises(KeyboardInterrupt):
                run(again, tmp_path / "again", stop)
        else:
            resumed, resumed_lines = run(again, tmp_path / "again", stop)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True)) and lines == resumed_lines


# ---- the stage


def test_phases_replay_and_what_they_train(rerun, monkeypatch):
    """hard and policy_init replay a third of each batch from easy; sft is what easy and hard leave, reference goes on
    from there."""
    drawn: dict[str, list] = {}
    original = sft.examples

    def spy(base, given, *rest):
        drawn.setdefault(label["now"], []).append(given)
        return original(base, given, *rest)

    label = {}
    train = sft.train

    def named(work, role, phase, *rest, **more):
        label["now"] = phase
        return train(work, role, phase, *rest, **more)

    monkeypatch.setattr(sft, "examples", spy)
    monkeypatch.setattr(sft, "train", named)
    recipe = rerun("sft.replay=0.34")
    work = Workspace(recipe)
    result = sft.run(work)
    easy = {r.id for r in work.records("sft_easy")}
    assert {phase: found["steps"] for phase, found in result.items()} == {"easy": 3, "hard": 3, "policy_init": 2}
    assert all(r.id in easy for r in drawn["easy"])
    for phase, steps in (("hard", 3), ("policy_init", 2)):
        assert len(drawn[phase]) == 6 * steps and sum(r.id in easy for r in drawn[phase]) == 2 * steps
    own = {"hard": {r.id for r in work.records("sft_hard")}, "policy_init": {r.id for r in work.records("policy_init")}}
    assert all(r.id in easy | own[phase] for phase in own for r in drawn[phase])
    assert (work.folder / "adapters" / "reference" / "adapter_model.safetensors").read_bytes() != (
        work.folder / "adapters" / "sft" / "adapter_model.safetensors"
    ).read_bytes()
    lines = [line for line in read_jsonl(work.log.path) if line["stage"].startswith("sft.")]
    assert [line["stage"] for line in lines] == ["sft.easy"] * 3 + ["sft.hard"] * 3 + ["sft.policy_init"] * 2


def test_phases_can_be_left_out(rerun):
    """null leaves a phase out, and its data is not asked for; without policy_init the reference is the SFT adapter
    itself."""
    recipe = rerun(
        "sft.easy=null", "sft.policy_init=null", "data.sft_easy=[]", "data.policy_init=[]", "sft.replay=0.34"
    )
    work = Workspace(recipe)
    result = sft.run(work)
    assert set(result) == {"hard"}
    files = [work.adapter(role) / "adapter_model.safetensors" for role in ("sft", "reference")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_sft_files_are_split_by_the_length_of_the_answer(finished, tmp_path):
    work = Workspace(finished)
    lines = [
        json.dumps(
            {
                "id": str(i),
                "messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "red " * n}],
            }
        )
        for i, n in enumerate((1, 5, 6, 40))
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    data = finished.data.model_copy(
        update={"sft": (str(tmp_path / "own.jsonl"),), "sft_easy": (), "sft_hard": (), "max_easy_words": 5}
    )
    work = Workspace(finished.model_copy(update={"data": data}))
    assert [r.id for r in work.records("sft_easy")] == ["0", "1"] and [r.id for r in work.records("sft_hard")] == [
        "2",
        "3",
    ]
    assert "sft" not in work.split_names()
