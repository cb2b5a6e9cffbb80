"""A judge's HTTP server on this machine, real and misbehaving as servers do."""

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KEY = "sk-very-secret"


class Server(ThreadingHTTPServer):
    """Does what the prediction in the prompt says: "500 once", "nonsense", ... ; everything else gets {'score': 4}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: Counter[str] = Counter()
        self.requests: list[tuple[dict, dict]] = []  # (headers, body)
        self.everybody: str | None = None  # what to do whatever the prediction says
        self.says = lambda prediction: "{'score': 4}"
        self.model = "judge-2026-01-01"
        self.healed = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that went away are the point of some tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.calls["GET"] += 1
        self.answer(200, {})

    def do_POST(self):
        server: Server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(
            ({name.title(): value for name, value in self.headers.items()}, {"path": self.path, **body})
        )
        found = re.search(r"<prediction>(.*)</prediction>", body["messages"][0]["content"])
        wish = found[1] if found else "probe"
        server.calls[wish] += 1
        what, _, rest = (server.everybody or wish).partition(" ")
        if rest.startswith("once") and server.calls[wish] > 1 or rest.startswith("until") and server.healed.is_set():
            what = "fine"
        if what.isdigit():
            wait = re.search(r"after=(\S+)", rest)
            said = {
                "error": {
                    "message": f"no {self.headers['Authorization']}" + (" insufficient_quota" * ("quota" in rest))
                }
            }
            self.answer(int(what), said, {"Retry-After": wait[1]} if wait else {"Location": server.url + "/other"})
        elif what == "garbage":
            self.raw(200, f"<html>502 Bad Gateway {self.headers['Authorization']}</html>".encode())
        elif what == "close":
            self.close_connection = True
        elif what == "half":
            self.raw(200, b'{"choices"', length=1000)
        elif what == "hang":
            server.healed.wait(20)
        else:
            text = {"nonsense": "I am only a language model.", "null": None}.get(what, server.says(wish))
            said = {"model": server.model, "choices": [{"message": {"content": text}}]}
            if what != "uncounted":
                said["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
            self.answer(200, said)

    def answer(self, code: int, body: dict, headers: dict | None = None):
        self.raw(code, json.dumps(body).encode(), headers)

    def raw(self, code: int, data: bytes, headers: dict | None = None, length: int | None = None):
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.healed.set()
    server.shutdown()
    server.server_close()
