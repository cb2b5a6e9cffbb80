"""Benchmarks for real, from the command line: a role of a run on a random base answers the authors' files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import benchmark_files as files
from core import shake, small_recipe
from rlaif_lite import cli
from rlaif_lite.benchmarks.answer import Examinee
from rlaif_lite.benchmarks.catalogue import BENCHMARKS
from rlaif_lite.model.roles import Roles
from rlaif_lite.recipe import dump_yaml, load_recipe

VIDEOS = files.facts(6)
FIRST = VIDEOS[0][1]


# ------------------------------------------------------------------------------------------------ for real, on a run


@pytest.fixture(scope="module")
def run_dir(checkpoint, load, tmp_path_factory) -> Path:
    """A run folder with an SFT role and a policy that differ."""
    folder = tmp_path_factory.mktemp("bench")
    recipe = small_recipe(checkpoint, folder)
    roles = Roles(load(), recipe.model.lora)
    for seed, role in enumerate(("sft", "policy")):
        roles.add(role, seed=seed)
        shake(roles, role, seed)
        roles.save(role, Path(recipe.output) / "adapters" / role)
    (Path(recipe.output) / "recipe.yaml").write_text(dump_yaml(recipe))
    return Path(recipe.output)


@pytest.fixture(scope="module")
def videos(world) -> Path:
    return world / "videos" / "test"


def bench(*args) -> str:
    result = CliRunner().invoke(cli.app, ["bench", *map(str, args)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def results(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "items.jsonl").read_text().splitlines()
    return json.loads((folder / "results.json").read_text()), [json.loads(line) for line in lines]


def test_a_part_of_a_video_is_shown(run_dir, videos, tmp_path):
    examinee = Examinee(run_dir, "sft")
    name, spans = "00000.mp4", [(0.0, 1.0), (2.0, 3.0)]
    examinee.look({name: str(videos / name)}, tmp_path / "videos.json", [(name, span) for span in spans])
    views = examinee.views(name)
    assert set(views) == {"video", "0-1s", "2-3s"}
    assert views["0-1s"].time_T.max() <= 1 and views["2-3s"].time_T.min() >= 2  # of 3 seconds
    asked = {"video": name, "question": "which ?", "candidates": ["red", "blue"], "answer": "red"}
    parts = [asked | {"start": start, "end": end} for start, end in spans]
    (tmp_path / "action_sequence.json").write_text(json.dumps([*parts, asked]))
    bench(
        run_dir,
        "mvbench",
        tmp_path / "action_sequence.json",
        "--videos",
        videos,
        "--role",
        "sft",
        "--out",
        tmp_path / "o",
    )
    found, rows = results(tmp_path / "o")
    assert (
        found["items"] == 3
        and len({row["seen"] for row in map(json.loads, (tmp_path / "o" / "answers.jsonl").open())}) == 1
    )
    parts_KD = [examinee.prompt("q", name, view).features_KD for view in ("0-1s", "2-3s")]
    assert len(rows) == 3 and not torch.equal(*parts_KD)


def test_from_the_command_line(run_dir, videos, tmp_path):
    """A video that is missing and one that is broken, a stop in the middle, another judge, other settings, a table."""
    shutil.copytree(videos, tmp_path / "videos")
    (tmp_path / "videos" / "00003.mp4").write_bytes(b"no video")
    (tmp_path / "videos" / "00005.mp4").unlink()
    asked, out = files.write("msvd-qa", tmp_path / "files", VIDEOS), tmp_path / "out"
    command = ("msvd-qa", *asked, "--videos", tmp_path / "videos", "--judge", "rules", "--role", "sft", "--out", out)
    said = bench(run_dir, *command)
    found, items = results(out)
    assert (found["items"], found["videos"], found["judge"]) == (12, 4, "rules:words-and-token-f1@3")
    assert found["missing"] == ["00005"] and list(found["broken"]) == ["00003"]
    assert (found["missing_items"], found["broken_items"]) == (3, 3)
    assert "1 videos missing, 3 items left out: 00005" in said and "1 videos broken, 3 items left out: 00003" in said
    assert set(found["groups"]) == {"0", "1", "2"}
    right = [item["reference"] in item["answers"][0].split() for item in items]
    assert [item["verdicts"]["qa"]["correct"] for item in items] == right
    assert found["metrics"]["accuracy"]["value"] == sum(right) / 12
    assert found["metrics"]["length"]["value"] == sum(item["lengths"][0] for item in items) / 12
    assert found["metrics"]["stop_rate"]["value"] == sum(item["stopped"][0] for item in items) / 12

    lines = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    kept = lines[0].replace('"answers": ["', '"answers": ["kept ')
    (out / "answers.jsonl").write_text(kept + "".join(lines[1:7]) + lines[7][:9])  # killed within the eighth line
    bench(run_dir, *command)
    again = results(out)[1]
    assert again[0]["answers"][0].startswith("kept ") and again[1:] == items[1:]  # what was there was not made anew

    shutil.copy(videos / "00004.mp4", tmp_path / "videos" / "00000.mp4")  # the same name, another video
    bench(run_dir, *command)
    other = results(out)[1]
    assert not other[0]["answers"][0].startswith("kept ") and other[3:] == items[3:]
    shutil.copy(videos / "00000.mp4", tmp_path / "videos" / "00000.mp4")
    bench(run_dir, *command)
    assert results(out)[1] == items

    refused = CliRunner().invoke(cli.app, ["bench", str(run_dir), *map(str, command), "--max-new-tokens", "3"])
    assert refused.exit_code == 2 and "max_new_tokens was 8, is 3" in refused.stderr
    bench(run_dir, *command[:-3], "policy", "--out", tmp_path / "policy", "--limit", "5")
    of_policy = results(tmp_path / "policy")[1]
    assert len(of_policy) == 5 and [i["answers"] for i in of_policy] != [i["answers"] for i in items[:5]]
    by_words = ("--judge", "local", "--judge-words")
    bench(run_dir, *command[:-6], *by_words, "--role", "policy", "--out", tmp_path / "words", "--limit", "5")
    found, items = results(tmp_path / "words")
    assert found["judge"].startswith("local:base") and [i["answers"] for i in items] == [
        i["answers"] for i in of_policy
    ]
    shown = bench("--table", out, tmp_path / "policy")
    assert shown.splitlines()[0] == f"| benchmark | metric | {run_dir}:sft | {run_dir}:policy |"
    result = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(result | {"judge": "another"}))
    refused = CliRunner().invoke(cli.app, ["bench", "--table", str(out), str(tmp_path / "policy")])
    assert refused.exit_code == 2 and "come from 2 judges" in refused.stderr


REQUESTS = {
    "retrieval": "describe the video",
    "ucf101": "what is the colour first ?",
    "hmdb51": "what is the shape first ?",
}
COUNTED = {
    "videochatgpt": 6,
    "pope": 24,
    "amber": 12,
    "objhal": 6,
    "mmhal": 12,
    "msrvtt-retrieval": 6,
    "ucf101": 6,
    "hmdb51": 6,
    "claims": 6,
    "videochatgpt-temporal": 6,
    "videochatgpt-consistency": 6,
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_benchmark_runs(run_dir, videos, tmp_path, name):
    request = REQUESTS.get(name.removeprefix("msrvtt-"))
    more = ["--prompt", request] if request else []
    asked = files.write(name, tmp_path / "files", VIDEOS)
    bench(run_dir, name, *asked, "--videos", videos, "--judge", "rules", *more, "--out", tmp_path / "out")
    found, items = results(tmp_path / "out")
    assert len(items) == COUNTED[name] and not found["missing"] and not found["broken"]
    assert (found["judge"] is not None) == bool(BENCHMARKS[name].tasks or name == "claims")
    for metric, figure in found["metrics"].items():
        parts = [item["counts"][metric] for item in items if metric in item["counts"]]
        part, whole = (sum(column) for column in zip(*parts, strict=True))
        assert figure["value"] == (pytest.approx(part / whole) if whole else None)
    ranked = name in ("msrvtt-retrieval", "ucf101", "hmdb51")
    assert ("length" in found["metrics"]) != ranked
    if name == "msrvtt-retrieval":
        scores = [json.loads(line)["scores"] for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
        for number, item in enumerate(items):  # of the caption's column, the place of its own video
            column = [line[number] for line in scores]
            assert item["rank"] == 1 + sorted(column, reverse=True).index(column[number])
    if name == "claims":
        assert all(set(item["claims"]) == {"true", "true_elsewhere", "said", "said_by_itself"} for item in items)


def test_a_claim_audit_has_one_judge(run_dir, videos, tmp_path):
    """What the judge was told makes it another one, whose verdicts are not put beside those that are there."""
    shutil.copytree(run_dir, tmp_path / "run")
    asked, out = files.write("claims", tmp_path / "files", VIDEOS[:2]), tmp_path / "out"
    command = (tmp_path / "run", "claims", *asked, "--videos", videos, "--role", "sft", "--out", out)
    bench(*command)
    lines = (out / "claims.jsonl").read_bytes()
    for change in ("context.max_new_tokens=4", "preference.claims.prompt='<video> {context} said :'"):
        recipe = load_recipe(run_dir / "recipe.yaml", [change])
        (tmp_path / "run" / "recipe.yaml").write_text(dump_yaml(recipe))
        refused = CliRunner().invoke(cli.app, ["bench", *map(str, command)])
        assert refused.exit_code == 2 and "judge was claims/" in refused.stderr
    assert (out / "claims.jsonl").read_bytes() == lines


def test_a_plain_base_and_pictures_inside_the_file(checkpoint, tmp_path):
    """A recipe instead of a run; the picture stands in the file, base64."""
    small_recipe(checkpoint, tmp_path)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    asked = files.objhal_inside(tmp_path, VIDEOS[:2], (tmp_path / "red.png").read_bytes())
    recipe, out = tmp_path / "test.yaml", tmp_path / "out"
    text = recipe.read_text() + f"\noutput: {tmp_path / 'run'}\n"
    recipe.write_text(text.replace("model:\n", f"model:\n  base: {checkpoint}\n"))
    bench(recipe, "objhal", *asked, "--videos", tmp_path, "--role", "base", "--out", out)
    found, items = results(out)
    assert found["who"].endswith("test.yaml:base") and len(items) == 2 and not found["missing"]
    assert len(list((out / "pictures").iterdir())) == 2
    refused = CliRunner().invoke(cli.app, ["bench", str(recipe), "objhal", str(asked[0]), "--videos", str(tmp_path)])
    assert refused.exit_code == 2 and "has no role policy. It has base." in refused.stderr


def test_what_is_asked_wrongly(run_dir, tmp_path):
    def refused(*args):
        result = CliRunner().invoke(cli.app, ["bench", *map(str, args)])
        assert result.exit_code == 2
        return result.stderr

    (tmp_path / "a.json").write_text("[]")
    assert "Did you mean msvd-qa?" in refused(run_dir, "msvd_qa", tmp_path / "a.json", "--videos", tmp_path)
    assert "There is no file" in refused(run_dir, "pope", tmp_path / "b.json", "--videos", tmp_path)
    assert "it holds no entries" in refused(run_dir, "pope", tmp_path / "a.json", "--videos", tmp_path)
    assert "is not a run folder" in refused(tmp_path, "pope", tmp_path / "a.json", "--videos", tmp_path)
    assert "Give a run" in refused(run_dir, "pope")
    asked = (run_dir, "msvd-qa", *files.qa(tmp_path, VIDEOS), "--videos", tmp_path, "--role", "sft")
    assert "An endpoint serves several models" in refused(*asked, "--judge", "http://localhost:1/v1")
    assert "There is no judge gpt" in refused(*asked, "--judge", "gpt")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "gpt2"}')
    by_words = (*asked, "--out", tmp_path / "never", "--judge-words")
    assert "is a text model" in refused(*by_words, "--judge-model", tmp_path / "text")
    assert "--judge-words is for a local judge; the judge is rules." in refused(*by_words, "--judge", "rules")
    assert not (tmp_path / "never").exists()  # refused before any answer was made
    pope = files.pope(tmp_path, VIDEOS)[0]
    assert "None of the 6 videos is under" in refused(run_dir, "pope", pope, "--videos", tmp_path)
    assert "holds no finished benchmark" in refused("--table", tmp_path)
    listed = CliRunner().invoke(cli.app, ["bench", "--list"]).stdout
    assert all(name in listed for name in BENCHMARKS)
