"""Judge servers that misbehave on purpose: each must end within its deadline, and no key may show in any output.

    python tests/campaigns/hostile_judges.py

Every server is a real socket on this machine. The judge has a key in its environment variable and another one in its
address, as some providers want it. What is searched for them: errors with their tracebacks, standard error, and every
file that the judge wrote.
"""

import contextlib
import gzip
import io
import json
import os
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rlaif_lite.errors import JudgeError
from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.cached import CachedJudge
from rlaif_lite.judge.outside.endpoint import Endpoint

KEY = "sk-Very+Secret/Key=="
QUERY = "hunter2/also+secret"
TIMEOUT, ATTEMPTS = 0.5, 2  # of one attempt in seconds, and how many
SLACK = 2.5  # seconds, for a busy machine


def http(status: str, body: bytes | str, *headers: str, length: int | None = None) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def completion(content: object = "{'score': 4}", model: object = "m", **more) -> str:
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return json.dumps({"model": model, "choices": [{"message": {"content": content}}], "usage": usage} | more)


def slowly(first: bytes, then: bytes = b"x", pause: float = 0.05) -> Callable[[socket.socket], None]:
    """Send `first`, and `then` again and again until the other side goes away."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(first)
        while True:
            connection.sendall(then)
            time.sleep(pause)

    return serve


def says(*parts: bytes) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(b"".join(parts))


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hangs(connection: socket.socket) -> None:
    time.sleep(10)


DEEP = "[" * 100_000 + "]" * 100_000
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWER = completion().encode()
SERVERS: dict[str, Callable[[socket.socket], None]] = {
    # time
    "says nothing": hangs,
    "closes": lambda connection: None,
    "resets": resets,
    "a byte of header at a time": slowly(b"HTTP/1.1 200 OK\r\nX: "),
    "headers without end": slowly(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "a byte of body at a time": slowly(http("200 OK", "", length=10_000)),
    "a byte of a 400's body at a time": slowly(http("400 Bad Request", "", length=10_000)),
    "a byte of a 500's body at a time": slowly(http("500 Oops", "", length=10_000)),
    "a byte of a redirect's body at a time": slowly(http("302 Found", "", "Location: /x", length=10_000)),
    "chunks without end": slowly(CHUNKED, b"1\r\nx\r\n"),
    "events without end": slowly(CHUNKED, b"9\r\ndata: {}\n\r\n"),
    "100 Continue without end": slowly(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "half a body, then nothing": lambda connection: (
        connection.sendall(http("200 OK", "{", length=99)),
        hangs(connection),
    ),
    # size
    "a body of 32 MB": says(http("200 OK", b" " * (1 << 25))),
    "an error of 32 MB": says(http("500 Oops", b" " * (1 << 25))),
    "a header of 1 MB": says(b"HTTP/1.1 200 OK\r\nX: ", b"y" * (1 << 20), b"\r\n\r\n"),
    "a bomb of gzip": says(http("200 OK", gzip.compress(b" " * (1 << 27)), "Content-Encoding: gzip")),
    "gzip that is none": says(http("200 OK", "{}", "Content-Encoding: gzip")),
    "a model's name of 1 MB": says(http("200 OK", completion(model="\x1b[31mx" * 200_000))),
    # the key comes back
    "the key as a status line": says(f"{KEY} {QUERY}\r\n\r\n".encode()),
    "the key as the reason": says(http(f"500 {KEY} {QUERY}", "")),
    "the key as the status": says(f"HTTP/1.1 {KEY} OK\r\n\r\n".encode()),
    "the key in Location": says(http("302 Found", "", f"Location: https://elsewhere/?k={KEY}&q={QUERY}")),
    "the key in a 401": says(http("401 Unauthorized", f"no {KEY} nor {QUERY}")),
    "the key in a 400, spelt for addresses": says(
        http("400 Bad Request", urllib.parse.quote(KEY, safe="") + urllib.parse.quote_plus(QUERY))
    ),
    "the key in a 500, in capitals": says(http("500 Oops", KEY.upper() + QUERY.upper())),
    "the key in a header": says(http("500 Oops", "", f"Retry-After: {KEY}", f"X-{QUERY.replace('/', '-')}: {KEY}")),
    "the key as the answer": says(http("200 OK", completion(f"{{'score': 4}} {KEY} {QUERY}"))),
    "the key as the model": says(http("200 OK", completion(model=f"{KEY} {QUERY}"))),
    "the key in no JSON": says(http("200 OK", f"<html>{KEY} {QUERY}")),
    # contents
    "deep JSON": says(http("200 OK", DEEP)),
    "deep JSON as usage": says(http("200 OK", completion()[:-1] + f', "x": {DEEP}}}')),
    "usage beyond all numbers": says(
        http("200 OK", completion(usage={"prompt_tokens": float("inf"), "completion_tokens": -1}))
    ),
    "usage of 5,000 digits": says(
        http("200 OK", completion()[:-1] + ', "usage": {"prompt_tokens": ' + "9" * 5000 + "}}")
    ),
    "usage that is a list": says(http("200 OK", completion(usage=["prompt_tokens"]))),
    "half a surrogate pair": says(http("200 OK", completion("{'score': 4} \ud800", model="m\udfff"))),
    "bytes that are no UTF-8": says(http("200 OK", b"\xff\xfe" + ANSWER)),
    "an answer that is a number": says(http("200 OK", completion(4))),
    "choices that are none": says(http("200 OK", '{"choices": {"0": []}}')),
    "no content": says(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "not modified": says(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "another protocol": says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n\x81\x01x"),
    "TLS": says(b"\x15\x03\x01\x00\x02\x02\x28"),
    "a status of 999": says(http("999 What", "")),
    "a wait without end": says(http("429 Slow", "", "Retry-After: 1e999")),
    "a wait that is no number": says(http("429 Slow", "", "Retry-After: nan")),
    "a wait until the year 9999": says(http("503 Slow", "", "Retry-After: Fri, 31 Dec 9999 23:59:59 -9999")),
}


class Outcome(NamedTuple):
    """What a server brought about."""

    name: str
    seconds: float
    end: str
    "the first line of the error, or `verdicts`"
    faults: list[str]


def attack(name: str) -> Outcome:
    """Let a judge meet the server `name`."""
    os.environ["HOSTILE_KEY"] = KEY
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            file = connection.makefile("rb")
            headers = dict(line.lower().split(b":", 1) for line in iter(file.readline, b"\r\n") if b":" in line)
            file.read(int(headers.get(b"content-length", 0)))  # what is left unread at the end resets the connection
            SERVERS[name](connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1?{urllib.parse.urlencode({'key': QUERY})}"
    written, faults, started = "", [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = Endpoint(url, "m", key="HOSTILE_KEY", timeout=TIMEOUT, attempts=ATTEMPTS, pause=0.01)
            written += model.name + model.revision
            verdicts = CachedJudge(model, Path(folder)).judge([Case("1", "detail", "what ?", "a dog", "a dog")])
            written += json.dumps([v._asdict() for v in verdicts], ensure_ascii=False).encode().decode()
            end = "verdicts"
        except JudgeError as error:
            end = str(error)
            written += "".join(traceback.format_exception(error))
        except Exception as error:  # a fault of the judge's
            end = repr(error)
            written += "".join(traceback.format_exception(error))
            faults.append("an error that is no JudgeError")
        seconds = time.monotonic() - started
        for file in Path(folder).iterdir():
            written += file.name + file.read_text()
    listener.close()
    if seconds > 2 * ATTEMPTS * TIMEOUT + SLACK:  # the request that asks who is there, and the case
        faults.append(f"{seconds:.1f} s")
    faults += [f"{secret!r} shows" for secret in shown(written + end)]
    return Outcome(name, seconds, end, faults)


def shown(text: str) -> list[str]:
    """Which secrets a text holds, in any spelling that a server may use."""
    spelt = {
        secret: (secret, urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret))
        for secret in (KEY, QUERY)
    }
    return [secret for secret, spellings in spelt.items() if any(s.lower() in text.lower() for s in spellings)]


def main() -> int:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        outcomes = [attack(name) for name in SERVERS]
    for outcome in outcomes:
        print(f"{outcome.seconds:5.2f} s  {outcome.name:<42}{'; '.join(outcome.faults) or 'ok':<30}{outcome.end[:90]}")
    bad = [outcome for outcome in outcomes if outcome.faults] + shown(said.getvalue())
    print(f"{len(outcomes)} servers, {len(bad)} with a fault; longest {max(o.seconds for o in outcomes):.2f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
