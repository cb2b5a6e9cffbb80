"""Verdicts on disk: asked once, kept at any kill, asked again on request only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlaif_lite.judge.outside import Case
from rlaif_lite.judge.outside.cached import CachedJudge, Reply

ROOT = Path(__file__).parent.parent


class Scripted:
    """A model whose reply is the prediction; it counts what it is asked."""

    name, revision, words = "scripted:a", "1", False

    def __init__(self):
        self.asked = []

    def ask(self, prompts, keep):
        for n in reversed(range(len(prompts))):  # replies may come in any order
            reply = prompts[n].text.partition("<prediction>")[2].partition("</prediction>")[0]
            self.asked.append(reply)
            keep(n, Reply(reply))


def cases(*replies: str) -> list[Case]:
    return [Case(f"c{n}", "correctness", "what ?", "a dog", reply) for n, reply in enumerate(replies)]


def asked(folder: Path, *replies: str, again: bool = False, **changed) -> tuple[list, list]:
    """(verdicts, what the model was asked) of a judge made anew."""
    model = Scripted()
    vars(model).update(changed)
    return CachedJudge(model, folder, again).judge(cases(*replies)), model.asked


def test_a_case_is_asked_once_whatever_its_id(tmp_path, capsys):
    verdicts, first = asked(tmp_path, "score: 1", "score: 2", "score: 1", "what?")
    assert [(v.id, v.score) for v in verdicts] == [("c0", 1), ("c1", 2), ("c2", 1), ("c3", None)]
    assert sorted(first) == ["score: 1", "score: 2", "what?"]
    assert "4 verdicts, 1 known before; 1 cannot be read, the first (c3): no score" in capsys.readouterr().err
    verdicts, second = asked(tmp_path, "score: 2", "what?", "score: 3")
    assert second == ["score: 3"] and [(v.id, v.score) for v in verdicts] == [("c0", 2), ("c1", None), ("c2", 3)]
    assert asked(tmp_path, "score: 2", "what?", again=True)[1] == ["what?"]
    assert asked(tmp_path, "score: 2", words=True)[1] == []  # but for qa, the prompt is the same
    for changed in ({"name": "scripted:b"}, {"revision": "2"}):  # another judge is asked for itself
        assert asked(tmp_path, "score: 2", **changed)[1] == ["score: 2"]


def test_what_is_asked_again_replaces_what_could_not_be_read(tmp_path):
    asked(tmp_path, "what?")
    model = Scripted()
    model.ask = lambda prompts, keep: keep(0, Reply("score: 5"))
    assert CachedJudge(model, tmp_path, again=True).judge(cases("what?"))[0].score == 5
    assert asked(tmp_path, "what?") == ([("c0", None, 5.0, "score: 5", None)], [])


def test_a_file_cut_at_any_byte_loses_the_cut_line_only(tmp_path):
    replies = ["score: 1", "score: 2 ü\u2028", "score: 3"]
    before, _ = asked(tmp_path / "whole", *replies)
    (whole,) = (tmp_path / "whole").iterdir()
    data = whole.read_bytes()
    for length in range(0, len(data) + 1, 7):
        cut = tmp_path / str(length)
        cut.mkdir()
        (cut / whole.name).write_bytes(data[:length])
        verdicts, missing = asked(cut, *replies)
        assert verdicts == before
        complete = sum(length >= end for end, byte in enumerate(data) if byte == ord("\n"))
        assert len(missing) == len(replies) - complete
        assert asked(cut, *replies) == (before, [])


def test_foreign_lines_are_passed_over(tmp_path):
    asked(tmp_path, "score: 1")
    (file,) = tmp_path.iterdir()
    file.write_text('null\n{"key": 1}\n[]\n\x00\n' + file.read_text() + '{"key"')
    assert asked(tmp_path, "score: 1")[1] == []
    assert json.loads(file.read_text().splitlines()[4])["score"] == 1


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_judge_cache import Scripted, cases
from rlaif_lite.judge.outside.cached import CachedJudge, Reply
class Dies(Scripted):
    def ask(self, prompts, keep):
        keep(0, Reply("score: 1"))
        os.kill(os.getpid(), 9)
CachedJudge(Dies(), Path(sys.argv[1])).judge(cases("score: 1", "score: 2"))
"""


def test_a_killed_process_leaves_what_was_judged(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    assert asked(tmp_path, "score: 1", "score: 2")[1] == ["score: 2"]


def test_nothing_to_judge(tmp_path):
    assert asked(tmp_path / "none") == ([], []) and not (tmp_path / "none").exists()


def test_a_case_that_does_not_fit_is_found_before_anything_is_asked(tmp_path):
    with pytest.raises(ValueError, match="case x"):
        CachedJudge(Scripted(), tmp_path).judge([*cases("score: 1"), Case("x", "caption", "q", "r", "p")])
    assert not list(tmp_path.iterdir())


def test_lines_of_another_judge_are_not_taken_for_its_own(tmp_path):
    asked(tmp_path / "a", "score: 1")
    asked(tmp_path / "b", "score: 2", revision="2")
    (one,), (other,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    other.write_bytes(one.read_bytes() + other.read_bytes())
    assert asked(tmp_path / "b", "score: 1", "score: 2", revision="2")[1] == ["score: 1"]
