"""`write(run_dir)`: one self-contained report.html: the verdict first, then the evidence, then what ran.

The page needs no network and no JavaScript. What a run does not have (truth, a finished stage, examples) is left out.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from rlaif_lite.files import write_text
from rlaif_lite.formats import duration, number, percent, signed, size
from rlaif_lite.report import plots
from rlaif_lite.report.folder import METHODS, Change, Changes, Run, changes, method_of, read_run
from rlaif_lite.report.people import trust
from rlaif_lite.report.stats import Interval, asked
from rlaif_lite.report.verdict import judge_run, rounds_of

ROLES = {"base": "Base", "sft": "SFT", "reference": "Reference", **METHODS}
MOST_DESCRIBED = 6  # videos
MODES = {"greedy": "Greedy", "sample": "Sampled"}


class Measure(NamedTuple):
    """A metric as the report shows it."""

    label: str
    help: str
    better: int  # 1 more is better, -1 less is better, 0 neither
    share: bool  # shown in per cent


MEASURES = {
    "accuracy": Measure("Accuracy", "answers that the rules find right, by the record's solution", 1, True),
    "hallucination": Measure("Hallucination", "mentioned objects that are not in the video", -1, True),
    "precision": Measure("Precision", "right among the facts said", 1, True),
    "recall": Measure("Recall", "facts of the video that were said", 1, True),
    "f1": Measure("F1", "harmonic mean of precision and recall", 1, True),
    "score": Measure("Right − wrong", "facts per answer", 1, False),
    "mentions": Measure("Objects", "mentioned per answer", 0, False),
    "malformed": Measure("Malformed", "answers with a sentence outside the grammar", -1, True),
    "repetition": Measure("Repetition", "repeated 4-grams", -1, True),
    "stop_rate": Measure("Stopped", "answers that end by themselves", 1, True),
    "length": Measure("Length", "tokens per answer", 0, False),
}

Curve = tuple[str, dict[str, str], plots.Axis]  # title, {label: metric}, what its axis must show
CURVES: list[Curve] = [
    ("Reward", {"of the feedback": "objective/scores", "with KL and penalties": "objective/rlhf_reward"}, "free"),
    ("KL to the reference, nats per answer", {"KL": "objective/kl"}, "zero"),
    ("True score of rollouts, right − wrong", {"true score": "rollout/oracle_score"}, "free"),
    ("Length, tokens per answer", {"length": "rollout/length"}, "free"),
    ("Answers that stop by themselves", {"stop rate": "rollout/stop_rate"}, "share"),
    ("Clipped share of tokens", {"clip fraction": "policy/clipfrac_avg"}, "zero"),
    # a judge that intervenes: none of the three says anything alone
    ("Claims per answer", {"claims": "interventions/claims"}, "zero"),
    ("Claims taken over by the judge", {"share": "interventions/rate"}, "zero"),
    ("Left out of the narrative, per answer", {"left out": "interventions/omitted"}, "zero"),
]
ROUND_CURVES: list[Curve] = [
    ("Judge’s score of held-out answers", {"score": "heldout_score"}, "free"),
    ("True score of held-out answers", {"true score": "heldout_truth"}, "free"),
    ("Words per answer", {"held out, greedy": "heldout_words", "sampled": "answer_words"}, "free"),
    ("Judge agrees with the truth", {"agreement": "agreement"}, "share"),
    ("Prefers the longer answer", {"judge": "length_bias", "truth": "truth_length_bias"}, "share"),
    ("Words of preferred answers", {"chosen": "chosen_words", "rejected": "rejected_words"}, "free"),
    ("True claims in descriptions", {"written": "description_true_written", "read": "description_true_read"}, "share"),
    ("Words per description", {"words": "description_words"}, "free"),
]
# heading, key in a round's line, factor, digits
ROUND_COLUMNS = [
    ("Pairs", "pairs", 1, 0),
    ("Judge agrees %", "agreement", 100, 1),
    ("Prefers the longer %", "length_bias", 100, 1),
    ("Chosen, words", "chosen_words", 1, 1),
    ("Rejected, words", "rejected_words", 1, 1),
    ("Descriptions changed %", "description_changed", 100, 1),
    ("true %", "description_true_written", 100, 1),
    ("Held out: judge", "heldout_score", 1, 2),
    ("truth", "heldout_truth", 1, 2),
    ("words", "heldout_words", 1, 1),
]
MORE_CURVES: list[Curve] = [
    ("Entropy, nats per token", {"entropy": "policy/entropy_avg"}, "free"),
    ("Explained variance of the value", {"explained variance": "val/explained_variance"}, "free"),
    ("Repeated 4-grams", {"repetition": "rollout/repetition"}, "zero"),
    ("Approximate KL of an update", {"approximate KL": "policy/approxkl_avg"}, "zero"),
    ("Value loss", {"value loss": "loss/value_avg"}, "zero"),
    ("KL coefficient", {"coefficient": "objective/kl_coef"}, "zero"),
]


def write(run_dir: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path.

    Raises StageError when `run_dir` is no run folder, or when a file in it is damaged.
    """
    run = read_run(Path(run_dir))
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters.update(percent=percent, number=number, signed=signed, duration=duration, size=size)
    html = templates.get_template("page.html.jinja").render(view(run))
    path = run.folder / "report.html"
    write_text(path, html)
    return path


def view(run: Run) -> dict[str, Any]:
    """Everything the template shows, as plain values."""
    summary = run.summary
    ppo, result, rounds = run.metrics.get("ppo", []), summary.get("ppo", {}), rounds_of(summary)
    effects = {base: {mode: changes(summary, base, mode) for mode in MODES} for base in ("sft", "reference")}
    bins = summary.get("reward", {}).get("calibration")
    rules = dict.fromkeys(name for line in ppo for name in line if name.startswith("rules/") and "failed" not in name)
    by_rule: Curve = ("Rewards by rule", {name.removeprefix("rules/"): name for name in rules}, "free")
    losses = [
        curve
        for stage, lines in run.metrics.items()
        if stage != "ppo"
        for curve in draw([(f"Loss of {stage.replace('_', ' ')}", {"loss": "loss"}, "zero")], lines)
    ]
    stages = summary.get("stages", {})
    longest = max([1e-9, *(stage["seconds"] for stage in stages.values())])
    return {
        "title": summary.get("recipe", run.folder.name),
        "folder": run.folder.name,
        "summary": summary,
        "verdict": judge_run(run, **effects["sft"]),
        "changes": [
            panel
            for baseline, by_mode in effects.items()
            for panel in change_panels(method_of(summary), baseline, by_mode)
        ],
        "best_of": [
            panel
            for role in summary.get("evaluation", {})
            if role.startswith(f"{method_of(summary)}@bo")  # against the policy's own answers, greedy and sampled
            for panel in change_panels(
                role, method_of(summary), {mode: changes(summary, method_of(summary), mode, role) for mode in MODES}
            )
        ],
        "asked": asked(run.rows),
        "people": run.people,
        "trust": run.people and trust(run.people),
        "method": METHODS[method_of(summary)],
        "curves": draw([*CURVES, by_rule], ppo) + draw(ROUND_CURVES, [row | {"step": row["round"]} for row in rounds]),
        "rounds": round_table(rounds),
        "descriptions": descriptions(rounds),
        "more_curves": draw(MORE_CURVES, ppo) + losses,
        "tables": [table for mode in MODES if (table := evaluation_table(summary.get("evaluation", {}), mode))],
        "cooler": any(role.startswith("sft@") for role in summary.get("evaluation", {})),
        "stages": [{"planned_memory_bytes": None, **stage, "name": name} for name, stage in stages.items()],
        "longest": longest,
        "judges": summary.get("preference", {}).get("judges", []),
        "calibration": Markup(plots.calibration(bins)) if bins else None,
        "roles": result.get("roles", {}),
        "base_bytes": sum(result.get("base_bytes", {}).values()),
        "examples": (cards := example_cards(run)),
        "question": cards[0].prompt if len({card.prompt for card in cards}) == 1 else None,
        "recipe": run.recipe,
    }


# ------------------------------------------------------------------------------------------------------- what changed


class ChangeRow(NamedTuple):
    """One metric's change against the baseline."""

    measure: Measure
    change: Change
    verdict: str  # better, worse, or same: what the interval supports
    bar: Interval | None  # where the interval lies on the panel's axis, 0 to 100; only for shares


class ChangePanel(NamedTuple):
    """The changes of all metrics of one way to decode."""

    title: str
    baseline: str
    reach: float  # the axis goes from -reach to +reach, in points
    rows: list[ChangeRow]


def change_panels(role: str, baseline: str, by_mode: dict[str, Changes]) -> list[ChangePanel]:
    """The policy, or another column `role`, against `baseline`, a panel per mode, all on the same axis."""
    shown = [found[name] for found in by_mode.values() for name in found if name in MEASURES and MEASURES[name].share]
    reach = max([0.01, *(abs(edge) for change in shown for edge in change.interval)])
    panels = []
    for mode, found in by_mode.items():
        rows = []
        for name, measure in MEASURES.items():
            if name in found:
                interval = found[name].interval
                bar = Interval(*(50 + 50 * edge / reach for edge in interval)) if measure.share else None
                verdict = interval.verdict(measure.better) if measure.better else ""
                rows.append(ChangeRow(measure, found[name], verdict or "same", bar))
        if rows:
            title = f"{MODES[mode]} answers, {_role_label(role)} against {ROLES[baseline]}"
            if "@" in role:
                title = f"{_role_label(role)}, against {ROLES[baseline]}’s {MODES[mode].lower()} answers"
            panels.append(ChangePanel(title, ROLES[baseline], 100 * reach, rows))
    return panels


class Table(NamedTuple):
    """Every role's value of some metrics."""

    title: str
    measures: list[Measure]
    rows: list[tuple[str, str, list[float | None]]]  # label, kind (a role, `policy`, `cooler` or `best_of`), values


def evaluation_table(evaluation: dict[str, dict[str, float]], mode: str) -> Table | None:
    """Every role in one mode; among the sampled ones SFT at lower temperatures, next to SFT."""
    order = [role for name in ROLES for role in evaluation if role == name or role.startswith(f"{name}@")]
    rows = {role: {name: evaluation[role].get(f"{mode}_{name}") for name in MEASURES} for role in order}
    for values in rows.values():
        if values["mentions"] == 0:  # who names nothing does not hallucinate, which is no merit
            values["hallucination"] = values["precision"] = None
    rows = {role: values for role, values in rows.items() if any(value is not None for value in values.values())}
    names = [name for name in MEASURES if any(values[name] is not None for values in rows.values())]
    if not rows:
        return None
    body = []
    for role, values in rows.items():
        name, _, how = role.partition("@")
        kind = ("best_of" if how.startswith("bo") else "cooler") if how else "policy" if name in METHODS else name
        body.append((_role_label(role), kind, [values[name] for name in names]))
    return Table(f"{MODES[mode]} answers", [MEASURES[name] for name in names], body)


def _role_label(role: str) -> str:
    name, _, how = role.partition("@")
    if how.startswith("bo"):
        return f"{ROLES[name]}, best of {how.removeprefix('bo')}"
    return f"{ROLES[name]} at temperature {how}" if how else ROLES[name]


# ------------------------------------------------------------------------------------------------------- curves, costs


def draw(wanted: list[Curve], lines: list[dict]) -> list[tuple[str, Markup]]:
    """(title, SVG) of every wanted curve that has at least two steps."""
    drawn = []
    for title, metrics, axis in wanted:
        have = {label: [line for line in lines if metric in line] for label, metric in metrics.items()}
        series = {
            label: ([line["step"] for line in found], [line[metrics[label]] for line in found])
            for label, found in have.items()
            if len(found) > 1
        }
        if series:
            drawn.append((title, Markup(plots.curve(series, axis))))
    return drawn


# -------------------------------------------------------------------------------------------------------- DPO's rounds


class Described(NamedTuple):
    "One video's descriptions, as they were rewritten."

    video: str
    texts: list[tuple[str, str]]  # who wrote it, and the text


def round_table(rounds: list[dict]) -> tuple[list[str], list[tuple[int, bool, list[str]]]] | None:
    """(headings, lines of round, whether it was taken, cells); columns that no round has are left out."""
    columns = [one for one in ROUND_COLUMNS if any(row.get(one[1]) is not None for row in rounds)]
    lines = []
    for row in rounds:
        found = [(row.get(key), factor, digits) for _, key, factor, digits in columns]
        cells = ["–" if value is None else number(factor * value, digits) for value, factor, digits in found]
        lines.append((row["round"], row["selected"], cells))
    return ([heading for heading, *_ in columns], lines) if rounds else None


def descriptions(rounds: list[dict]) -> list[Described]:
    """The videos whose descriptions the rounds kept as examples, those first that most rounds described."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in rounds:
        for one in row.get("descriptions", []):
            texts = found.setdefault(one["video"], [])
            if not texts or texts[-1][1] != one["read"]:
                texts.append((f"Read in round {row['round']}", one["read"]))
            texts.append((f"Written in round {row['round']}", one["written"]))
    return [Described(*item) for item in sorted(found.items(), key=lambda item: -len(item[1]))[:MOST_DESCRIBED]]


# ------------------------------------------------------------------------------------------------------------ examples


class Answer(NamedTuple):
    """A role's answer to an example, with what is wrong in it marked."""

    label: str
    pieces: list[tuple[str, bool]]  # text, and whether it is wrong
    right: int | None
    wrong: int | None


class Card(NamedTuple):
    """An example with all answers."""

    id: str
    image: str
    prompt: str
    truth: str | None
    answers: list[Answer]


def example_cards(run: Run) -> list[Card]:
    """The examples that have an answer: SFT's before, the policy's after, greedy where there is a greedy one."""
    rows = sorted(run.rows, key=lambda row: row["mode"] == "greedy")  # stable: a greedy row replaces a sampled one
    by_role = {(row["key"], row["role"]): row for row in rows}
    method, cards = method_of(run.summary), []
    for example in run.examples:
        shown = {
            label: by_role[example.key, role]
            for role, label in (("sft", "Before, SFT"), (method, f"After, {METHODS[method]}"))
            if (example.key, role) in by_role
        }
        if shown:
            prompt = next(iter(shown.values()))["prompt"]
            answers = [_answer(label, row) for label, row in shown.items()]
            cards.append(Card(example.id, example.image, prompt, example.truth, answers))
    return cards


def _answer(label: str, row: dict) -> Answer:
    text, pieces, end = row["answer"], [], 0
    for start, stop in sorted(row.get("wrong_words", [])):
        pieces += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    pieces.append((text[end:], False))
    truth = row["truth"]
    return Answer(label, [piece for piece in pieces if piece[0]], truth and truth["correct"], truth and truth["wrong"])
