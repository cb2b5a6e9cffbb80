"""One benchmark, one role, one judge: from files to `results.json`.

    OUT/settings.json   what the answers depend on, and the verdicts of a claim audit; other settings are refused here
    OUT/answers.jsonl   (scores.jsonl, claims.jsonl) as they are made
    OUT/items.jsonl     one line per item, in the file's order: answer, length, stopped, verdicts, judge, counts
    OUT/results.json    figures with intervals, who was examined, who judged, what was missing

The answers do not depend on the judge: another judge reads the same ones.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import DataError
from ..files import digest_of, file_digest, read_json, write_json, write_jsonl
from ..judge.outside import Case, Judge
from .answer import Examinee, write_pictures
from .catalogue import BENCHMARKS, Benchmark
from .items import Item, Tally, find_videos
from .results import figures


def run(
    examinee: Examinee,
    name: str,
    files: list[Path],
    videos: Path,
    make_judge: Callable[[], Judge],
    out: Path,
    limit: int | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
) -> dict:
    """Run a role on benchmark `name` -> its `results.json`. `make_judge` is called if the benchmark needs a judge.

    Raises DataError: files in another shape, no video at all, a folder that holds other answers."""
    benchmark, recipe = BENCHMARKS[name], examinee.work.recipe
    items = benchmark.load(files)[:limit]
    inside = write_pictures(items, out / "pictures")
    found, missing = find_videos([name for item in items for name in item.videos if name not in inside], videos)
    found |= inside
    if not found:
        raise DataError(f"None of the {len(missing)} videos is under {videos}, among them {', '.join(missing[:5])}.")
    settings = {
        "benchmark": name,
        "files": {path.name: file_digest(path) for path in files},
        "answers": examinee.digest(examinee.role),
        "prompt": prompt or benchmark.prompt,
        "max_new_tokens": max_new_tokens or recipe.evaluate.max_new_tokens,
        "weights": {"quantization": recipe.model.quantization, "dtype": recipe.model.dtype},
        "features": recipe.features.model_dump(mode="json", exclude={"cache", "workers"}),
    }
    spans = [(item.video, item.span) for item in items if item.span is not None]
    broken = examinee.look(found, out / "videos.json", spans, clips=benchmark.kind == "claims")
    usable = [item for item in items if all(video in found and video not in broken for video in item.videos)]
    if not usable:
        raise DataError(f"None of the {len(found)} videos can be used; the first: {next(iter(broken.values()))}")
    if benchmark.kind == "claims":  # its verdicts lie in the folder, beside the answers
        role = examinee.judge_role
        section, context = recipe.preference.claims, recipe.context.model_dump(mode="json", exclude={"batch_size"})
        asked = digest_of([section.model_dump(mode="json"), context], 12)  # the judge's prompts, and its narratives'
        settings["judge"] = f"claims/{recipe.model.base}/{role} {examinee.digest(role)}/{asked}"
    if benchmark.kind == "retrieval":
        settings["texts"] = digest_of([item.reference for item in usable])
    path = out / "settings.json"
    before = read_json(path) if path.exists() else settings
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        shown = "; ".join(f"{key} was {before.get(key)}, is {settings[key]}" for key in changed)
        raise DataError(f"{out} holds answers of other settings ({shown}). Give another --out, or remove it.")
    if not path.exists():
        write_json(path, settings)
    rows, judge = _rows(examinee, benchmark, usable, out, settings, make_judge)
    tallies = [benchmark.tally(item, row) | _manner(row) for item, row in zip(usable, rows, strict=True)]
    write_jsonl(
        out / "items.jsonl",
        [
            {
                "id": item.id,
                "video": item.video,
                "group": item.group,
                "question": item.questions,
                "reference": item.reference,
            }
            | row
            | {"judge": judge, "counts": tally}
            for item, row, tally in zip(usable, rows, tallies, strict=True)
        ],
    )
    groups: dict[str, list[tuple[str, Tally]]] = {}
    for item, found_of in zip(usable, tallies, strict=True):
        groups.setdefault(item.group, []).append((item.video, found_of))
    result = settings | {
        "who": str(examinee),
        "kind": benchmark.kind,
        "judge": judge,
        "items": len(usable),
        "videos": len({item.video for item in usable}),
        "missing": missing,
        "missing_items": sum(any(video in missing for video in item.videos) for item in items),
        "broken": broken,
        "broken_items": sum(any(video in broken for video in item.videos) for item in items),
        "metrics": figures([(item.video, tally) for item, tally in zip(usable, tallies, strict=True)]),
        "groups": {name: figures(of) for name, of in groups.items()} if len(groups) > 1 else {},
    }
    write_json(out / "results.json", result)
    return result


def _rows(
    examinee: Examinee,
    benchmark: Benchmark,
    items: list[Item],
    out: Path,
    settings: dict,
    make_judge: Callable[[], Judge],
) -> tuple[list[dict], str | None]:
    """(what was found for each item, the judge's id or None)."""
    prompt = settings["prompt"]
    if benchmark.kind in ("retrieval", "recognition"):
        found = examinee.rankings(items, out / "scores.jsonl", prompt, benchmark.kind == "retrieval")
        return [found[item.id] for item in items], None
    answers = examinee.answers(items, out / "answers.jsonl", prompt, settings["max_new_tokens"])
    rows = [{key: value for key, value in answers[item.id].items() if key not in ("id", "seen")} for item in items]
    if benchmark.kind == "claims":
        found = examinee.audits(items, answers, out)
        rows = [row | {"claims": found[item.id]["claims"]} for item, row in zip(items, rows, strict=True)]
        return rows, settings["judge"]
    if not benchmark.tasks:
        return rows, None
    examinee.work.release_roles()
    judge = make_judge()
    for row in rows:
        row["verdicts"] = {}
    for task in benchmark.tasks:
        cases = []
        for item, row in zip(items, rows, strict=True):
            question, answer = tuple(item.questions), tuple(row["answers"])
            if task != "consistency":  # which takes both questions and answers; the other tasks have one
                (question,), (answer,) = question, answer
            cases.append(Case(item.id, task, question, item.reference, answer, item.context))
        for row, verdict in zip(rows, judge.judge(cases), strict=True):
            row["verdicts"][task] = {key: value for key, value in verdict._asdict().items() if key != "id"}
    return rows, judge.id


def _manner(row: dict) -> Tally:
    """Length in tokens, and whether the answer reached its end. Both influence judges; every score has them."""
    if "answers" not in row:
        return {}
    count = len(row["answers"])
    return {"length": (float(sum(row["lengths"])), count), "stop_rate": (float(sum(row["stopped"])), count)}
