"""The reward model: where the head is read, the held-out split, calibration, the floor.

Shapes: B answers, S positions, D width.
"""

import math
from dataclasses import replace

import pytest
import torch

from core import record, shake
from rlaif_lite.data.splits import hold_out_videos
from rlaif_lite.errors import ModelError, StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.model.answers import Group
from rlaif_lite.model.text import RUNNING, encode_answer
from rlaif_lite.stages import reward
from rlaif_lite.stages.features import views_of
from rlaif_lite.stages.reward import RewardInput, calibration, check_floor, stumbling
from rlaif_lite.training.loop import derive_seed
from rlaif_lite.workspace import Workspace

ANSWERS = ["first a red circle left . also a red star .", "red", "", "a blue cross . green"]


@pytest.fixture
def work(finished) -> Workspace:
    """A workspace on the finished run, with a reward role that says something of every token."""
    work = Workspace(finished)
    work.roles.add("reward", seed=1)
    work.roles.add_head("reward", zero=False, seed=2)
    shake(work.roles, "reward", seed=3)
    return work


def configured(work: Workspace, **keys) -> RewardInput:
    section = work.recipe.reward.model_copy(update=keys)
    work.recipe = work.recipe.model_copy(update={"reward": section})
    return RewardInput(work)


def values(work: Workspace, layout: RewardInput, given, answer: list[int]) -> torch.Tensor:
    """The head at every position of one row."""
    from rlaif_lite.model.inputs import collate

    with torch.no_grad(), work.roles.use("reward") as role:
        return role.scalar(role.hidden(collate(work.base(), [layout.prompt(given).extend(answer)])))[0]


@pytest.mark.parametrize("prompt", [None, "response :", "red . {question} red ."])
@pytest.mark.parametrize("pool", ["last", "tokens"])
def test_the_score_is_the_head_at_the_last_token_or_at_chosen_ones(work, prompt, pool):
    """Pool tokens are "." and "red": those of the prompt do not count, the last token counts once."""
    layout = configured(work, pool=pool, prompt=prompt, pool_tokens=(".", "red"))
    base = work.base()
    records = work.records("preference")[: len(ANSWERS)]
    answers = [encode_answer(base, RUNNING, text) for text in ANSWERS]
    answers[3] = answers[3][:-1]  # cut by the length limit: the last real token is "green"
    with torch.no_grad(), work.roles.use("reward") as role:
        groups = [Group(layout.prompt(r), [answer]) for r, answer in zip(records, answers, strict=True)]
        score_B = layout.score(role, groups)
    read = {  # places in the answer
        "last": [[11], [1], [0], [4]],
        "tokens": [[2, 5, 8, 10, 11], [0, 1], [0], [3, 4]],
    }[pool]
    for given, answer, places, score in zip(records, answers, read, score_B.tolist(), strict=True):
        value_S = values(work, layout, given, answer)
        start = len(value_S) - len(answer)
        assert score == pytest.approx(value_S[[start + t for t in places]].sum().item(), abs=1e-4)
    assert score_B.abs().min() > 1e-3


def test_the_prompt_of_the_reward_model(work):
    given = record("<video> what is the colour first ?", video=work.records("preference")[0].video)

    def text(**keys) -> str:
        return work.base().tokenizer.decode(configured(work, **keys).prompt(given).ids_S).replace("<video> " * 23, "")

    assert text(prompt=None) == "<s> <video> what is the colour first ? <ans>"
    assert (
        text(prompt="question {question} response :")
        == "<s> <video> question what is the colour first ? response : <ans>"
    )
    assert text(prompt="response :") == "<s> <video> response : <ans>"


def test_the_narrative_stands_in_the_prompt_where_the_recipe_says(work):
    """Of its own video; and then the RL videos have clips to be described, as the preference videos do."""
    before = {name: set(views) for name, (_, views) in views_of(work).items()}
    layout = configured(work, context=True, prompt="context : {context} response :")
    for given in work.records("preference")[:3]:
        narrative = work.narratives()[work.name_of(given)]
        assert work.base().tokenizer.decode(layout.prompt(given).ids_S).count(f"context : {narrative} response :") == 1
    stated = replace(given, captions=("a red circle", "a star"))  # what the data say themselves comes first
    assert "context : - a red circle - a star response :" in work.base().tokenizer.decode(layout.prompt(stated).ids_S)
    clips = {"clip0", "clip1", "clip2"}
    for given in work.records("rl"):
        assert not clips & before[work.name_of(given)]
        assert clips <= set(views_of(work)[work.name_of(given)][1])


def test_pool_words_of_several_tokens_are_refused(work):
    with pytest.raises(ModelError, match=r"`reward.pool_tokens`: 'a red' is 2 tokens"):
        configured(work, pool_tokens=("red", "a red"))


def test_padding_and_neighbours_do_not_change_a_score(work):
    layout, base = RewardInput(work), work.base()
    records = work.records("preference")[: len(ANSWERS)]
    groups = [
        Group(layout.prompt(r), [encode_answer(base, RUNNING, text)]) for r, text in zip(records, ANSWERS, strict=True)
    ]
    with torch.no_grad(), work.roles.use("reward") as role:
        together_B = layout.score(role, groups)
        alone_B = torch.cat([layout.score(role, [group]) for group in groups])
    assert (together_B - alone_B).abs().max() <= 1e-4


def test_micro_batches_give_the_gradient_of_the_whole_batch(rerun, monkeypatch):
    """The stage's own step, without the centring term, which is not a sum over pairs: five pairs at once, or 2 + 2 +
    1."""
    found: dict[int | None, tuple[dict, list[torch.Tensor]]] = {}

    def one_step(roles, role, section, steps, step_loss, *rest):
        roles.trainable(role)
        with roles.use(role) as active:
            stats = step_loss(active, 0, section.micro_batch or section.batch_size)
        found[section.micro_batch] = stats, [p.grad.clone() for p in roles.parameters(role)]

    monkeypatch.setattr(reward, "fit", one_step)
    for size in ("null", "2"):
        reward.run(Workspace(rerun("reward.batch_size=5", "reward.centering=0.0", f"reward.micro_batch={size}")))
    (whole, gradients), (micro, micro_gradients) = found[None], found[2]
    assert whole.keys() == micro.keys()
    assert all(whole[name] == pytest.approx(micro[name], abs=1e-5) for name in whole)
    for a, b in zip(gradients, micro_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * max(a.norm().item(), 1e-6)


def test_no_video_is_on_both_sides():
    pairs = [(record(f"<video> q{i}", video=f"{i % 10}.mp4"), "x", "y") for i in range(40)]

    def split(items, share, seed):
        return hold_out_videos(items, share, lambda pair: str(pair[0].video), lambda name: derive_seed(seed, name))

    train, held = split(pairs, 0.25, 0)
    sides = [{r.video for r, _, _ in side} for side in (train, held)]
    assert not sides[0] & sides[1] and len(sides[1]) == 3  # ceil(.25 x 10)
    assert len(train) + len(held) == 40 and all(p in pairs for p in train + held)
    again = split(list(reversed(pairs)), 0.25, 0)  # the order of the pairs decides nothing
    assert {r.id for r, _, _ in again[1]} == {r.id for r, _, _ in held}
    assert any({r.video for r, _, _ in split(pairs, 0.25, s)[1]} != sides[1] for s in (1, 2))
    frames = [(record("q<video>", video=["a.jpg", "b.jpg"]), "x", "y"), (record("text", video=None), "x", "y")]
    train, held = split(frames, 0.5, 0)
    assert len(train) == len(held) == 1


def test_stumbles_are_worse_forms_of_the_chosen_answer():
    """A share of the pairs; nothing but words doubled, dropped or put elsewhere; the same again for the same seed."""
    pairs = [(record(f"<video> v{i}"), f"a{i} b{i} c{i} d{i} e{i} .", "anything") for i in range(40)]
    extra = stumbling(pairs, 0.5, seed=3)
    assert len(extra) == 20 and extra == stumbling(pairs, 0.5, seed=3) != stumbling(pairs, 0.5, seed=4)
    assert stumbling(pairs, 0.0, seed=3) == []
    lengths = set()
    for given, chosen, worse in extra:
        assert (given, chosen, "anything") in pairs
        words, own = worse.split(), chosen.split()
        assert words != own and set(words) <= set(own) and 3 <= len(words) <= 9
        lengths.add(len(words) > len(own))
        if len(words) < len(own):  # dropped: one run is missing, the rest stands in order
            cut = len(own) - len(words)
            assert any(own[:i] + own[i + cut :] == words for i in range(len(own)))
    assert lengths == {True, False}
    silent = (record("<video> v40"), "", "anything")  # an answer of no words cannot stumble
    assert len(stumbling([*pairs, silent], 1.0, seed=3)) == 40


def test_calibration_by_hand():
    """p = sigmoid(|gap|); bins of p >= .5 are [.5, .6) .. [.9, 1]. Right when the gap is positive."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    gaps = [logit(0.55), -logit(0.57), logit(0.75), logit(0.77), -logit(0.72), logit(0.99), 50.0, 0.0]
    table = calibration(gaps)
    assert [(round(b["low"], 6), round(b["high"], 6), b["count"]) for b in table] == [
        (0.5, 0.6, 3),
        (0.7, 0.8, 3),
        (0.9, 1.0, 2),
    ]
    assert [b["observed"] for b in table] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert [b["predicted"] for b in table] == pytest.approx(
        [(0.55 + 0.57 + 0.5) / 3, (0.75 + 0.77 + 0.72) / 3, (0.99 + 1) / 2]
    )


def test_the_floor(recipe):
    check_floor(recipe("reward.floor=0.8"), 0.8)
    with pytest.raises(StageError, match=r"0\.790 of held-out pairs as labelled, below `reward.floor: 0.8`"):
        check_floor(recipe("reward.floor=0.8"), 0.79)


def test_the_stage_measures_held_out_pairs_only(rerun):
    """Held-out accuracy and calibration from the saved role, counted by hand."""
    from rlaif_lite.stages.preference import read_pairs

    work = Workspace(rerun("reward.steps=2"))
    result = reward.run(work)
    train, held = hold_out_videos(
        read_pairs(work), 0.3, lambda pair: work.name_of(pair[0]), lambda name: work.seed("heldout", name)
    )
    assert (result["train_pairs"], result["heldout_pairs"], result["steps"]) == (len(train), len(held), 2)
    again = Workspace(work.recipe)
    again.load_role("reward")
    layout = RewardInput(again)
    gaps = []
    for pair in held:
        with torch.no_grad(), again.roles.use("reward") as role:
            chosen, rejected = reward.score_pairs(layout, role, [pair])[0].tolist()
        gaps.append(chosen - rejected)
    assert result["heldout_accuracy"] == sum(gap > 0 for gap in gaps) / len(gaps)
    assert sum(row["count"] for row in result["calibration"]) == len(held)
    lines = [line for line in read_jsonl(work.log.path) if line["stage"] == "reward"]
    assert len(lines) == 2 and {"loss", "accuracy", "margin", "lr", "grad_norm"} <= lines[0].keys()


def test_too_few_pairs_are_said(rerun):
    work = Workspace(rerun())
    path = work.folder / "preference" / "pairs.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(StageError, match="0 pairs to train on and 1 held out"):
        reward.run(work)
