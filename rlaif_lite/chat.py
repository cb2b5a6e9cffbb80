"""Ask any role of a run about a video file."""

import sys
from pathlib import Path

import torch

from .data.records import VIDEO_MARK, Message
from .errors import StageError
from .model.base import Base, load_base
from .model.inputs import encode_prompt
from .model.roles import BASE, Roles
from .model.text import decode_answer
from .recipe import Recipe, load_recipe
from .rollout import Sampling, sample
from .rollout.score import best_of
from .stages.evaluate import ADAPTERS
from .stages.features import encode
from .training.loop import derive_seed
from .video.cache import FeatureRecord
from .video.decode import View
from .video.workers import decode_one
from .workspace import WHOLE, pick_device


class Chat:
    """One role of a finished run, and one video."""

    def __init__(self, run_dir: Path, role: str, best_of: int | None = None):
        """`best_of`: answer with the policy's best of so many, by its own reward against the role `reference`."""
        path = run_dir / "recipe.yaml"
        if not path.exists():
            raise StageError(
                f"{run_dir} is not a run folder: it has no recipe.yaml. Give the folder that `rlaif-lite run` wrote."
            )
        self.recipe: Recipe = load_recipe(path)
        self.base: Base = load_base(self.recipe.model, torch.device(pick_device(self.recipe.device)))
        self.roles = Roles(self.base, self.recipe.model.lora)
        self.role = ADAPTERS.get(role, role)
        self.best_of = best_of
        if best_of and self.role != "policy":
            raise StageError(f"--best-of ranks answers by what the policy learnt: ask the role `policy`, not `{role}`.")
        for name in {self.role, "reference"} if best_of else {self.role} - {BASE}:
            self.roles.load(name, run_dir / "adapters" / name)

    def look(self, video: str) -> FeatureRecord:
        """Decode and encode a video as the run's features stage did."""
        section = self.recipe.features
        self.base.limit_pixels(section.max_pixels)
        size = self.base.images.size.of(section.frames)
        frames = decode_one(video, {WHOLE: View(section.frames)}, size, section.max_source_pixels)
        return encode(self.base, frames, [step.model_dump() for step in section.prune])[WHOLE]

    def ask(self, video: FeatureRecord, question: str, temperature: float = 0.0, seed: int = 0) -> str:
        """One answer; greedy unless a temperature is given. The best of several is drawn as the evaluation draws."""
        prompt = encode_prompt(self.base, [Message("user", f"{VIDEO_MARK} {question}")], video)
        section = self.recipe.evaluate
        if self.best_of:
            sampling = Sampling(section.max_new_tokens, temperature or section.temperature)
            (best,) = best_of(
                self.roles,
                self.role,
                "reference",
                [prompt],
                sampling,
                count=self.best_of,
                seeds=[derive_seed(seed, j) for j in range(self.best_of)],
                beta=self.recipe.dpo.beta,
                batch_size=section.batch_size,
            )
            return decode_answer(self.base, best.answer.ids)
        sampling = Sampling(section.max_new_tokens, temperature)
        with self.roles.use(self.role) as role:
            (found,) = sample(role, [prompt], sampling, seeds=[seed])
        return decode_answer(self.base, found.ids)


def main(run_dir: Path, video: str, role: str, question: str | None, best_of: int | None) -> None:
    """Answer one question, or every line of standard input until it ends."""
    chat = Chat(run_dir, role, best_of)
    features = chat.look(video)
    if question is not None:
        print(chat.ask(features, question))
        return
    if sys.stdin.isatty():
        print("A question per line; an empty line or Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            break
        print(chat.ask(features, line.strip()), flush=True)
