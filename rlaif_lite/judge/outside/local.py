"""A judge on this machine: a role on a loaded base, another video language model, or a text model.

It reads the prompt's text alone, as the field's judges do, and writes its reply greedily. With `words`, qa is decided
by the probabilities of yes and no as the next token (as RLAIF-V asks about claims): that always gives a verdict, where
a small model may write nothing that can be read, but no score.

Shapes: B rows, S positions, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.utils import cached_file

from ...data.records import Message
from ...errors import ModelError
from ...files import chunks
from ...model.base import base_digest, load_base, read_config
from ...model.families import FAMILIES
from ...model.inputs import BRANCH_MARK, collate, encode_prompt
from ...model.inputs import Sequence as Row
from ...model.memory import in_pieces
from ...model.roles import BASE, Roles
from ...model.text import word_tokens
from ...recipe import Divide, Lora
from ...recipe import Model as Section
from ...rollout import greedy_texts
from ..divide import TextModel
from .cached import Model, Reply
from .prompts import REPLY_TOKENS, Prompt


class LocalRole:
    """A role on a loaded base, as a `cached.Model`."""

    def __init__(self, roles: Roles, role: str, name: str, revision: str, words: bool = False, batch_size: int = 16):
        self.name, self.revision, self.words = name, revision, words
        self._roles, self._role, self._batch_size = roles, role, batch_size

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        """See `cached.Model`. A prompt that cannot be put to this model gets a reply with that problem."""
        rows = {}
        for n, prompt in enumerate(prompts):
            try:
                rows[n] = self._row(prompt)
            except ModelError as error:
                keep(n, Reply("", problem=str(error)))
        for word, answer in ((True, self._decide), (False, self._write)):
            numbers = sorted((n for n in rows if prompts[n].word is word), key=lambda n: len(rows[n].ids_S))
            # several times what is in flight, so that slots are refilled
            for batch in chunks(numbers, 4 * self._batch_size):
                for n, reply in zip(batch, answer([rows[n] for n in batch]), strict=True):
                    keep(n, Reply(reply))

    def _row(self, prompt: Prompt) -> Row:
        base = self._roles.base
        if BRANCH_MARK in prompt.text:
            raise ModelError(f"the text to be judged holds {BRANCH_MARK!r}, which has a meaning of its own here")
        row = encode_prompt(base, [Message("user", prompt.text)], None)
        needed = len(row.ids_S) + (1 if prompt.word else REPLY_TOKENS)
        if needed > (limit := base.decoder.config.max_position_embeddings):
            raise ModelError(f"prompt and reply take {needed} tokens, the model has {limit} positions")
        return row

    def _write(self, rows: list[Row]) -> list[str]:
        with self._roles.use(self._role) as role:
            return greedy_texts(role, rows, REPLY_TOKENS, self._batch_size)

    @torch.no_grad()
    def _decide(self, rows: list[Row]) -> list[str]:
        base = self._roles.base
        yes, no = (word_tokens(base, rows[0].opening, word, "judge") for word in ("yes", "no"))

        def read(part: Sequence[Row]) -> list[str]:
            hidden_BSD = role.hidden(collate(base, part))
            at_B = torch.tensor([len(row.ids_S) - 1 for row in part], device=base.device)
            hidden_BD = hidden_BSD[torch.arange(len(part), device=base.device), at_B]
            prob_BV = torch.softmax((hidden_BD @ base.head_weight_VD.T).float() + base.ban_bias_V, -1)
            pairs = zip(prob_BV[:, yes].sum(-1).tolist(), prob_BV[:, no].sum(-1).tolist(), strict=True)
            return [f"{'yes' if y > n else 'no'}: P(yes) {y:.4f}, P(no) {n:.4f}" for y, n in pairs]

        with self._roles.use(self._role) as role:
            return in_pieces(rows, self._batch_size, read)


class LocalText:
    """A text model, as a `cached.Model`."""

    words = False

    def __init__(self, model: TextModel, name: str, revision: str):
        self.name, self.revision = name, revision
        self._model = model

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        """See `cached.Model`."""
        for numbers in chunks(list(range(len(prompts))), self._model.section.batch_size):
            for n, reply in zip(numbers, self._model.write([prompts[n].text for n in numbers]), strict=True):
                keep(n, Reply(reply))


def of_model(name: str, device: torch.device, words: bool = False, batch_size: int = 16) -> Model:
    """A checkpoint: a folder or a hub id, of a family that can be a base or a causal language model.

    Raises ModelError for one that is neither, and where `words` is asked of a text model."""
    section = Section(base=name)
    config = check_model(name, words)
    # of a hub id the commit, which is the folder's name in the hub's cache
    found = base_digest(section) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent.name
    if config.model_type in FAMILIES:
        if config.get_text_config().hidden_size % 64:
            section = section.model_copy(update={"quantization": "none"})
        roles = Roles(load_base(section, device, tower=False), Lora())
        return LocalRole(roles, BASE, f"local:{short_name(name)}:{section.quantization}", found, words, batch_size)
    text = TextModel(name, device, Divide(max_new_tokens=REPLY_TOKENS, batch_size=batch_size))
    return LocalText(text, f"local:{short_name(name)}:{'nf4' if device.type == 'cuda' else 'full'}", found)


def check_model(name: str, words: bool) -> PretrainedConfig:
    """The configuration of a checkpoint. Raises ModelError as `of_model` does, without loading the weights."""
    config = read_config(Section(base=name))
    if words and config.model_type not in FAMILIES:
        raise ModelError(f"{name} is a text model, which judges by what it writes. Leave --judge-words out.")
    return config


def short_name(name: str) -> str:
    """A folder by its last part: its place is not part of the judge's name."""
    return Path(name).name if Path(name).is_dir() else name
