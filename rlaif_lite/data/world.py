"""The synthetic world: small mp4 videos whose facts are known, and the data files of a whole RLAIF run over them.

A video is 24 frames of 64 x 64 pixels at 8 frames per second. Three events follow each other, 8 frames each: a
coloured shape that moves or changes size. In half of the videos a small star stands in a corner all the time. Pixel
noise, jitter and frames in which the object is hidden make it hard: a policy that sees 2 frames of each event misses
things that a clip caption (6 frames of it) does not.

Video `index` of `split` in world `seed` is a pure function of the three: splits never share a video, and a smaller
world is a subset of a larger one. This world has no counterpart in the paper; it exists so that every stage can be run
and measured against the truth in minutes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from rlaif_lite.data import world_text
from rlaif_lite.data.world_text import COLOURS, EVENTS, MOTIONS, SHAPES, Facts, corrupt, describe, garbled
from rlaif_lite.errors import DataError
from rlaif_lite.files import atomic, read_json, remove, write_json, write_text

STUMBLING = 0.15  # share of the divided answers that stumble, as sampled answers do
GARBLED = 0.25  # share of the checked answers with a malformed sentence
RGB = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 70, 230),
    "yellow": (225, 215, 50),
    "purple": (160, 50, 190),
    "white": (235, 235, 235),
}


@dataclass(frozen=True)
class WorldConfig:
    """What videos look like. The embedded base was pretrained on the defaults."""

    size: int = 64  # pixels, width and height
    frames_per_event: int = 8
    fps: int = 8
    noise: float = 22.0  # standard deviation of the pixel noise, of 255
    jitter: float = 1.0  # standard deviation of the object's place, pixels
    dropout: float = 0.33  # chance that the object is hidden in a frame
    star: float = 0.5  # chance of a corner star
    crf: int = 20  # libx264 quality
    weak_video: bool = False  # no easy record is about a whole video: the data of a model that reads clips only


@dataclass(frozen=True)
class WorldSplits:
    """Videos per split."""

    sft: int = 600
    preference: int = 800
    rl: int = 800
    test: int = 300


def facts_of(world_seed: int, split: str, index: int, config: WorldConfig = WorldConfig()) -> Facts:
    """The facts of one video."""
    rng = random.Random(f"facts/{world_seed}/{split}/{index}")
    events = [[rng.choice(COLOURS), rng.choice(SHAPES), rng.choice(MOTIONS)] for _ in range(EVENTS)]
    return {"events": events, "star": rng.choice(COLOURS) if rng.random() < config.star else None}


def _shape(name: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Mask of a shape; x and y are pixel offsets from its centre (F,H,W), r its radius (F,1,1)."""
    if name == "circle":
        return x * x + y * y <= r * r
    if name == "square":
        return (abs(x) <= r * 0.88) & (abs(y) <= r * 0.88)
    if name == "triangle":
        return (y <= r * 0.8) & (y >= -r) & (abs(x) <= (y + r) * 0.6)
    if name == "cross":
        return ((abs(x) <= r * 0.33) & (abs(y) <= r)) | ((abs(y) <= r * 0.33) & (abs(x) <= r))
    return np.hypot(x, y) <= r * (0.62 + 0.38 * np.cos(5 * np.arctan2(y, x)))  # star


def render(
    facts: Facts, rng: np.random.Generator, config: WorldConfig = WorldConfig()
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a video: frames (F,H,W,3) uint8, and (F,4) float32: visible, x, y, radius (pixels) of the object."""
    size, per = config.size, config.frames_per_event
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    frames = np.empty((EVENTS * per, size, size, 3), np.float32)
    frames[:] = rng.uniform(55, 75, (EVENTS * per, 1, 1, 1))
    if facts["star"]:
        corner = np.array([8, size - 8])[rng.integers(0, 2, 2)]
        frames[:, _shape("star", columns - corner[0], rows - corner[1], np.float32(7.5))] = RGB[facts["star"]]
    along = np.linspace(-0.5, 0.5, per)
    placed = []
    for number, (colour, shape, motion) in enumerate(facts["events"]):
        (x0, y0), radius, distance = rng.uniform(26, 38, 2) * size / 64, rng.uniform(8.5, 11), rng.uniform(20, 28)
        step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
        x = x0 + step[0] * distance * along + rng.normal(0, config.jitter, per)
        y = y0 + step[1] * distance * along + rng.normal(0, config.jitter, per)
        r = radius * (1 + {"grows": 0.9, "shrinks": -0.9}.get(motion, 0.0) * along)
        visible = rng.random(per) >= config.dropout
        place = lambda values: values[:, None, None].astype(np.float32)  # noqa: E731
        mask = _shape(shape, columns - place(x), rows - place(y), place(r)) & visible[:, None, None]
        bright = np.array(RGB[colour], np.float32) * rng.uniform(0.85, 1.08, (per, 1))
        event = frames[number * per : (number + 1) * per]
        event[:] = np.where(mask[..., None], bright[:, None, None], event)
        placed.append(np.stack([visible, x, y, r], 1))
    frames += rng.standard_normal(frames.shape, np.float32) * config.noise
    return frames.clip(0, 255).astype(np.uint8), np.concatenate(placed).astype(np.float32)


def pixels_rng(world_seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of everything in a video that is not a fact: places, brightness, noise, hidden frames."""
    return np.random.default_rng(random.Random(f"pixels/{world_seed}/{split}/{index}").getrandbits(128))


def encode(path: str | Path, frames: np.ndarray, config: WorldConfig = WorldConfig()) -> None:
    """Writes frames (F,H,W,3) uint8 as H.264 mp4; one thread, so that the same frames give the same bytes."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=config.fps, options={"crf": str(config.crf), "preset": "ultrafast", "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_video(
    path: str | Path, world_seed: int, split: str, index: int, config: WorldConfig = WorldConfig()
) -> np.ndarray:
    """Renders and encodes one video of the world; returns what `render` says of its frames, (F,4)."""
    frames, placed = render(facts_of(world_seed, split, index, config), pixels_rng(world_seed, split, index), config)
    encode(path, frames, config)
    return placed


def _write_one(job: tuple[str, int, str, int, WorldConfig]) -> None:
    """An interrupted world never holds half a file."""
    path, *what = job
    with atomic(path, durable=False) as tmp:  # many small files: whoever needs them on the disk syncs them together
        write_video(tmp, *what)


def _record(name: str, video: str, prompt: str, answer: str | None = None, **more) -> dict:
    """A record in the shape of `records.Record`; empty fields are left out."""
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": name, "video": video, "messages": messages, **more}


def easy_records(name: str, video: str, facts: Facts, rng: random.Random, weak: bool = False) -> Iterator[dict]:
    """Clean short tasks about one video: they keep alive what the judge needs while SFT teaches to describe.

    Three clip captions, two questions and one about the star, two claims, two checks (some of answers that stumble),
    one pair; of the last three, half with a context that errs as clip captions do. `weak` teaches nothing about a
    whole video: no questions, and everything else with a context.
    """

    def prefix() -> str:
        return f"<video> context : {world_text.narrative(facts, rng)} " if weak or rng.random() < 0.5 else "<video> "

    for clip in range(EVENTS):
        said = world_text.caption(facts, clip)
        yield _record(f"{name}/clip{clip}", video, "<video> describe the clip", said, clip=clip, clips=EVENTS)
    if not weak:
        for number in range(2):
            text, answer = world_text.question(facts, rng)
            yield _record(f"{name}/question{number}", video, f"<video> {text}", answer)
        text, answer = world_text.star_question(facts)
        yield _record(f"{name}/star", video, f"<video> {text}", answer)
    for number in range(2):
        text, is_true = world_text.claim(facts, rng)
        yield _record(f"{name}/claim{number}", video, prefix() + text, world_text.answer_yes_no(is_true))
    for number in range(2):
        answer = world_text.sampled(facts, rng)
        if rng.random() < GARBLED:
            answer = garbled(answer, rng)
        ends = accumulate(len(word) + 1 for word in answer.split())
        marks = [(end - 1, label) for end, label in zip(ends, world_text.verdicts(answer, facts), strict=False)]
        yield _record(f"{name}/check{number}", video, prefix() + "response :", answer, verdicts=marks)
    a, b, margin = world_text.pair(facts, rng, ties=0.0)
    yield _record(
        f"{name}/pair",
        video,
        f"{prefix()}<|> response A : {a} <|> response B : {b} <|> better ?",
        "A" if margin > 0 else "B",
    )


def question_records(name: str, video: str, facts: Facts, learnt: bool) -> Iterator[dict]:
    """Questions that rules can check: with a careless annotator's answers where they are `learnt`, else with the right
    solutions."""
    rng = random.Random(f"questions/{name}/{facts}")
    for asked in world_text.solved_questions(corrupt(facts, rng) if learnt else facts, rng):
        more = {"answer": f"{asked.solution} ."} if learnt else {"solution": asked.solution, "task": asked.task}
        more |= {"options": list(asked.options)} if asked.options and not learnt else {}
        yield _record(f"{name}/{asked.task}", video, f"<video> {asked.question}", **more)


def world_records(splits: WorldSplits, seed: int, config: WorldConfig) -> Iterator[tuple[str, dict]]:
    """(file, record) of the whole world. Only prompts carry `facts`, and only evaluation may read them. The answers
    of `sft_questions` are a careless annotator's; the solutions of the other questions are right."""
    describe_it = "<video> describe the video"
    for split, count in asdict(splits).items():
        for index in range(count):
            facts = facts_of(seed, split, index, config)
            rng = random.Random(f"labels/{seed}/{split}/{index}")
            name, video = f"{split}/{index:05d}", f"videos/{split}/{index:05d}.mp4"
            if split in ("sft", "rl", "test"):
                for record in question_records(name, video, facts, learnt=split == "sft"):
                    yield f"{split}_questions.jsonl", record
            if split == "sft":
                yield "sft_hard.jsonl", _record(name, video, describe_it, describe(corrupt(facts, rng)))
                for record in easy_records(name, video, facts, rng, config.weak_video):
                    yield "sft_easy.jsonl", record
                continue
            yield f"{split}.jsonl", _record(name, video, describe_it, facts=facts)
            if split == "rl":
                yield "policy_init.jsonl", _record(f"{name}/init", video, describe_it, describe(corrupt(facts, rng)))


class DividedAnswer(NamedTuple):
    """A question, an answer and its atomic claims: what an adapter that divides answers learns from."""

    question: str
    answer: str
    claims: list[str]
    sentences: list[list[str]]

    def asked(self, rng: random.Random) -> tuple[str, str]:
        """One claim, of a sentence drawn first, and the question about it."""
        chosen = rng.choice(world_text.claims_of(" ".join(rng.choice(self.sentences))))
        return chosen, world_text.claim_question(chosen)


def divided_answer(rng: random.Random) -> DividedAnswer:
    """Of a video that is drawn here and is none of a run's; some sentences are left out, some stumble."""
    facts = facts_of(rng.getrandbits(48), "divide", 0)
    sentences = world_text.sentences_of(garbled(describe(facts), rng) if rng.random() < STUMBLING else describe(facts))
    kept = sorted(rng.sample(range(len(sentences)), rng.randint(1, len(sentences))))  # also answers of few words
    answer = " ".join(" ".join([*sentences[i], "."]) for i in kept)
    return DividedAnswer("describe the video", answer, world_text.claims_of(answer), [sentences[i] for i in kept])


def write_world(
    folder: str | Path,
    splits: WorldSplits = WorldSplits(),
    seed: int = 0,
    config: WorldConfig = WorldConfig(),
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `videos/<split>/NNNNN.mp4` and the JSONL files of a run; returns the folder.

    Files: sft_easy (clean short answers and judge formats), sft_hard and policy_init (noisy descriptions of the sft
    and the rl videos), preference, rl and test (prompts; with facts), sft_questions (careless answers), rl_questions
    and test_questions (with solutions). `progress(done, total)` is called as videos are finished. A finished world of
    the same seed, splits and config is left as it is, an interrupted one is completed; DataError if the folder holds
    another world.
    """
    folder = Path(folder)
    world = {"seed": seed, "splits": asdict(splits), "config": asdict(config)}
    card, begun = folder / "world.json", folder / "world.part.json"
    for path in (card, begun):
        if path.exists() and read_json(path) != world:
            raise DataError(
                f"{path} describes another world than the one asked for (seed {seed}). "
                "Choose an empty folder or delete this one."
            )
    if card.exists():
        return folder
    for split in asdict(splits):
        (folder / "videos" / split).mkdir(parents=True, exist_ok=True)
    write_json(begun, world)
    wanted = [
        (str(folder / f"videos/{s}/{i:05d}.mp4"), seed, s, i, config)
        for s, n in asdict(splits).items()
        for i in range(n)
    ]
    jobs = [job for job in wanted if not os.path.exists(job[0])]
    for done in _run(jobs, workers):
        if progress:
            progress(len(wanted) - len(jobs) + done, len(wanted))
    files: dict[str, list[str]] = {}
    for file, record in world_records(splits, seed, config):
        files.setdefault(file, []).append(json.dumps(record) + "\n")
    for file, lines in files.items():
        write_text(folder / file, "".join(lines))
    write_json(card, world)
    remove(begun)
    return folder


def _run(jobs: list[tuple[str, int, str, int, WorldConfig]], workers: int) -> Iterator[int]:
    """Does the jobs and yields how many are done. Processes are spawned: a fork of one with torch threads can hang."""
    if workers <= 1 or len(jobs) < 32:
        for done, job in enumerate(jobs, 1):
            _write_one(job)
            yield done
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(_write_one, jobs, chunksize=8), 1):
            yield done
