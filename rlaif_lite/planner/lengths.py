"""How long the texts of each split are, in tokens, before anything is tokenised for a run.

From the data files where they are there (their first records), from the world's own generator where the run will make
them, and otherwise assumed. Tokens are counted by the base's tokenizer where it lies on this disk, else from
characters.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from jinja2 import Template
from transformers import AutoTokenizer

from ..data.readers import read_records
from ..data.records import Record, from_json
from ..data.splits import WORLD, WORLD_VIDEOS
from ..data.world import WorldConfig, WorldSplits, world_records
from ..model.base import named_template, resolve_base
from ..model.limits import record_tokens, template_tokens
from ..recipe import SPLITS, Recipe

LOOK = 2000  # records of a file that are read
WORLD_LOOK = 24  # videos of a split of the world that are looked at
PER_TOKEN = 3.5  # characters, where the tokenizer is not here
TEMPLATE = 30  # tokens of a chat template around a message, where the tokenizer is not here
PROMPT, ANSWER = 128, 256  # tokens, of a file that is not here


class Texts(NamedTuple):
    """One split."""

    records: int
    videos: int
    clips: float  # that the records of one video name
    prompt: int  # tokens of the longest prompt with its template, the video's tokens not among them
    answer: int  # of the longest answer
    both: int  # of the longest record
    known: bool  # false: the file is not here, and all of this is assumed
    longest: str = ""  # where that record was read


class Lengths(NamedTuple):
    """How long the texts of a run are, in tokens."""

    count: Callable[[str], int]  # tokens of a text
    template: int  # tokens around a message
    splits: dict[str, Texts]


def lengths_of(recipe: Recipe) -> Lengths:
    """Look at the recipe's data; files that are not there yet are assumed to hold PROMPT and ANSWER tokens."""
    path, named = Path(resolve_base(recipe.model.base)), named_template(recipe.model)
    said = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    if (path / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(path)
        count = lambda text: len(tokenizer.encode(text, add_special_tokens=False))
        around = template_tokens(tokenizer, named)
        template = TEMPLATE if around is None else around
    else:
        count, template = lambda text: round(len(text) / PER_TOKEN), TEMPLATE
        if named:
            written = Template(named).render(messages=said, bos_token="", eos_token="", add_generation_prompt=True)
            template = count(written)
    named = {split: recipe.data.files(split) for split in SPLITS}
    return Lengths(
        count, template, {name: _texts(recipe, files, count, template) for name, files in named.items() if files}
    )


def _texts(recipe: Recipe, files: Iterable[str], count: Callable[[str], int], template: int) -> Texts:
    found, total, known = [], 0, True
    for file in files:
        if file.startswith(WORLD):
            records, share = _of_world(recipe, file.removeprefix(WORLD))
        elif Path(file).exists():
            read = read_records(Path(file), limit=LOOK)
            records, share = read.records, read.share
        else:
            records, share, known = [], 1.0, False
        found += records
        total += round(len(records) / share)
    sizes = [record_tokens(r, count) for r in found]
    if not sizes:
        return Texts(0, 0, 0.0, PROMPT + template, ANSWER, PROMPT + template + ANSWER, False)
    videos = len({r.video for r in found})
    clips = len({(r.video, r.clip) for r in found if r.clip is not None}) / videos
    prompt, answer = (max(column) for column in zip(*sizes, strict=True))
    videos = videos * total // len(found)
    longest = max(range(len(found)), key=lambda i: sum(sizes[i]))
    both = sum(sizes[longest]) + template + 1
    return Texts(total, videos, clips, prompt + template, answer + 1, both, known, found[longest].source)


def _of_world(recipe: Recipe, name: str) -> tuple[list[Record], float]:
    """(some records of a world's set, which share of all they are)"""
    world, look = recipe.data.world, WORLD_LOOK
    split = WORLD_VIDEOS.get(name, name)
    splits = WorldSplits(**{"sft": 0, "preference": 0, "rl": 0, "test": 0} | {split: look})
    lines = world_records(splits, world.seed, WorldConfig(weak_video=world.weak_video))
    return [from_json(line, name) for file, line in lines if file == f"{name}.jsonl"], look / getattr(world, split)
