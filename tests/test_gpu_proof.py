"""`make gpu` degrades part by part: a missing package, a failure and a part that takes too long are named."""

import json

import pytest

from lab.bench import gpu as gpu_proof


@pytest.fixture(scope="module")
def gpu():
    return gpu_proof


def test_one_bad_part_does_not_stop_the_others(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "describe", lambda: (False, {"device": "none"}, {"python": "3"}))
    figures = '{"times_faster": 4.5}'
    only = [
        gpu.Part("lacking", ("no_such_package",), 9, lambda out: []),
        gpu.Part("failing", (), 9, lambda out: ["-c", "print('what went wrong'); raise SystemExit(3)"]),
        gpu.Part("slow", (), 0.5, lambda out: ["-c", "import time; time.sleep(60)"]),
        gpu.Part("plain step", (), 9, lambda out: ["-c", f"open({str(out)!r}, 'w').write({figures!r})"]),
    ]
    gpu.main(only, tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (found["lacking"]["status"], found["lacking"]["why"]) == ("skipped", "needs the package no_such_package")
    assert found["failing"]["status"] == "failed" and "exit code 3: what went wrong" in found["failing"]["why"]
    assert found["slow"]["why"].startswith("stopped after 0 s") and found["slow"]["seconds"] < 20
    text = (tmp_path / "gpu.md").read_text()
    assert "| plain step: times faster than plain | at least 3 | 4.50 |" in text
    assert "| ppo vlm_rlaif_7b_24gb: peak of PPO, GB | at most 20 | not measured |" in text
    assert "no figure below means anything" in text


def test_no_time_left_is_said(gpu, tmp_path):
    part = gpu.Part("late", (), 9, lambda out: ["-c", ""])
    assert gpu.run(part, tmp_path, left=3.0)["why"] == "no time was left"


def test_the_three_recipes_are_capped_at_24_gb(gpu, tmp_path):
    commands = {part.name: part.command(tmp_path / "x.json") for part in gpu.parts(rehearsal=False)}
    for recipe in ("vlm_rlaif_7b_24gb", "qwen2_5_vl_3b_24gb", "qwen2_5_vl_7b_24gb"):
        command = commands[f"ppo {recipe}"]
        assert command[command.index("--memory-cap") + 1] == "24GB" and "--random-weights" in command
    assert {target.part for target in gpu.TARGETS} <= set(commands)
