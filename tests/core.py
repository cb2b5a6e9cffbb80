"""What several tests need: a random base of the embedded architecture, saved once, and a synthetic world of a few
videos."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from lab.embedded_base import architecture  # noqa: E402
from rlaif_lite.data.records import Message, Record, from_json  # noqa: E402
from rlaif_lite.data.world import WorldSplits, write_world  # noqa: E402
from rlaif_lite.model.base import Base, load_base  # noqa: E402
from rlaif_lite.model.inputs import collate, encode_prompt  # noqa: E402
from rlaif_lite.model.roles import Roles  # noqa: E402
from rlaif_lite.recipe import Lora, Model, Recipe, load_recipe  # noqa: E402
from rlaif_lite.video.cache import FeatureRecord  # noqa: E402

torch.set_num_threads(1)
VIDEOS = 8  # of each split of the world

RECIPE = {
    "name": "test",
    "seed": 3,
    "device": "cpu",
    "threads": 1,
    "data": {
        "world": {"seed": 5, "sft": VIDEOS, "preference": VIDEOS, "rl": VIDEOS, "test": VIDEOS, "workers": 1},
        **{name: [f"world:{name}"] for name in ("sft_easy", "sft_hard", "policy_init", "preference", "rl", "test")},
    },
    "model": {"lora": {"rank": 4, "alpha": 8}},
    "features": {"frames": 6, "clips": 3, "clip_frames": 6, "workers": 1},
    "sft": {
        "easy": {"steps": 3, "batch_size": 6, "lr": 2e-3},
        "hard": {"steps": 3, "batch_size": 6, "lr": 2e-3},
        "policy_init": {"steps": 2, "batch_size": 6, "lr": 1e-3},
        "replay": 0.34,
        "loss_per": "record",
    },
    "context": {
        "prompt": "describe the clip",
        "markers": ["first", "then", "finally"],
        "max_new_tokens": 5,
        "batch_size": 12,
    },
    "preference": {
        "samples": 4,
        "max_new_tokens": 9,
        "batch_size": 16,
        "compare_pairs": 5,
        "claims": {"mode": "inline", "prompt": "<video> {context} response :", "context_prefix": "context : {context}"},
        "pairwise": {
            "prompt": "<video> {context} <|> response A : {a} <|> response B : {b} <|> better ?",
            "context_prefix": "context : {context}",
        },
    },
    "reward": {
        "steps": 3,
        "batch_size": 4,
        "lr": 1e-3,
        "pool": "tokens",
        "pool_tokens": [".", "red"],
        "prompt": "response :",
        "floor": 0.0,
        "heldout": 0.3,
    },
    "ppo": {
        "steps": 4,
        "rollouts": 8,
        "minibatch": 4,
        "lr": 5e-4,
        "value_lr": 1e-3,
        "max_new_tokens": 8,
        "checkpoint_every": 2,
    },
    "evaluate": {
        "samples": 2,
        "max_new_tokens": 8,
        "batch_size": 16,
        "bootstrap": 50,
        "examples": 2,
        "temperatures": [0.5],
    },
}
# A step of PPO on made-up inputs, as short as it gets.
SHORT_STEP = ["ppo.rollouts=4", "ppo.micro_batch=2", "ppo.max_new_tokens=5", "ppo.epochs=1", "preference.batch_size=4"]
SHORT_STEP += ["device=cpu", "threads=1", "features.frames=4", "features.clip_frames=2"]


def random_base(folder: Path) -> Path:
    """A base with random weights: config, tokenizer, processor and safetensors, as a user would have it.

    What its blocks add to the stream is made large, or with tied embeddings every token would be followed by itself."""
    model = architecture.build_model(seed=0)
    for name, weight in model.named_parameters():
        if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(10)
    architecture.save(model, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The random base, saved once."""
    return random_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def load(checkpoint):
    """load(quantization="nf4", tower=False, **keys of `model`) -> a fresh Base on the CPU."""

    def make(quantization: str = "nf4", tower: bool = False, **keys) -> Base:
        return load_base(
            Model(base=str(checkpoint), quantization=quantization, **keys), torch.device("cpu"), tower=tower
        )

    return make


@pytest.fixture(scope="session")
def base(load) -> Base:
    """The random base in 4 bits, without its tower; shared, so no test may change it or put adapters on it."""
    return load()


@pytest.fixture
def roles(load) -> Roles:
    """No roles yet, on a base of their own."""
    return Roles(load(), Lora(rank=4, alpha=8.0))


@pytest.fixture(scope="module")
def judge(load) -> Roles:
    """One role, `sft`, on a base of its own; shared by the tests of a file."""
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    roles.add("sft")
    shake(roles, "sft")
    return roles


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with videos and JSONL files of a world of VIDEOS videos per split."""
    return write_world(tmp_path_factory.mktemp("world"), WorldSplits(VIDEOS, VIDEOS, VIDEOS, VIDEOS), seed=5)


def small_recipe(checkpoint: Path, folder: Path, *overrides: str) -> Recipe:
    """RECIPE on the random base, into `folder`/run."""
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return load_recipe(path, [f"model.base={checkpoint}", f"output={folder / 'run'}", *overrides])


@pytest.fixture
def recipe(checkpoint, tmp_path):
    """recipe("ppo.steps=2", ...) -> the small recipe, its run folder tmp_path/run."""
    return lambda *overrides: small_recipe(checkpoint, tmp_path, *overrides)


@pytest.fixture(scope="session")
def finished(checkpoint, tmp_path_factory) -> Recipe:
    """The recipe of a run that is done. Its folder is shared: read it, or copy it first."""
    from rlaif_lite import pipeline

    recipe = small_recipe(checkpoint, tmp_path_factory.mktemp("finished"))
    pipeline.run(recipe)
    return recipe


@pytest.fixture
def rerun(finished, tmp_path):
    """rerun("ppo.steps=2", ...) -> the small recipe with its run folder a copy of the finished one."""

    def make(*overrides: str) -> Recipe:
        shutil.copytree(finished.output, tmp_path / "run", dirs_exist_ok=True)
        return small_recipe(Path(finished.model.base), tmp_path, *overrides)

    return make


def shake(roles: Roles, name: str, seed: int = 0, size: float = 0.05) -> None:
    """Give a role weights that do something: a fresh adapter's output is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in roles.parameters(name):
        parameter.data += size * torch.randn(parameter.shape, generator=generator)


def video_of(
    base: Base, tokens: int = 8, layout: int | None = None, keep: list[int] | None = None, seed: int = 0
) -> FeatureRecord:
    """Made-up features of a video: `tokens` of a layout (all of it unless `keep` lists the ones that pruning left)."""
    layout = layout or tokens
    keep = list(range(layout)) if keep is None else keep
    features_ND = torch.randn(layout, base.width, generator=torch.Generator().manual_seed(seed)) * 0.3
    return record_of(features_ND, layout, keep)


def record_of(features_ND: torch.Tensor, layout: int, keep: list[int], per_frame: int = 4) -> FeatureRecord:
    """A record of one run of 1-D positions: token `keep[i]` of `layout` is features_ND[keep[i]]; frames one second
    apart."""
    place_K, frames = torch.tensor(keep), layout // per_frame
    return FeatureRecord(
        features_ND[keep],
        place_K[None],
        place_K // per_frame,
        torch.arange(frames).double(),
        torch.tensor([len(keep)]),
        torch.tensor([layout]),
        layout,
        frames,
        float(frames),
    )


def record(prompt: str, answer: str | None = None, video: str | None = "v.mp4", **more) -> Record:
    messages = [{"role": "user", "content": prompt}] + ([{"role": "assistant", "content": answer}] if answer else [])
    return from_json({"id": prompt, "video": video, "messages": messages, **more}, "made up")


def gradients(base: Base) -> list[torch.Tensor]:
    """Of a fixed LoRA role, after a pass in evaluation mode without gradients: that pass is what sets the trap."""
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy", seed=1)
    shake(roles, "policy")
    roles.trainable("policy")
    batch = collate(base, [encode_prompt(base, [Message("user", "<video> describe the video")], video_of(base))])
    with torch.no_grad(), roles.use("policy") as role:
        before_BSD = role.hidden(batch)
    with roles.use("policy") as role:
        hidden_BSD = role.hidden(batch)
        hidden_BSD.pow(2).mean().backward()
    assert (hidden_BSD - before_BSD).abs().max() <= 1e-5  # evaluation and training are one function
    return [parameter.grad for parameter in roles.parameters("policy")]
