"""The judge that intervenes: where claims end in any tokenizer, when it takes over, and what each kind of takeover
leaves.

Shapes: S positions, D width, V vocabulary, T tokens.
"""

import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core import video_of
from family_checkpoints import TINY, build_tokenizer
from rlaif_lite import pipeline
from rlaif_lite.data.records import Message
from rlaif_lite.data.sentences import split_claims
from rlaif_lite.data.world_text import COLOURS
from rlaif_lite.errors import RecipeError
from rlaif_lite.files import read_jsonl
from rlaif_lite.judge import rlif
from rlaif_lite.judge.rlif import (
    Claim,
    missing_words,
    omissions,
    read_claims,
    sampled_answer,
    statements,
    text_of,
    token_ends,
)
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import Checklist, Claims
from rlaif_lite.rl.rlif import end_reward, takeovers, token_rewards
from rlaif_lite.rollout import Sampling, Trajectory, sample
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.rlif import InterventionFeedback
from rlaif_lite.workspace import Workspace

# ---- the arithmetic, by hand


def test_when_a_claim_is_taken_over():
    odds, ends = [2.0, -1.0, 0.5, 0.4], [1, 3, 4, 6]
    uniform_T = [0.94, 0.0, 0.04, 0.96, 0.0, 0.5]  # at the claims' last tokens: .94, .04, .96, .5
    assert takeovers(odds, ends, uniform_T, tau=0.0, beta=0.95, spurious=0.05) == [0, 1, 3]
    assert takeovers(odds, ends, uniform_T, tau=0.45, beta=0.95, spurious=0.05) == [0, 1]
    assert takeovers(odds, ends, uniform_T, tau=0.0, beta=1.0, spurious=0.0) == [0, 2, 3]
    assert takeovers([0.0], [1], uniform_T, tau=0.0, beta=1.0, spurious=0.0) == []  # as likely true as false
    assert takeovers([], [], uniform_T, 0.0, 1.0, 1.0) == []


def test_rewards_by_hand():
    assert token_rewards(5, [2, 5]) == [0, -1, 0, 0, -1]
    assert token_rewards(1, []) == [0]
    assert end_reward(2.5, 8, omission=0.5, length_floor=0) == -1.25
    assert end_reward(0.0, 3, omission=0.5, length_floor=12) == -0.75
    assert end_reward(1.0, 1, omission=0.5, length_floor=4) == pytest.approx(-0.5 - 0.75)
    assert end_reward(0.0, 12, omission=0.5, length_floor=12) == 0


def test_statements_of_a_narrative():
    told = "first a red circle left and a yellow star . then a blue square up and a yellow star ."
    assert statements(told, [" and "]) == ["first a red circle left", "a yellow star", "then a blue square up"]
    assert statements("[0.0s-1.5s] A man runs. He falls! [1.5s-3.0s] A man runs.", []) == ["A man runs", "He falls"]
    assert statements("[0.0s-1.5s] A man runs [1.5s-3.0s] A dog", []) == ["A man runs", "A dog"]  # captions cut short
    assert statements("", [" and "]) == [] == statements(" . ", [])
    assert statements("A man runs. *** \U0001f642! - ", []) == ["A man runs"]  # what has no word cannot be left out


def test_words_that_an_answer_leaves_out():
    answer = "first a red circle left . also a green star ."
    assert missing_words("first a red circle left", answer) == 0
    assert missing_words("a yellow star", answer) == pytest.approx(1 / 3)  # of a, yellow, star: yellow
    assert missing_words("then a blue square up", answer) == pytest.approx(4 / 5)  # both sentences have "a"
    assert missing_words("a yellow star", "") == 1


# ---- where claims end


def metaspace() -> PreTrainedTokenizerFast:
    """Words that begin with a mark for the space before them, which the decoder takes off at the very start (Llama)."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    core.train_from_iterator(["A man runs in the park. He falls! what happens ? yes no"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


TOKENIZERS = {"byte-level": build_tokenizer(TINY["qwen2_vl"]), "llama": metaspace()}


def speaker(name: str, base) -> SimpleNamespace:
    return base if name == "words" else SimpleNamespace(tokenizer=TOKENIZERS[name])


TEXTS = {
    "words": "first a red circle left . then blue . also a yellow star",
    "byte-level": "Le café 🙂 ouvre. Naïve!  Does he run? yes",
    "llama": "A man 🙂 runs. He falls!  Does he? yes",
}


@pytest.mark.parametrize("name", TEXTS)
def test_claims_end_where_the_tokenizer_itself_says(name, base):
    """Offsets that the tokenizer gives for a text that it cut itself."""
    on, text = speaker(name, base), TEXTS[name]
    cut = on.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert text_of(on, cut.input_ids).strip() == text
    claims = split_claims(text)
    at, expected = 0, []
    for claim in claims:
        at = text.index(claim, at) + len(claim)
        # several tokens of one character all have its span: the last of them completes it
        expected.append(max(t for t, (start, _) in enumerate(cut.offset_mapping) if start < at) + 1)
    assert len(claims) >= 3 and token_ends(on, cut.input_ids, claims) == expected


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 30), name=st.sampled_from(sorted(TEXTS)))
def test_claims_end_at_the_first_token_that_completes_them(seed, count, name, base):
    """Whatever was sampled, also what no tokenizer would write so: half characters, special spacing, runs of stops."""
    on, rng = speaker(name, base), random.Random(seed)
    size = len(on.tokenizer)
    stops = [on.tokenizer.encode(mark, add_special_tokens=False)[-1] for mark in (".", "?")]
    ids = [rng.choice(stops) if rng.random() < 0.2 else rng.randrange(size) for _ in range(count)]
    text, at, before = text_of(on, ids), 0, 0
    claims = split_claims(text)
    for claim, end in zip(claims, token_ends(on, ids, claims), strict=True):
        at = text.index(claim, at) + len(claim)
        assert text_of(on, ids[:end])[:at] == text[:at] and text_of(on, ids[: end - 1])[:at] != text[:at]
        assert before <= end
        before = end


# ---- what the judge says of them


def yes_no(judge: Roles, row) -> tuple[float, float]:
    """(P(yes), P(no)) of the token that follows a row, in float64."""
    base = judge.base
    with torch.no_grad(), judge.use("sft") as role:
        hidden_D = role.hidden(collate(base, [row]))[0, -1].double()
    prob_V = torch.softmax(base.head_weight_VD.double() @ hidden_D + base.ban_bias_V.double(), -1)
    return tuple(prob_V[base.tokenizer.convert_tokens_to_ids(word)].item() for word in ("yes", "no"))


def ids_of(base, text: str) -> list[int]:
    return [base.eos_id if word == "</s>" else base.tokenizer.convert_tokens_to_ids(word) for word in text.split()]


ANSWERS = ["first a red circle left . then a blue square up . </s>", "</s>", "also star star"]


def test_inline_claims_stand_where_the_word_is_a_verdict(judge, monkeypatch):
    base, video = judge.base, video_of(judge.base)
    section = Claims(mode="inline", prompt="<video> {context} response :", context_prefix="context : {context}")
    items = [sampled_answer(base, video, "what", ids_of(base, text), "a blue cross") for text in ANSWERS]
    prompt = encode_prompt(base, [Message("user", "<video> context : a blue cross response :")], video)
    told = [[yes_no(judge, prompt.extend(item.ids[: t + 1])) for t in range(len(item.ids))] for item in items]
    sums = sorted(yes + no for answer in told for yes, no in answer)
    monkeypatch.setattr(rlif, "VERDICT", (sums[7] + sums[8]) / 2)  # this random judge is sure of nothing
    with judge.use("sft") as role:
        found = read_claims(role, items, section, batch_size=2)
    assert found[1] == [] and sum(map(len, found)) == len(sums) - 8
    for claims, answer in zip(found, told, strict=True):
        ends = [t + 1 for t, (yes, no) in enumerate(answer) if yes + no > rlif.VERDICT]
        assert [claim.end for claim in claims] == ends and [claim.start for claim in claims] == [0, *ends][: len(ends)]
        for claim in claims:
            yes, no = answer[claim.end - 1]
            assert claim.odds == pytest.approx(torch.tensor(no / yes).log().item(), abs=1e-4)


def test_claims_that_are_asked_about_keep_their_places(judge):
    base, video = judge.base, video_of(judge.base)
    section = Claims(mode="ask", prompt="<video> claim : {claim} ?")
    items = [sampled_answer(base, video, "what", ids_of(base, text), None) for text in ANSWERS]
    with judge.use("sft") as role:
        found = read_claims(role, items, section, batch_size=2)
    assert [[claim[:2] for claim in claims] for claims in found] == [[(0, 6), (6, 12)], [], [(0, 3)]]
    row = encode_prompt(base, [Message("user", "<video> claim : then a blue square up . ?")], video)
    yes, no = yes_no(judge, row)
    assert found[0][1].odds == pytest.approx(torch.tensor(no / yes).log().item(), abs=1e-4)


def test_omissions(judge):
    base, claims = judge.base, Claims(mode="ask")
    told = "first a red circle left and a yellow star . then a blue square up and a yellow star ."
    answers, narratives = ["first a red circle left .", "", "star"], [told, told, None]
    words = Checklist(by="words", joints=(" and ",))
    with judge.use("sft") as role:
        # a, yellow, star: 2 of 3 missing; then, a, blue, square, up: 4 of 5
        assert omissions(role, answers, narratives, claims, words, 2) == [pytest.approx(2 / 3 + 4 / 5), 3.0, 0.0]
        asked = Checklist(prompt="context : {context} claim : {claim} ?", joints=(" and ",))
        found = omissions(role, answers, narratives, claims, asked, 2)
    for answer, narrative, value in zip(answers, narratives, found, strict=True):
        total = 0.0
        for statement in statements(narrative, asked.joints) if narrative else ():
            yes, no = yes_no(
                judge, encode_prompt(base, [Message("user", f"context : {answer} claim : {statement} ?")], None)
            )
            total += no / (yes + no)
        assert value == pytest.approx(total, abs=1e-5)


# ---- what follows: a judge by hand, who takes every colour for a claim and red for false

CERTAIN = (
    "ppo.feedback=interventions",
    "ppo.interventions.beta=1",
    "ppo.interventions.spurious=0",
    "ppo.interventions.checklist.by=words",
    "ppo.rollouts=4",
    "ppo.max_new_tokens=14",
)


class AgainstRed(InterventionFeedback):
    def read(self, records, drafts):
        out = []
        for draft in drafts:
            words = self.work.base().tokenizer.convert_ids_to_tokens(draft.said.ids)
            ends = [t + 1 for t, word in enumerate(words) if word in COLOURS]
            odds = [3.0 if words[end - 1] == "red" else -3.0 for end in ends]
            out.append([Claim(start, end, gap) for start, end, gap in zip([0, *ends], ends, odds, strict=False)])
        return out

    def narrative(self, record):
        return "a red cross and a blue star ."


@pytest.fixture
def against_red(rerun):
    """against_red("stop", ...) -> (feedback, records)"""

    def make(takeover: str, *overrides: str):
        recipe = rerun(
            *CERTAIN,
            f"ppo.interventions.takeover={takeover}",
            "ppo.interventions.checklist.joints=[' and ']",
            *overrides,
        )
        feedback = AgainstRed(Workspace(recipe))
        ppo.prepare(feedback.work, feedback)
        return feedback, feedback.work.records("rl")[:4]

    return make


SAID = ["first a blue circle left . also a red star . </s>", "red cross red </s>", "</s>", "left . left ."]


def said(base, texts=SAID) -> list[Trajectory]:
    out = []
    for i, text in enumerate(texts):
        ids = ids_of(base, text)
        out.append(Trajectory(i, ids, ids[-1] == base.eos_id, [-1.0] * len(ids)))
    return out


# what of "a red cross" and "a blue star" is in no one sentence: red or blue at least, cross; the whole; the whole
def test_labels(against_red):
    feedback, records = against_red("label")
    answers = said(feedback.work.base())
    taken = feedback.take(records, answers, 0)
    assert taken.records == records and taken.answers == answers and all(all(own) for own in taken.own)
    # "also a red star": a, red of the one, a, star of the other; "red cross red": red, cross, and nothing of the other
    left = [1 / 3 + 1 / 3, 1 / 3 + 1, 2, 2]
    assert taken.rewards == [
        [0] * 8 + [-1, 0, 0, pytest.approx(-left[0] / 2)],
        [-1, 0, -1, pytest.approx(-left[1] / 2)],
        [-1],
        [0, 0, 0, -1],
    ]
    assert taken.metrics == {
        "interventions/claims": 4 / 4,
        "interventions/rate": 3 / 4,
        "interventions/unsupported": 3 / 4,
        "interventions/answers": 2 / 4,
        "interventions/omitted": pytest.approx(sum(left) / 4),
        "judge/without_mass": 1 / 3,  # one of the three answers that say something has no claim
    }


def test_stops(against_red):
    """At the first unsupported claim, also where it is the first word; what was not said by then is left out."""
    feedback, records = against_red("stop")
    answers = said(feedback.work.base())
    taken = feedback.take(records, answers, 0)
    assert [len(answer.ids) for answer in taken.answers] == [9, 1, 1, 4]
    assert [answer.stopped for answer in taken.answers] == [True, True, True, False]  # the last ran into the limit
    assert taken.answers[0].ids == answers[0].ids[:9] and taken.answers[2:] == answers[2:]
    # "also a red" lacks cross, "first a blue circle left" lacks star; "red" lacks a and cross, and the whole of the
    # other
    assert taken.rewards[0][-1] == pytest.approx(-1 - (1 / 3 + 1 / 3) / 2)
    assert taken.rewards[1] == [pytest.approx(-1 - (2 / 3 + 1) / 2)] and taken.rewards[2:] == [[-1], [0, 0, 0, -1]]
    assert taken.metrics["interventions/claims"] == 1  # of the answers as they were sampled


def test_replaces(against_red):
    feedback, records = against_red("replace", "ppo.interventions.candidates=3", "ppo.interventions.claim_tokens=6")
    base = feedback.work.base()
    answers = said(base)
    taken = feedback.take(records, answers, 0)
    rows = {i: [] for i in range(4)}
    for record, answer, own, rewards in zip(taken.records, taken.answers, taken.own, taken.rewards, strict=True):
        assert len(answer.ids) == len(own) == len(rewards) == len(answer.logp) <= 14 and any(own)
        assert own == sorted(own)  # a context, then what the policy said
        rows[records.index(record)].append((answer, own, rewards))
    assert [len(rows[i]) for i in (2, 3)] == [1, 1]  # nothing to take back
    assert rows[2][0] == (answers[2], [True], [-1]) and rows[3][0][2] == [0, 0, 0, -1]
    for i, kept in ((0, 3), (1, 0)):  # taken back after "first a blue", and from the beginning
        (first, own, rewards), *more = rows[i]
        assert first.ids == answers[i].ids[: kept + 6 if i == 0 else 1] and all(own) and first.stopped
        assert rewards == [0] * (len(own) - 1) + [-1]
        before = first.ids[:kept]
        for number, (answer, own, rewards) in enumerate(more):
            context = answer.ids[: own.index(True)]
            assert context[:kept] == before and len(context) > kept and base.eos_id not in context
            words = base.tokenizer.convert_ids_to_tokens(context[kept:])
            assert sum(word in COLOURS for word in words) <= 1  # one claim was put in
            assert len(words) <= 6
            spoken_words = base.tokenizer.convert_ids_to_tokens(answer.ids[len(context) :])
            if rewards[-1] == -1 and number + 1 < len(more):  # taken back again
                assert spoken_words.count("red") == 1 and spoken_words[-1] == "red"
                ends = [
                    t + 1
                    for t, token in enumerate(base.tokenizer.convert_ids_to_tokens(answer.ids))
                    if token in COLOURS
                ]
                kept = [0, *ends][-2]
                before = answer.ids[:kept]
    assert len(taken.answers) > 4
    again = feedback.take(records, answers, 0)
    assert again == taken  # a function of seed, step and answer
    alone = feedback.take(records[:2], answers[:2], 0)
    ours = [i for i, record in enumerate(taken.records) if record in records[:2]]
    assert sorted(a.ids for a in alone.answers) == sorted(taken.answers[i].ids for i in ours)
    assert [a.ids for a in feedback.take(records, answers, 1).answers] != [a.ids for a in taken.answers]


def test_what_is_put_in_is_what_the_judge_likes_best(against_red):
    """Of what the reference says next: a claim that holds, else an end, else red, else what neither ends nor claims."""
    feedback, records = against_red("replace", "ppo.interventions.candidates=2", "ppo.interventions.takeovers=1")
    work, base = feedback.work, feedback.work.base()
    kept = ["first a blue", "also green", "white", "then a yellow triangle up . also a blue"]
    ranks = set()
    for step in range(3):
        taken = feedback.take(records, said(base, [f"{text} red" for text in kept]), step)
        contexts = [a.ids[: own.index(True)] for a, own in zip(taken.answers, taken.own, strict=True) if not all(own)]
        expected = []
        for i, text in enumerate(kept):
            prompt = encode_prompt(base, records[i].prompt, work.features(records[i])).extend(ids_of(base, text))
            with work.roles.use("reference") as reference:
                seeds = [work.seed("ppo", "candidates", step, i, 1, j) for j in range(2)]
                found = sample(reference, [prompt], Sampling(14 - len(text.split())), seeds=seeds, per_prompt=2)
            pieces = []
            for candidate in found:
                words = base.tokenizer.convert_ids_to_tokens(candidate.ids)
                end = next((t + 1 for t, word in enumerate(words) if word in COLOURS), None)
                rank = (1 if candidate.stopped else 3) if end is None else (2 if words[end - 1] == "red" else 0)
                pieces.append((rank, candidate.ids[:end]))
            rank, ids = min(pieces, key=lambda piece: piece[0])
            ranks.add(rank)
            if ids[-1] != base.eos_id:
                expected.append(ids_of(base, text) + ids)
        assert contexts == expected
    assert {0, 1} <= ranks, ranks


def test_chance_is_the_answers_own(against_red):
    """Which claims are taken over hangs on seed, step and answer, not on who else is heard."""
    feedback, records = against_red("label", "ppo.interventions.beta=0.5", "ppo.interventions.spurious=0.5")
    answers = said(feedback.work.base())
    drawn = [feedback.take(records, answers, step).rewards for step in range(4)]
    assert feedback.take(records, answers, 2).rewards == drawn[2] and any(rewards != drawn[0] for rewards in drawn)
    assert feedback.take(records[:2], answers[:2], 3).rewards == drawn[3][:2]


# ---- the whole of it


def run_ppo(recipe) -> tuple[list[dict], dict[str, torch.Tensor]]:
    work = Workspace(recipe)
    ppo.run(work)
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    adapter = load_file(work.adapter("policy") / "adapter_model.safetensors")
    return (
        [{k: v for k, v in line.items() if k != "time"} for line in lines],
        {key: weight.clone() for key, weight in adapter.items()},  # the file may be written over
    )


FIGURES = {"interventions/claims", "interventions/rate", "interventions/omitted"}


def test_labels_end_to_end(rerun):
    """By asking, with the narratives of the RL videos, and without a critic."""
    recipe = rerun(
        "ppo.feedback=interventions",
        "ppo.steps=2",
        "ppo.value=none",
        "ppo.baseline=batch",
        "ppo.gamma=0.9",
        "preference.claims.mode=ask",
        "preference.claims.prompt='<video> {context} claim : {claim} ?'",
        "ppo.interventions.checklist.prompt='context : {context} claim : {claim} ?'",
        "evaluate.roles=[policy]",
    )
    assert recipe.stages == ("data", "features", "sft", "context", "ppo", "evaluate") and recipe.narrated == ("rl",)
    pipeline.run(recipe)
    lines = [line for line in read_jsonl(Workspace(recipe).log.path) if line["stage"] == "ppo"]
    assert len(lines) == 2 and all(set(line) >= FIGURES for line in lines) and lines[0]["objective/kl"] == 0
    assert lines[0]["interventions/claims"] > 0 and lines[0]["interventions/omitted"] > 0


@pytest.mark.parametrize("takeover", ["stop", "replace"])
def test_an_interrupted_run_ends_the_same(rerun, takeover, monkeypatch):
    monkeypatch.setattr(rlif, "VERDICT", 0.02)  # this judge was trained for three steps: it is sure of nothing
    asked = (
        "ppo.feedback=interventions",
        f"ppo.interventions.takeover={takeover}",
        "ppo.interventions.omission=0",
        "ppo.judge_context=false",
        "ppo.interventions.takeovers=2",
        "ppo.steps=2",
        "ppo.checkpoint_every=1",
    )
    lines, adapter = run_ppo(rerun(*asked))
    assert sum(line["interventions/claims"] for line in lines) > 0 and lines[0]["objective/kl"] == 0
    recipe = rerun(*asked)  # the run folder as it was before
    shutil.rmtree(Workspace(recipe).stage("ppo"))

    def dies(self, records, answers, step):
        return take(self, records, answers, step) if step == 0 else 1 / 0

    take = InterventionFeedback.take
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(InterventionFeedback, "take", dies)
        run_ppo(recipe)
    again, same = run_ppo(recipe)
    assert again == lines and all(torch.equal(adapter[key], same[key]) for key in adapter)


def test_what_does_not_go_together(recipe):
    with pytest.raises(RecipeError, match="ppo.interventions.takeover.*replace.*Set it to batch"):
        recipe("ppo.feedback=interventions", "ppo.interventions.takeover=replace", "ppo.value=none", "ppo.group_size=2")
    with pytest.raises(RecipeError, match="ppo.interventions.checklist.prompt.*lacks {context}"):
        recipe("ppo.interventions.checklist.prompt='is it said ? {claim}'")
