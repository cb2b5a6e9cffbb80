"""rlaif-lite on the work that the peers are given: its own stages, from the recipe to the optimiser's update.

`features` is what the stage of that name does for one video: decode, encode, write to the cache. A
DPO step includes the reference's pass over the step's pairs, which the stage makes for all pairs before it trains.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lab.bench.peers.turns import Turns, read_work, share_of_e
from rlaif_lite.data.records import Record
from rlaif_lite.files import write_jsonl
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.model.text import encode_answer
from rlaif_lite.phases import listen
from rlaif_lite.pipeline import STAGES
from rlaif_lite.recipe import Recipe
from rlaif_lite.stages import features
from rlaif_lite.stages.dpo import train as dpo
from rlaif_lite.training.loop import batches
from rlaif_lite.video.cache import FeatureStore
from rlaif_lite.video.decode import View, decode_views
from rlaif_lite.workspace import WHOLE, Workspace


class Listener:
    """Steps as turns; what each phase took is said with them."""

    def __init__(self, turns: Turns, first: Callable[[], None]):
        self.turns, self.first = turns, first  # `first` is done at the start of every step, and is part of it

    def step(self) -> None:
        self.turns.next()
        self.first()

    @contextmanager
    def phase(self, name: str, count: int) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.turns.add(f"{name}: seconds", time.perf_counter() - began)
        self.turns.add(f"{name}: tokens", count)


def reward(record: Record, answer: str, *_) -> float:
    """The peers' reward, as a rule of this project."""
    return share_of_e(answer)


def recipe_of(task: str, folder: Path, work: dict) -> Recipe:
    """What the peers are told, in this project's keys."""
    data = folder / "ours.jsonl"
    write_jsonl(
        data,
        [
            {
                "id": str(i),
                "video": item["video"],
                "messages": [
                    {"role": "user", "content": f"<video>{item['question']}"},
                    {"role": "assistant", "content": item["chosen"]},
                ],
            }
            for i, item in enumerate(work["items"])
        ],
    )
    constant = {"steps": work["steps"], "lr": work["lr"], "warmup_ratio": 0.0, "schedule": "constant"}
    return Recipe.model_validate(
        {
            "name": f"peers_{task}",
            "output": str(folder / f"ours_{task}"),
            "device": "cpu",
            "threads": 1,
            "data": {"sft_easy": [str(data)], "rl": [str(data)]},
            "model": {
                "base": str(folder / "checkpoint"),
                "quantization": "none",
                "lora": {"rank": work["rank"], "alpha": 2.0 * work["rank"]},
            },
            "features": {"frames": work["frames"], "max_pixels": work["side"] ** 2, "workers": 1}
            | {"cache": str(folder / "features")},
            "sft": {
                "easy": constant | {"batch_size": work["batch"]["sft"]} if task == "sft" else None,
                "hard": None,
                "policy_init": None,
            },
            "ppo": {
                "feedback": "rules",
                "rules": {"rewards": [{"rule": "lab.bench.peers.ours:reward"}]},
                "steps": work["steps"],
                "rollouts": work["batch"]["grpo"],
                "group_size": work["group"],
                "minibatch": work["batch"]["grpo"],
                "epochs": 1,
                "lr": work["lr"],
                "kl_coef": work["kl"],
                "kl_in": "loss",
                "kl_estimator": "k3",
                "value": "none",
                "baseline": "group",
                "whiten_advantages": False,
                "stop_penalty": 0.0,
                "max_new_tokens": work["new_tokens"],
                "checkpoint_every": 1000,
            },
            "dpo": constant | {"batch_size": work["batch"]["dpo"], "beta": work["beta"]},
        }
    )


def read_features(work: Workspace, given: dict, turns: Turns) -> None:
    """One video after the other."""
    base, section = work.base(tower=True), work.recipe.features
    base.limit_pixels(section.max_pixels)
    store = FeatureStore(work.folder / "cache")
    for number, item in enumerate(itertools.islice(itertools.cycle(given["items"]), given["steps"])):
        turns.next()
        size = base.images.size.of(section.frames)
        frames = decode_views(item["video"], {WHOLE: View(section.frames)}, size=size)
        with torch.no_grad():
            store.put(f"{number:016x}", features.encode(base, frames, []), {"video": item["video"]})


def learn_pairs(work: Workspace, given: dict, turns: Turns) -> None:
    """DPO on the items' answers."""
    section, base, pairs = work.recipe.dpo, work.base(), []
    for record, item in zip(work.records("rl"), given["items"], strict=True):
        prompt = encode_prompt(base, record.prompt, work.features(record))
        ids = [encode_answer(base, prompt.opening, item[name]) for name in ("chosen", "rejected")]
        pairs.append(dpo.Preferred(record, item["chosen"], item["rejected"], *ids, 1.0))
    start, folder = work.adapter("reference"), work.stage("dpo")
    order = iter(enumerate(batches(len(pairs), section.batch_size, section.steps, work.recipe.seed, "dpo.1")))
    reference = [(0.0, 0.0)] * len(pairs)
    work.load_role("reference")

    def read_reference() -> None:
        step, batch = next(order)
        (folder / f"reference{step}").mkdir()
        own = [pairs[i] for i in batch]
        for i, logps in zip(
            batch, dpo.reference_logps(work, "reference", own, folder / f"reference{step}"), strict=True
        ):
            reference[i] = logps

    with listen(Listener(turns, read_reference)):
        dpo.train(work, 1, start, start, pairs, reference, folder)


def main() -> None:
    task, folder, given = read_work()
    turns = Turns()
    torch.set_num_threads(1)
    recipe = recipe_of(task, folder, given)
    work = Workspace(recipe)
    if task == "features":
        read_features(work, given, turns)
        return
    features.run(work)
    listener = Listener(turns, lambda: None)
    if task == "sft":
        with listen(listener):
            STAGES["sft"].run(work)
        return
    STAGES["sft"].run(work)  # makes the adapters, trains nothing
    if task == "dpo":
        learn_pairs(work, given, turns)
        return
    with listen(listener):
        STAGES["ppo"].run(work)


if __name__ == "__main__":
    main()
