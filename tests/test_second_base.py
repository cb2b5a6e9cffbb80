"""The reward role on a base of its own: another width, another tokenizer, features of its own tower.

Shapes: B answers, S positions.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from core import shake
from lab.embedded_base import architecture
from rlaif_lite import pipeline
from rlaif_lite.data.records import Message
from rlaif_lite.errors import RecipeError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.inputs import collate, encode_prompt
from rlaif_lite.recipe import Model, RewardBase, check_files
from rlaif_lite.stages import features, reward
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.stages.ppo.experience import cut
from rlaif_lite.stages.ppo.feedback import RewardModelFeedback
from rlaif_lite.video.cache import read_index
from rlaif_lite.workspace import Workspace


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A wider base whose ordinary words have other ids than the policy's."""
    folder = tmp_path_factory.mktemp("larger")
    config = architecture.build_config()
    config.text_config.hidden_size, config.text_config.head_dim, config.text_config.num_hidden_layers = 192, 24, 2
    torch.manual_seed(1)
    architecture.save(architecture.LlavaNextVideoForConditionalGeneration(config), folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {token["id"] for token in tokenizer["added_tokens"]}
    words = [word for word, number in tokenizer["model"]["vocab"].items() if number not in special]
    numbers = [tokenizer["model"]["vocab"][word] for word in words]
    tokenizer["model"]["vocab"] |= dict(zip(reversed(words), numbers, strict=True))
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def work(rerun, larger) -> Workspace:
    """The finished run's folder, under a recipe that gives the reward role a base of its own."""
    recipe = rerun(f"model.reward_base.base={larger}", "ppo.steps=2", "ppo.checkpoint_every=1")
    return Workspace(recipe)


def test_the_stages_with_a_reward_base_of_its_own(work, larger):
    features.run(work)
    own, other = (read_index(work.folder / "features" / name) for name in ("index.json", "index_reward.json"))
    assert own.keys() == other.keys() and not set(own.values()) & set(other.values())
    record = work.records("rl")[0]
    assert [side.features(record).features_KD.shape[1] for side in (work, work.for_reward)] == [128, 192]

    work.release_roles()
    result = reward.run(work)
    assert result["train_pairs"] > 0 and 0 <= result["heldout_accuracy"] <= 1
    assert load_file(work.adapter("reward") / "head.safetensors")["weight"].shape == (1, 192)
    saved = json.loads((work.adapter("reward") / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(larger)

    work.release_roles()
    result = ppo.run(work)  # which checks that KL is 0 and the ratio 1 at the first step
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "ppo"]
    assert len(lines) == 2 and lines[0]["objective/kl"] == 0.0
    assert set(result["roles"]) == {"policy", "reference", "value", "reward"}
    assert result["reward_base_bytes"] == work.for_reward.base().bytes() != result["base_bytes"]
    assert load_file(work.adapter("value") / "head.safetensors")["weight"].shape == (1, 128)


def test_scores_are_the_reward_bases_own_reading_of_the_text(work):
    """Each answer by hand: its words in the other tokenizer, the head summed over pooled words and the last token."""
    features.run(work)
    side = work.for_reward
    work.load_role("reference")
    work.roles.add("policy", copy_of="reference")
    work.roles.add("value", copy_of="reference")
    work.roles.add_head("value", zero=True)
    side.roles.add("reward", seed=1)
    side.roles.add_head("reward", zero=False, seed=1)
    shake(side.roles, "reward")
    feedback, records = RewardModelFeedback(work), work.records("rl")[:8]
    answers = ppo.rollout(work, records, 0)
    minibatches = cut(work, feedback.critic_prompt, records, answers, 0, work.recipe.ppo.minibatch)
    found = ppo.score(
        work.roles, work.recipe.ppo, feedback, minibatches, feedback.take(records, answers, 0), kl_coef=0.1
    )

    here, there = work.base(), side.base()
    assert {a.stopped for a in answers} == {True, False} or len({len(a.ids) for a in answers}) > 1
    for row, (record, answer) in enumerate(zip(records, answers, strict=True)):
        words = here.tokenizer.convert_ids_to_tokens(answer.ids)
        ids = there.tokenizer.convert_tokens_to_ids(words)  # one word, one token in both; EOS is a word here
        assert words[-1] == "</s>" or not answer.stopped
        prompt = encode_prompt(there, [Message("user", "<video>\nresponse :")], side.features(record))
        with torch.no_grad(), side.roles.use("reward") as role:
            value_S = role.scalar(role.hidden(collate(there, [prompt.extend(ids)])))[0]
        start = len(prompt.ids_S)
        read = [t for t, word in enumerate(words) if word in (".", "red") or t == len(words) - 1]
        assert abs(found.raw_B[row].item() - sum(value_S[start + t].item() for t in read)) < 1e-4


def test_what_a_reward_base_makes_stale(work, larger):
    def reads(name: str) -> dict:
        return pipeline.inputs(work, name, pipeline.STAGES[name].READS)

    for name in ("features", "reward", "ppo"):
        assert reads(name)["model.reward_base.base"] == str(larger) and "files of model.reward_base" in reads(name)
    assert not any("reward_base" in key for name in ("context", "preference", "evaluate") for key in reads(name))


def test_the_reward_bases_section_replaces_the_bases_own():
    model = Model(base="a", revision="b", dtype="bfloat16", reward_base=RewardBase(base="c", quantization="none"))
    assert model.for_reward() == Model(base="c", quantization="none", dtype="bfloat16")
    assert Model(base="a").for_reward() == Model(base="a")


def test_a_reward_base_that_is_not_there_is_said(recipe):
    with pytest.raises(RecipeError, match="model.reward_base.base.*names ./nowhere, which is not a folder"):
        check_files(recipe("model.reward_base.base=./nowhere"))
