"""The judge: claims in one forward as if asked one by one, verdicts inside an answer, two answers in both orders, the
narrative.

Shapes: S positions, D width, V vocabulary.
"""

import pytest
import torch

from core import video_of
from rlaif_lite.data.records import Message
from rlaif_lite.data.sentences import split_claims
from rlaif_lite.errors import ModelError
from rlaif_lite.judge.claims import (
    MIN_MASS,
    AnswerToJudge,
    ClaimScores,
    judge_claims,
    refuse_silent_judge,
    user_message,
)
from rlaif_lite.judge.narrative import narrative
from rlaif_lite.judge.pairwise import AnswerPair, judge_pairs
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.model.text import RUNNING, word_tokens
from rlaif_lite.recipe import Claims, Pairwise

ASK = Claims(
    mode="ask", prompt="<video> {context} claim : {claim} question {question} ?", context_prefix="context : {context}"
)
INLINE = Claims(mode="inline", prompt="<video> {context} response :", context_prefix="context : {context}")
BESIDE = Pairwise(
    prompt="<video> {context} <|> response A : {a} <|> response B : {b} <|> {question} better ?",
    context_prefix="context : {context}",
)
PLAIN = Pairwise(
    prompt="<video> {context} response A : {a} response B : {b} better ?", context_prefix="context : {context}"
)


def items(base) -> list[AnswerToJudge]:
    video, other = video_of(base, layout=12, keep=[1, 2, 8]), video_of(base, 8, seed=2)
    return [
        AnswerToJudge(
            video,
            "describe the video",
            "first a red circle left . then a blue square up . also a yellow star .",
            "first a green cross",
        ),
        AnswerToJudge(other, "what is true ?", "finally a white cross grows .", None),
        AnswerToJudge(other, "describe the video", "", "a red circle ."),
        AnswerToJudge(None, "what is true ?", "first a red circle left . yes", None),
    ]


def probabilities(judge: Roles, text: str, video) -> torch.Tensor:
    """P(next token) at every position of a user message, banned tokens left out; the template's end included."""
    base = judge.base
    with torch.no_grad(), judge.use("sft") as role:
        hidden_SD = role.hidden(collate(base, [encode_prompt(base, [Message("user", text)], video)]))[0]
    return torch.softmax(hidden_SD.double() @ base.head_weight_VD.T.double() + base.ban_bias_V.double(), -1)


def yes_minus_no(judge: Roles, prob_V: torch.Tensor) -> float:
    yes, no = (judge.base.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    return (prob_V[yes] - prob_V[no]).item()


def test_claims_asked_together_are_as_if_asked_one_by_one(judge):
    given = items(judge.base)
    given[3] = given[3]._replace(video=given[1].video)
    with judge.use("sft") as role:
        verdicts = judge_claims(role, given, ASK, batch_size=8)
    assert [v.claims for v in verdicts] == [
        ["first a red circle left .", "then a blue square up .", "also a yellow star ."],
        ["finally a white cross grows ."],
        [],
        ["first a red circle left .", "yes"],
    ]
    for item, verdict in zip(given, verdicts, strict=True):
        context = f"context : {item.context}" if item.context else ""
        for claim, value in zip(verdict.claims, verdict.values, strict=True):
            text = f"<video> {context} claim : {claim} question {item.question} ?"
            assert value == pytest.approx(yes_minus_no(judge, probabilities(judge, text, item.video)[-1]), abs=1e-5)
        assert verdict.score == pytest.approx(sum(verdict.values))
    assert max(abs(v) for verdict in verdicts for v in verdict.values) > 1e-3


def test_inline_verdicts_are_read_at_every_token(judge):
    """At answer token t, having read it: what stands after `response : w1 .. wt`."""
    given = items(judge.base)[:3]
    with judge.use("sft") as role:
        verdicts = judge_claims(role, given, INLINE, batch_size=8)
    for item, verdict in zip(given, verdicts, strict=True):
        words = item.answer.split()
        assert verdict.claims == words and len(verdict.values) == len(words)
        context = f"context : {item.context}" if item.context else ""
        for t in range(len(words)):
            base = judge.base
            row = encode_prompt(base, [Message("user", f"<video> {context} response :")], item.video)
            row = row.extend(base.tokenizer.convert_tokens_to_ids(words[: t + 1]))
            with torch.no_grad(), judge.use("sft") as role:
                hidden_D = role.hidden(collate(base, [row]))[0, -1]
            prob_V = torch.softmax(hidden_D @ base.head_weight_VD.T + base.ban_bias_V, -1)
            assert verdict.values[t] == pytest.approx(yes_minus_no(judge, prob_V), abs=1e-5)
        assert verdict.score == pytest.approx(sum(verdict.values))
    assert verdicts[2].score == 0  # nothing said, nothing wrong


def test_what_people_are_shown_of_a_verdict():
    """Claims with P(yes) and P(no); inline, a claim is what was said since the last verdict."""
    asked = ClaimScores(0.5, ["It runs.", "It sits."], [0.8, -0.3], [-2.0, 1.0], [1.0, 0.5])
    assert asked.said("It runs. It sits.", "ask") == [("It runs.", 0.9, 0.1), ("It sits.", 0.1, 0.4)]
    words = ["a", "red", "circle", ".", "up", "red", "."]
    mass = [0.01, 0.9, 0.8, 0.0, 0.6, 0.7, 0.0]
    inline = ClaimScores(0.0, words, [0.0, 0.7, -0.6, 0.0, 0.0, 0.5, 0.0], [0.0] * 7, mass)
    assert inline.said("a red circle . up red .", "inline") == [
        ("a red", 0.8, 0.1),
        ("circle", 0.1, 0.7),
        ("up", 0.3, 0.3),
        ("red", 0.6, 0.1),
    ]
    assert ClaimScores(0.0, [], [], [], []).said("", "inline") == []


@pytest.mark.parametrize("section", [ASK, INLINE], ids=["ask", "inline"])
def test_claims_keep_their_order_in_any_batch(judge, section):
    given = [item for item in items(judge.base) if item.video is not None]
    with judge.use("sft") as role:
        one, all_of_them = (judge_claims(role, given, section, batch_size=size) for size in (1, 64))
    for a, b in zip(one, all_of_them, strict=True):
        assert a.claims == b.claims and a.score == pytest.approx(b.score, abs=1e-5)


def pairs(base) -> list[AnswerPair]:
    video = video_of(base, 8)
    return [
        AnswerPair(video, "what", "first a red circle left .", "also a yellow star .", "a blue cross"),
        AnswerPair(video, "what", "star", "first a red circle left . then a blue square up .", None),
        AnswerPair(video_of(base, 12, seed=4), "what", "red", "green", None),
    ]


def logit_gap(judge: Roles, text: str, video) -> float:
    """logit(A) - logit(B): the log of the ratio of their probabilities."""
    prob_V = probabilities(judge, text, video)[-1]
    a, b = (judge.base.tokenizer.convert_tokens_to_ids(word) for word in ("A", "B"))
    return (prob_V[a].log() - prob_V[b].log()).item()


@pytest.mark.parametrize("section", [BESIDE, PLAIN], ids=["beside", "plain"])
def test_a_margin_is_the_mean_of_both_orders(judge, section):
    with judge.use("sft") as role:
        choices = judge_pairs(role, pairs(judge.base), section, batch_size=2)
    for pair, choice in zip(pairs(judge.base), choices, strict=True):
        context = f"context : {pair.context}" if pair.context else ""
        ab, ba = (
            logit_gap(judge, section.prompt.format(context=context, a=a, b=b, question=pair.question), pair.video)
            for a, b in ((pair.a, pair.b), (pair.b, pair.a))
        )
        assert choice.margin == pytest.approx((ab - ba) / 2, abs=1e-4)
        assert choice.consistent == (ab * ba < 0)
    assert max(abs(choice.margin) for choice in choices) > 1e-3


@pytest.mark.parametrize("section", [BESIDE, PLAIN], ids=["beside", "plain"])
def test_swapped_answers_get_the_opposite_margin(judge, section):
    given = pairs(judge.base)
    with judge.use("sft") as role:
        there = judge_pairs(role, given, section, batch_size=8)
        back = judge_pairs(role, [pair._replace(a=pair.b, b=pair.a) for pair in given], section, batch_size=8)
    for x, y in zip(there, back, strict=True):
        assert x.margin == -y.margin and x.consistent == y.consistent


def test_answers_side_by_side_have_no_order(judge):
    """With the same label the two branches cannot be told apart, whatever the model: the margin is 0. In a plain
    sequence it is not."""
    beside = Pairwise(
        prompt="<video> {context} <|> response : {a} <|> response : {b} <|> better ?", context_prefix="{context}"
    )
    plain = Pairwise(prompt="<video> {context} response : {a} response : {b} better ?", context_prefix="{context}")
    with judge.use("sft") as role:
        none = judge_pairs(role, pairs(judge.base), beside, batch_size=8)
        some = judge_pairs(role, pairs(judge.base), plain, batch_size=8)
    assert max(abs(choice.margin) for choice in none) <= 1e-5
    assert min(abs(choice.margin) for choice in some) > 1e-3


def test_the_default_prompts_carry_the_video(judge):
    """They are words this tiny base does not know; what counts is that video and answers reach it, and text-only
    items work."""
    base = judge.base
    claims = Claims(mode="ask")
    words = Claims(mode="ask", prompt=f"<video>\n{claims.prompt}", context_prefix=claims.context_prefix)
    given = [
        AnswerToJudge(video_of(base), "what", "first a red circle left .", "a blue cross"),
        AnswerToJudge(None, "what", "star", None),
    ]
    with judge.use("sft") as role:
        default, marked = judge_claims(role, given, claims, 8), judge_claims(role, given[:1], words, 8)
        assert default[0].score == pytest.approx(marked[0].score, abs=1e-6) and len(default[1].values) == 1
        found = judge_pairs(role, [pairs(base)[0], pairs(base)[1]._replace(video=None)], Pairwise(), batch_size=8)
    assert len(found) == 2


def test_user_messages():
    assert user_message(
        "<video> {context}say {claim}", "seen: {context} | ", "x {y}", True, claim="c", question="q"
    ).content == ("<video> seen: x {y} | say c")  # braces in a narrative are text
    assert user_message("{context}say {claim}", "seen: {context}", None, False, claim="c {d}").content == "say c {d}"
    assert user_message("say {claim}", "", None, True, claim="c").content == "<video>\nsay c"


def test_a_verdict_of_several_tokens_is_refused(judge):
    assert word_tokens(judge.base, RUNNING, "yes", "here") == [judge.base.tokenizer.convert_tokens_to_ids("yes")]
    with pytest.raises(ModelError, match=r"`here`: 'yes no' is 2 tokens of this base \(\['yes', 'no'\]\)"):
        word_tokens(judge.base, RUNNING, "yes no", "here")
    with judge.use("sft") as role:
        with pytest.raises(ModelError, match="preference.claims.*'not at all' is 3 tokens"):
            judge_claims(role, items(judge.base)[:1], INLINE.model_copy(update={"no": "not at all"}), 8)
        with pytest.raises(ModelError, match="preference.pairwise.choices.*'response A' is 2 tokens"):
            judge_pairs(role, pairs(judge.base), BESIDE.model_copy(update={"choices": ("response A", "B")}), 8)


def test_claims_are_sentences():
    assert split_claims("A man runs. He falls!  Does he? yes") == ["A man runs.", "He falls!", "Does he?", "yes"]
    assert split_claims("first a red circle left . then . ") == ["first a red circle left .", "then ."]
    assert split_claims(" . ") == [] == split_claims("")


def test_narratives():
    spans = [(0.0, 2.5), (3.0, 5.5)]
    assert narrative(["a red circle", "a cross"], ["first", "then"], spans) == "first a red circle then a cross"
    assert narrative(["a", "b"], [], spans) == "[0.0s-2.5s] a [3.0s-5.5s] b"
    with pytest.raises(ValueError):
        narrative(["a", "b"], ["first"], spans)


def test_a_verdict_without_probability_mass_is_seen(judge):
    """Words that the judge would never say: pushed down by the ban, as 30 nats would push them."""
    base, kept = judge.base, judge.base.ban_bias_V.clone()
    words = [base.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no", "A", "B")]
    with judge.use("sft") as role:
        heard = judge_claims(role, items(base)[:3], ASK, 8)
        chosen = judge_pairs(role, pairs(base), PLAIN, 8)
        try:
            base.ban_bias_V[words] = -30.0
            silent = judge_claims(role, items(base)[:3], ASK, 8)
        finally:
            base.ban_bias_V.copy_(kept)
    assert all(verdict.has_mass for verdict in heard) and all(0 < choice.mass < 1 for choice in chosen)
    assert [verdict.has_mass for verdict in silent] == [False, False, True]  # nothing was asked of the third
    assert max(max(verdict.mass, default=0) for verdict in silent) < MIN_MASS
    assert refuse_silent_judge([verdict.has_mass for verdict in silent], "preference") == 2
    with pytest.raises(ModelError, match="preference: in all of 2 verdicts .* less than 0.001 of probability"):
        refuse_silent_judge([False, False], "preference")
    assert refuse_silent_judge([], "preference") == 0
