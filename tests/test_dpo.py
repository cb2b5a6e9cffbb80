"""The dpo stage: what a round does, on the random base; killed anywhere it ends the same; its judges; best of N."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from core import shake, small_recipe, video_of
from rlaif_lite import files as run_files
from rlaif_lite import pipeline
from rlaif_lite.data.records import Message
from rlaif_lite.data.world_text import claim_question, claims_of
from rlaif_lite.errors import ModelError, StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.judge.claims import ClaimScores
from rlaif_lite.judge.divide import Divided, TextModel, divide, parse_list, rejected
from rlaif_lite.model.answers import Group
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.recipe import Divide
from rlaif_lite.rollout import Sampling, sample
from rlaif_lite.rollout.score import answer_logps, best_of
from rlaif_lite.stages.dpo import rounds as dpo
from rlaif_lite.stages.dpo.judges import Scores, divide_answers, score_answers
from rlaif_lite.stages.dpo.train import spans_of
from rlaif_lite.training import checkpoint, loop
from rlaif_lite.workspace import Workspace

ROUNDS = "dpo={rounds: 2, steps: 3, batch_size: 4, lr: 1e-3, heldout: 0.25, sft_weight: 0.1}"
ASKED = "preference.claims={mode: ask, prompt: '<video> {context} {claim}', context_prefix: 'context : {context}'}"
DIVIDED = """dpo.divide={train: {steps: 2, batch_size: 2, lr: 1e-3}, split: "response : {answer} claim :",
    ask: "claim : {claim} question :", separator: " - ", max_new_tokens: 8}"""
PAIRWISE = "preference.judge=pairwise"
RRPO = ("dpo.spans=tokens", "dpo.kl_weight=0.1")
AGAIN = "dpo.describe={prompt: 'context : {context} <video> describe the clip'}"


@pytest.fixture(scope="module")
def begun(checkpoint, tmp_path_factory) -> Path:
    """A run folder with everything up to the context stage."""
    folder = tmp_path_factory.mktemp("dpo")
    recipe = small_recipe(checkpoint, folder, "method=dpo", ROUNDS)
    pipeline.run(recipe, until="context", force=True)
    return Path(recipe.output)


@pytest.fixture
def work(begun, checkpoint, tmp_path):
    """work(*overrides) -> a workspace on a copy of it, where the dpo stage begins."""

    def make(*overrides: str) -> Workspace:
        shutil.copytree(begun, tmp_path / "run", dirs_exist_ok=True)
        made = Workspace(small_recipe(checkpoint, tmp_path, "method=dpo", ROUNDS, *overrides))
        made.stage("dpo")
        return made

    return make


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for checkpoints and what took how long."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if "checkpoint" not in name.parts}


def logged(work: Workspace) -> list[dict]:
    lines = [line for line in read_jsonl(work.log.path) if "dpo" in line["stage"]]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


# ---------------------------------------------------------------------------------------------------------- the rounds


def test_two_rounds_leave_a_policy_and_say_what_they_did(work):
    made = work()
    result = dpo.run(made)
    start, first, second = result["rounds"]
    assert [row["round"] for row in result["rounds"]] == [0, 1, 2] and result["judge"] == "claims"
    best = max(first, second, key=lambda row: row["heldout_score"])
    assert result["selected"] == best["round"] and [r["selected"] for r in result["rounds"]].count(True) == 1
    chosen = made.folder / "dpo" / f"round{best['round']}" / "policy" / "adapter_model.safetensors"
    assert (made.adapter("policy") / chosen.name).read_bytes() == chosen.read_bytes()
    assert first["prompts"] == 6 and first["answers"] == 24 and result["heldout_prompts"] == 2
    pairs = read_jsonl(made.folder / "dpo" / "round1" / "pairs.jsonl")
    assert len(pairs) == first["pairs"] and all(pair["margin"] > 0 for pair in pairs)
    shown = first["pairs"] + first["dropped"]["surplus"] + first["dropped"]["tied"] + first["dropped"]["length"]
    assert shown == 6 * 6  # every two of four answers to six prompts
    assert max([pair["record"] for pair in pairs].count(pair["record"]) for pair in pairs) <= 2
    lines = logged(made)
    assert [(line["stage"], line["step"]) for line in lines] == [(f"dpo.{t}", s) for t in (1, 2) for s in range(3)]
    for line in lines[::3]:  # each round is held to the policy that it starts from
        assert line["margin"] == pytest.approx(0, abs=1e-3)
        assert line["loss"] == pytest.approx(0.6931 + 0.1 * line["nll"], abs=1e-3)


def test_the_reference_may_stay_the_first_model(work):
    made = work("dpo.reference=start", "dpo.generator=start", "dpo.judge_role=policy")
    dpo.run(made)
    margins = [line["margin"] for line in logged(made)]
    assert margins[0] == pytest.approx(0, abs=1e-3)
    assert abs(margins[3]) > 1e-3  # round 2 begins away from it


class Killed(Exception):
    """Where a kill would have come."""


@pytest.mark.parametrize("overrides", [(PAIRWISE, AGAIN), (ASKED, DIVIDED, *RRPO)], ids=["i-SRT", "RLAIF-V, RRPO"])
def test_killed_again_and_again_it_ends_the_same(work, tmp_path, monkeypatch, overrides):
    """Each attempt dies a few writes later than the last one, and leaves half a line behind."""
    whole = work(*overrides, "preference.batch_size=2")
    result = dpo.run(whole)
    kept, lines = files(whole.folder / "dpo"), logged(whole)
    policy = (whole.adapter("policy") / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")

    left = [0]

    def dying(*args, **named):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return json.dumps(*args, **named)

    writers = SimpleNamespace(dumps=dying, loads=json.loads)
    attempts = 0
    while True:
        again = Workspace(whole.recipe) if attempts else work(*overrides, "preference.batch_size=2")
        left[0] = 5 + 5 * attempts  # lines, checkpoints and files that an attempt writes
        with monkeypatch.context() as patch:
            for module in (run_files, loop, checkpoint):
                patch.setattr(module, "json", writers)
            try:
                assert dpo.run(again) == result
                break
            except Killed:
                attempts += 1
        for path in (again.folder / "dpo").glob("round*/answers.jsonl"):
            if not (path.parent / "round.json").exists():
                with open(path, "a") as file:
                    file.write('{"items": 1, "results": [{"id": "half a li')
    assert attempts > 4
    assert files(again.folder / "dpo") == kept and logged(again) == lines
    assert (again.adapter("policy") / "adapter_model.safetensors").read_bytes() == policy


def test_without_a_preference_the_first_round_says_so(work):
    with pytest.raises(StageError, match="Round 1 of DPO has no pairs"):
        dpo.run(work("preference.min_margin=100.0"))


def test_rrpo_compares_claims_and_is_held_by_the_kl(work):
    made = work("dpo.rounds=1", "dpo.spans=claims", "dpo.kl_weight=0.5", "dpo.sft_weight=0")
    (_, row) = dpo.run(made)["rounds"]
    for pair in read_jsonl(made.folder / "dpo" / "round1" / "pairs.jsonl"):
        spans = spans_of(made.base(), "claims", pair["chosen_ids"], pair["rejected_ids"])
        assert [list(map(list, of)) for of in spans] == pair["spans"]
    first, *_, last = logged(made)
    assert first["margin"] == pytest.approx(0, abs=1e-3) and first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["kl"] > 10 * abs(first["kl"]) and row["kl"] > 0 and "alike" in row["dropped"]


def test_the_variants_of_the_loss_begin_where_they_should(work):
    for key in ("dpo.loss=ipo", "dpo.length_normalised=true"):
        made = work(key, "dpo.rounds=1", "dpo.beta=0.5")
        dpo.run(made)
        loss = logged(made)[0]["loss"] - 0.1 * logged(made)[0]["nll"]
        assert loss == pytest.approx(1.0 if "ipo" in key else 0.6931, abs=5e-3)  # (0 - 1 / (2 * 0.5))^2
        shutil.rmtree(made.folder)


# ------------------------------------------------------------------------------------------------------ divided claims


def test_a_list_is_read_as_it_may_be_written():
    text = "### Facts:\n- A cat sits.\n\n2) It is red.\n* it-self\nplain"
    assert parse_list(text, "\n") == ["A cat sits.", "It is red.", "it-self", "plain"]
    assert parse_list("first red - first circle -", " - ") == ["first red", "first circle"]


def test_claims_and_questions_stay_together_or_the_answer_is_not_judged():
    asked = []

    def write(prompts):
        asked.append(prompts)
        said = {"split one": "a\nb", "split two": "b\nc", "split three": ""}
        said |= {"ask a": "a ?", "ask b": "b ?", "ask c": "c ?\nd ?"}
        return [said[prompt] for prompt in prompts]

    section = Divide(split="split {answer}", ask="ask {claim}")
    found = divide(write, [("q", "one"), ("q", "two"), ("q", "three")], section)
    assert found == [Divided(["a", "b"], ["a ?", "b ?"]), Divided(["b", "c"], ["b ?", "c ?", "d ?"]), Divided([], [])]
    assert [each.judged for each in found] == [True, False, False]
    assert asked == [["split one", "split two", "split three"], ["ask a", "ask b", "ask c"]]  # a claim is asked once
    found = divide(write, [("q", "It runs. It is red.")], Divide(split=None, ask=None))
    assert found == [Divided(["It runs.", "It is red."], ["It runs.", "It is red."])]


def test_the_score_counts_what_is_not_likelier_true():
    assert rejected(ClaimScores(0.0, ["a", "b", "c"], [0.1, -0.2, 0.0], [], [])) == 2


def test_the_worlds_own_division():
    assert claims_of("first a red circle left . then red . also a blue star .") == [
        "first red",
        "first circle",
        "first left",
        "then red",
        "also a blue star",
    ]
    assert claim_question("first red") == "claim : first red ?"


def test_answers_that_cannot_be_judged_are_counted(work):
    made = work(ASKED, "dpo.divide={split: null, ask: null}")
    made.load_role("sft")
    answers = [dpo.Answers(made.records("preference")[0], ["a b .", "", "c .", "a b ."], [[1]] * 4)]
    scored = score_answers(made, "sft", answers, None, made.stage("dpo"), "x")
    assert scored.dropped == {"mismatched": 0, "claimless": 1, "unread": 0}
    ((first, empty, other, again),) = scored.scores
    assert empty is None and first == again and {first, other} <= {0, -1}
    assert (
        len(read_jsonl(made.stage("dpo") / "judged.jsonl")[0]["results"]) == 2
    )  # what stands twice is asked about once


def test_held_out_answers_that_cannot_be_judged_do_not_win(work, monkeypatch):
    made = work(ASKED, "dpo.divide={split: null, ask: null}")
    held = dpo.split_by_video(made)[1]
    said, judged = iter([["a . b . c .", "x .", ""], ["", "", ""]]), iter([[None, -2.0, None], [None] * 3])

    def sampled(*_):
        return [dpo.Answers(record, [text], [[1]]) for record, text in zip([*held, held[0]], next(said), strict=True)]

    monkeypatch.setattr(dpo, "sample_answers", sampled)
    monkeypatch.setattr(dpo, "score_answers", lambda *_: Scores([[score] for score in next(judged)], {}))
    assert dpo.look(made, 0, made.adapter("reference"), held)["heldout_score"] == (-3 - 2 - 1) / 3
    with pytest.raises(StageError, match="no held-out answer of 2 could be judged"):
        dpo.look(made, 0, made.adapter("reference"), held)


@pytest.fixture(scope="module")
def text_model(checkpoint, tmp_path_factory) -> Path:
    """A Llama of two narrow layers with the words of the embedded base."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("text")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def test_a_text_model_writes_each_prompt_as_if_alone(text_model, tmp_path):
    section = Divide(max_new_tokens=6, batch_size=2)
    prompts = ["first a red circle", "what is the colour star ?", "then"]
    model = TextModel(str(text_model), torch.device("cpu"), section)
    assert model.write(prompts) == [model.write([prompt])[0] for prompt in prompts]
    assert all(model.write(prompts))
    with pytest.raises(ModelError, match="dpo.divide.model"):
        TextModel(str(tmp_path), torch.device("cpu"), section)


def test_a_text_model_divides_for_a_run(work, text_model):
    made = work(ASKED, f"dpo.divide={{model: '{text_model}', max_new_tokens: 4, ask: null}}")
    answers = [("describe", "first red ."), ("describe", "first red .")]
    found = divide_answers(made, answers, made.stage("dpo"), "x")
    assert found[0] == found[1] and found[0].claims
    assert len(read_jsonl(made.stage("dpo") / "claims.jsonl")[0]["results"]) == 1  # what is said twice is divided once


# ----------------------------------------------------------------------------------------------------- best of several


def test_the_best_answer_is_the_one_whose_tokens_gained_most(roles):
    roles.add("reference")
    roles.add("policy")
    shake(roles, "policy", seed=4)
    base = roles.base
    asked = [Message("user", "<video> describe the video")]
    prompts = [encode_prompt(base, asked, video_of(base, seed=seed)) for seed in (0, 1)]
    sampling, seeds = Sampling(7, 1.0), list(range(10))
    with roles.use("policy") as role:
        found = sample(role, prompts, sampling, seeds=seeds, per_prompt=5)
    best = best_of(roles, "policy", "reference", prompts, sampling, count=5, seeds=seeds, beta=0.2, batch_size=3)
    for place, winner in enumerate(best):
        rewards = []
        for answer in found[5 * place : 5 * place + 5]:
            sums = []
            for name in ("policy", "reference"):
                with torch.no_grad(), roles.use(name) as role:
                    sums.append(answer_logps(role, [Group(prompts[place], [answer.ids])]).item())
            rewards.append(0.2 * (sums[0] - sums[1]) / len(answer.ids))
        assert winner.reward == pytest.approx(max(rewards), abs=1e-5)
        assert winner.answer.ids == found[5 * place + rewards.index(max(rewards))].ids
        assert max(rewards) - min(rewards) > 1e-3


def test_a_run_ends_with_a_column_of_its_own_and_the_best_of_several(work):
    overrides = ("dpo.rounds=1", "evaluate.best_of=3", "evaluate.roles=[sft, policy]", "evaluate.temperatures=[]")
    recipe = work(*overrides).recipe
    summary = pipeline.run(recipe, force=True)
    assert set(summary["evaluation"]) == {"sft", "dpo", "dpo@bo3"} and summary["finished"]
    assert set(summary["evaluation_intervals"]) == {"dpo-sft", "dpo@bo3-dpo"}
    assert {"greedy_f1", "sample_f1"} <= set(summary["evaluation_intervals"]["dpo@bo3-dpo"])
    assert [row["round"] for row in summary["dpo"]["rounds"]] == [0, 1]
    one, best = (read_jsonl(Path(recipe.output) / "evaluate" / f"{name}.sample@1.jsonl") for name in ("dpo", "dpo@bo3"))
    assert len(best) == 8 and len(one) == 16
    own = {row["id"]: row["answer"] for row in reversed(one)}  # the first of each prompt's, drawn with the same seed
    assert {row["id"] for row in best} == set(own) and any(row["answer"] != own[row["id"]] for row in best)


def test_log_probs_of_answers_are_the_samplers_own(roles):
    """The sampler scores token by token with a cache; whole answers are scored in one padded forward."""
    roles.add("policy")
    shake(roles, "policy")
    base = roles.base
    asked = [Message("user", "<video> describe the video")]
    prompts = [encode_prompt(base, asked, video_of(base, seed=seed)) for seed in (0, 1)]
    with roles.use("policy") as role:
        found = sample(role, prompts, Sampling(9, 1.0), seeds=[5, 6])
        with torch.no_grad():
            logp_B = answer_logps(role, [Group(p, [t.ids]) for p, t in zip(prompts, found, strict=True)])
    assert logp_B.tolist() == pytest.approx([sum(t.logp) for t in found], abs=1e-3)
