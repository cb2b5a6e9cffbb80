"""The data files of the English world, in the product's own record format, over videos of the synthetic world.

conversations.jsonl  one video, several clean turns: what the base learns before any run
sft_easy.jsonl       clean short answers and judgements: keeps the judge alive while SFT teaches to describe
statements.jsonl     more judgements, most of them with a narrative: what makes a judge (docs/results/smol_world.md)
sft_hard.jsonl, policy_init.jsonl       descriptions by a careless annotator
preference.jsonl, rl.jsonl, test.jsonl  prompts; facts for evaluation only
generic_qa.json, qa.json                of the test videos, for `rlaif-lite bench`: descriptions and short questions
"""

import random
from collections.abc import Iterator
from pathlib import Path

from rlaif_lite.data.world import WorldConfig, WorldSplits, facts_of, write_world
from rlaif_lite.data.world_text import EVENTS, Facts, corrupt
from rlaif_lite.files import write_json, write_jsonl

from . import english

DROPOUT = 0.33  # share of frames in which an object is hidden
CONVERSED = 320  # videos that conversations are about
STATED = 8  # statements of a conversation in statements.jsonl


def record(name: str, video: str, turns: list[tuple[str, str | None]], **more) -> dict:
    """Turns of (prompt, answer); the video is shown in the first."""
    messages = []
    for number, (prompt, answer) in enumerate(turns):
        messages.append({"role": "user", "content": prompt if number else f"<video>\n{prompt}"})
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"id": name, "video": video, "messages": messages, **more}


def judgement(facts: Facts, rng: random.Random, context: str | None) -> tuple[str, str]:
    """A statement as a judge is asked about it, and the verdict."""
    said = english.statement(facts, rng)
    return english.asked(said.text, context), "Yes." if said.true else "No."


def conversations(name: str, video: str, facts: Facts, rng: random.Random) -> Iterator[dict]:
    """Two of the whole video, one of them with its narrative, and one of a clip."""
    alone = [judgement(facts, rng, None) for _ in range(6)] + [english.question(facts, rng) for _ in range(2)]
    alone.append((rng.choice(english.DESCRIBE), english.describe(facts, rng)))
    rng.shuffle(alone)
    yield record(f"{name}/alone", video, alone)
    told = english.narrative(facts, rng)
    first = judgement(facts, rng, told) if rng.random() < 0.7 else english.compared(facts, rng, told)
    yield record(f"{name}/told", video, [first, *(judgement(facts, rng, None) for _ in range(7))])
    clip = rng.randrange(EVENTS)
    shown = [(english.CAPTION, english.caption(facts, clip, rng))]
    yield record(f"{name}/clip", video, shown, clip=clip, clips=EVENTS)


def easy(name: str, video: str, facts: Facts, rng: random.Random) -> Iterator[dict]:
    """Clean short records about one video."""
    clip = rng.randrange(EVENTS)
    yield record(f"{name}/clip", video, [(english.CAPTION, english.caption(facts, clip, rng))], clip=clip, clips=EVENTS)
    for number, context in enumerate((None, english.narrative(facts, rng))):
        more = [judgement(facts, rng, None) for _ in range(3)]
        yield record(f"{name}/claims{number}", video, [judgement(facts, rng, context), *more])


def statements(name: str, video: str, facts: Facts, rng: random.Random) -> Iterator[dict]:
    """Conversations of statements alone, two of them with a narrative of their own."""
    for number in range(3):
        told = english.narrative(facts, rng) if number else None
        more = [judgement(facts, rng, None) for _ in range(STATED - 1)]
        yield record(f"{name}/statements{number}", video, [judgement(facts, rng, told), *more])


def records(splits: WorldSplits, seed: int) -> Iterator[tuple[str, dict]]:
    """(file, record) of everything; `seed` is the world's."""
    config = WorldConfig(dropout=DROPOUT)
    for split, count in splits.__dict__.items():
        for index in range(count):
            facts = facts_of(seed, split, index, config)
            rng = random.Random(f"english/{seed}/{split}/{index}")
            name, video = f"{split}/{index:05d}", f"videos/{split}/{index:05d}.mp4"
            prompt = rng.choice(english.DESCRIBE)
            careless = english.describe(corrupt(facts, rng), rng)
            if split == "sft":
                yield "sft_hard", record(name, video, [(prompt, careless)])
                yield from (("sft_easy", found) for found in easy(name, video, facts, rng))
                apart = random.Random(f"statements/{seed}/{index}")
                yield from (("statements", found) for found in statements(name, video, facts, apart))
                if index < CONVERSED:
                    yield from (("conversations", found) for found in conversations(name, video, facts, rng))
                continue
            yield split, record(name, video, [(prompt, None)], facts=facts)
            if split == "rl":
                yield "policy_init", record(f"{name}/init", video, [(prompt, careless)])


def questions(videos: int, seed: int) -> dict[str, list[dict]]:
    """{file: entries} about the test videos, in the shapes of Video-ChatGPT's benchmarks."""
    files: dict[str, list[dict]] = {"generic_qa": [], "qa": []}
    for index in range(videos):
        facts = facts_of(seed, "test", index, WorldConfig(dropout=DROPOUT))
        rng = random.Random(f"questions/{seed}/{index}")
        video = {"video_name": f"{index:05d}"}
        files["generic_qa"].append(video | {"Q": rng.choice(english.DESCRIBE), "A": english.describe(facts, rng)})
        asked, answer = english.question(facts, rng)
        files["qa"].append(video | {"question_id": str(index), "question": asked, "answer": answer})
    return files


def write(folder: Path, splits: WorldSplits, seed: int, workers: int = 1) -> Path:
    """Write the videos, and beside them the English records -> `folder`."""
    write_world(folder / "world", splits, seed, WorldConfig(dropout=DROPOUT), workers)
    files: dict[str, list[dict]] = {}
    for file, found in records(splits, seed):
        found["video"] = f"world/{found['video']}"
        files.setdefault(file, []).append(found)
    for file, lines in files.items():
        write_jsonl(folder / f"{file}.jsonl", lines)
    for file, entries in questions(splits.test, seed).items():
        write_json(folder / f"{file}.json", entries)
    return folder
