"""RLAIF-V's judge (arXiv 2405.17220): an answer is divided into atomic claims, each claim becomes a yes/no question,
and the judge's probabilities of yes and no decide; the score is minus the number of claims rejected.

Who divides is a writer: the run's own base, with an adapter or without, or a text model that is loaded for it alone.
Published: two fine-tuned Llama-3-8B, one that splits and one that asks. What a writer writes is read line by line; an
answer whose questions are not as many as its claims cannot be judged, and neither can one without any claim.

Departures: all is written greedily (published: temperature 0.2), so that the same answer is divided the same way in
every round; an answer without a claim is left out where it would win with a score of 0.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..data.records import Message
from ..data.sentences import says_something, split_claims
from ..errors import ModelError
from ..model.inputs import encode_prompt
from ..model.roles import ActiveRole
from ..recipe import Divide
from ..rollout import greedy_texts
from .claims import ClaimScores

Writer = Callable[[list[str]], list[str]]  # prompts -> what is written to each
BULLET = re.compile(r"^(?:[-*\u2022]|\d+[.)])\s+")


class Divided(NamedTuple):
    """One answer, divided."""

    claims: list[str]
    questions: list[str]

    @property
    def judged(self) -> bool:
        return 0 < len(self.claims) == len(self.questions)


def divide(write: Writer, answers: Sequence[tuple[str, str]], section: Divide) -> list[Divided]:
    """Divide answers, given as (question, answer), into claims and their questions."""
    claims = [split_claims(answer) for _, answer in answers]
    if section.split is not None:
        prompts = [section.split.format(question=question, answer=answer) for question, answer in answers]
        claims = [parse_list(text, section.separator) for text in write(prompts)]
    if section.ask is None:
        return [Divided(found, found) for found in claims]
    different = list(dict.fromkeys(claim for found in claims for claim in found))
    written = write([section.ask.format(claim=claim) for claim in different])
    asked = dict(zip(different, (parse_list(text, section.separator) for text in written), strict=True))
    return [Divided(found, [question for claim in found for question in asked[claim]]) for found in claims]


def parse_list(text: str, separator: str) -> list[str]:
    """The items of a written list: headings (`### Facts:`) and items without a word are dropped, bullets and
    numbers cut off."""
    parts = [part.strip() for part in text.split(separator.strip() or separator)]
    return [BULLET.sub("", part) for part in parts if says_something(part) and not part.startswith("###")]


def rejected(verdict: ClaimScores) -> int:
    """Claims that the judge does not find likelier true than false."""
    return sum(value <= 0 for value in verdict.values)


def write_by_role(role: ActiveRole, section: Divide) -> Writer:
    """A role of the run's base writes, without any video."""

    def write(prompts: list[str]) -> list[str]:
        rows = [encode_prompt(role.roles.base, [Message("user", prompt)], None) for prompt in prompts]
        return greedy_texts(role, rows, section.max_new_tokens, section.batch_size)

    return write


class TextModel:
    """A causal language model that writes, in 4 bits on a GPU."""

    def __init__(self, name: str, device: torch.device, section: Divide):
        """Raises ModelError where `name` is no such model."""
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        try:
            self.model = AutoModelForCausalLM.from_pretrained(
                name, dtype="auto", device_map={"": device}, quantization_config=nf4 if device.type == "cuda" else None
            ).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        except (OSError, ValueError) as error:
            raise ModelError(f"`dpo.divide.model`: {name} is no causal language model that loads ({error}).") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.section = section

    @torch.no_grad()
    def write(self, prompts: list[str]) -> list[str]:
        """Greedy, `batch_size` at a time; by the chat template where the model has one."""
        if self.tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [self.tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
        out = []
        for start in range(0, len(prompts), self.section.batch_size):
            rows = self.tokenizer(
                prompts[start : start + self.section.batch_size],
                return_tensors="pt",
                padding=True,
                add_special_tokens=not self.tokenizer.chat_template,
            ).to(self.model.device)
            ids = self.model.generate(
                input_ids=rows["input_ids"],
                attention_mask=rows["attention_mask"],
                do_sample=False,
                temperature=None,
                top_p=None,
                max_new_tokens=self.section.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            out += self.tokenizer.batch_decode(ids[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
        return out
