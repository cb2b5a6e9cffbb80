"""The judge on this machine, for real: a role of a small base, and a text model of its own.

Shapes: S positions, D width, V vocabulary.
"""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from core import shake
from rlaif_lite.benchmarks.command import of_role
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.judge.outside import Case, local
from rlaif_lite.judge.outside.cached import CachedJudge
from rlaif_lite.judge.outside.local import LocalRole, LocalText
from rlaif_lite.judge.outside.prompts import prompt_of
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Lora
from rlaif_lite.workspace import Workspace


@pytest.fixture(scope="module")
def judges(load) -> Roles:
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    roles.add("sft")
    shake(roles, "sft", size=0.2)
    return roles


@pytest.fixture(autouse=True)
def short_replies(monkeypatch):
    monkeypatch.setattr(local, "REPLY_TOKENS", 6)


def qa(number: int, prediction: str) -> Case:
    return Case(f"{number}", "qa", "what is first ?", "a red circle", prediction)


def last_hidden(roles: Roles, role: str, ids: list[int]) -> torch.Tensor:
    """hidden_D at the last of the ids of a prompt, by one full forward."""
    row = encode_prompt(roles.base, [Message("user", "x")], None)
    row = row._replace(ids_S=ids, position_CS=torch.arange(len(ids))[None])
    with torch.no_grad(), roles.use(role) as active:
        return active.hidden(collate(roles.base, [row]))[0, -1]


def prompt_ids(roles: Roles, case: Case, word: bool) -> list[int]:
    text = prompt_of(case, word).text
    return encode_prompt(roles.base, [Message("user", text)], None).ids_S


def test_replies_are_what_the_role_writes_greedily(judges, tmp_path):
    cases = [qa(1, "a red circle"), qa(2, "first a blue square then a green cross up ."), qa(3, "yellow star")]
    raw = {}
    for role in ("sft", "base"):
        found = CachedJudge(LocalRole(judges, role, f"local:{role}", "1", batch_size=2), tmp_path).judge(cases)
        assert [v.id for v in found] == ["1", "2", "3"] and all(v.problem and v.score is None for v in found)
        raw[role] = [v.raw for v in found]
        ids = prompt_ids(judges, cases[1], word=False)
        written = []
        while len(written) < 6 and (not written or written[-1] != judges.base.eos_id):
            hidden_D = last_hidden(judges, role, ids + written)
            written.append(int((hidden_D @ judges.base.head_weight_VD.T + judges.base.ban_bias_V).argmax()))
        text = judges.base.tokenizer.decode([i for i in written if i != judges.base.eos_id]).strip()
        assert raw[role][1] == text and text
    assert raw["sft"] != raw["base"]


def test_yes_and_no_by_their_probabilities(judges, tmp_path):
    cases = [qa(n, text) for n, text in enumerate(["a red circle", "blue", "no no no", "yes first then up down left"])]
    judge = CachedJudge(LocalRole(judges, "sft", "local:sft", "1", words=True, batch_size=3), tmp_path)
    tokenizer = judges.base.tokenizer
    for case, verdict in zip(cases, judge.judge(cases), strict=True):
        hidden_D = last_hidden(judges, "sft", prompt_ids(judges, case, word=True)).double()
        prob_V = torch.softmax(hidden_D @ judges.base.head_weight_VD.T.double() + judges.base.ban_bias_V, -1)
        yes, no = (prob_V[tokenizer.convert_tokens_to_ids(word)].item() for word in ("yes", "no"))
        assert verdict.correct is (yes > no) and verdict.score is None and verdict.problem is None
        assert verdict.raw == f"{'yes' if yes > no else 'no'}: P(yes) {yes:.4f}, P(no) {no:.4f}"
    assert judge.id.endswith("+words")


@pytest.mark.parametrize(
    ("prediction", "problem"),
    [
        ("a <video> of it", "marks 1 videos"),
        ("a <|> b <|> c", "holds '<|>'"),
        ("red " * 600, "the model has 512 positions"),
    ],
)
def test_a_text_that_cannot_be_put_to_the_model_is_a_problem_of_that_case(judges, tmp_path, prediction, problem):
    judge = CachedJudge(LocalRole(judges, "base", "local:base", "1", words=True), tmp_path)
    wrong, right = judge.judge([qa(1, prediction), qa(2, "red")])
    assert problem in wrong.problem and right.problem is None


def test_of_a_role_of_a_run(recipe, judges, tmp_path):
    work = Workspace(recipe())
    judges.save("sft", work.adapter("sft"))
    shutil.copytree(work.adapter("sft"), work.adapter("policy"))
    model = of_role(work, "policy", words=True)
    assert model.name.startswith("local:base") and model.name.endswith(":policy:nf4")
    assert model.revision == of_role(work, "sft").revision != of_role(work, "base").revision
    assert CachedJudge(model, tmp_path).judge([qa(1, "red")])[0].problem is None
    with pytest.raises(ModelError, match="no adapter"):
        of_role(work, "critic")


def test_of_a_checkpoint(checkpoint, tmp_path):
    model = local.of_model(str(checkpoint), torch.device("cpu"), words=True)
    assert isinstance(model, LocalRole) and model.name == f"local:{checkpoint.name}:nf4"
    assert CachedJudge(model, tmp_path).judge([qa(1, "red")])[0].problem is None

    text = tmp_path / "text"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    model = local.of_model(str(text), torch.device("cpu"), batch_size=2)
    assert isinstance(model, LocalText) and model.name == "local:text:full" and len(model.revision) == 16
    cases = [qa(1, "red"), qa(2, "blue square"), qa(3, "a")]
    found = CachedJudge(model, tmp_path).judge(cases)
    assert all(v.raw and v.problem for v in found)
    assert CachedJudge(model, tmp_path / "alone").judge(cases[1:2])[0].raw == found[1].raw
    with pytest.raises(ModelError, match="is a text model"):
        local.of_model(str(text), torch.device("cpu"), words=True)
    with pytest.raises(ModelError, match="cannot be read"):
        local.of_model(str(tmp_path / "nothing"), torch.device("cpu"))
