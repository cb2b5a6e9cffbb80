"""Ask the roles of a run about a video file."""

import sys
from pathlib import Path

import torch

from .data.records import VIDEO_MARK, Message
from .data.splits import Video
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
    """The roles of a run, on one base, and videos to ask them about."""

    def __init__(self, run_dir: Path):
        """Raises StageError where `run_dir` is no run folder."""
        path = run_dir / "recipe.yaml"
        if not path.exists():
            raise StageError(
                f"{run_dir} is not a run folder: it has no recipe.yaml. Give the folder that `rlaif-lite run` wrote."
            )
        self.folder = run_dir
        self.recipe: Recipe = load_recipe(path)
        self.base: Base = load_base(self.recipe.model, torch.device(pick_device(self.recipe.device)))
        self.roles = Roles(self.base, self.recipe.model.lora)

    def load(self, *roles: str) -> None:
        """Put roles onto the base, those that are not there yet: base, sft, reference, policy, or a method's name."""
        for name in dict.fromkeys(ADAPTERS.get(role, role) for role in roles):
            if name != BASE and name not in self.roles.names:
                self.roles.load(name, self.folder / "adapters" / name)

    def look(self, video: Video) -> FeatureRecord:
        """Decode and encode a video as the run's features stage did."""
        section = self.recipe.features
        self.base.limit_pixels(section.max_pixels)
        size = self.base.images.size.of(section.frames)
        frames = decode_one(video, {WHOLE: View(section.frames)}, size, section.max_source_pixels)
        return encode(self.base, frames, [step.model_dump() for step in section.prune])[WHOLE]

    def ask(
        self, video: FeatureRecord, role: str, question: str, sampling: Sampling | None = None, seed: int = 0
    ) -> str:
        """A role's answer; greedy unless `sampling` says otherwise."""
        prompt = encode_prompt(self.base, [Message("user", f"{VIDEO_MARK} {question}")], video)
        self.load(role)
        sampling = sampling or Sampling(self.recipe.evaluate.max_new_tokens, temperature=0.0)
        with self.roles.use(ADAPTERS.get(role, role)) as active:
            (found,) = sample(active, [prompt], sampling, seeds=[seed])
        return decode_answer(self.base, found.ids)

    def best_of(self, video: FeatureRecord, question: str, count: int, seed: int = 0) -> str:
        """The best of the policy's `count` answers by its own reward against the role `reference`, drawn as the
        evaluation draws."""
        prompt = encode_prompt(self.base, [Message("user", f"{VIDEO_MARK} {question}")], video)
        section = self.recipe.evaluate
        self.load("policy", "reference")
        (best,) = best_of(
            self.roles,
            "policy",
            "reference",
            [prompt],
            Sampling(section.max_new_tokens, section.temperature),
            count=count,
            seeds=[derive_seed(seed, j) for j in range(count)],
            beta=self.recipe.dpo.beta,
            batch_size=section.batch_size,
        )
        return decode_answer(self.base, best.answer.ids)


def main(run_dir: Path, video: str, role: str, question: str | None, best_of: int | None) -> None:
    """Answer one question, or every line of standard input until it ends."""
    if best_of and ADAPTERS.get(role, role) != "policy":
        raise StageError(f"--best-of ranks answers by what the policy learnt: ask the role `policy`, not `{role}`.")
    chat = Chat(run_dir)
    chat.load(role, *(["reference"] if best_of else []))
    features = chat.look(video)

    def answer(asked: str) -> str:
        return chat.best_of(features, asked, best_of) if best_of else chat.ask(features, role, asked)

    if question is not None:
        print(answer(question))
        return
    if sys.stdin.isatty():
        print("A question per line; an empty line or Ctrl-D ends.", file=sys.stderr)
    for line in sys.stdin:
        if not line.strip():
            break
        print(answer(line.strip()), flush=True)
