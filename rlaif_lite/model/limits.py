"""What a base can read and write, from its config and tokenizer alone: checked on all data before any training.

An answer with a token that the base may not write (an unknown word, a special token) has a loss of 1e27; a prompt
longer than the base's positions is read as noise. Neither shows in a run, so neither may enter it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.readers import answers_of
from ..data.records import VIDEO_MARK, Record
from ..errors import DataError
from ..recipe import Model, Recipe
from .base import banned_ids, named_template, read_config, resolve_base
from .text import apply_template

Count = Callable[[str], int]
CHUNK = 1000  # texts tokenised at a time
SHOWN = 3
READ_AT_MOST = 0.25  # share of unknown tokens in the answers of pairs; above, the reward model reads noise


class Limits(NamedTuple):
    """One base."""

    tokenizer: PreTrainedTokenizerBase
    unwritable: frozenset[int]  # ids that no answer may hold
    positions: int | None  # of the decoder; None where the config names none
    template: int  # tokens of the chat template around one question


def load_limits(section: Model) -> Limits:
    """Raises ModelError where the base's files cannot be read."""
    config = read_config(section)
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(section.base), revision=section.revision)
    unwritable = banned_ids(tokenizer, config) | {tokenizer.eos_token_id}
    return Limits(
        tokenizer, frozenset(unwritable), positions_of(config), template_tokens(tokenizer, named_template(section)) or 0
    )


def positions_of(config) -> int | None:
    """Positions of the decoder, as its config names them."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def template_tokens(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> int | None:
    """Tokens that the chat template puts around one question; None where there is no template. `template`: the
    recipe's own, else the tokenizer's."""
    template = template or tokenizer.chat_template
    if not template:
        return None
    said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    return len(tokenizer.encode(apply_template(tokenizer, said, template), add_special_tokens=False)) - 1


def record_tokens(record: Record, count: Count) -> tuple[int, int]:
    """(tokens of the prompt without template and video, tokens of the longest answer)."""
    answers = (record.answer or "",) if record.chosen is None else (record.chosen, record.rejected)
    return sum(count(m.content.replace(VIDEO_MARK, "")) for m in record.prompt), max(map(count, answers))


def sampled(recipe: Recipe) -> dict[str, int]:
    """The splits whose prompts the model answers itself, and the tokens that it may take for that."""
    rooms = {"rl": recipe.ppo.max_new_tokens, "test": recipe.evaluate.max_new_tokens}
    return rooms if recipe.data.pairs else rooms | {"preference": recipe.preference.max_new_tokens}


def check_answers(limits: Limits, key: str, records: Iterable[Record], train_on: str) -> None:
    """Raise DataError for answers that hold tokens which the base cannot write, with their share and examples.

    SFT answers are written, so none may hold any; the answers of pairs are only read, and READ_AT_MOST may be such."""
    given = []
    for record in records:
        if record.chosen is not None and record.rejected is not None:
            given += [(record, record.chosen), (record, record.rejected)]
        elif record.answer is not None:
            given += [(record, text) for text in answers_of(record, train_on)]
    total = bad_tokens = 0
    examples: dict[str, str] = {}  # record -> what it holds
    for start in range(0, len(given), CHUNK):
        chunk = given[start : start + CHUNK]
        encoded = limits.tokenizer([text for _, text in chunk], add_special_tokens=False)["input_ids"]
        for (record, text), ids in zip(chunk, encoded, strict=True):
            bad = [id for id in ids if id in limits.unwritable]
            total, bad_tokens = total + len(ids), bad_tokens + len(bad)
            if bad:
                names = ", ".join(dict.fromkeys(map(str, limits.tokenizer.convert_ids_to_tokens(bad))))
                examples.setdefault(record.source, f"{record.source}: {names} in {text[:80]!r}")
    written = any(record.chosen is None for record, _ in given)
    if bad_tokens > (0 if written else READ_AT_MOST * total):
        shown = "\n  ".join(list(examples.values())[:SHOWN])
        raise DataError(
            f"{key}: {bad_tokens} of {total} tokens ({bad_tokens / total:.1%}) in the answers of {len(examples)} "
            f"records are unknown to the base or special, so it can never write them:\n  {shown}\n"
            "Take these out of the answers, or take a base whose tokenizer has the words."
        )


def check_lengths(limits: Limits, key: str, records: Iterable[Record], video: int, room: int | None) -> None:
    """Raise DataError for the longest record, where it takes more positions than the base has. `video`: tokens of a
    video; `room`: tokens kept for an answer that is sampled, None where the record's own answer is read."""
    if limits.positions is None:
        return
    count = lambda text: len(limits.tokenizer.encode(text, add_special_tokens=False))
    longest, most = "", (0, 0, 0)
    for record in records:
        texts = [*(m.content for m in record.messages), record.chosen or "", record.rejected or ""]
        if 4 * sum(map(len, texts)) + video + (room or 0) + limits.template < limits.positions:
            continue  # a character is four tokens at most: bytes of UTF-8
        prompt, answer = record_tokens(record, count)
        sizes = (video if record.video is not None else 0, prompt + limits.template, answer if room is None else room)
        if sum(sizes) > sum(most):
            longest, most = record.source, sizes
    if sum(most) > limits.positions:
        raise DataError(too_long(key, longest, *most, limits.positions))


def too_long(key: str, source: str, video: int, prompt: int, answer: int, positions: int) -> str:
    """What is said of a record that does not fit into the positions."""
    return (
        f"{key}: {source} takes {video + prompt + answer} positions ({video} of its video, {prompt} of its prompt, "
        f"{answer} of the answer), but the base has {positions} (max_position_embeddings). Keep fewer video tokens "
        "(`features.frames`, `features.prune`), shorten the text, or take a base with a longer context."
    )
