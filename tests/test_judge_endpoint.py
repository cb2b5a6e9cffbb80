"""The judge behind an address, against a real HTTP server on this machine that misbehaves as servers do."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from campaigns import hostile_judges
from judge_server import KEY
from rlaif_lite.errors import JudgeError
from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.cached import CachedJudge
from rlaif_lite.judge.outside.endpoint import GIVE_UP, Endpoint, Prices, _seconds

ROOT = Path(__file__).parent.parent


@pytest.fixture
def judge(server, tmp_path):
    """judge(concurrency=1, ...) -> a judge at the server, its verdicts in tmp_path."""

    def make(again: bool = False, **keys) -> CachedJudge:
        given = {"key": "JUDGE_KEY", "timeout": 5.0, "pause": 0.01, "attempts": 3} | keys
        return CachedJudge(Endpoint(server.url, "judge", **given), tmp_path, again)

    return make


def cases(*wishes: str) -> list[Case]:
    return [Case(f"c{n}", "correctness", "what ?", "a dog", wish) for n, wish in enumerate(wishes)]


TROUBLES = [
    "fine",
    "429 once after=0.2",
    "500 once",
    "503 once",
    "garbage once",
    "close once",
    "half once",
    "hang once",
    "nonsense",
    "null",
]


def test_what_passes_is_tried_again_and_nothing_is_asked_twice(server, judge, tmp_path):
    first = judge(timeout=1.5)
    verdicts = first.judge(cases(*TROUBLES, "fine"))
    assert [v.id for v in verdicts] == [f"c{n}" for n in range(11)]
    assert [v.score for v in verdicts] == [4.0] * 8 + [None, None, 4.0]
    assert [v.problem for v in verdicts[8:10]] == [
        "no score from 0 to 5: 'I am only a language model.'",
        "no score from 0 to 5: the reply is empty",
    ]
    asked = {"probe": 1} | {wish: 2 if "once" in wish else 1 for wish in TROUBLES}
    assert server.calls == asked  # "fine" stands for two cases and was asked once
    assert first.id.startswith(f"endpoint:127.0.0.1:{server.server_port}/v1:judge@judge-2026-01-01#")

    assert judge().judge(cases(*TROUBLES, "fine")) == verdicts
    assert server.calls == asked | {"probe": 2}
    judge(again=True).judge(cases(*TROUBLES))
    assert server.calls == asked | {"probe": 3, "nonsense": 2, "null": 2}

    (file,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(line["judge"], line["revision"]) for line in lines} == {(first.id, "judge-2026-01-01")}
    assert all(len(line["prompt"]) == 12 and line["tokens"] == [100, 10] for line in lines)


def test_the_request(server, judge):
    judge(body={"max_tokens": None, "max_completion_tokens": 9}).judge(cases("fine"))
    headers, body = server.requests[-1]
    assert headers["Authorization"] == f"Bearer {KEY}" and body["path"] == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("judge", 0, 9)
    assert "max_tokens" not in body and body["messages"][0]["role"] == "user" and len(body["messages"]) == 1


def test_cost(server, capsys, tmp_path):
    model = Endpoint(server.url, "judge", prices=Prices(2.0, 10.0), attempts=1, revision="x")
    CachedJudge(model, tmp_path).judge(cases("fine", "fine too", "uncounted"))
    said = "3 replies, 200 + 20 tokens (1 replies without a count), cost 0.0006"
    assert said in capsys.readouterr().err and said in model.cost()


def test_what_does_not_pass_stops_at_the_end_and_the_rest_is_kept(server, judge):
    given = cases("fine", "500 until", "hang until", "also fine")
    with pytest.raises(
        JudgeError, match=r"2 of 4 prompts were answered, and their verdicts are kept.*run the same command"
    ):
        judge(timeout=0.5, attempts=2).judge(given)
    assert server.calls["500 until"] == server.calls["hang until"] == 2
    server.healed.set()
    before = server.calls.copy()
    assert [v.score for v in judge().judge(given)] == [4.0] * 4
    assert server.calls - before == {"500 until": 1, "hang until": 1, "probe": 1}


def test_a_server_that_is_down_is_not_asked_for_everything(server, judge):
    model = judge(concurrency=2, attempts=1)
    server.everybody = "500"
    with pytest.raises(JudgeError, match=r"0 of 100 prompts.*HTTP 500"):
        model.judge(cases(*(f"w{n}" for n in range(100))))
    assert GIVE_UP <= sum(server.calls.values()) <= GIVE_UP + 4


@pytest.mark.parametrize(
    ("everybody", "message"),
    [
        ("401", "Check the API key"),
        ("404", "Check the address and the model's name"),
        ("429 quota", "quota is used up"),
        ("429 after=4000", "asks to wait for 4000 s"),
        ("400", "does not judge: HTTP 400"),
        ("500", r"HTTP 500 .*\(tried 3 times\)"),
        ("hang", "no answer within 0.3 s"),
        ("garbage", "no chat completion: b'<html>"),
    ],
)
def test_a_judge_that_cannot_judge_is_found_before_anything_is_asked(server, judge, everybody, message):
    server.everybody = everybody
    with pytest.raises(JudgeError, match=message) as error:
        judge(timeout=0.3 if everybody == "hang" else 5.0)
    assert KEY not in str(error.value) and set(server.calls) == {"probe"}


def test_a_redirect_is_not_followed(server, judge):
    server.everybody = "302"
    with pytest.raises(JudgeError, match="It has moved to http.*/v1/other: give that address"):
        judge()
    assert server.calls == {"probe": 1}


def test_a_prompt_that_is_refused_is_a_verdict_unless_all_are(server, judge):
    verdicts = judge(concurrency=1).judge(cases("400", "fine"))
    assert verdicts[0].problem.startswith("HTTP 400 Bad Request") and KEY not in verdicts[0].problem
    assert verdicts[1].score == 4.0
    with pytest.raises(JudgeError, match="0 of 2 prompts were answered.*HTTP 422"):
        judge().judge(cases("422", "422 too"))
    assert judge().judge(cases("400"))[0].problem  # kept like any verdict


def test_another_model_behind_the_name_is_another_judge(server, judge):
    model = judge()
    model.judge(cases("fine"))
    server.model = "judge-2026-02-02"
    with pytest.raises(JudgeError, match="stood for judge-2026-01-01 and now stands for judge-2026-02-02"):
        model.judge(cases("fine", "another"))
    assert judge().id != model.id


def test_a_server_is_asked_again_when_it_says(server, judge):
    model = judge(concurrency=1)
    started = time.monotonic()
    model.judge(cases("429 once after=0.5", "fine"))
    assert time.monotonic() - started >= 0.5
    server.calls.clear()
    started = time.monotonic()
    judge(concurrency=1, pause=0.8).judge(cases("503 once after=0"))  # no time at all is no pause
    assert time.monotonic() - started >= 0.4 and server.calls["503 once after=0"] == 2
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < _seconds(in_a_minute) <= 60
    assert [_seconds(text) for text in ("3", "-1", "soon", None)] == [3.0, 0.0, None, None]


JUDGING = """
import signal
import sys
from pathlib import Path
from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.cached import CachedJudge
from rlaif_lite.judge.outside.endpoint import Endpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts us in the background has it ignored
url, folder, *wishes = sys.argv[1:]
cases = [Case(wish, "correctness", "what ?", "a dog", wish) for wish in wishes]
CachedJudge(Endpoint(url, "judge", concurrency=2, timeout=60.0), Path(folder)).judge(cases)
"""


def test_ctrl_c_ends_at_once_and_keeps_what_was_judged(server, judge, tmp_path):
    """In a process of its own: threads that wait for the server must not hold up its end."""
    wishes = ["fine", "hang until", "also fine"]
    process = subprocess.Popen(
        [sys.executable, "-c", JUDGING, server.url, str(tmp_path), *wishes], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (server.calls["hang until"] and server.calls["also fine"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # for the last reply to be kept
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - sent < 10 and "KeyboardInterrupt" in said
    assert "3 replies, 300 + 30 tokens" in said  # with the one that asked who is there
    before = server.calls.copy()
    server.healed.set()
    assert [v.score for v in judge().judge(cases(*wishes))] == [4.0] * 3
    assert server.calls - before == {"hang until": 1, "probe": 1}


def test_addresses_and_keys(monkeypatch):
    for url in ("api.openai.com", "ftp://x/v1", "http://"):
        with pytest.raises(JudgeError, match="is no address of a judge"):
            Endpoint(url, "m", revision="x")
    with pytest.raises(JudgeError, match="Put the key into an environment variable") as error:
        Endpoint("http://me:hunter2@host/v1", "m", revision="x")
    assert "hunter2" not in str(error.value)
    with pytest.raises(JudgeError, match="127.0.0.1:9/v1/chat/completions does not judge") as error:
        Endpoint("http://127.0.0.1:9/v1?key=hunter2", "m", attempts=1)
    assert "hunter2" not in str(error.value)
    with pytest.raises(JudgeError, match="environment variable NO_SUCH_KEY.* is not set"):
        Endpoint("http://host/v1", "m", key="NO_SUCH_KEY", revision="x")
    monkeypatch.setenv("JUDGE_KEY", "a\nb")
    with pytest.raises(JudgeError, match="more than an API key") as error:
        Endpoint("http://host/v1", "m", key="JUDGE_KEY", revision="x")
    full = Endpoint("https://host/v1/chat/completions/", "m", revision="x")
    assert full.name == "endpoint:host/v1:m" == Endpoint("https://host/v1", "m", revision="x").name


HOSTILE = [
    "says nothing",
    "a byte of header at a time",
    "a byte of a 500's body at a time",
    "chunks without end",
    "an error of 32 MB",
    "a bomb of gzip",
    "the key as a status line",
    "the key in Location",
    "the key in a 400, spelt for addresses",
    "the key as the answer",
    "the key as the model",
    "deep JSON as usage",
    "usage beyond all numbers",
    "half a surrogate pair",
    "a wait that is no number",
]


def test_hostile_servers_end_in_time_and_show_no_key(capsys):
    """Part of the campaign; `python tests/campaigns/hostile_judges.py` runs all of it."""
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(hostile_judges.attack, HOSTILE))
    assert [outcome for outcome in outcomes if outcome.faults] == []
    said = capsys.readouterr()
    assert hostile_judges.shown(said.out + said.err) == []
    ends = {outcome.name: outcome.end for outcome in outcomes}
    assert "no answer within 0.5 s" in ends["a byte of a 500's body at a time"]
    assert "a body that is no chat completion" in ends["deep JSON as usage"]
    assert ends["half a surrogate pair"] == ends["usage beyond all numbers"] == "verdicts"
    assert "It has moved to https://elsewhere/?k=***" in ends["the key in Location"]


def test_a_key_over_plain_http_is_warned_about(server, monkeypatch, capsys):
    Endpoint("http://127.0.0.1:9/v1", "m", key="JUDGE_KEY", revision="x")
    Endpoint("http://gpu.example/v1", "m", revision="x")  # no key to read
    Endpoint("https://gpu.example/v1", "m", key="JUDGE_KEY", revision="x")
    assert "plain http" not in capsys.readouterr().err
    Endpoint("http://gpu.example/v1", "m", key="JUDGE_KEY", revision="x")
    assert "gpu.example is asked over plain http. The key can be read on the way" in capsys.readouterr().err


def test_keys_of_the_environment_stay_there(server, judge, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, f"secret-of-{name}")
    judge(key=None).judge(cases("fine"))
    judge().judge(cases("also fine"))
    assert all("secret-of-" not in str(headers) for headers, _ in server.requests) and len(server.requests) == 4


def test_without_the_package_the_line_that_installs_it_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(JudgeError, match=r"pip install 'rlaif-lite\[judge\]'"):
        Endpoint("http://127.0.0.1:9/v1", "m", revision="x")
