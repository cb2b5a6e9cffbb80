"""What `rlaif-lite bench` does with its arguments."""

import json
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, RlaifError
from ..files import file_digest
from ..judge.outside import Judge, local
from ..judge.outside.cached import CachedJudge
from ..judge.outside.endpoint import Endpoint, Prices, settings_of
from ..model.base import base_digest
from ..model.roles import BASE
from ..workspace import Workspace
from .answer import Examinee
from .catalogue import BENCHMARKS
from .results import as_text, table
from .rule_judge import Rules
from .run import run as run_benchmark


class Judging(NamedTuple):
    """Which judge is asked for."""

    kind: str  # local, rules, or an endpoint's base URL
    model: str | None
    "its name at the endpoint; a folder or hub id of a local one; None: the run's own base, without an adapter"
    words: bool  # local: question answering is decided by the probabilities of yes and no
    key: str | None  # environment variable that holds the endpoint's key
    body: str | None  # endpoint: JSON of settings for its requests; null leaves one of ours out
    concurrency: int
    price: tuple[float, float] | None
    again: bool


def bench(
    where: str,
    name: str,
    files: list[Path],
    videos: Path,
    role: str,
    judging: Judging,
    out: Path | None,
    limit: int | None,
    prompt: str | None,
    max_new_tokens: int | None,
) -> str:
    """Run one benchmark; returns what is to be shown. Raises RlaifError for what is not there."""
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(BENCHMARKS)}."
        raise RlaifError(f"There is no benchmark {name}. {hint}")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise DataError(f"There is no file {', '.join(missing[:5])}. Paths start at {Path.cwd()}.")
    examinee = Examinee(where, role)
    results = examinee.work.folder / "bench"
    out = out or results / f"{name}-{role}"

    if judging.words and judging.kind != "local":
        raise RlaifError(f"--judge-words is for a local judge; the judge is {judging.kind}.")
    if judging.kind == "local" and judging.model is not None:
        local.check_model(judging.model, judging.words)
    verdicts, ready = results / "verdicts", None
    if BENCHMARKS[name].tasks and judging.kind != "local":  # a wrong address is said before hours of answers
        ready = make_judge(judging, examinee, verdicts)
    found = run_benchmark(
        examinee,
        name,
        files,
        videos,
        lambda: ready or make_judge(judging, examinee, verdicts),
        out,
        limit,
        prompt,
        max_new_tokens,
    )
    return as_text(found, out)


def make_judge(judging: Judging, examinee: Examinee, folder: Path) -> Judge:
    """The judge asked for, its verdicts kept in `folder`."""
    if judging.kind == "rules":
        return Rules()
    if judging.kind.startswith(("http://", "https://")):
        if judging.model is None:
            raise RlaifError("An endpoint serves several models. Name one with --judge-model.")
        prices = Prices(*judging.price) if judging.price else None
        model = Endpoint(
            judging.kind,
            judging.model,
            judging.key,
            concurrency=judging.concurrency,
            prices=prices,
            body=settings_of(judging.body, "--judge-body"),
        )
        return CachedJudge(model, folder, judging.again)
    if judging.kind == "local":
        if judging.model is None:
            judge = of_role(examinee.work, "base", judging.words)
        else:
            judge = local.of_model(judging.model, examinee.work.device, words=judging.words)
        return CachedJudge(judge, folder, judging.again)
    raise RlaifError(f"There is no judge {judging.kind}: local, rules, or a URL that begins with http.")


def of_role(work: Workspace, role: str, words: bool = False) -> local.LocalRole:
    """A role of a run, on the base that the run has loaded; `base` is the role without an adapter.

    Raises ModelError for a role that is not there."""
    section, revision = work.recipe.model, base_digest(work.recipe.model)
    if role != BASE:
        work.load_role(role)
        adapter = work.adapter(role) / "adapter_model.safetensors"
        revision += f"+{file_digest(adapter)}"
    name = f"local:{local.short_name(section.base)}:{role}:{section.quantization}"
    return local.LocalRole(work.roles, role, name, revision, words)


def listing() -> str:
    """Every benchmark, what judges it, and its files."""
    lines = []
    for name, benchmark in BENCHMARKS.items():
        judge = "a judge" if benchmark.tasks else "its own rules"
        judge = {"claims": "the run's claims judge", "answers": judge}.get(benchmark.kind, "likelihoods")
        lines.append(f"{name:<26}{judge:<24}{benchmark.files}")
    return "\n".join(lines)


def side_by_side(folders: list[Path]) -> str:
    """The table of finished results. Raises DataError for a folder without one, and where judges differ."""
    results = []
    for folder in folders:
        path = folder / "results.json"
        if not path.is_file():
            raise DataError(f"{path} is missing: {folder} holds no finished benchmark.")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return table(results)
