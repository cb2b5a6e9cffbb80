"""Text as the chat template writes it: the one door through which prompts, answers and verdict words become tokens.

Many tokenizers keep the blank before a word inside the word's token, so `She` alone is another token than `She` in
`Assistant: She`. Everything that is scored or trained on is therefore tokenised in the place where the template puts
it: after the end of the text that precedes it, with the blank that the template writes in between.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError

from ..data.records import VIDEO_MARK, Message
from ..errors import ModelError
from ..video.cache import FeatureRecord
from .base import Base

PROBE = "Xyzzy"
CONTEXT = 48  # characters of the preceding text that can change how a text is tokenised, with room to spare


class Opening(NamedTuple):
    """The place where an answer begins."""

    before: str  # the end of the prompt's text
    lead: str  # what the template writes between that and an answer: a blank, or nothing


RUNNING = Opening("a", " ")  # a place in running text


def write_prompt(base: Base, messages: Sequence[Message], video: FeatureRecord | None) -> tuple[str, Opening]:
    """The chat template's text up to where the assistant speaks, with one placeholder for each run of the video's
    tokens, and the place where the answer begins. Blanks at the end of the text are the answer's.

    Raises ModelError: a video that is not marked, a mark without a video, turns that the template refuses."""
    family = base.family
    marks = sum(message.content.count(VIDEO_MARK) for message in messages)
    if marks != (video is not None):
        shown = " ".join(message.content for message in messages)[:200]
        raise ModelError(
            f"The prompt marks {marks} videos with `{VIDEO_MARK}` and {int(video is not None)} was given: {shown!r}."
            " Write `<video>` exactly once in the first user message of a record that has a video."
        )
    places = [{"type": family.content}] * (len(video.kept_R) if video is not None and family.content == "image" else 1)
    turns = []
    for message in messages:
        before, *after = message.content.split(VIDEO_MARK)
        texts = [text.strip() for text in (before, *after)] if after else [before]
        parts = [{"type": "text", "text": text} if text else None for text in texts]
        parts[1:1] = places if after else []
        turns.append({"role": message.role, "content": [part for part in parts if part]})
    template = family.template() if family.template and video is not None else base.tokenizer.chat_template
    text = apply_template(base.tokenizer, turns, template).rstrip(" ")
    if video is not None and family.write is not None:
        token = base.tokenizer.convert_ids_to_tokens(base.placeholder_id)
        text = text.replace(family.mark or token, family.write(video, token))
    return text, Opening(text[-CONTEXT:], answer_lead(base.tokenizer, template))


def apply_template(tokenizer, turns: list[dict], template: str, ask: bool = True) -> str:
    """The chat template's text; `ask`: with the beginning of the assistant's turn. Raises ModelError where the
    template refuses the turns."""
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ModelError(
            f"The base's chat template refuses turns of {roles}: {error}. Put a system text into the first user turn, "
            "or name another template in `model.chat_template`."
        ) from error


@lru_cache(maxsize=64)
def answer_lead(tokenizer, template: str) -> str:
    """The white space that the template writes between its generation prompt and an answer. A template that writes
    words there writes them for finished turns only; such an answer follows the generation prompt as it is."""
    asked = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    said = {"role": "assistant", "content": [{"type": "text", "text": PROBE}]}
    prompt = apply_template(tokenizer, asked, template)
    full = apply_template(tokenizer, [*asked, said], template, ask=False)
    before = prompt.rstrip(" ")
    lead = full[len(before) : full.rfind(PROBE)] if full.startswith(before) else ""
    return lead if lead and not lead.strip() else prompt[len(before) :]


def encode_start(base: Base, text: str) -> list[int]:
    """The beginning of a row -> ids, with the tokenizer's BOS where it has one and the template does not write it."""
    bos = base.tokenizer.bos_token
    return base.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def encode_after(base: Base, before: str, text: str) -> list[int]:
    """`text` -> the ids that it has after `before`, without special tokens.

    Where a token would reach across the seam, the prompt's tokens cannot stay as they are; the text is then tokenised
    as at the start of a line. Raises ModelError for a text that holds the video's placeholder."""
    ids = ids_after(base.tokenizer, before, text)
    if base.placeholder_id in ids or VIDEO_MARK in text:
        raise ModelError(
            f"A text holds the video placeholder: {text[:200]!r}. Remove it: only prompts may mark a video."
        )
    return ids


def ids_after(tokenizer, before: str, text: str) -> list[int]:
    """`encode_after` of any text."""
    for start in (before[-CONTEXT:], "\n", ""):
        head = tokenizer.encode(start, add_special_tokens=False)
        ids = tokenizer.encode(start + text, add_special_tokens=False)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return ids


def encode_answer(base: Base, opening: Opening, text: str, end: bool = True) -> list[int]:
    """An answer -> its ids at `opening` (see `inputs.Sequence`), ended by EOS unless `end` is false."""
    ids = encode_after(base, opening.before, opening.lead + text) if text else []
    return [*ids, base.eos_id] if end else ids


def answer_offsets(base: Base, opening: Opening, text: str) -> list[tuple[int, int]]:
    """The characters (start, end) of `text` that each token of `encode_answer` spans, EOS left out."""
    ids = encode_answer(base, opening, text, end=False)
    for start in (opening.before, "\n", ""):
        lead = len(start) + len(opening.lead)
        encoded = base.tokenizer(start + opening.lead + text, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"][len(encoded["input_ids"]) - len(ids) :] == ids:
            spans = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
            return [(max(0, a - lead), max(0, b - lead)) for a, b in spans]
    raise ModelError(f"This base's tokenizer does not say which characters its tokens span: {text[:100]!r}.")


def decode_answer(base: Base, ids: Sequence[int]) -> str:
    """Ids of an answer -> text, without EOS and without the blanks around it."""
    return base.tokenizer.decode([i for i in ids if i != base.eos_id], clean_up_tokenization_spaces=False).strip()


def word_tokens(base: Base, opening: Opening, word: str, where: str, capitals: bool = True) -> list[int]:
    """The ids of every spelling of `word` that is one token at `opening`, the template's own first: with and without
    a blank and, with `capitals`, "yes", "Yes" and "YES". Raises ModelError, with the pieces, when there is none."""
    found = spellings(base.tokenizer, opening, word, capitals)
    if not found:
        ids = encode_after(base, opening.before, opening.lead + word)
        pieces = base.tokenizer.convert_ids_to_tokens(ids)
        raise ModelError(
            f"`{where}`: {word!r} is {len(ids)} tokens of this base ({pieces}); choose a word that is one token."
            if len(ids) != 1
            else f"`{where}`: {word!r} is not in this base's vocabulary; choose a word that is one token."
        )
    return list(found)


@lru_cache(maxsize=4096)  # asked for every verdict of every record, step after step
def spellings(tokenizer, opening: Opening, word: str, capitals: bool) -> tuple[int, ...]:
    """See `word_tokens`; empty where there are none."""
    cases = (word, word.lower(), word.capitalize(), word.upper()) if capitals else (word,)
    texts = dict.fromkeys(lead + case for case in cases for lead in (opening.lead, "", " "))
    found = [ids_after(tokenizer, opening.before, text) for text in texts]
    return tuple(dict.fromkeys(ids[0] for ids in found if len(ids) == 1 and ids[0] != tokenizer.unk_token_id))
