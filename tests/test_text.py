"""Text in its place: what is scored and trained on has the tokens that the template's own full text has."""

import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from core import small_recipe
from family_checkpoints import CHATML, LLAVA_TOKENS, QWEN_TOKENS, TINY, VICUNA
from rlaif_lite.data.records import Message
from rlaif_lite.data.sentences import split_claims
from rlaif_lite.data.world import facts_of
from rlaif_lite.data.world_text import describe
from rlaif_lite.errors import ModelError, RecipeError
from rlaif_lite.judge.narrative import narrative
from rlaif_lite.model import families
from rlaif_lite.model.base import base_digest, load_base
from rlaif_lite.model.families import CHAT_TEMPLATES, FAMILIES
from rlaif_lite.model.inputs import MARK_WITH_BLANKS, encode_prompt, split_prompt
from rlaif_lite.model.text import (
    RUNNING,
    answer_offsets,
    decode_answer,
    encode_after,
    encode_answer,
    encode_start,
    word_tokens,
    write_prompt,
)
from rlaif_lite.planner.lengths import lengths_of
from rlaif_lite.recipe import Model, check_files

ANSWERS = ["She is here.", "yes", "Yes, he does. No!", "1. One thing", '"Quoted" words', "他在走路。"]
CORPUS = ["Assistant: She is here. user assistant what happens ? Yes, he does. No! yes no Yes No one thing words " * 3]
ASKED = [Message("user", "what happens ?")]
LEADING = VICUNA.replace("ASSISTANT:", "ASSISTANT: ")  # a generation prompt that ends in a blank


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)


def sentencepiece():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    return core, trainers.UnigramTrainer(
        vocab_size=90,
        initial_alphabet=list('他在走路。"1\n'),
        unk_token="<unk>",
        special_tokens=["<unk>"],
        show_progress=False,
    )


def llama():
    """As the tokenizers of LLaVA and VLM-RLAIF: a blank is put before everything, blanks are letters."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return core, trainers.BpeTrainer(
        vocab_size=150, initial_alphabet=list('他在走路。"1\n:|><_'), special_tokens=["<unk>"], show_progress=False
    )


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return core, trainers.WordPieceTrainer(
        vocab_size=120, initial_alphabet=list('他在走路。"1'), special_tokens=["<unk>"], show_progress=False
    )


KINDS = {"byte-level": byte_level, "sentencepiece": sentencepiece, "llama": llama, "wordpiece": wordpiece}


def base_of(
    kind: str, template: str, family: str = "llava", special=(*LLAVA_TOKENS, *QWEN_TOKENS, "<|im_end|>"), eos="</s>"
):
    core, trainer = KINDS[kind]()
    # word by word, so that no token holds two: as the real ones were trained
    core.train_from_iterator(CORPUS if kind == "byte-level" else CORPUS[0].split(), trainer)
    special = [*dict.fromkeys([*special, "<image>", "<video>"])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        unk_token="<unk>" if kind != "byte-level" else None,
        additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return SimpleNamespace(
        tokenizer=tokenizer,
        family=FAMILIES[family],
        placeholder_id=tokenizer.convert_tokens_to_ids("<image>"),
        eos_id=tokenizer.eos_token_id,
    )


def check(base, answer: str) -> None:
    """The template's full text, tokenised whole, is the prompt's tokens, the answer's and what ends it."""
    text, opening = write_prompt(base, ASKED, None)
    turns = [{"role": "user", "content": [{"type": "text", "text": ASKED[0].content}]}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    full = base.tokenizer.apply_chat_template([*turns, said], tokenize=False)
    want, ours = encode_start(base, full), encode_start(base, text) + encode_answer(base, opening, answer, end=False)
    assert want[: len(ours)] == ours, (base.tokenizer.convert_ids_to_tokens(want), opening)
    rest = base.tokenizer.decode(want[len(ours) :])
    assert rest.strip() in ("", base.tokenizer.eos_token, "<|im_end|>"), rest  # the end of a turn, and no letter of it


def template_of(name: str) -> str:
    family, tiny = FAMILIES[name], TINY[name]
    return family.template() if family.template else tiny.template or family.fallback_template


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_answer_are_the_templates_own_text(name, kind):
    base = base_of(kind, template_of(name), name, TINY[name].special, TINY[name].eos)
    for answer in ANSWERS:
        check(base, answer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [families.VICUNA, VICUNA, LEADING, CHATML], ids=["v1", "tiny", "blank", "chatml"])
def test_so_it_is_with_other_templates(template, kind):
    base = base_of(kind, template)
    for answer in ANSWERS:
        check(base, answer)
        ids = encode_answer(base, write_prompt(base, ASKED, None)[1], answer)
        if base.tokenizer.unk_token_id not in ids and kind != "wordpiece":
            assert decode_answer(base, ids) == answer


def test_an_answer_alone_would_be_other_tokens():
    """The fault that this file is about: SmolVLM's template writes `Assistant: She`."""
    base = base_of("byte-level", template_of("smolvlm"), "smolvlm")
    opening = write_prompt(base, ASKED, None)[1]
    assert opening.before.endswith("Assistant:") and opening.lead == " "
    ids = encode_answer(base, opening, "She is", end=False)
    assert base.tokenizer.convert_ids_to_tokens(ids)[0] == "ĠShe"
    assert ids != base.tokenizer.encode("She is", add_special_tokens=False)
    assert decode_answer(base, ids) == "She is"


def test_an_answer_that_would_melt_into_the_prompt_stands_alone():
    """`assistant\\n` and an answer's own line break may be one token; the prompt's tokens stay, the text is kept."""
    base = base_of("byte-level", CHATML)
    core = base.tokenizer
    ids = encode_after(base, "assistant\n", "\n\nShe is")
    assert core.decode(ids) == "\n\nShe is"


def test_every_spelling_of_a_verdict_is_read():
    base = base_of("byte-level", template_of("smolvlm"), "smolvlm")
    opening = write_prompt(base, ASKED, None)[1]
    spelled = base.tokenizer.convert_ids_to_tokens(word_tokens(base, opening, "yes", "here"))
    assert spelled[0] == "Ġyes" and {"Ġyes", "ĠYes"} <= set(spelled)
    assert {token.strip("Ġ").lower() for token in spelled} == {"yes"}
    letters = word_tokens(base, RUNNING, "A", "here", capitals=False)
    assert set(base.tokenizer.convert_ids_to_tokens(letters)) <= {"A", "ĠA"}
    with pytest.raises(ModelError, match="`here`: 'happens what' is 2 tokens"):
        word_tokens(base, opening, "happens what", "here")


def test_the_place_of_a_verdict_in_an_answer():
    base = base_of("byte-level", template_of("smolvlm"), "smolvlm")
    opening = write_prompt(base, ASKED, None)[1]
    spans = answer_offsets(base, opening, "She is here.")
    assert len(spans) == len(encode_answer(base, opening, "She is here.", end=False))
    assert spans[0] == (0, 3) and spans[-1][1] == 12
    assert all(before[1] <= after[0] + 1 for before, after in zip(spans, spans[1:], strict=False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_is_tokenised_where_the_question_puts_it(kind, monkeypatch):
    """The row of a branch is the template's text with the claim in it."""
    base = base_of(kind, template_of("llava"))
    monkeypatch.setattr("rlaif_lite.model.inputs.place_video", lambda base, ids, video, text: ids)
    for lead in ("Claim: ", "Claim:", "Claim:\n"):
        split = split_prompt(base, f"{lead}<|>", None)
        got = split.prefix + split.branch(base, "She is here. True?")
        want = encode_start(base, write_prompt(base, [Message("user", f"{lead}She is here. True?")], None)[0])
        assert got == want or base.tokenizer.decode(got) == base.tokenizer.decode(want)
        if lead != "Claim:":
            assert got == want


def test_blanks_around_a_mark_go_to_the_text_after_it():
    assert MARK_WITH_BLANKS.sub("|", "a <|> b<|>c") == "a|b|c"


def test_the_named_template_is_vicunas():
    base = base_of("llama", CHAT_TEMPLATES["vicuna_v1"])
    text, _ = write_prompt(base, ASKED, None)
    assert text.endswith("to the user's questions. USER: what happens ? ASSISTANT:")


def test_a_template_that_refuses_a_system_turn_is_said():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    base = base_of("llama", refusing + VICUNA)
    with pytest.raises(ModelError, match="refuses turns of system, user: System role not supported"):
        write_prompt(base, [Message("system", "be short"), *ASKED], None)


# ---- sentences


MARKDOWN = """**Scene**
* A man in a red coat walks into a shop
* He talks to Mr. Lee for approx. 2.5 minutes
1. He buys bread
2. He leaves on St. John's Road.
"""


def test_lists_abbreviations_and_markdown():
    assert split_claims(MARKDOWN) == [
        "Scene",
        "A man in a red coat walks into a shop",
        "He talks to Mr. Lee for approx. 2.5 minutes",
        "He buys bread",
        "He leaves on St. John's Road.",
    ]
    assert split_claims("a) one thing\n(b) two\n\n---\n## Facts:\n- A dog. A cat") == [
        "one thing",
        "two",
        "Facts:",
        "A dog.",
        "A cat",
    ]
    assert split_claims("**He sits.** The U.S. flag waves. ***") == ["He sits.", "The U.S. flag waves."]


def test_other_scripts():
    assert split_claims("一个男人走进商店。他买了面包！") == ["一个男人走进商店。", "他买了面包！"]
    assert split_claims("Он вошёл. Потом он купил хлеб.") == ["Он вошёл.", "Потом он купил хлеб."]
    assert split_claims("यह एक आदमी है। वह चलता है।") == ["यह एक आदमी है।", "वह चलता है।"]


def test_a_claim_is_a_part_of_its_answer():
    for text in (MARKDOWN, 'He said: "Stop!" and left. **Then** he `ran`.', "一。二。", *ANSWERS):
        at = 0
        for claim in split_claims(text):
            at = text.index(claim, at) + len(claim)


def test_the_worlds_answers_are_split_as_before_and_fast():
    answers = [describe(facts_of(0, "test", number)) for number in range(50)]
    for answer in answers:
        want = [f"{part.strip()} ." for part in answer.split(" .") if part.strip()]
        assert [claim if claim.endswith(" .") else f"{claim} ." for claim in split_claims(answer)] == want
    start = time.process_time()
    for answer in answers * 20:
        split_claims(answer)
    assert (time.process_time() - start) / 1000 < 2e-4


def test_a_caption_without_a_word_is_left_out():
    assert narrative(["a dog", " ... ", "a cat"], ["first", "then", "finally"], []) == "first a dog finally a cat"
    assert narrative(["", "a cat"], [], [(0.0, 1.5), (2.0, 4.0)]) == "[2.0s-4.0s] a cat"


# ---- the template of a recipe


def test_a_recipe_names_its_template(checkpoint, tmp_path):
    """By name or by file; the plan counts its tokens; another template is another base; a wrong name is refused."""
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}what what {{ m.content[0].text }}{% endfor %}{% if add_generation_prompt %} red{% "
        "endif %}"
    )
    plain, named, filed = (
        Model(base=str(checkpoint), quantization="none", chat_template=template)
        for template in (None, "vicuna_v1", str(own))
    )
    base = load_base(filed, torch.device("cpu"))
    assert base.tokenizer.decode(encode_prompt(base, [Message("user", "star")], None).ids_S).endswith(
        "what what star red"
    )
    assert len({base_digest(section) for section in (plain, named, filed)}) == 3
    key = f"model.chat_template={own}"
    counted = [lengths_of(small_recipe(checkpoint, tmp_path, *keys)).template for keys in ((), (key,))]
    assert counted[1] == len(base.tokenizer.encode("what what a red", add_special_tokens=False)) - 1 != counted[0]
    with pytest.raises(RecipeError, match="`model.chat_template` .*vicuna_v2, which is neither .* mean .*vicuna_v1"):
        check_files(small_recipe(checkpoint, tmp_path, "model.chat_template=vicuna_v2"))
