"""A judge that is a model. Each reply is on disk before it is used, so nothing is asked twice.

There is one file of JSON lines per model and revision. A line holds the reply, the verdict, the judge, its revision
and the prompt's hash. Its key is the hash of the model's name and the whole prompt: a changed word is another question.
Lines are only appended, each as soon as its reply arrives. A kill costs what was in flight; a line that was cut
short is ignored. A verdict that could not be read is kept too, and asked for again only on request.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from ...errors import JudgeError
from ...files import digest_of
from ...progress import progress, say
from . import Case, Verdict
from .prompts import ALL, Prompt, prompt_of
from .reading import read, read_word


class Reply(NamedTuple):
    """What a model answered to a prompt."""

    raw: str
    problem: str | None = None  # why there can be no answer to this prompt; then `raw` is empty
    tokens: tuple[int, int] | None = None  # of the prompt and of the reply, where the model says


class Model(Protocol):
    """A model that answers prompts: on this machine or behind an address."""

    name: str  # kind and model, and the settings that change what it says
    revision: str  # which version of it
    words: bool  # qa is answered by the probabilities of yes and no

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        """Call `keep(number of the prompt, reply)` as replies come in, from any thread. Raises RlaifError where it
        cannot go on; what was kept stays."""
        ...


class CachedJudge:
    """The judge that a model is, its verdicts in `folder`. `again` asks once more for what could not be read. `budget`:
    tokens, of prompts and replies, beyond which nothing more is asked; those of the verdicts in `folder` count."""

    def __init__(self, model: Model, folder: Path, again: bool = False, budget: int | None = None):
        self.id = f"{model.name}@{model.revision}#{ALL}{'+words' if model.words else ''}"
        self._model = model
        self._again, self._budget = again, budget
        self._verdicts = Verdicts(folder, f"{model.name}@{model.revision}")

    def judge(self, cases: Sequence[Case]) -> list[Verdict]:
        """One verdict for each case, in order; cases with one and the same prompt are asked once. Raises JudgeError
        where there is something to ask and the budget is used up."""
        prompts = [prompt_of(case, self._model.words) for case in cases]
        keys = [self._verdicts.key(prompt.text) for prompt in prompts]
        asked = {key: n for n, key in enumerate(keys) if not self._verdicts.has(key, readable=self._again)}
        numbers = list(asked.values())
        if numbers:
            if self._budget is not None and self._verdicts.tokens >= self._budget:
                raise JudgeError(
                    f"{self.id} has used {self._verdicts.tokens} tokens of a budget of {self._budget}, and "
                    f"{len(numbers)} prompts are left. Verdicts are kept in {self._verdicts.path}. Raise the budget "
                    "and run the same command again: only the rest is asked."
                )
            self._ask([cases[n] for n in numbers], [prompts[n] for n in numbers], [keys[n] for n in numbers])
        verdicts = [self._verdicts.of(case.id, key) for case, key in zip(cases, keys, strict=True)]
        unread = [verdict for verdict in verdicts if verdict.problem]
        known = f", {len(cases) - len(numbers)} known before" if len(cases) > len(numbers) else ""
        problems = f"; {len(unread)} cannot be read, the first ({unread[0].id}): {unread[0].problem}" if unread else ""
        say(f"{self.id}: {len(verdicts)} verdicts{known}{problems}")
        return verdicts

    def _ask(self, cases: list[Case], prompts: list[Prompt], keys: list[str]) -> None:
        lock = threading.Lock()
        with progress(len(prompts), "judge", unit="case") as bar:

            def keep(n: int, reply: Reply) -> None:
                case, prompt = cases[n], prompts[n]
                if reply.problem is not None:
                    verdict = Verdict(case.id, None, None, "", reply.problem)
                else:
                    verdict = (read_word if prompt.word else read)(case, reply.raw)
                line = {
                    "judge": self.id,
                    "revision": self._model.revision,
                    "prompt": prompt.hash,
                    "task": case.task,
                    "tokens": reply.tokens,
                }
                with lock:
                    self._verdicts.add(keys[n], verdict, line)
                    bar.advance()

            self._model.ask(prompts, keep)


class Verdicts:
    """The verdicts of one model on disk, and in memory. Several processes may append to one file."""

    def __init__(self, folder: Path, judge: str):
        self._judge = judge
        self.path = folder / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', judge)[:60]}-{digest_of(judge, 8)}.jsonl"
        self._found: dict[str, Verdict] = {}
        self.tokens = 0  # that the verdicts have cost, where the model said so
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.split("\n"):
            try:
                held = json.loads(line)
                self._found[held["key"]] = Verdict(*(held[name] for name in Verdict._fields))
                self.tokens += sum(held["tokens"] or ())
            except (ValueError, KeyError, TypeError):  # cut short by a kill
                continue

    def key(self, prompt: str) -> str:
        """What a prompt is found by."""
        return digest_of([self._judge, prompt], 64)

    def has(self, key: str, readable: bool = False) -> bool:
        """Whether there is a verdict; `readable`: one without a problem."""
        return key in self._found and not (readable and self._found[key].problem)

    def of(self, id: str, key: str) -> Verdict:
        """The verdict, in the name of the case that asks."""
        return self._found[key]._replace(id=id)

    def add(self, key: str, verdict: Verdict, more: dict) -> None:
        """Write a verdict, with `more` beside it, in one go."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **verdict._asdict(), **more}) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # behind a line that a kill cut short
                    line = "\n" + line
            file.write(line.encode())
        self._found[key] = verdict
        self.tokens += sum(more["tokens"] or ())
