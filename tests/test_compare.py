"""What changed between two runs or two benchmark results: intervals, refusals with their reasons, and what is shown."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rlaif_lite import cli
from rlaif_lite.errors import StageError
from rlaif_lite.report.compare import SEED_NOTE, as_json, as_text, compare
from rlaif_lite.report.stats import RATIOS, paired_bootstrap, tally
from run_folders import make_run

DATA = {"data.test": ["world:test"], "data.world.seed": 5, "data.world.dropout": 0.3, "version": "0.1.0"}
EVALUATE = {"seed": 0, "evaluate.temperature": 1.0, "version": "0.1.0", "stage ppo": "abc"}
PPO = {"ppo.kl_coef": 0.2, "ppo.steps": 20, "files of model.base": "123"}


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def finish(folder: Path, data: dict = DATA, evaluate: dict = EVALUATE, **stages: dict) -> Path:
    """Give a fabricated run what says which keys its stages read."""
    for stage, reads in {"data": data, "evaluate": evaluate, **stages}.items():
        write(folder / stage / "done.json", {"reads": reads, "status": "done"})
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    """A helps, B hacks; the same 60 videos."""
    root = tmp_path_factory.mktemp("runs")
    a = finish(make_run(root / "a", "helped", videos=60), ppo=PPO, reward={"reward.lr": 1, "reward.pool": "last"})
    b = finish(make_run(root / "b", "hacked", videos=60, seed=1), EVALUATE | DATA, ppo=PPO | {"ppo.kl_coef": 0.01})
    return a, b


@pytest.fixture
def copies(two, tmp_path) -> tuple[Path, Path]:
    """Two runs of one's own, to be changed."""
    return tuple(shutil.copytree(run, tmp_path / run.name) for run in two)


def change(path: Path, alter) -> None:
    """Rewrite the lines of a file of rows."""
    rows = [alter(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row))


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluate" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def repetition(two):
    """The fabricated rows lack it; here it is 0.1 in A's and 0.3 in B's."""
    for run, value in zip(two, (0.1, 0.3), strict=True):
        for path in (run / "evaluate").glob("*.jsonl"):
            change(path, lambda row, value=value: row | {"repetition": value})


# ---------------------------------------------------------------------------------------------------------------- runs


def test_every_metric_of_both_modes_with_its_paired_interval(two):
    found = compare(*two)
    assert found.videos == {"greedy": 60, "sample": 60} and len(found.lines) == 20
    lines = {(line.table, line.metric): line for line in found.lines}
    before, after = (tally(rows_of(run, "ppo.sample@1")) for run in two)
    arms = [np.stack([counts[id] for id in sorted(counts)]) for counts in (before, after)]
    line = lines["sample", "hallucination"]
    assert line.before == pytest.approx(RATIOS["hallucination"](sum(before.values())))
    assert line.interval == paired_bootstrap(*arms, RATIOS["hallucination"])
    assert line.interval.delta == pytest.approx(line.after - line.before)
    assert line.interval.low > 0 and line.verdict == "worse"
    assert lines["greedy", "f1"].interval.high < 0 and lines["greedy", "f1"].verdict == "worse"
    assert lines["greedy", "repetition"].interval == pytest.approx((0.2, 0.2, 0.2))
    assert lines["greedy", "mentions"].verdict == ""  # three in every answer
    back = {(line.table, line.metric): line for line in compare(*two[::-1]).lines}
    assert back["greedy", "f1"].verdict == "better"
    assert back["greedy", "f1"].interval.delta == pytest.approx(-lines["greedy", "f1"].interval.delta)


def test_a_run_against_itself_differs_in_nothing(two):
    found = compare(two[0], two[0])
    assert {line.interval for line in found.lines} == {(0.0, 0.0, 0.0)} and not any(
        line.verdict for line in found.lines
    )
    assert found.keys == {} and found.alone == ({}, {})


def test_what_else_differs(two):
    found = compare(*two)
    assert found.keys == {"ppo.kl_coef": (0.2, 0.01)}
    assert found.alone == ({"reward": 2}, {})
    assert found.cost["ppo"] == (82.0, 82.0) and found.cost["all stages"][0] == pytest.approx(339.9)
    assert found.notes == [SEED_NOTE]


def test_the_text(two):
    text = as_text(compare(*two))
    assert f"A  {two[0]}: fixture, seed 0, answers of ppo" in text
    beyond = as_json(compare(*two))["beyond_noise"]
    assert f"20 metrics looked at, {beyond} beyond noise" in text and "about 1.0 of 20 would too" in text
    (f1,) = [line for line in text.split("Sampled")[0].splitlines() if line.startswith("  F1")]
    assert f1.endswith("worse") and f1.split()[2] == "%" and f1.split()[5].startswith("-")
    assert "  ppo.kl_coef                           0.2                       0.01" in text
    assert "read by A alone: reward (2)" in text and "all stages" in text and "peak memory" in text


def test_other_columns(two):
    assert compare(*two, role="policy").lines == compare(*two).lines
    sft = compare(*two, role="sft")
    assert {line.table for line in sft.lines} == {"greedy", "sample"}
    cooler = compare(*two, role="sft@0.3")
    assert {line.table for line in cooler.lines} == {"sample"} and cooler.lines[0].before != sft.lines[10].before
    with pytest.raises(StageError, match="no answers of `critic`. It has base, ppo, reference, sft, sft@0.3"):
        compare(*two, role="critic")


def test_two_methods_are_compared_by_what_each_trained(copies):
    summary = json.loads((copies[1] / "summary.json").read_text())
    write(copies[1] / "summary.json", summary | {"method": "dpo"})
    before = compare(*copies, role="sft").lines
    for name in ("greedy@0", "sample@1"):
        old = copies[1] / "evaluate" / f"ppo.{name}.jsonl"
        change(old, lambda row: row | {"role": "dpo"})
        old.rename(old.with_name(f"dpo.{name}.jsonl"))
    found = compare(*copies)
    assert found.names[0].endswith("answers of ppo") and found.names[1].endswith("answers of dpo")
    assert len(found.lines) == 20 and compare(*copies, role="sft").lines == before


def test_without_truth_only_what_needs_none(tmp_path):
    folders = [finish(make_run(tmp_path / name, "no_truth", videos=20, seed=n)) for n, name in enumerate("ab")]
    for folder in folders:
        for path in (folder / "evaluate").glob("*.jsonl"):
            change(path, lambda row: row | {"repetition": 0.0})
    found = compare(*folders)
    assert {line.metric for line in found.lines} == {"repetition", "stop_rate", "length"}


def test_who_says_nothing_has_no_share_of_hallucinations(copies):
    for path in (copies[1] / "evaluate").glob("ppo.*.jsonl"):
        nothing = {"correct": 0, "wrong": 0, "mentions": 0, "hallucinated": 0}
        change(path, lambda row, nothing=nothing: row | {"truth": row["truth"] | nothing})
    metrics = {line.metric for line in compare(*copies).lines}
    assert {"recall", "f1", "mentions"} <= metrics and not metrics & {"hallucination", "precision"}


def test_samples_of_different_temperatures_are_left_out(copies):
    finish(copies[1], evaluate=EVALUATE | {"evaluate.temperature": 0.5})
    for name in ("greedy@0", "sample@1"):
        change(
            copies[1] / "evaluate" / f"ppo.{name}.jsonl", lambda row: row | {"temperature": row["temperature"] and 0.5}
        )
    found = compare(*copies)
    assert {line.table for line in found.lines} == {"greedy"}
    assert "Sampled answers are not compared: A and B were sampled at temperature 1 and 0.5." in found.notes


def fewer(folder: Path) -> None:
    for path in (folder / "evaluate").glob("*.jsonl"):
        change(path, lambda row: row if row["key"] < "test/00050" else None)


def other_question(folder: Path) -> None:
    for path in (folder / "evaluate").glob("*.jsonl"):
        change(path, lambda row: row | {"prompt": "what then ?"} if row["key"] == "test/00007" else row)


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda run: finish(run, DATA | {"data.world.seed": 6}), r"`data.world.seed` is 5 in A and 6 in B"),
        (
            lambda run: finish(run, {"data.test": [f"{Path.home()}/t.json"], f"file {Path.home()}/t.json": "f0"}),
            r"the content of `data.test\[0\]` is not there in A and f0 in B",
        ),
        (fewer, "A has 60 questions and B 50, 50 of them the same"),
        (other_question, "1 questions or truths differ, among them that of test/00007"),
    ],
)
def test_other_test_sets_are_refused(copies, alter, reason):
    alter(copies[1])
    with pytest.raises(StageError, match=f"evaluated on different test sets: .*{reason}"):
        compare(*copies)


def test_one_file_in_two_places_is_one_test_set(copies):
    for number, run in enumerate(copies):
        finish(run, {"data.test": [f"t{number}.json"], f"file t{number}.json": "f0"})
    assert len(compare(*copies).lines) == 20


def test_what_is_no_finished_run_is_refused(copies, tmp_path):
    (copies[1] / "evaluate" / "done.json").unlink()
    with pytest.raises(StageError, match="b has not done evaluate, so there is nothing to compare"):
        compare(*copies)
    with pytest.raises(StageError, match="holds neither a run's summary.json nor a benchmark's results.json"):
        compare(copies[0], tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------- benchmarks


def bench(folder: Path, right: list[int], judge: str | None = "rules@1", who: str = "run:sft", **more) -> Path:
    """Results as `rlaif-lite bench` writes them: two questions about each video."""
    items = [
        {
            "id": f"q{n}",
            "video": f"v{n // 2}",
            "question": ["what ?"],
            "judge": judge,
            "counts": {"accuracy": [score, 1], "length": [3 + n, 1], "qa_score": [0, 0]},
        }
        for n, score in enumerate(right)
    ]
    folder.mkdir(parents=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    summary = {
        "benchmark": "msvd-qa",
        "files": {"qa.json": "f0"},
        "judge": judge,
        "who": who,
        "answers": who,
        "prompt": "{question}",
        "max_new_tokens": 9,
        "features": {"frames": 6},
    }
    write(folder / "results.json", summary | more)
    return folder


def test_benchmarks_by_sums_over_videos(tmp_path):
    a, b = bench(tmp_path / "a", [1, 0, 0, 0, 1, 1]), bench(tmp_path / "b", [1, 1, 1, 0, 1, 1], who="run:policy")
    found = compare(a, b)
    accuracy, length = found.lines  # nobody counted a score
    assert (accuracy.table, accuracy.before, accuracy.after) == ("msvd-qa", pytest.approx(0.5), pytest.approx(5 / 6))
    by_hand = paired_bootstrap([0.5, 0.0, 1.0], [1.0, 0.5, 1.0])  # each video has as many questions
    assert accuracy.interval == pytest.approx(by_hand) and accuracy.verdict == ""
    assert length.before == length.after == pytest.approx(5.5)
    assert found.videos == {"msvd-qa": 3} and found.keys == {"msvd-qa: answers": ("run:sft", "run:policy")}
    text = as_text(found)
    assert "Judge of msvd-qa: rules@1." in text and f"B  {b}: run:policy" in text and "Cost" not in text


def test_benchmarks_below_two_folders_by_name(tmp_path):
    for name in ("a", "b"):
        bench(tmp_path / name / "msvd-qa-policy", [1, 0, 1, 0])
    bench(tmp_path / "a" / "pope-policy", [1, 0], judge=None)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert {line.table for line in found.lines} == {"msvd-qa"} and "Only in A: pope-policy." in found.notes
    with pytest.raises(StageError, match="no benchmark under the same name: msvd-qa-policy, pope-policy and ."):
        compare(tmp_path / "a", tmp_path / "b" / "msvd-qa-policy")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"judge": "endpoint:x@1"}, "judged by different judges, rules@1 and endpoint:x@1"),
        ({"benchmark": "pope"}, "the benchmark is msvd-qa in A and pope in B"),
        ({"files": {"qa.json": "f1"}}, "the content of the files is"),
        ({"texts": "t1"}, "the texts to choose from is None in A and t1 in B"),
        ({"right": [1, 0]}, "A has 4 items and B 2, 2 of them the same"),
    ],
)
def test_figures_that_do_not_belong_side_by_side(tmp_path, other, reason):
    a, b = bench(tmp_path / "a", [1, 0, 1, 0]), bench(tmp_path / "b", **({"right": [1, 0, 1, 0]} | other))
    with pytest.raises(StageError, match=f"cannot be compared: .*{reason}"):
        compare(a, b)


def test_a_run_and_a_benchmark_are_two_things(two, tmp_path):
    a = bench(tmp_path / "a", [1, 0])
    with pytest.raises(StageError, match="holds a benchmark and .* a run. Give two of a kind"):
        compare(a, two[0])
    with pytest.raises(StageError, match="Leave --role out"):
        compare(a, a, "sft")


def test_the_command(two):
    shown = CliRunner().invoke(cli.app, ["compare", *map(str, two)])
    assert shown.exit_code == 0 and shown.stdout == as_text(compare(*two)) + "\n"
    told = json.loads(CliRunner().invoke(cli.app, ["compare", *map(str, two), "--role", "sft", "--json"]).stdout)
    assert told["looked_at"] == 20 == len(told["metrics"]) and told["metrics"][0]["verdict"] in (
        "noise",
        "better",
        "worse",
    )
    assert CliRunner().invoke(cli.app, ["compare", str(two[0]), "nowhere"]).exit_code == 2
