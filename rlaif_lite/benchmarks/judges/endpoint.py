"""A judge behind any address that speaks OpenAI's chat completions: a provider, vLLM, llama.cpp, Ollama.

Replies are kept as they come in (`cached.py`), so whatever ends a run early - Ctrl-C, a provider that is down, an
empty account - costs only what was in flight; the same command again asks for the rest. What may pass (429, 5xx, a
timeout, a broken connection, a body that is no completion) is tried again with growing pauses, or after the time that
the server names, which then holds for all threads. What will not pass by itself (key, address, quota) ends the run at
once. A single prompt that is refused (400: too long, filtered) is a verdict with that problem.

The model that the server says it used is the judge's revision. A name that comes to stand for another model during a
run ends it: two judges do not go into one column.
"""

import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ...errors import JudgeError
from ...progress import say
from .cached import Reply
from .prompts import REPLY_TOKENS, Prompt

LONGEST_PAUSE_S = 60.0  # between two attempts, where the server names no time
LONGEST_WAIT_S = 600.0  # that a server may ask for; more than this, and the run is better started again then
GIVE_UP = 8  # prompts in a row without an answer: it is not the prompts
LARGEST_BODY = 1 << 22  # bytes
TELL_EVERY_S = 10.0
PROBE = Prompt("Answer with the word yes.", "", word=False)


class Prices(NamedTuple):
    """What a provider takes for a million tokens, in any currency."""

    prompt: float
    reply: float


class Endpoint:
    """A model behind `url`, such as https://api.openai.com/v1 or http://localhost:8000/v1. See `cached.Model`.

    `key`: the environment variable with the API key; it is sent and never written. `body`: settings of the request
    beside or instead of ours ({"max_tokens": null, "max_completion_tokens": 2000} for a model that takes no other).
    Without `revision`, one short request asks which model serves the name. Raises JudgeError: see the module.
    """

    words = False

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        revision: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        prices: Prices | None = None,
        body: dict[str, Any] | None = None,
        pause: float = 1.0,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JudgeError(f"{url} is no address of a judge. Give a base URL such as http://localhost:8000/v1.")
        if parts.username or parts.password:
            raise JudgeError("The judge's address holds a name or password. Put the key into an environment variable.")
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self._url = urllib.parse.urlunsplit(parts._replace(path=f"{path}/chat/completions"))
        self._where = self._url.partition("?")[0]  # as messages name it: some providers take the key behind the "?"
        self._key = None if key is None else _key_of(key)
        self._model = model
        self._body = body or {}
        self._concurrency, self._timeout, self._attempts, self._pause = concurrency, timeout, attempts, pause
        self._prices = prices
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._lock = threading.Lock()
        self._not_before = 0.0  # of time.monotonic(): the server asked everybody to wait
        self._told = -TELL_EVERY_S  # when a line last said what holds things up
        self._served: str | None = None
        self._requests, self._tokens, self._unstated = 0, [0, 0], 0
        settings = f"+{json.dumps(self._body, sort_keys=True)}" if self._body else ""
        self.name = f"endpoint:{parts.netloc}{path}:{model}{settings}"
        if revision is None:
            try:
                self._answer(PROBE, threading.Event())
            except (_Refused, _Unanswered) as error:
                raise JudgeError(f"{self._where} does not judge: {error}. {_ADVICE}") from None
        self.revision = revision or self._served

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        """See `cached.Model`. Raises JudgeError once all that could be asked was, if prompts are left without an
        answer; at once where nothing gets one."""
        todo: queue.SimpleQueue = queue.SimpleQueue()
        told: queue.SimpleQueue = queue.SimpleQueue()  # (number, None or what went wrong), one for each prompt
        for item in enumerate(prompts):
            todo.put(item)
        stop = threading.Event()
        for _ in range(min(self._concurrency, len(prompts))):
            # daemons: a request in flight must not hold up Ctrl-C
            threading.Thread(target=self._work, args=(todo, told, keep, stop), daemon=True).start()
        try:
            self._gather(len(prompts), told, keep)
        finally:
            stop.set()
            say(self.cost())

    def cost(self) -> str:
        """Requests, tokens and, with prices, money since this object was made."""
        prompt, reply = self._tokens
        text = f"{self.name}: {self._requests} replies, {prompt} + {reply} tokens"
        text += f" ({self._unstated} replies without a count)" if self._unstated else ""
        if self._prices is None:
            return f"{text}; no prices were given"
        return f"{text}, cost {(prompt * self._prices.prompt + reply * self._prices.reply) / 1e6:.4f}"

    def _gather(self, count: int, told: queue.SimpleQueue, keep: Callable[[int, Reply], None]) -> None:
        refused: dict[int, Exception] = {}
        failed: dict[int, Exception] = {}
        answered = in_a_row = 0
        while answered + len(refused) + len(failed) < count and in_a_row < GIVE_UP:
            number, error = told.get()
            if error is None:
                answered, in_a_row = answered + 1, 0
            elif isinstance(error, _Refused):
                refused[number] = error
                in_a_row += not answered  # where others are answered, it is the prompt
            elif isinstance(error, _Unanswered):
                failed[number] = error
                in_a_row += 1
            else:
                raise error
        if answered:
            for number, error in refused.items():
                keep(number, Reply("", problem=str(error)))
        elif refused:
            failed |= refused
        if failed:
            raise JudgeError(
                f"{self._where}: {answered} of {count} prompts were answered, and their verdicts are kept. "
                f"{count - answered} are left; the last error: {list(failed.values())[-1]}. {_ADVICE}"
            )

    def _work(self, todo: queue.SimpleQueue, told: queue.SimpleQueue, keep: Callable, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                number, prompt = todo.get_nowait()
            except queue.Empty:
                return
            try:
                keep(number, self._answer(prompt, stop))
                told.put((number, None))
            except Exception as error:  # goes on in the main thread
                told.put((number, error))

    def _answer(self, prompt: Prompt, stop: threading.Event) -> Reply:
        """One prompt, with all its attempts. Raises _Refused, _Unanswered, JudgeError."""
        for attempt in range(1, self._attempts + 1):
            if stop.wait(max(0.0, self._not_before - time.monotonic())):
                raise _Unanswered("stopped")
            try:
                return self._reply(self._post(prompt))
            except _Again as error:
                last = error
            if last.after is not None and last.after > LONGEST_WAIT_S:
                raise JudgeError(f"{self._where} asks to wait for {last.after:.0f} s ({last}). {_ADVICE}")
            if attempt == self._attempts:
                break
            pause = min(LONGEST_PAUSE_S, self._pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            self._tell(last)
            if not last.after:  # 0 as well: all attempts would be gone at once
                stop.wait(pause)
            else:
                with self._lock:
                    self._not_before = max(self._not_before, time.monotonic() + last.after)
        raise _Unanswered(f"{last} (tried {self._attempts} times)")

    def _tell(self, error: Exception) -> None:
        """Why it takes so long, at most once in a while."""
        with self._lock:
            if time.monotonic() - self._told > TELL_EVERY_S:
                self._told = time.monotonic()
                say(f"judge: {error}; trying again")

    def _post(self, prompt: Prompt) -> bytes:
        message = {"role": "user", "content": prompt.text}
        body = {"model": self._model, "messages": [message], "temperature": 0, "max_tokens": REPLY_TOKENS} | self._body
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        request = urllib.request.Request(self._url, data, headers)
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                found = b""
                while chunk := response.read1(1 << 16):  # the timeout is one of each read: keep the time of them all
                    found += chunk
                    if time.monotonic() > deadline or len(found) > LARGEST_BODY:
                        raise TimeoutError("the reply does not end")
                return found
        except urllib.error.HTTPError as error:
            raise self._meaning(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said = f"no answer within {self._timeout:g} s" if isinstance(reason, TimeoutError) else f"{reason!r}"
            raise _Again(said) from None

    def _meaning(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP error is: to be tried again, this prompt's, or the run's end."""
        try:
            words = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):
            words = ""
        said = self._masked(f"HTTP {error.code} {error.reason}: {words}")
        used_up = error.code == 429 and "insufficient_quota" in words  # OpenAI's; no waiting helps
        if error.code in (408, 409, 425, 429) and not used_up or error.code >= 500:
            return _Again(said, _seconds(error.headers.get("Retry-After")))
        if error.code in (400, 413, 422):
            return _Refused(said)
        do = {
            401: "Check the API key and the name of its environment variable.",
            402: "The account is empty.",
            403: "The key may not use this model.",
            404: "Check the address and the model's name.",
            429: "The account's quota is used up.",
        }
        moved = (
            f"It has moved to {error.headers.get('Location')}: give that address." if 300 <= error.code < 400 else ""
        )
        return JudgeError(f"{self._where}, model {self._model}: {said}. {moved or do.get(error.code, '')} {_ADVICE}")

    def _masked(self, said: str) -> str:
        """What a server says, which may repeat the key."""
        return said if self._key is None else said.replace(self._key, "***")

    def _reply(self, data: bytes) -> Reply:
        try:
            body = json.loads(data)
            content = body["choices"][0]["message"]["content"]
            if not isinstance(content, (str, type(None))):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            words = self._masked(data.decode(errors="replace"))[:100].encode()
            raise _Again(f"a body that is no chat completion: {words!r}") from None
        served, usage = str(body.get("model") or "unstated"), body.get("usage")
        with self._lock:
            self._served = self._served or served
            self._requests += 1
            try:
                tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
                self._tokens = [a + b for a, b in zip(self._tokens, tokens, strict=True)]
            except (KeyError, TypeError, ValueError):
                tokens = None
                self._unstated += 1
        if served != self._served:
            raise JudgeError(
                f"{self._where}: the name {self._model} stood for {self._served} and now stands for {served}: another "
                f"judge. Name {served} as the model, and judge all of it anew; the verdicts of the other are kept."
            )
        return Reply(content or "", tokens=tokens)


_ADVICE = "What was judged is kept: run the same command again, and only the rest is asked."


class _Again(Exception):
    """May pass; `after` is in how many seconds, where the server says."""

    def __init__(self, said: str, after: float | None = None):
        super().__init__(said)
        self.after = after


class _Refused(Exception):
    """The server takes this prompt not."""


class _Unanswered(Exception):
    """All attempts failed."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args):
        return None


def _key_of(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeError(f"The environment variable {variable}, which is to hold the judge's API key, is not set.")
    if not (key.isascii() and key.isprintable()):
        raise JudgeError(f"The environment variable {variable} holds more than an API key: a line break, say.")
    return key


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
