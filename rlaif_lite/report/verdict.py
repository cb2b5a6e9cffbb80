"""Did RLAIF help? A headline and a few sentences, made from the numbers and as ready to say no as yes.

A change counts only when its 95 % interval (paired bootstrap over videos) excludes zero. In this order:

    hacked      the truth fell while the reward (DPO: the judge's score of held-out answers) rose
    harmed      the truth fell
    traded      fewer hallucinations, but a lower F1
    helped      fewer hallucinations, a higher F1 or a higher accuracy in greedy answers
    sharper     only sampled answers improved: a lower temperature does that without any alignment
    unclear     no change that the intervals support
    no_truth    the data does not say what is true, and nobody was asked
    preferred, disliked, undecided
                the data does not say what is true, and people compared the policy with SFT: the interval of its win
                rate lies above a half, below, or holds it
    unfinished  nothing was evaluated

"The truth fell": right minus wrong facts per answer fell, hallucination rose without a better F1, or the accuracy by
rules fell. A reward or a judge that is pleased never makes a verdict better.
"""

import re
from typing import Any, NamedTuple

from rlaif_lite.formats import number, percent, signed
from rlaif_lite.report.folder import METHODS, Changes, Run, method_of
from rlaif_lite.report.people import People
from rlaif_lite.report.stats import RATIOS, Asked, asked, paired, paired_bootstrap


class Verdict(NamedTuple):
    """What the report concludes, in words."""

    kind: str
    headline: str
    sentences: list[str]
    cautions: list[str]


def judge_run(run: Run, greedy: Changes, sample: Changes) -> Verdict:
    """The verdict on a run, from what the policy changed against SFT (`folder.changes`; empty where nothing was
    evaluated)."""
    items, warnings = asked(run.rows), cautions(run)
    if not greedy and not sample:
        done = list(run.summary.get("stages", {}))  # done, skipped or shared: it has those that finished
        so_far = f"Stages finished: {', '.join(done)}." if done else "No stage has finished."
        if "ppo" in run.metrics and "ppo" not in done:
            so_far += f" PPO has done {run.metrics['ppo'][-1]['step'] + 1} steps."
        begun = [int(stage.removeprefix("dpo.")) for stage in run.metrics if re.fullmatch(r"dpo\.\d+", stage)]
        if begun and "dpo" not in done:
            so_far += f" DPO is in round {max(begun)}."
        return Verdict("unfinished", "Not evaluated yet", [so_far, *_training(run)], warnings)
    kind = classify(greedy, sample, _reward_rose(run.summary))
    headline = _headline(kind, greedy or sample, method_of(run.summary))
    people, without = _win_rate(run.people), _without_truth(run.summary) if kind == "no_truth" else []
    if kind == "no_truth" and run.people and run.people.policy:
        kind, headline = _by_people(run.people)
    sentences = [*_effect("Greedy answers", greedy, items), *_effect("Sampled answers", sample, items)]
    sentences = [*people, *sentences, *_temperature(run, sample), *_order(run.summary), *without, *_training(run)]
    return Verdict(kind, headline, sentences, warnings)


def classify(greedy: Changes, sample: Changes, reward_rose: bool | None) -> str:
    """The kind of verdict (see the top of this file) of changes that were evaluated."""
    known = [one for one in (greedy, sample) if "f1" in one or "accuracy" in one]
    if not known:
        return "no_truth"
    worse = lambda one: _rose(one, "hallucination") and not _rose(one, "f1")
    if any(_fell(one, "score") or _fell(one, "accuracy") or worse(one) for one in known):
        return "hacked" if reward_rose else "harmed"
    first = known[0]
    if _fell(first, "hallucination"):
        return "traded" if _fell(first, "f1") else "helped"
    better = lambda one: _rose(one, "f1") or _rose(one, "accuracy")
    if better(first):
        return "helped"
    if len(known) == 2 and (_fell(sample, "hallucination") or better(sample)):
        return "sharper"
    return "unclear"


def cautions(run: Run) -> list[str]:
    """What a careful reader should know before quoting a number from this run."""
    summary, found = run.summary, []
    ppo, reward, preference = (summary.get(name, {}) for name in ("ppo", "reward", "preference"))
    method, rounds = method_of(summary), rounds_of(summary)
    if ppo.get("kl_start", 0.0) != 0.0:
        found.append(f"PPO began at a KL of {ppo['kl_start']:.3g}, not 0: policy and reference differed.")
    if ppo.get("kl_end", 0.0) > 10.0:
        found.append(f"The policy is {ppo['kl_end']:.1f} nats per answer away from the reference, which is far.")
    accuracy = reward.get("heldout_accuracy_truth", reward.get("heldout_accuracy"))
    if accuracy is not None and accuracy < 0.65:
        found.append(f"The reward model decides only {percent(accuracy)} of held-out pairs rightly (chance: 50 %).")
    if reward and reward["heldout_accuracy"] is None:
        found.append("The reward model was given and not measured: there were no pairs.")
    agreement = preference.get("judge_agreement_with_truth", rounds[-1].get("agreement") if rounds else None)
    if agreement is not None and agreement < 0.7:
        found.append(f"The judge agrees with the truth on only {percent(agreement)} of pairs.")
    for mode in ("greedy", "sample"):
        malformed = summary.get("evaluation", {}).get(method, {}).get(f"{mode}_malformed", 0.0)
        if malformed > 0.02:
            how = {"greedy": "greedy", "sample": "sampled"}[mode]
            found.append(f"{percent(malformed)} of {METHODS[method]}'s {how} answers hold a malformed sentence.")
    if rounds and (taken := _taken(rounds))["heldout_words"] > 1.25 * rounds[0]["heldout_words"]:
        words = f"from {number(rounds[0]['heldout_words'], 1)} to {number(taken['heldout_words'], 1)} words"
        found.append(f"Answers grew {words}: a judge that prefers longer ones teaches length instead of truth.")
    features = summary.get("features") or {}
    missing = features.get("missing", 0) + features.get("unreadable", 0)
    if missing:
        found.append(f"{missing} videos were missing or unreadable and left out.")
    items = asked(run.rows)
    if 0 < items.videos < 100:
        found.append(f"Only {items.videos} videos were evaluated; the intervals are wide and rough.")
    if 0 < items.known < items.questions:
        found.append(
            f"The truth is known for {items.known} of {items.questions} questions; figures of it are of these."
        )
    if run.people:
        found += run.people.labels.refused
        if run.people.labels.stale:
            found.append(
                f"{run.people.labels.stale} verdicts of people are about answers that this run no longer has. They are "
                "kept and not counted."
            )
    return found


def _by_people(people: People) -> tuple[str, str]:
    """(kind, headline) where the data has no truth and people compared the policy with SFT."""
    rate = people.policy
    won = f"it won {percent(rate.value)} of {rate.verdicts} comparisons with SFT"
    if rate.low > 0.5:
        return "preferred", f"People prefer the trained policy: {won}"
    if rate.high < 0.5:
        return "disliked", f"People prefer the answers from before: the policy {won.removeprefix('it ')}"
    return "undecided", f"People see no clear difference: the policy {won.removeprefix('it ')}"


def _win_rate(people: People | None) -> list[str]:
    if people is None or people.policy is None:
        return []
    rate, (won, tied, lost) = people.policy, people.counts
    low, high = number(100 * rate.low, 1), percent(rate.high)
    text = (
        f"People compared the policy's greedy answers with SFT's, blind: of {rate.verdicts} verdicts on {rate.videos} "
        f"videos the policy won {won}, tied {tied} and lost {lost}. Its win rate is {percent(rate.value)} ({low} to "
        f"{high}), a tie counted as half."
    )
    alike = f" Another {people.equal} answers are the same word for word, so nobody was asked about them."
    return [text + (alike if people.equal else "")]


def _without_truth(summary: dict) -> list[str]:
    """What can be said of the judge where nothing says what is true."""
    preference, parts = summary.get("preference", {}), []
    if (same := preference.get("position_consistency")) is not None:
        parts.append(f"asked in both orders, it names the same winner in {percent(same)} of pairs")
    for judge in preference.get("judges", []):
        own = (judge["judge"], judge["context"]) == (preference["judge"], preference.get("context", True))
        if not own and judge.get("same_winner") is not None:
            how = "with" if judge["context"] else "without"
            parts.append(f"`{judge['judge']}` {how} the narrative agrees with it on {percent(judge['same_winner'])}")
    if judged := preference.get("pairs_judged"):
        parts.append(f"{percent(preference['verdicts_without_mass'] / judged)} of its verdicts have no mass")
    if (outside := preference.get("outside_narrative")) is not None:
        parts.append(f"{percent(outside)} of the answers it read name nothing of their narrative")
    return [f"What can be said of the judge without a truth: {'; '.join(parts)}."] if parts else []


def _headline(kind: str, first: Changes, method: str) -> str:
    if kind in ("helped", "traded") and _fell(first, "hallucination"):
        was, now = percent(first["hallucination"].before), percent(first["hallucination"].after)
        fall = f"hallucination fell from {was} to {now}"
        return f"RLAIF helped: {fall}" if kind == "helped" else f"A trade: {fall}, but F1 fell too"
    rose = "judge’s score" if method == "dpo" else "reward"
    return {
        "hacked": f"Reward hacking: the {rose} rose while the answers got worse",
        "harmed": "RLAIF made the answers worse",
        "helped": "RLAIF helped: more of what the answers say is right",
        "sharper": "Sampled answers improved, greedy ones did not: this looks like sharper sampling, not alignment",
        "unclear": "No effect that the intervals support",
        "no_truth": "Whether the answers got better, this data cannot say",
    }[kind]


def _effect(what: str, found: Changes, items: Asked) -> list[str]:
    if not found:
        return []
    if "f1" not in found and "accuracy" not in found:
        length = found["length"]
        tokens = f"went from {length.before:.1f} to {length.after:.1f} tokens"
        form = _points(found, ("repetition", "repetition"), ("answers that stop by themselves", "stop_rate"))
        return [f"{what} to {items} {tokens}; no truth is known. What their form shows: {form}."]
    named = (("accuracy", "accuracy"), ("hallucination", "hallucination"), ("F1", "f1"), ("recall", "recall"))
    return [f"{what} to {items}, with 95\u00a0% intervals: {_points(found, *named)}."]


def _points(found: Changes, *named: tuple[str, str]) -> str:
    """Changes of shares in points, with their intervals."""
    parts = []
    for label, name in named:
        if name in found:
            delta, low, high = (signed(100 * points) for points in found[name].interval)
            parts.append(f"{label} {delta} points ({low} to {high})")
    return ", ".join(parts)


def _temperature(run: Run, sample: Changes) -> list[str]:
    "Sharpening alone lowers hallucination too; say whether it may be all that the policy's sampled answers gained."
    reached = {
        role: metrics["sample_hallucination"]
        for role, metrics in run.summary.get("evaluation", {}).items()
        if role.startswith("sft@") and "sample_hallucination" in metrics
    }
    if not reached or not _fell(sample, "hallucination"):
        return []
    best = min(reached, key=lambda role: reached[role])
    temperature = best.removeprefix("sft@")
    sampled = [row for row in run.rows if row["mode"] == "sample"]
    cooler = [row for row in sampled if row["role"] == "sft" and row["temperature"] == float(temperature)]
    method = method_of(run.summary)
    policy = [row for row in sampled if row["role"] == method]
    if not cooler or not policy:
        return []
    change = paired_bootstrap(*paired(cooler, policy), RATIOS["hallucination"])
    verdict = "does not explain" if change.high < 0 else "may explain"
    delta, low, high = (signed(100 * points) for points in change)
    return [
        f"Sharper sampling alone {verdict} the sampled gain: at temperature {temperature}, SFT hallucinates "
        f"{percent(reached[best])}, and {METHODS[method]} differs from that by {delta} points ({low} to {high})."
    ]


def _order(summary: dict) -> list[str]:
    """How much greedy answers depend on the order of the frames."""
    said = []
    for role, found in summary.get("order", {}).items():
        name, changed = METHODS.get(role, role.upper()), percent(found["changed"])
        text = f"With the frames shuffled, {changed} of {name}'s greedy answers change"
        if "metric" in found:
            delta, low, high = (signed(100 * found["change"][key]) for key in ("delta", "low", "high"))
            metric = {"f1": "F1"}.get(found["metric"], found["metric"])
            text += f", and their {metric} changes by {delta} points ({low} to {high})"
        said.append(f"{text}.")
    return said


def _training(run: Run) -> list[str]:
    rounds = rounds_of(run.summary)
    if rounds:
        start, taken = rounds[0], _taken(rounds)
        text = f"Of {len(rounds) - 1} rounds of DPO, {taken['round']} was taken"
        text += f": the judge's score of the held-out answers went {_went(start, taken, 'heldout_score')}"
        if taken["heldout_truth"] is not None:
            text += f", their true score {_went(start, taken, 'heldout_truth')}"
        return [f"{text}, their length {_went(start, taken, 'heldout_words', 1)} words."]
    ppo: dict[str, Any] = run.summary.get("ppo", {})
    if "reward_start" not in ppo:
        return []
    start, end = ppo["reward_start"], ppo["reward_end"]
    moved = "rose" if end > start else "fell" if end < start else "stayed"
    what = "reward model's score" if run.summary.get("reward") else "reward"
    text = f"Over PPO the {what} {moved} from {number(start)} to {number(end)}"
    if "oracle_start" in ppo:
        oracle = f"{number(ppo['oracle_start'])} to {number(ppo['oracle_end'])}"
        text += f" and the true score of the rollouts went from {oracle}"
    return [f"{text}; the policy ended {number(ppo['kl_end'])} nats per answer away from the reference."]


def rounds_of(summary: dict) -> list[dict]:
    """DPO's table: a line per round, the first about where it started; empty without DPO."""
    return summary.get("dpo", {}).get("rounds", [])


def _taken(rounds: list[dict]) -> dict:
    return next(row for row in rounds if row["selected"])


def _went(start: dict, end: dict, name: str, digits: int = 2) -> str:
    return f"from {number(start[name], digits)} to {number(end[name], digits)}"


def _reward_rose(summary: dict) -> bool | None:
    if rounds := rounds_of(summary):
        return _taken(rounds)["heldout_score"] > rounds[0]["heldout_score"]
    if summary.get("feedback") == "ranking":  # places in a group: their mean is the same, however good the answers
        return None
    ppo = summary.get("ppo", {})
    return ppo["reward_end"] > ppo["reward_start"] if "reward_end" in ppo else None


def _fell(found: Changes, name: str) -> bool:
    return name in found and found[name].interval.high < 0


def _rose(found: Changes, name: str) -> bool:
    return name in found and found[name].interval.low > 0
