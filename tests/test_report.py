"""The report: intervals by hand, honest verdicts, one self-contained page, and how it looks in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlaif_lite.errors import StageError
from rlaif_lite.formats import duration, number, signed, size
from rlaif_lite.report.folder import Change, changes, read_run
from rlaif_lite.report.page import write
from rlaif_lite.report.stats import COUNTS, RATIOS, Interval, paired_bootstrap, tally
from rlaif_lite.report.verdict import classify
from run_folders import make_run

KINDS = ("helped", "hacked", "no_truth", "unfinished", "dpo")


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: write(make_run(root / kind, kind)) for kind in KINDS}


@pytest.fixture
def run(pages, tmp_path) -> Path:
    "A finished run of one's own, to be changed."
    return shutil.copytree(pages["helped"].parent, tmp_path / "helped")


def text_of(path: Path) -> str:
    "What a reader sees, without markup and repeated space."
    html = re.sub(r"<(style|svg).*?</\1>", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html)).replace("\xa0", " ")


# ----------------------------------------------------------------------------------------------------------- intervals


def test_bootstrap_agrees_with_normal_theory_where_that_holds():
    rng = np.random.default_rng(0)
    before_N = rng.normal(0, 1, 400)
    gain_N = rng.normal(0.1, 0.3, 400)
    found = paired_bootstrap(before_N, before_N + gain_N, n=4000)
    half = 1.96 * gain_N.std() / 20
    assert found.delta == pytest.approx(gain_N.mean())
    assert found.low == pytest.approx(gain_N.mean() - half, abs=0.003)
    assert found.high == pytest.approx(gain_N.mean() + half, abs=0.003)


def test_bootstrap_is_paired():
    before_N = np.random.default_rng(0).normal(0, 100, 50)  # items differ wildly, the change is the same for all
    assert paired_bootstrap(before_N, before_N + 1.0) == pytest.approx((1.0, 1.0, 1.0))


def test_bootstrap_is_reproducible_and_refuses_unpaired_items():
    a_N, b_N = np.arange(20.0), np.arange(20.0)[::-1]
    first, again, other = (paired_bootstrap(a_N, b_N, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    for wrong in (np.arange(19.0), np.zeros((20, 2))):
        with pytest.raises(ValueError, match="cannot pair"):
            paired_bootstrap(a_N, wrong)


def row(video: str, correct: int, wrong: int, hallucinated: int = 0, malformed: int = 0, **more) -> dict:
    truth = {"correct": correct, "wrong": wrong, "total": 10, "mentions": 4}
    truth |= {"hallucinated": hallucinated, "malformed": malformed}
    return {"key": video, "video": video, "truth": truth, "length": 20, "stopped": True, "repetition": 0.1} | more


def test_metrics_are_ratios_of_sums():
    rows = [row("a", 9, 1, 1, accuracy=1.0), row("a", 5, 5, 3, malformed=2, stopped=False, accuracy=0.5)]
    counts = tally([*rows, row("b", 2, 0, length=6)])  # whose record has no solution
    assert dict(zip(COUNTS, counts["a"], strict=True)) == {
        "answers": 2,
        "known": 2,
        "correct": 14,
        "wrong": 6,
        "total": 20,
        "mentions": 8,
        "hallucinated": 4,
        "malformed": 1,
        "length": 40,
        "stopped": 1,
        "repetition": 0.2,
        "checked": 2,
        "accuracy": 1.5,
    }
    sums = sum(counts.values())
    found = {name: float(metric(sums)) for name, metric in RATIOS.items()}
    precision, recall = 16 / 22, 16 / 30  # not the mean of 14/20 and 2/2
    assert found == pytest.approx(
        {
            "accuracy": 0.75,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "hallucination": 4 / 12,
            "malformed": 1 / 3,
            "mentions": 4.0,
            "right": 16 / 3,
            "wrong": 2.0,
            "score": 10 / 3,
            "length": 46 / 3,
            "stop_rate": 2 / 3,
            "repetition": 0.1,
        }
    )


def test_an_empty_answer_is_no_division_by_zero():
    sums = tally([row("a", 0, 0)])["a"] * [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]
    assert RATIOS["precision"](sums) == RATIOS["f1"](sums) == RATIOS["hallucination"](sums) == 0.0


def test_changes_are_those_of_the_summary(pages):
    summary = json.loads((pages["helped"].parent / "summary.json").read_text())
    found = changes(summary, "sft", "sample")
    assert found["f1"].before == summary["evaluation"]["sft"]["sample_f1"]
    assert found["f1"].after == summary["evaluation"]["ppo"]["sample_f1"]
    assert found["f1"].interval._asdict() == summary["evaluation_intervals"]["ppo-sft"]["sample_f1"]
    assert found["f1"].interval.delta == pytest.approx(found["f1"].after - found["f1"].before)
    assert changes(summary, "base", "sample") == {}


# ------------------------------------------------------------------------------------------------------------ verdicts

UP, DOWN = (0.05, 0.01, 0.09), (-0.05, -0.09, -0.01)
FLAT, WOBBLE = (0.01, -0.03, 0.05), (-0.01, -0.05, 0.03)


def effects(hallucination: tuple, f1: tuple, score: tuple) -> dict[str, Change]:
    deltas = {"hallucination": hallucination, "f1": f1, "score": score}
    return {name: Change(0.0, 0.0, Interval(*delta)) for name, delta in deltas.items()}


GOOD, NOTHING = effects(DOWN, UP, UP), effects(FLAT, FLAT, FLAT)


@pytest.mark.parametrize(
    ("greedy", "sample", "reward_rose", "kind"),
    [
        (GOOD, GOOD, True, "helped"),
        (effects(DOWN, FLAT, UP), GOOD, True, "helped"),
        (effects(FLAT, UP, UP), {}, None, "helped"),
        (effects(DOWN, DOWN, FLAT), GOOD, True, "traded"),
        (effects(DOWN, DOWN, DOWN), GOOD, True, "hacked"),  # says nearly nothing, so nothing wrong either
        (effects(UP, FLAT, FLAT), GOOD, True, "hacked"),
        (GOOD, effects(UP, FLAT, DOWN), True, "hacked"),
        (effects(UP, DOWN, DOWN), {}, False, "harmed"),
        (NOTHING, GOOD, True, "sharper"),
        (NOTHING, NOTHING, True, "unclear"),
        (effects(WOBBLE, WOBBLE, WOBBLE), NOTHING, True, "unclear"),
        ({}, GOOD, True, "helped"),
        ({"length": NOTHING["f1"]}, {}, True, "no_truth"),
    ],
)
def test_a_change_counts_only_when_its_interval_excludes_zero(greedy, sample, reward_rose, kind):
    assert classify(greedy, sample, reward_rose) == kind


def test_each_run_gets_its_verdict_first(pages):
    expected = {
        "helped": "RLAIF helped: hallucination fell from ",
        "hacked": "Reward hacking: the reward rose while the answers got worse",
        "no_truth": "Whether the answers got better, this data cannot say",
        "unfinished": "Not evaluated yet",
        "dpo": "RLAIF helped: hallucination fell from ",
    }
    for kind, headline in expected.items():
        html = pages[kind].read_text()
        assert headline in html[html.index("<h1>") : html.index("</h1>")]
        assert html.count("<h1>") == 1 and html.index("<h1>") < html.index("<h2>")
    so_far = "Stages finished: features, sft, context, preference, reward. PPO has done 11 steps."
    assert so_far in text_of(pages["unfinished"])
    assert "true score of the rollouts went from 3.00 to 0.70" in text_of(pages["hacked"])


def test_sharpening_is_not_sold_as_alignment(pages, run):
    assert re.search(
        r"Sharper sampling alone does not explain the sampled gain: at temperature 0.\d, SFT hallucinates \d+.\d %, "
        r"and PPO differs from that by −\d+.\d points \(−\d+.\d to −\d+.\d\)",
        text_of(pages["helped"]),
    )
    ppo = [json.loads(line) for line in (run / "evaluate" / "ppo.sample@1.jsonl").read_text().splitlines()]
    as_good = [json.dumps(row | {"role": "sft", "temperature": 0.3}) + "\n" for row in ppo]
    (run / "evaluate" / "sft.sample@0.3.jsonl").write_text("".join(as_good))
    summary = json.loads((run / "summary.json").read_text())
    summary["evaluation"]["sft@0.3"] = {"sample_hallucination": summary["evaluation"]["ppo"]["sample_hallucination"]}
    (run / "summary.json").write_text(json.dumps(summary))
    text = text_of(write(run))
    assert "Sharper sampling alone may explain the sampled gain" in text
    assert "differs from that by 0.0 points (0.0 to 0.0)" in text


def test_a_careful_reader_is_warned(tmp_path):
    run = make_run(tmp_path / "run", videos=30)
    summary = json.loads((run / "summary.json").read_text())
    summary["ppo"] |= {"kl_start": 0.013, "kl_end": 31.0}
    summary["reward"]["heldout_accuracy_truth"] = 0.58
    summary["preference"]["judge_agreement_with_truth"] = 0.61
    summary["features"]["missing"] = 7
    summary["evaluation"]["ppo"]["sample_malformed"] = 0.05
    (run / "summary.json").write_text(json.dumps(summary))
    text = text_of(write(run))
    for warning in (
        "a KL of 0.013, not 0",
        "31.0 nats per answer",
        "only 58.0 % of held-out pairs",
        "on only 61.0 % of pairs",
        "7 videos were missing",
        "5.0 % of PPO's sampled answers",
        "Only 30 videos were evaluated",
    ):
        assert warning in text.replace("&#39;", "'"), warning


# ---------------------------------------------------------------------------------------------------------------- page


class Balanced(HTMLParser):
    "Fails on a tag that closes another one; void and self-closed elements aside."

    VOID = {"meta", "link", "br", "img"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_whole_and_needs_nothing_else(pages, kind):
    html = pages[kind].read_text()
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert "<script" not in html and "@import" not in html
    for link in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html) + re.findall(r"url\(([^)]*)\)", html):
        assert link.startswith(("data:", "#")), link
    assert not re.search(r"\b(nan|None|Undefined|inf)\b", text_of(pages[kind]))


def test_sections_follow_what_the_run_has(pages):
    helped, no_truth, unfinished = (text_of(pages[kind]) for kind in ("helped", "no_truth", "unfinished"))
    for word in ("What changed", "Before and after", "Training", "Evaluation", "The judge", "The reward model", "Time"):
        assert word in helped
    for word in ("Hallucination", "agree with the truth", "In truth", "True score", "Sharper sampling"):
        assert word in helped and word not in no_truth, word
    assert "no truth is known. What their form shows: repetition" in no_truth and "stop by themselves" in no_truth
    for word in ("What changed", "Before and after", "Evaluation"):
        assert word not in unfinished
    assert pages["helped"].read_text().count("<svg xmlns") == 6 + 6 + 3 + 1  # PPO, more of PPO, losses, calibration


def test_a_run_of_dpo_speaks_of_dpo(pages, run):
    """Its rounds are told, and what it does not have leaves no hole."""
    text, html = text_of(pages["dpo"]), pages["dpo"].read_text()
    assert "PPO" not in text and "The reward model" not in text and "The judge" not in text
    assert "Greedy answers, DPO against SFT" in text and "After, DPO" in text and '<tr class="policy"><td>DPO' in html
    told = "Of 3 rounds of DPO, 2 was taken: the judge's score of the held-out answers went from 3.10 to 5.00"
    assert f"{told}, their true score from 3.00 to 3.70, their length from 21.5 to 24.0 words." in text.replace(
        "&#39;", "'"
    )
    assert (
        "start – – – – – – – 3.10 3.00 21.5 1 379 89.0 47.0 21.5 22.5 80.0 75.0 4.00 3.60 23.0 2, taken 378 88.0"
        in text
    )
    assert "Read in round 1 a &lt;b&gt; 0 Written in round 1 a &lt;b&gt; 1 Written in round 2 a &lt;b&gt; 2" in text
    assert html.count("<svg xmlns") == 8 + 3 + 3  # rounds, losses of DPO, of other phases

    folder = shutil.copytree(pages["dpo"].parent, run.parent / "dpo")
    summary = json.loads((folder / "summary.json").read_text())
    summary["dpo"]["rounds"][2]["heldout_words"] = 27.0
    evaluation, intervals = summary["evaluation"], summary["evaluation_intervals"]
    evaluation["dpo@bo8"] = {k: v for k, v in evaluation["dpo"].items() if k.startswith("sample_")} | {
        "sample_f1": 0.99
    }
    intervals["dpo@bo8-dpo"] = {"greedy_f1": {"delta": 0.03, "low": 0.01, "high": 0.05}}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = text_of(write(folder))
    assert "Answers grew from 21.5 to 27.0 words" in text and "DPO, best of 8" in text
    before = number(100 * evaluation["dpo"]["greedy_f1"], 1)
    assert "DPO, best of 8, against DPO’s greedy answers DPO Best Change" in text
    assert f"F1 harmonic mean of precision and recall {before} % 99.0 % +3.0 +1.0 to +5.0" in text


def test_answers_with_strange_line_ends(run):
    path = run / "evaluate" / "ppo.greedy@0.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answer"] += " one\u2028two"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert "one\u2028two" in write(run).read_text()


def test_a_run_that_is_in_the_middle_of_dpo(pages, run):
    folder = shutil.copytree(pages["dpo"].parent, run.parent / "dpo")
    summary = json.loads((folder / "summary.json").read_text()) | {
        "evaluation": {},
        "evaluation_intervals": {},
        "dpo": {},
    }
    del summary["stages"]["dpo"], summary["stages"]["evaluate"]
    summary["stages"]["sft"]["status"] = "shared"  # of a sweep: taken from another point
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Stages finished: features, sft, context. DPO is in round 3." in text_of(write(folder))


def test_dpo_is_hacked_when_the_judge_is_pleased_and_the_truth_falls(pages, run):
    folder = shutil.copytree(pages["dpo"].parent, run.parent / "dpo")
    summary = json.loads((folder / "summary.json").read_text())
    summary["evaluation_intervals"]["dpo-sft"]["greedy_score"] = {"delta": -1.0, "low": -1.5, "high": -0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Reward hacking: the judge’s score rose while the answers got worse" in text_of(write(folder))
    summary["dpo"]["rounds"][2]["heldout_score"] = 3.0
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "RLAIF made the answers worse" in text_of(write(folder))


def test_interventions_are_drawn_together(pages, run):
    names = {"claims": 3.0, "rate": 0.2, "omitted": 0.5}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
    lines = [line | {f"interventions/{name}": value for name, value in names.items()} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((run / "summary.json").read_text()) | {"preference": {}, "reward": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    text = text_of(write(run))
    assert "Claims per answer Claims taken over by the judge Left out of the narrative, per answer" in text
    assert "Over PPO the reward rose" in text and "reward model" not in text.lower()


def test_tables_show_the_numbers_of_the_summary(pages):
    text = text_of(pages["helped"])
    evaluation = json.loads((pages["helped"].parent / "summary.json").read_text())["evaluation"]["ppo"]
    shares = ("hallucination", "precision", "recall", "f1")
    shown = " ".join(number(100 * evaluation[f"greedy_{name}"], 1) for name in shares)
    assert f"PPO {shown} {evaluation['greedy_score']:.1f}" in text
    assert "claims yes 1,100 94.9 100.0 – 55.0" in text and "pairwise yes 300 87.0 88.0 81.2 –" in text
    assert "sft 1 min 58 s 1.17 GB done" in text and "All 5 min 40 s 1.17 GB" in text


def test_who_names_nothing_gets_no_credit_for_not_hallucinating(run):
    summary = json.loads((run / "summary.json").read_text())
    silent = ("precision", "recall", "f1", "hallucination", "mentions")
    summary["evaluation"]["base"] |= {f"greedy_{name}": 0.0 for name in silent}
    (run / "summary.json").write_text(json.dumps(summary))
    assert "Base – – 0.0 0.0 " in text_of(write(run))


def test_planned_memory_stands_beside_measured(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["stages"]["sft"]["planned_memory_bytes"] = 1_230_000_000
    (run / "summary.json").write_text(json.dumps(summary))
    assert "sft 1 min 58 s 1.17 GB 1.23 GB done" in text_of(write(run))


def test_wrong_words_and_only_they_are_struck_out(pages):
    html = pages["helped"].read_text()
    struck = re.findall(r"<del>(.*?)</del>", html)
    assert struck and set(struck) == {"zigzag"}
    cards = re.findall(r"(\d) right, (\d) wrong</h4>\s*<p>(.*?)</p>", html, flags=re.DOTALL)
    assert len(cards) == 20
    for right, wrong, answer in cards:
        assert int(wrong) == answer.count("<del>") and int(right) + int(wrong) == 9


def test_what_a_model_wrote_is_text_never_markup(run):
    path = run / "evaluate" / "ppo.greedy@0.jsonl"
    hostile = {"answer": "<script>alert(1)</script> & <b>", "wrong_words": [[0, 8]]}
    rows = [json.dumps(json.loads(line) | hostile) + "\n" for line in path.read_text().splitlines()]
    path.write_text("".join(rows))
    html = write(run).read_text()
    assert "<script" not in html and "<del>&lt;script&gt;</del>alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in html


def test_the_same_run_gives_the_same_page(pages, run):
    (run / "report.html").unlink()
    same = write(run).read_text() == pages["helped"].read_text()
    assert same


def test_what_is_no_run_folder_or_damaged_is_named(tmp_path):
    with pytest.raises(StageError, match="no run folder"):
        write(tmp_path)
    run = make_run(tmp_path / "run", "unfinished")
    (run / "metrics.jsonl").write_text("{broken}\n")
    with pytest.raises(StageError, match="metrics.jsonl has a line that is not JSON"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text("{")
    with pytest.raises(StageError, match="summary.json is not JSON"):
        read_run(run)


def test_a_run_that_has_barely_begun_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    text = text_of(write(tmp_path))
    assert "Not evaluated yet" in text and "No stage has finished." in text and "name: x" in text


def test_numbers_read_well():
    assert [duration(s) for s in (0.44, 12.4, 59.6, 185)] == ["0.4 s", "12 s", "1 min 00 s", "3 min 05 s"]
    assert duration(8040) == "2 h 14 min"
    assert [size(n) for n in (840_000, 12_340_000, 640e6, 1.456e9)] == ["840 kB", "12.3 MB", "640 MB", "1.46 GB"]
    assert [signed(x) for x in (1.23, -1.23, -0.04, 0.0)] == ["+1.2", "−1.2", "0.0", "0.0"]


# ------------------------------------------------------------------------------------------------------------- browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
PROBE = """<script>onload = () => { document.title = JSON.stringify({
    overflow: document.documentElement.scrollWidth - innerWidth,
    images: [...document.images].map(i => i.complete && i.naturalWidth > 0),
    plots: [...document.querySelectorAll('figure svg')].filter(s => !s.closest('details'))
        .map(s => s.getBoundingClientRect().width),
    requests: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).map(r => r.name),
    cut: [...document.querySelectorAll('.scroll')].filter(s => !s.closest('details') && s.scrollWidth > s.clientWidth)
        .map(s => s.previousElementSibling.textContent),
    smallest: Math.min(...[...document.querySelectorAll('td, p, h4, figcaption')]
        .map(e => parseFloat(getComputedStyle(e).fontSize))),
}) }</script>"""


def browse(page: Path, profile: Path, *flags: str) -> str:
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed to open the page with")
@pytest.mark.parametrize(("width", "columns"), [(1200, 3), (770, 3), (500, 1)])
def test_the_page_looks_right_in_a_browser(pages, tmp_path, width, columns):
    probe = tmp_path / "probe.html"  # the page, with a script that reports how it was laid out
    probe.write_text(pages["helped"].read_text().replace("</body>", f"{PROBE}</body>"))
    dom = browse(probe, tmp_path / "a", f"--window-size={width},900", "--dump-dom")
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    assert seen["overflow"] <= 0  # nothing sticks out sideways
    assert not [title for title in seen["cut"] if "against" in title]  # nor do the tables of changes inside their box
    assert seen["images"] == [True] * 10 and seen["requests"] == []
    assert len(seen["plots"]) == 7 and min(seen["plots"]) > 0.8 * (width - 130) / columns * (1 if columns == 1 else 0.9)
    assert seen["smallest"] >= 13

    shot = tmp_path / "shot.png"
    browse(pages["helped"], tmp_path / "b", f"--window-size={width},2600", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert (pixels.min(-1) > 235).mean() > 0.6  # dark on light
    assert ((abs(red - 15) < 12) & (abs(green - 118) < 12) & (abs(blue - 110) < 12)).sum() > 300  # teal: better
    assert (red - green > 60).sum() > 300  # struck-out words and red shapes
    rows_with_ink = (pixels.max(-1) < 120).any(axis=1)
    assert rows_with_ink[:1000].mean() > 0.2 and rows_with_ink[1600:].mean() > 0.2  # no blank stretch
