"""What data files are read as, before any training: `rlaif-lite data FILE...`.

Format, counts, lengths, missing videos, and the first records as the model will read them: every special token, the
video's tokens as a count, and the trained tokens between « and ». With a recipe or a base, lengths are in tokens of its
tokenizer and its chat template is applied; weights are never loaded. Without, lengths are in words.
"""

from collections.abc import Callable, Iterable
from itertools import groupby
from math import isqrt
from pathlib import Path

from .data.readers import answers_of, count_words, read_records, with_videos
from .data.records import VIDEO_MARK, Record
from .errors import DataError, RlaifError

SHOWN = 3
Render = Callable[[Record], str]


def report_on(files: Iterable[Path], recipe: str | None, base: str | None, video_root: Path | None) -> str:
    """The report on some files as text. Raises DataError for a file that is refused."""
    from .recipe import Model, Recipe, load_recipe

    loaded = Recipe(name="data", model=Model(base=base)) if base else None
    if recipe is not None:
        loaded = load_recipe(recipe, [f"model.base={base}"] if base else [])
    root = video_root or (loaded.data.video_root if loaded else None)
    count, unit, render, refusals = _tools(loaded)
    return "\n\n".join(_one_file(path, root, count, unit, render, refusals) for path in files)


def _one_file(path: Path, root, count, unit: str, render: Render, refusals) -> str:
    read = read_records(path, video_root=root)
    kept, missing = with_videos(read.records)
    records = read.records
    pairs = [r for r in records if r.chosen is not None]
    answered = [r for r in records if r.answer is not None]
    rounds = [sum(m.role == "assistant" for m in r.messages) for r in answered]
    lines = [f"{read.path}: {read.format}, {len(records)} records"]
    kinds = {
        f"{len(answered)} with an answer ({sum(n > 1 for n in rounds)} conversations of several)": answered,
        f"{len(pairs)} pairs ({sum(r.chosen == r.rejected for r in pairs)} of them equal, to be left out)": pairs,
        f"{len(records) - len(answered) - len(pairs)} prompts alone": len(records) > len(answered) + len(pairs),
        f"{sum(r.solution is not None for r in records)} with a solution": any(r.solution for r in records),
    }
    lines += [f"  {text}" for text, there in kinds.items() if there]
    videos = {r.video for r in records if r.video is not None}
    lines.append(f"  {len(videos)} videos, {sum(r.video is None for r in records)} records of text alone")
    if missing:
        names = sorted({r.video if isinstance(r.video, str) else r.video[0] for r in missing})
        lines.append(
            f"  {len(missing)} records miss their video: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        )
    lines.append(
        _spread("prompt", unit, [sum(count(m.content.replace(VIDEO_MARK, "")) for m in r.prompt) for r in records])
    )
    texts = [text for r in answered if r.chosen is None for text in answers_of(r, "all")]
    texts += [text for r in pairs for text in (r.chosen, r.rejected)]
    lines.append(_spread("answer", unit, [count(text) for text in texts]))
    if read.ignored:
        lines.append(f"  keys left out: {', '.join(read.ignored)}")
    lines += [f"  refused: {reason}" for reason in refusals(path.name, records)]
    for record in records[:SHOWN]:
        frames = record.video if isinstance(record.video, tuple) else ()
        video = f"{frames[0]}, {len(frames)} frames" if frames else record.video or "none"
        lines += ["", f"  {record.source} (id {record.id}, video {video})", f"    {render(record)}"]
        if record.chosen is not None:
            lines += [f"    chosen: {record.chosen!r}", f"    rejected: {record.rejected!r}"]
    return "\n".join(line for line in lines if line is not None)


def _spread(what: str, unit: str, sizes: list[int]) -> str | None:
    if not sizes:
        return None
    ordered = sorted(sizes)
    middle, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
    return f"  {what}, {unit}: median {middle}, 95 % up to {high}, longest {ordered[-1]}"


def _tools(recipe) -> tuple[Callable[[str], int], str, Render, Callable[[str, list[Record]], list[str]]]:
    """(count of a text, its unit, how a record is shown, what the data stage would refuse)."""
    if recipe is None:
        return count_words, "words", _plain, lambda name, records: []
    from .model.limits import check_answers, check_lengths, load_limits

    limits = load_limits(recipe.model)
    shell, video = shell_of(recipe)

    def refusals(name: str, records: list[Record]) -> list[str]:
        found = []
        checks = (
            lambda: check_answers(limits, name, records, recipe.sft.train_on),
            lambda: check_lengths(limits, name, records, len(video.features_KD), None),
        )
        for check in checks:
            try:
                check()
            except DataError as error:
                found.append(str(error))
        return found

    count = lambda text: len(limits.tokenizer.encode(text, add_special_tokens=False))
    return count, "tokens", lambda record: _as_read(shell, video, record, recipe.sft), refusals


def _plain(record: Record) -> str:
    return "\n    ".join(
        f"{m.role}: «{m.content}»" if m.role == "assistant" else f"{m.role}: {m.content}" for m in record.messages
    )


def shell_of(recipe):
    """The recipe's base without weights, and a video of zeros laid out as the recipe's features will be."""
    import torch
    from transformers import AutoModelForImageTextToText

    from .model.base import finish, read_config
    from .model.families import Encoded
    from .model.layout import lay_out
    from .planner.shapes import frame_size, shapes_of

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(read_config(recipe.model))
    shell = finish(model, recipe.model, torch.device("meta"), tower=False)
    shapes, section = shapes_of(recipe.model, torch.device("cpu")), recipe.features
    groups, grid = section.frames, (isqrt(shapes.frame_tokens),) * 2
    if patch := shapes.images.patch:
        groups = -(-section.frames // patch.frames)
        grid = tuple(side // (patch.side * patch.merge) for side in frame_size(shapes, section, section.frames))
    features_LGPD = torch.zeros(1 + shapes.deepstack, groups, grid[0] * grid[1] if patch else shapes.frame_tokens, 1)
    chain = [step.model_dump() for step in section.prune]
    video = lay_out(
        shell.family,
        shell.model.config,
        Encoded(features_LGPD, grid),
        chain,
        time_G=torch.arange(groups, dtype=torch.float64),
        frames=section.frames,
        duration=float(section.frames),
    )
    return shell, video


def _as_read(shell, video, record: Record, sft) -> str:
    """A record's tokens as text: special tokens as they are, the video as a count, trained tokens between « and »."""
    from .model.inputs import IGNORE, encode_prompt
    from .stages.sft import examples

    features = None if record.video is None else video
    try:
        if record.answer is None:
            row, targets_S = encode_prompt(shell, record.prompt, features), []
        else:
            row, targets_S, _ = examples(shell, record, features, sft.loss_per, sft.train_on)[0]
    except RlaifError as error:
        return f"refused: {error}"
    if record.verdicts:
        said = "".join(shell.tokenizer.decode(row.ids_S))
        verdicts = [shell.tokenizer.decode([target]) for target in targets_S if target != IGNORE]
        return f"{said} «verdicts: {' '.join(verdicts)}»"
    trained = [False, *(target != IGNORE for target in targets_S)]
    trained = (trained + [False] * len(row.ids_S))[: len(row.ids_S)]
    kinds = [(id == shell.placeholder_id, learnt) for id, learnt in zip(row.ids_S, trained, strict=True)]
    parts = []
    for (is_video, learnt), group in groupby(zip(kinds, row.ids_S, strict=True), key=lambda each: each[0]):
        ids = [id for _, id in group]
        text = f"<video: {len(ids)} tokens>" if is_video else shell.tokenizer.decode(ids, skip_special_tokens=False)
        parts.append(f"«{text}»" if learnt else text)
    return "".join(parts)
