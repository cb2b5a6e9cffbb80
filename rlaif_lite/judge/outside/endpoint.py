"""A judge behind an address that speaks OpenAI's chat completions: a provider, vLLM, llama.cpp, Ollama.

The `openai` package sends the requests (the extra `judge`). This module adds what a run of hours needs.

- Replies are kept as they arrive (`cached.py`). Ctrl-C, a provider that is down or an empty account costs only the
  requests in flight. The same command again asks for the rest.
- One deadline holds for a whole attempt: connecting, headers, body and error body. A slow server cannot extend it.
- What may pass (429, 5xx, a timeout, a broken connection, a body that is no completion) is tried again with growing
  pauses, or after the time that the server names. That time then holds for all requests.
- What cannot pass (key, address, quota) ends the run at once. One refused prompt (400: too long, filtered) becomes a
  verdict with that problem.
- Everything that a server says goes through one mask before it is shown, raised or written: no key leaves this module.

The model that the server says it used is the judge's revision. If a name starts to mean another model, the run ends:
two judges never share a column.
"""

import asyncio
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import JudgeError
from ...progress import say
from .cached import Reply
from .mask import Mask, whole
from .prompts import REPLY_TOKENS, Prompt

if TYPE_CHECKING:
    from httpx2 import Response
    from openai import APIStatusError, AsyncOpenAI

LONGEST_PAUSE_S = 60.0  # between two attempts, where the server names no time
LONGEST_WAIT_S = 600.0  # that a server may ask for; for more than this, start the run again later
GIVE_UP = 8  # prompts in a row without an answer: the prompts are not the reason
LARGEST_BODY = 1 << 22  # bytes
MOST_TOKENS = 10**7  # of one reply; a larger count is nonsense
TELL_EVERY_S = 10.0
PROBE = Prompt("Answer with the word yes.", "", word=False)
INSTALL = "An endpoint judge needs the openai package: pip install 'rlaif-lite[judge]'"


class Prices(NamedTuple):
    """What a provider takes for a million tokens, in any currency."""

    prompt: float
    reply: float


class Endpoint:
    """A model behind `url`, such as https://api.openai.com/v1 or http://localhost:8000/v1. See `cached.Model`.

    `key`: the environment variable with the API key, which is sent and never written. `timeout`: seconds for one
    attempt, everything included. `body`: settings of the request that add to ours or replace them
    ({"max_tokens": null, "max_completion_tokens": 2000} for a model that refuses `max_tokens`). Without `revision`,
    one short request asks which model serves the name. Raises JudgeError: see the module.
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
        try:
            import openai  # noqa: F401
        except ImportError:
            raise JudgeError(INSTALL) from None
        parts = _address(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self._url = urllib.parse.urlunsplit(parts._replace(path=path, query="", fragment=""))
        self._query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        self._key = None if key is None else os.environ.get(key, "").strip()
        if self._key == "":
            raise JudgeError(f"The environment variable {key}, which should hold the judge's API key, is not set.")
        if self._key and not (self._key.isascii() and self._key.isprintable()):
            raise JudgeError(f"The environment variable {key} holds more than an API key: a line break, for example.")
        # some providers take the key behind the "?", so its values are secret as well
        self._mask = Mask([self._key or "", *self._query.values()])
        self._where = self._mask(f"{self._url}/chat/completions")
        self._model = model
        self._body = body or {}
        self._concurrency, self._timeout, self._attempts, self._pause = concurrency, timeout, attempts, pause
        self._prices = prices
        self._not_before = 0.0  # of time.monotonic(): the server asked everybody to wait
        self._told = -TELL_EVERY_S  # when a line last said why it takes long
        self._served: str | None = None
        self._requests, self._tokens, self._unstated = 0, [0, 0], 0
        settings = f"+{json.dumps(self._body, sort_keys=True)}" if self._body else ""
        self.name = self._mask(f"endpoint:{parts.netloc}{path}:{model}{settings}")
        if parts.scheme == "http" and (self._key or self._query) and not _is_local(parts.hostname):
            say(f"judge: {parts.hostname} is asked over plain http. The key can be read on the way; use https.")
        if revision is None:
            try:
                _in_a_thread(self._probe())
            except (_Refused, _Unanswered) as error:
                raise JudgeError(f"{self._where} does not judge: {error}. {_ADVICE}") from None
        self.revision = revision or self._served

    def ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        """See `cached.Model`. Raises JudgeError after all prompts were tried, if some have no answer; at once where no
        prompt gets one."""
        try:
            _in_a_thread(self._ask(prompts, keep))
        finally:
            say(self.cost())

    def cost(self) -> str:
        """Requests, tokens and, with prices, money since this object was made."""
        prompt, reply = self._tokens
        text = f"{self.name}: {self._requests} replies, {prompt} + {reply} tokens"
        text += f" ({self._unstated} replies without a count)" if self._unstated else ""
        if self._prices is None:
            return f"{text}; no prices were given"
        return f"{text}, cost {(prompt * self._prices.prompt + reply * self._prices.reply) / 1e6:.4f}"

    # ---- prompts

    async def _probe(self) -> None:
        async with self._client() as client:
            await self._answer(client, PROBE)

    async def _ask(self, prompts: Sequence[Prompt], keep: Callable[[int, Reply], None]) -> None:
        todo = iter(enumerate(prompts))
        refused: dict[int, _Refused] = {}
        last: Exception | None = None
        answered = in_a_row = 0

        async def work() -> None:
            nonlocal last, answered, in_a_row
            while in_a_row < GIVE_UP and (job := next(todo, None)) is not None:
                number, prompt = job
                try:
                    reply = await self._answer(client, prompt)
                except _Refused as error:
                    refused[number] = error
                    in_a_row += not answered  # where others are answered, the prompt is the reason
                except _Unanswered as error:
                    last = error
                    in_a_row += 1
                else:
                    keep(number, reply)
                    answered, in_a_row = answered + 1, 0

        async with self._client() as client:
            await asyncio.gather(*(work() for _ in range(min(self._concurrency, len(prompts)))))
        if answered:
            for number, error in refused.items():
                keep(number, Reply("", problem=str(error)))
        elif refused:
            last = last or list(refused.values())[-1]
        if last:
            raise JudgeError(
                f"{self._where}: {answered} of {len(prompts)} prompts were answered, and their verdicts are kept. "
                f"{len(prompts) - answered} are left; the last error: {last}. {_ADVICE}"
            )

    async def _answer(self, client: "AsyncOpenAI", prompt: Prompt) -> Reply:
        """One prompt, with all its attempts. Raises _Refused, _Unanswered, JudgeError."""
        for attempt in range(1, self._attempts + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            try:
                return await self._attempt(client, prompt)
            except _Again as error:
                last = error
            if last.after is not None and last.after > LONGEST_WAIT_S:
                raise JudgeError(f"{self._where} asks to wait for {last.after:.0f} s ({last}). {_ADVICE}")
            if attempt == self._attempts:
                break
            if time.monotonic() - self._told > TELL_EVERY_S:
                self._told = time.monotonic()
                say(f"judge: {last}; trying again")
            if last.after:
                self._not_before = max(self._not_before, time.monotonic() + last.after)
            else:  # 0 as well: all attempts would be gone at once
                pause = min(LONGEST_PAUSE_S, self._pause * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                await asyncio.sleep(pause)
        raise _Unanswered(f"{last} (tried {self._attempts} times)")

    # ---- one attempt

    def _client(self) -> "AsyncOpenAI":
        import openai

        # OPENAI_* of the environment stay here: the user may not have meant them for this address
        unset = ["OpenAI-Organization", "OpenAI-Project"] + ([] if self._key else ["Authorization"])
        self._headers = {"Accept-Encoding": "identity", **dict.fromkeys(unset, openai.Omit())}
        return openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self._url,
            default_query=self._query,
            max_retries=0,  # `_answer` tries again: a server's wait holds for all requests
            timeout=self._timeout,
            # a redirect would carry the key to another host
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_bounded]}),
        )

    async def _attempt(self, client: "AsyncOpenAI", prompt: Prompt) -> Reply:
        """Raises _Again, _Refused, JudgeError; no other exception, whatever the server does."""
        import openai

        settings = {"temperature": 0, "max_tokens": REPLY_TOKENS} | self._body
        message: Any = {"role": "user", "content": whole(prompt.text)}
        try:
            async with asyncio.timeout(self._timeout):
                response = await client.chat.completions.with_raw_response.create(
                    model=self._model,
                    messages=[message],
                    extra_headers=self._headers,
                    extra_body={name: value for name, value in settings.items() if value is not None},
                )
                body = response.content
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"no answer within {self._timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._meaning(error) from None
        except openai.APIConnectionError as error:
            raise _Again(self._mask(repr(error.__cause__ or error))) from None
        except Exception as error:
            raise _Again(self._mask(f"a reply that cannot be read: {error!r}")) from None
        return self._reply(body)

    def _meaning(self, error: "APIStatusError") -> Exception:
        """What an HTTP error is: to be tried again, this prompt's, or the run's end."""
        code, headers = error.status_code, error.response.headers
        words = error.response.content.decode(errors="replace")
        phrase = HTTPStatus(code).phrase if code in set(HTTPStatus) else ""
        said = self._mask(f"HTTP {code} {phrase}: {words}")
        used_up = code == 429 and "insufficient_quota" in words  # OpenAI's; no waiting helps
        if code in (408, 409, 425, 429) and not used_up or code >= 500:
            return _Again(said, _seconds(headers.get("Retry-After")))
        if code in (400, 413, 422):
            return _Refused(said)
        do = {
            401: "Check the API key and the name of its environment variable.",
            402: "The account is empty.",
            403: "The key may not use this model.",
            404: "Check the address and the model's name.",
            429: "The account's quota is used up.",
        }
        moved = headers.get("Location") if 300 <= code < 400 else None
        hint = f"It has moved to {self._mask(moved)}: give that address." if moved else do.get(code, "")
        return JudgeError(f"{self._where}, model {self._model}: {said}. {hint} {_ADVICE}")

    def _reply(self, data: bytes) -> Reply:
        """The completion in a body. Raises _Again where there is none, JudgeError where another model wrote it."""
        try:
            body = json.loads(data)
            content = body["choices"][0]["message"]["content"]
            if not isinstance(content, (str, type(None))):
                raise TypeError
        except (ValueError, LookupError, TypeError, RecursionError):
            words = self._mask(data.decode(errors="replace"))[:100].encode()
            raise _Again(f"a body that is no chat completion: {words!r}") from None
        served = self._mask(str(body.get("model") or "unstated"))
        self._served = self._served or served
        self._requests += 1
        usage = body.get("usage")
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        tokens = None
        if counts and all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts):
            tokens = (counts[0], counts[1])
            self._tokens = [a + b for a, b in zip(self._tokens, tokens, strict=True)]
        else:
            self._unstated += 1  # the server states no such counts, or impossible ones
        if served != self._served:
            raise JudgeError(
                f"{self._where}: the name {self._model} stood for {self._served} and now stands for {served}: another "
                f"judge. Name {served} as the model, and judge all of it again; the verdicts of the other are kept."
            )
        return Reply(self._mask.hide(whole(content or "")), tokens=tokens)


_ADVICE = "What was judged is kept: run the same command again, and only the rest is asked."


class _Again(Exception):
    """May pass; `after` is in how many seconds, where the server says."""

    def __init__(self, said: str, after: float | None = None):
        super().__init__(said)
        self.after = after


class _Refused(Exception):
    """The server does not take this prompt."""


class _Unanswered(Exception):
    """All attempts failed."""


async def _bounded(response: "Response") -> None:
    """Read a body of at most LARGEST_BODY bytes, of an error as well. Raises ValueError for a longer one.

    What claims to be compressed stays as it is: a few kilobytes can unpack to gigabytes, and we asked for none."""
    import httpx2

    stream, body = response.stream, bytearray()
    try:
        async for chunk in stream:
            body += chunk
            if len(body) > LARGEST_BODY:
                raise ValueError(f"the body is longer than {LARGEST_BODY} bytes")
    finally:
        await stream.aclose()
    response.headers.pop("Content-Encoding", None)
    response.stream = httpx2.ByteStream(bytes(body))


def _in_a_thread(work: Coroutine) -> Any:
    """Run `work` to its end in a thread with a loop of its own: a notebook's thread has a loop already.

    Ctrl-C ends the wait at once and cancels the requests in flight."""
    done: Future = Future()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)

    def body() -> None:
        try:
            done.set_result(loop.run_until_complete(task))
        except BaseException as error:  # raised again in the thread that waits
            done.set_exception(error)
        finally:
            loop.run_until_complete(_cancel_others())
            loop.close()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    try:
        return done.result()
    except BaseException:
        if not done.done():
            loop.call_soon_threadsafe(task.cancel)
        raise


async def _cancel_others() -> None:
    """End the loop's other tasks: the requests of an `_ask` that raised."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _address(url: str) -> urllib.parse.SplitResult:
    """The parts of a judge's address. Raises JudgeError for one that cannot be used, without its secrets."""
    shown = re.sub(r"//[^/@]*@", "//***@", url.partition("?")[0])
    wrong = f"{shown} is no address of a judge. Give a base URL such as http://localhost:8000/v1."
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        raise JudgeError(wrong) from None
    if not usable:
        raise JudgeError(wrong)
    if parts.username or parts.password:
        raise JudgeError("The judge's address holds a name or password. Put the key into an environment variable.")
    return parts


def settings_of(text: str | None, where: str) -> dict[str, Any]:
    """The request's own settings from JSON. Raises JudgeError, naming `where`, for what is no JSON object."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise JudgeError(f"{where} is {text}, expected a JSON object such as '{{\"temperature\": null}}'.")
    return found


def _is_local(host: str) -> bool:
    """Whether what is sent to `host` stays on this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))  # of "nan" 0
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
