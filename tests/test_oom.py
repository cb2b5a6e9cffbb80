"""Memory that runs out inside a step: the step is done again in smaller pieces, with the same update, and the run
goes on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from core import shake, video_of
from rlaif_lite import pipeline
from rlaif_lite.errors import StageError
from rlaif_lite.files import read_jsonl
from rlaif_lite.judge.claims import AnswerToJudge, judge_claims
from rlaif_lite.judge.pairwise import AnswerPair, judge_pairs
from rlaif_lite.model.memory import in_pieces, out_of_memory
from rlaif_lite.model.pixels import to_pixels
from rlaif_lite.model.roles import ActiveRole, Roles
from rlaif_lite.recipe import Claims, Lora, Pairwise
from rlaif_lite.stages import features, reward, sft
from rlaif_lite.stages.ppo import step as ppo
from rlaif_lite.training import fit as training
from rlaif_lite.training.oom import Backoff, snapshot
from rlaif_lite.workspace import Workspace

ONE_STEP = {
    sft: ("sft.easy.steps=1", "sft.hard=null", "sft.policy_init=null"),
    reward: ("reward.steps=1", "reward.centering=0.0"),
    ppo: ("ppo.steps=1", "ppo.normalize_reward=false"),  # the scale is taken in micro-batches too, and rounds with them
}
SIZE = {sft: "sft.easy.micro_batch", reward: "reward.micro_batch", ppo: "ppo.micro_batch"}
NAME = {sft: "sft", reward: "reward", ppo: "ppo"}
TRAINED = {sft: ["sft"], reward: ["reward"], ppo: ["policy", "value"]}


def no_room() -> None:
    """What torch itself says when there is no such memory."""
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.fixture
def scarce(monkeypatch):
    """scarce(rows, after) -> the training forwards that fit; once `after` of them did, the next of `rows` rows fails,
    once."""

    def install(rows: int, after: int = 0) -> list[int]:
        hidden, seen, failed = ActiveRole.hidden, [], []

        def guarded(self, batch):
            if torch.is_grad_enabled():
                if len(batch.ids_BS) >= rows and len(seen) >= after and not failed:
                    failed.append(True)
                    no_room()
                seen.append(len(batch.ids_BS))
            return hidden(self, batch)

        monkeypatch.setattr(ActiveRole, "hidden", guarded)
        return seen

    return install


def trained(stage, recipe, resume: bool = False) -> list[torch.Tensor]:
    """Run one stage, from its start unless told otherwise, and read what it learnt."""
    work = Workspace(recipe)
    if not resume:
        shutil.rmtree(work.stage(NAME[stage]) / "checkpoint", ignore_errors=True)
    stage.run(work)
    files = [work.adapter(role) / "adapter_model.safetensors" for role in TRAINED[stage]]
    # copies: safetensors maps the file, and the next run writes it anew
    return [tensor.clone() for file in files for _, tensor in sorted(load_file(file).items())]


@pytest.mark.parametrize(
    ("stage", "whole", "half", "rows", "after"),
    # six records; four pairs, a row each; minibatches of four answers, where the fault comes after an optimiser step
    [(sft, 6, 3, 6, 0), (reward, 4, 2, 4, 0), (ppo, 4, 2, 4, 3)],
    ids=["sft", "reward", "ppo"],
)
def test_the_update_is_the_same(rerun, scarce, capfd, stage, whole, half, rows, after):
    """Bit for bit what the smaller size gives when it is asked for, and but for rounding what the larger one gives."""
    recipe = lambda *more: rerun(*ONE_STEP[stage], *more)
    large, small = trained(stage, recipe()), trained(stage, recipe(f"{SIZE[stage]}={half}"))
    seen = scarce(rows, after)
    found = trained(stage, recipe())
    assert f"out of memory at {whole} a forward, done again at {half}" in capfd.readouterr().err
    assert seen[:after] == [rows] * after and max(seen[after:]) == rows * half // whole
    assert all(torch.equal(a, b) for a, b in zip(found, small, strict=True))
    change = sum((a - b).abs().sum() for a, b in zip(found, large, strict=True))
    assert change <= 1e-3 * sum(a.abs().sum() for a in large)


@pytest.mark.parametrize("when", ["before", "half-way"])
@pytest.mark.parametrize(("stage", "half"), [(sft, 3), (reward, 2), (ppo, 2)], ids=["sft", "reward", "ppo"])
def test_memory_that_runs_out_in_the_optimiser(rerun, monkeypatch, capfd, stage, half, when):
    """Its state is made in the first step; half-way the parameters have moved already. The update is that of `half`."""
    recipe = lambda *more: rerun(*ONE_STEP[stage], *more)
    small = trained(stage, recipe(f"{SIZE[stage]}={half}"))
    step, failed = torch.optim.AdamW.step, []

    def scarce_step(self, *arguments, **keys):
        if not failed:
            failed.append(True)
            if when == "half-way":
                step(self, *arguments, **keys)
            no_room()
        return step(self, *arguments, **keys)

    monkeypatch.setattr(torch.optim.AdamW, "step", scarce_step)
    found = trained(stage, recipe())
    assert f"done again at {half}" in capfd.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(found, small, strict=True))


def test_the_smaller_size_stays_and_is_resumed_with(rerun, scarce, capfd, monkeypatch):
    """Three steps, memory short in the first; killed after its checkpoint, it goes on at the smaller size."""
    keys = ("sft.easy.steps=3", "sft.hard=null", "sft.policy_init=null")
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 1)
    seen = scarce(6)
    whole = trained(sft, rerun(*keys))
    assert seen == [3] * 6 and capfd.readouterr().err.count("out of memory") == 1
    recipe = rerun(*keys)
    lines = [line for line in read_jsonl(Workspace(recipe).log.path) if line["stage"] == "sft.easy"]
    assert [line["step"] for line in lines] == [0, 1, 2]  # a step that failed is not logged

    keep = sft.fit.__globals__["keep"]

    def killed(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    scarce(6)
    monkeypatch.setitem(sft.fit.__globals__, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(sft, recipe)
    monkeypatch.setitem(sft.fit.__globals__, "keep", keep)
    seen.clear()
    resumed = trained(sft, recipe, resume=True)
    assert seen == [3] * 4 and all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_one_record_that_does_not_fit_ends_the_run(tmp_path):
    backoff, sizes = Backoff("reward", 5, tmp_path), []

    def attempt(micro):
        sizes.append(micro)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(StageError, match="reward: step 7 does not fit .* single record .*gradient_checkpointing"):
        backoff.run(7, attempt, undo=lambda: sizes.append(0))
    assert sizes == [5, 0, 2, 0, 1]


def test_other_errors_pass(tmp_path):
    def attempt(micro):
        raise RuntimeError("shape '[64, 1]' is invalid")

    with pytest.raises(RuntimeError, match="shape"):
        Backoff("x", 4, tmp_path).run(0, attempt, undo=lambda: None)
    with pytest.raises(RuntimeError) as found:
        no_room()
    assert out_of_memory(found.value) and not out_of_memory(RuntimeError("CUDA error: device-side assert"))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))


def test_a_failed_forward_leaves_the_decoder_as_it_was(load, monkeypatch):
    """In training mode transformers fills no cache: sampling would go on without what it has read."""
    from rlaif_lite.model import roles as module
    from rlaif_lite.recipe import Lora

    base = load(gradient_checkpointing=True)
    roles = module.Roles(base, Lora(rank=4))
    roles.add("sft")

    monkeypatch.setattr(module, "decode", lambda base, batch: no_room())
    with roles.use("sft") as role, pytest.raises(RuntimeError):
        role.hidden(None)
    assert not base.decoder.training


def test_what_is_only_read_goes_through_in_smaller_pieces(caplog):
    """Four of ten fit: the first five and all after them are read in halves, in order and none twice."""
    pieces = []

    def read(piece):
        if len(piece) > 4:
            no_room()
        pieces.append(list(piece))
        return [10 * each for each in piece]

    assert in_pieces(range(12), 10, read) == list(range(0, 120, 10))
    assert pieces == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    said = [record.getMessage().rsplit(": ", 1)[1] for record in caplog.records]
    assert said == ["going on with 5.", "going on with 2."]
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        in_pieces([1], 1, lambda piece: no_room())
    with pytest.raises(ValueError):
        in_pieces([1, 2], 2, lambda piece: [][0:0].index(1))


def test_the_scale_of_the_rewards_is_measured_in_smaller_pieces(rerun, monkeypatch):
    """Of the reward model's scores on the reference's answers, before the first step of PPO."""
    recipe = rerun("ppo.steps=1", "ppo.normalize_reward=true")
    shutil.rmtree(Workspace(recipe).stage("ppo") / "checkpoint", ignore_errors=True)
    hidden, refused = ActiveRole.hidden, []

    def guarded(self, batch):
        if not torch.is_grad_enabled() and len(batch.ids_BS) > 2:
            refused.append(len(batch.ids_BS))
            no_room()
        return hidden(self, batch)

    monkeypatch.setattr(ActiveRole, "hidden", guarded)
    assert ppo.run(Workspace(recipe))["kl_start"] == 0.0
    assert refused


def test_a_reward_model_that_is_measured_goes_through_in_smaller_pieces(rerun, monkeypatch, caplog):
    """The forwards without gradients of the reward stage are those of its held-out pairs."""
    recipe = rerun()
    file = Workspace(recipe).stage("reward") / "heldout.json"
    want, hidden, rows = json.loads(file.read_text()), ActiveRole.hidden, []

    def guarded(self, batch):
        if not torch.is_grad_enabled():
            rows.append(len(batch.ids_BS))
            if len(rows) == 1:
                no_room()
        return hidden(self, batch)

    monkeypatch.setattr(ActiveRole, "hidden", guarded)
    pipeline.run(recipe, until="reward", again="reward")
    got = json.loads(file.read_text())
    assert rows[0] > 2 and rows[1] == rows[0] // 4 * 2 and "do not fit" in caplog.text
    assert got["heldout_accuracy"] == want["heldout_accuracy"]
    assert [row["count"] for row in got["calibration"]] == [row["count"] for row in want["calibration"]]
    assert got["calibration"][0]["predicted"] == pytest.approx(want["calibration"][0]["predicted"], abs=1e-5)


def test_a_judge_that_runs_out_of_memory_says_the_same(load, monkeypatch):
    """Fault injection: no forward of more than two rows fits."""
    roles = Roles(load(), Lora(rank=4, alpha=8.0))
    roles.add("sft")
    shake(roles, "sft")
    video = video_of(roles.base, layout=12, keep=[1, 2, 8])
    texts = ["a red circle .", "a blue square up . a star .", "left", "a green cross", "yes ."]
    items = [AnswerToJudge(video, "describe", text, None) for text in texts]
    pairs = [AnswerPair(video, "describe", text, "a red circle .", None) for text in texts]
    claims = Claims(mode="inline", prompt="<video> {context} response :", context_prefix="context : {context}")
    pairwise = Pairwise(prompt="<video> {context} response A : {a} response B : {b} better ?")

    def judged():
        with roles.use("sft") as role:
            return [v.score for v in judge_claims(role, items, claims, 8)], judge_pairs(role, pairs, pairwise, 8)

    scores, choices = judged()
    hidden, rows = ActiveRole.hidden, []

    def guarded(self, batch):
        if len(batch.ids_BS) > 2:
            no_room()
        rows.append(len(batch.ids_BS))
        return hidden(self, batch)

    monkeypatch.setattr(ActiveRole, "hidden", guarded)
    again, chosen = judged()
    assert rows == [2, 2, 1] * 3  # claims, and pairs in both orders
    assert again == pytest.approx(scores, abs=1e-4)
    assert [c.margin for c in chosen] == pytest.approx([c.margin for c in choices], abs=1e-4)


@pytest.mark.gpu
def test_a_gpu_leaves_its_blocks(tmp_path):
    block = torch.ones(1 << 20, device="cuda")
    assert str(tmp_path) in snapshot(tmp_path / "oom.json")
    left = json.loads((tmp_path / "oom.json").read_text())
    assert left["stats"]["allocated_bytes.all.current"] >= block.nbytes and left["segments"]


@pytest.mark.parametrize("fits", [4, 1])
def test_frames_that_do_not_fit_go_through_the_tower_in_parts(load, monkeypatch, fits):
    """The features are those of all frames at once; and no frame that does not fit is the video's fault."""
    base = load(tower=True)
    rgb_THWC = torch.randint(0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = to_pixels(rgb_THWC.numpy(), base.images)
    whole = base.encode(pixels)
    plain, seen = type(base).encode, []

    def guarded(self, pixels_TCHW):
        if len(pixels_TCHW) > fits:
            no_room()
        seen.append(len(pixels_TCHW))
        return plain(self, pixels_TCHW)

    monkeypatch.setattr(type(base), "encode", guarded)
    found = features.through_tower(base, pixels, 1)
    assert seen == [fits] * (8 // fits) and found.grid == whole.grid
    assert torch.allclose(found.features_LGPD, whole.features_LGPD, atol=1e-5)
    monkeypatch.setattr(type(base), "encode", lambda self, pixels_TCHW: no_room())
    with pytest.raises(StageError, match=r"1 frame\(s\) of .* do not fit .*features.max_pixels"):
        features.through_tower(base, pixels, 1)
