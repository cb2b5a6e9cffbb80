"""Each family on a tiny random checkpoint: cached features, positions, prompt text and sampling against the model's
own.

The frames are sampled once a second from a video of 2 frames a second, so that times differ from indices.
Shapes: T frames, S positions, K tokens kept, D width.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.video_utils import VideoMetadata

from core import small_recipe
from family_checkpoints import FRAME, PATCH, TINY, write
from rlaif_lite import pipeline
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError, RecipeError
from rlaif_lite.model.base import Base, load_base
from rlaif_lite.model.families import FAMILIES, _in_words
from rlaif_lite.model.inputs import Sequence, collate, decode, encode_prompt
from rlaif_lite.model.layout import check_chain, merged_times
from rlaif_lite.model.pixels import to_patches, to_pixels
from rlaif_lite.model.roles import Roles
from rlaif_lite.model.text import RUNNING, encode_answer
from rlaif_lite.model.windows import NAME
from rlaif_lite.planner.shapes import shapes_of
from rlaif_lite.recipe import Lora, Model
from rlaif_lite.rollout import Sampling, sample
from rlaif_lite.stages.features import encode
from rlaif_lite.video.decode import Frames

FRAMES, STEP, FPS, SECONDS = 6, 2, 2.0, 6.0
QUESTION = "<video>\nwhat happens in the video ?"
TURNS = [Message("system", "be short"), Message("user", QUESTION)]
QUICK = ("preference.max_new_tokens=6", "preference.compare_pairs=0", "preference.compare_context=false")
QUICK += ("model.gradient_checkpointing=true", "reward.pool=last", "reward.pool_tokens=['.']", "ppo.max_new_tokens=6")
QUICK += ("ppo.steps=2", "evaluate.temperatures=[]", "evaluate.roles=[policy]", "evaluate.shuffled=false")
SHAPES = {"qwen2_vl": (48, 32), "qwen2_5_vl": (32, 48), "qwen3_vl": (48, 32), "video_llama_3": (32, 48)}


class Case:
    """A family's base, a video, its record and the row of a prompt about it."""

    def __init__(self, name: str, folder):
        self.name, self.folder = name, folder
        self.base: Base = load_base(Model(base=str(folder), quantization="none"), torch.device("cpu"), tower=True)
        height, width = SHAPES.get(name, (FRAME, FRAME))
        rgb_THWC = np.random.default_rng(0).integers(0, 256, (FRAMES, height, width, 3), dtype=np.uint8)
        time_T = np.arange(FRAMES) * STEP / FPS
        self.frames = Frames(rgb_THWC=rgb_THWC, time_T=time_T, duration=SECONDS, source="decord", reason="", timed=True)
        self.pixels_TCHW = to_pixels(rgb_THWC, self.base.images)
        self.grid = (
            FRAMES // (self.base.images.patch.frames if self.base.images.patch else 1),
            height // PATCH,
            width // PATCH,
        )

    def record(self, chain: list[dict]):
        return encode(self.base, {"v": self.frames}, chain)["v"]

    def row(self, chain: list[dict] = []) -> Sequence:  # noqa: B006
        return encode_prompt(self.base, TURNS, self.record(chain))

    def pixel_inputs(self, row: Sequence) -> dict:
        """What the model's own forward and `generate` take for this video."""
        ids_1S = torch.tensor([row.ids_S])
        inputs = {"input_ids": ids_1S, "attention_mask": torch.ones_like(ids_1S)}
        if self.base.images.patch is None:
            if self.name in ("llava", "internvl"):
                return inputs | {"pixel_values": self.pixels_TCHW}
            key = "pixel_values" if self.name == "smolvlm" else "pixel_values_videos"
            return inputs | {key: self.pixels_TCHW[None]}
        patches_NF, grid_13 = to_patches(self.pixels_TCHW, self.base.images.patch)
        inputs |= {"pixel_values_videos": patches_NF, "video_grid_thw": grid_13}
        if self.name == "video_llama_3":
            return inputs | {"video_merge_sizes": torch.tensor([2])}
        if self.name == "qwen2_5_vl":  # as its processor has it: 2 merged frames over the sampled rate
            inputs["second_per_grid_ts"] = torch.tensor([2.0])
        return inputs | {"mm_token_type_ids": 2 * (ids_1S == self.base.placeholder_id).int()}


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    return Case(request.param, write(request.param, folder))


@torch.no_grad()
def hidden(base: Base, row: Sequence, mask_S: torch.Tensor | None = None) -> torch.Tensor:
    batch = collate(base, [row])
    return decode(base, batch if mask_S is None else batch._replace(attention=mask_S[None]))[0]


def test_the_planner_counts_a_frames_tokens_as_the_tower_makes_them(case):
    """From the config alone, for towers of one size; of the others the number depends on the video."""
    counted = shapes_of(Model(base=str(case.folder), quantization="none"), torch.device("cpu")).frame_tokens
    assert counted == (0 if case.base.family.any_size else case.base.encode(case.pixels_TCHW).features_LGPD.shape[2])


def test_every_family_has_a_checkpoint():
    assert set(FAMILIES) == set(TINY)


def test_cached_features_are_the_forward_from_pixels(case):
    row = case.row()
    with torch.no_grad():
        want_SD = case.base.model.base_model(**case.pixel_inputs(row), return_dict=True).last_hidden_state[0]
    got_SD = hidden(case.base, row)
    assert (got_SD - want_SD).abs().max() == 0
    # it is the video that makes them, and its order
    other = case.frames._replace(rgb_THWC=case.frames.rgb_THWC[::-1])
    turned = encode_prompt(case.base, TURNS, encode(case.base, {"v": other}, [])["v"])
    assert (hidden(case.base, turned)[-1] - want_SD[-1]).abs().max() > 1e-3


def test_windows_of_one_length_are_attended_together(case, monkeypatch):
    """As in transformers' loop over the windows, in fewer calls."""
    tower = getattr(case.base.model.base_model, case.base.family.tower[0])
    configs = {id(m.config): m.config for m in tower.modules() if "config" in vars(m)}.values()
    assert {config._attn_implementation for config in configs} == {NAME if case.base.family.any_size else "sdpa"}
    rgb_THWC = np.random.default_rng(0).integers(0, 256, (4, 80, 112, 3), dtype=np.uint8)
    pixels_TCHW, calls, plain = to_pixels(rgb_THWC, case.base.images), [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    if case.base.family.any_size:
        found, together = case.base.encode(pixels_TCHW).features_LGPD, len(calls)
        for config in configs:
            monkeypatch.setattr(config, "_attn_implementation", "sdpa")
        wanted = case.base.encode(pixels_TCHW).features_LGPD
        assert together < len(calls) - together
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


SELECTORS = [{"evs": 0.4}, {"vidcom2": 0.4}, {"v_cast": 0.4}, {"random": 0.4}, {"dtd": -1.0}]  # -1: frame 0 is left


@pytest.mark.parametrize("step", SELECTORS, ids=str)
def test_pruned_is_the_full_sequence_with_pruned_keys_masked(case, step):
    full, pruned = case.record([]), case.record([step])
    assert pruned.layout_tokens == full.layout_tokens == len(full.features_KD) > len(pruned.features_KD)
    assert torch.equal(pruned.span_R, full.span_R) and pruned.kept_R.sum() == len(pruned.features_KD)
    full_row, row = (encode_prompt(case.base, TURNS, record) for record in (full, pruned))
    places = [tuple(p) for p in torch.cat([full.frame_K[None], full.position_CK]).T.tolist()]
    kept = {tuple(p) for p in torch.cat([pruned.frame_K[None], pruned.position_CK]).T.tolist()}
    kept_S = torch.tensor(full_row.ids_S) != case.base.placeholder_id
    kept_S[~kept_S] = torch.tensor([place in kept for place in places])
    want_SD = hidden(case.base, full_row, kept_S)[kept_S]
    got_SD = hidden(case.base, row)
    assert got_SD.shape == want_SD.shape and (got_SD - want_SD).abs().max() <= 1e-5
    assert torch.equal(row.next_position_C[-1], full_row.next_position_C[-1])
    anew_CS = torch.arange(len(row.ids_S)).expand_as(row.position_CS)
    assert (hidden(case.base, row._replace(position_CS=anew_CS)) - want_SD).abs().max() > 1e-3  # positions matter


def own_text(case: Case) -> str:
    """The chat template's text with the video written by the processor's own method. A processor cannot be built where
    torchvision is missing, so the method is called on one that was not initialised."""
    processor_type = getattr(transformers, PROCESSOR_MAPPING_NAMES[case.name])
    tokenizer, count = case.base.tokenizer, FRAMES
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "be short"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what happens in the video ?"}]},
    ]
    if case.name == "llava":
        turns[1]["content"][:1] = [{"type": "image"}] * count
    template = tokenizer.chat_template
    if case.name == "smolvlm":
        from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as template
    text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
    metadata = VideoMetadata(
        total_num_frames=int(SECONDS * FPS), fps=FPS, duration=SECONDS, frames_indices=[STEP * i for i in range(count)]
    )
    grid_13 = torch.tensor([case.grid])
    inputs = {
        "video_metadata": [metadata],
        "video_grid_thw": grid_13,
        "pixel_values_videos": case.pixels_TCHW[None].numpy(),
        "pixel_values": case.pixels_TCHW if case.name == "llava" else case.pixels_TCHW[None],
    }
    processor = processor_type.__new__(processor_type)
    processor.tokenizer, processor.image_token, processor.video_token = tokenizer, "<image>", "<video>"
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor.patch_size, processor.num_additional_image_tokens, processor.vision_feature_select_strategy = (
        PATCH,
        1,
        "default",
    )
    if case.name.startswith("qwen"):
        processor.video_token = "<|video_pad|>"
        processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    if case.name == "llava_onevision":
        processor.num_image_tokens = (FRAME // PATCH) ** 2
    if case.name == "video_llama_3":
        inputs |= {
            "video_merge_sizes": torch.tensor([2]),
            "video_compression_mask": torch.ones(int(grid_13.prod()) // 4, dtype=torch.bool),
        }
    if case.name == "internvl":
        processor.start_image_token, processor.end_image_token, processor.image_token = (
            "<img>",
            "</img>",
            "<IMG_CONTEXT>",
        )
        processor.image_seq_length = 4
    if case.name == "smolvlm":
        processor.image_seq_len, processor.fake_image_token, processor.global_image_token = (
            4,
            "<fake_token_around_image>",
            "<global-img>",
        )
    if case.name == "llava":
        first, *rest = text.split("<image>")
        return first + "".join(processor.replace_image_token(inputs, i) + part for i, part in enumerate(rest))
    return text.replace(processor.video_token, processor.replace_video_token(inputs, 0))


@pytest.fixture
def words_of_numbers(monkeypatch):
    """SmolVLM's processor takes the words of numbers from a package that need not be installed."""
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", lambda n: {6: "six"}[n], raising=False)


def test_the_prompt_is_what_the_familys_processor_writes(case, words_of_numbers):
    text = own_text(case)
    tokenizer = case.base.tokenizer
    bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    assert case.row().ids_S == tokenizer.encode(text, add_special_tokens=not bos)
    said = {
        "qwen3_vl": ["<0.5 seconds>", "<4.5 seconds>"],
        "video_llama_3": ["Time 0.0s:", ",Time 5.0s:"],
        "smolvlm": ["series of six frames from a 0:00:06 [H:MM:SS]", "\nFrame from 00:05:"],
        "internvl": ["Frame1: <img>", "\nFrame6: "],
        "llava": ["USER: <image>", "<image>\n<image>"],
    }
    for part in said.get(case.name, ["what happens"]):
        assert part in text


def test_greedy_sampling_is_generate_from_pixels(case):
    base, row = case.base, case.row()
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    with roles.use("base") as role:
        (got,) = sample(role, [row], Sampling(12, temperature=0.0), seeds=[0])
    with torch.no_grad():
        want = base.model.generate(
            **case.pixel_inputs(row),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=base.tokenizer.pad_token_id,
            eos_token_id=base.eos_id,
            suppress_tokens=base.ban_bias_V.nonzero()[:, 0].tolist(),
        )[0, len(row.ids_S) :].tolist()
    assert got.ids == want[: len(got.ids)] and (len(got.ids) == 12 or got.ids[-1] == base.eos_id)
    assert len(set(got.ids)) > 3


def test_adapters_reach_the_decoder_and_nothing_else(case, tmp_path):
    base = load_base(Model(base=str(case.folder), quantization="nf4"), torch.device("cpu"), tower=False)
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy")
    names = [name for name, _ in base.model.named_parameters() if "lora_A" in name]
    assert len(names) == 2 * 7 and not [
        name for name in names if "vision" in name or "visual" in name or "tower" in name
    ]
    quantised = [name for name, p in base.model.named_parameters() if p.dtype == torch.uint8]
    assert len(quantised) == 2 * 7
    assert not base.has_tower


def test_placeholders_can_be_neither_said_nor_scored(case):
    base = case.base
    special = [i for i in base.tokenizer.all_special_ids if i != base.eos_id] + [base.placeholder_id]
    assert (base.ban_bias_V[special] == -1e30).all() and base.ban_bias_V[base.eos_id] == 0
    marks = base.tokenizer.convert_tokens_to_ids(TINY[case.name].special)
    assert (base.ban_bias_V[marks] == -1e30).all()
    assert (base.ban_bias_V[len(base.tokenizer) :] == -1e30).all() and (base.ban_bias_V[:256] == 0).sum() > 200
    token = base.tokenizer.convert_ids_to_tokens(base.placeholder_id)
    for text in (f"a {token} b", "a <video> b"):
        with pytest.raises(ModelError, match="placeholder"):
            encode_answer(base, RUNNING, text)
    with pytest.raises(ModelError, match="video placeholders|marks 2 videos"):
        encode_prompt(base, [Message("user", f"<video> a {token} b")], case.record([]))


# ---- positions by hand


def test_positions_of_qwen_by_hand(tmp_path):
    """Text of n, then 3 merged frames of 3 x 2 tokens: the text after goes on at n + 3; Qwen2.5 counts half seconds."""
    for name, times in (("qwen2_vl", [0, 1, 2]), ("qwen2_5_vl", [0, 4, 8])):
        case = Case(name, write(name, tmp_path / name))
        rows, columns = (3, 2) if name == "qwen2_vl" else (2, 3)
        row = case.row()
        n = row.ids_S.index(case.base.placeholder_id)
        position_CS = row.position_CS
        assert position_CS[0].tolist() == list(range(len(row.ids_S)))
        assert (position_CS[1:, :n] == torch.arange(n)).all()
        video_CK = (position_CS[1:, n : n + 18] - n).tolist()
        assert video_CK[0] == [t for t in times for _ in range(6)]
        assert video_CK[1] == [r for r in range(rows) for _ in range(columns)] * 3
        assert video_CK[2] == list(range(columns)) * rows * 3
        tail = len(row.ids_S) - n - 18
        assert (position_CS[1:, n + 18 :] == torch.arange(n + 3, n + 3 + tail)).all()
        assert row.next_position_C.tolist() == [len(row.ids_S), *[n + 3 + tail] * 3]
        own = case.base.model.base_model.get_rope_index(
            **{k: v for k, v in case.pixel_inputs(row).items() if k not in ("pixel_values_videos",)}
        )[0]
        assert torch.equal(own[:, 0], position_CS[1:])


def test_pooling_makes_a_smaller_layout(tmp_path):
    """2 x 3 tokens a frame pooled to 2 x 2, deepstack alike; the one that is kept of a pooled frame stays where it
    was."""
    case = Case("qwen3_vl", write("qwen3_vl", tmp_path))
    full, pooled = case.record([]), case.record([{"pool": 2}])
    assert (
        pooled.layout_tokens == 18
        and pooled.features_KD.shape == (12, 64)
        and pooled.deepstack_LKD.shape == (2, 12, 64)
    )
    assert (
        pooled.kept_R.tolist() == [4, 4, 4]
        and pooled.span_R.tolist() == [2, 2, 2]
        and full.span_R.tolist() == [3, 3, 3]
    )
    assert pooled.position_CK[:, :4].tolist() == [[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1]]
    # rows 0-1 and 1-2 of 3 are averaged, columns stay
    want_D = (full.deepstack_LKD[1, 0] + full.deepstack_LKD[1, 2]) / 2
    assert torch.allclose(pooled.deepstack_LKD[1, 0], want_D, atol=1e-6)
    pruned = case.record([{"pool": 2}, {"evs": 0.5}])
    assert pruned.kept_R.sum() == 6 and len(pruned.position_CK[0]) == 6 and pruned.kept_R[0] == 4
    for k, (frame, row, column) in enumerate(
        zip(pruned.frame_K, pruned.position_CK[1], pruned.position_CK[2], strict=True)
    ):
        assert torch.equal(pruned.deepstack_LKD[:, k], pooled.deepstack_LKD[:, 4 * frame + 2 * row + column])


def test_means_of_a_video_are_one_run(tmp_path):
    """VLM-RLAIF's 6 temporal and 16 spatial tokens stand behind ONE <image>, as in the release; OneVision ends it."""
    case = Case("llava", write("llava", tmp_path / "llava"))
    record, row = case.record([{"st_mean": True}]), case.row([{"st_mean": True}])
    assert record.kept_R.tolist() == record.span_R.tolist() == [22]
    start = row.ids_S.index(case.base.placeholder_id)
    assert (
        row.ids_S[start : start + 22] == [case.base.placeholder_id] * 22
        and row.ids_S.count(case.base.placeholder_id) == 22
    )
    assert row.position_CS[0].tolist() == list(range(len(row.ids_S)))
    case = Case("llava_onevision", write("llava_onevision", tmp_path / "ov"))
    record = case.record([{"st_mean": True}])
    assert record.kept_R.tolist() == [6 + 4 + 1] and torch.equal(
        record.features_KD[-1], case.base.model.model.image_newline
    )
    for name in ("qwen2_vl", "smolvlm"):
        with pytest.raises(RecipeError, match=f"st_mean makes tokens of no time .*`{name}`"):
            check_chain(FAMILIES[name], name, [{"st_mean": True}])


def test_times_of_merged_frames():
    assert merged_times(torch.tensor([0.0, 1.0, 2.0, 4.0, 7.0]), 2).tolist() == [0.5, 3.0, 7.0]
    assert merged_times(torch.tensor([0.0, 1.5]), 1).tolist() == [0.0, 1.5]


def test_an_odd_number_of_frames_repeats_the_last(tmp_path):
    case = Case("qwen2_vl", write("qwen2_vl", tmp_path))
    odd = case.frames._replace(rgb_THWC=case.frames.rgb_THWC[:5], time_T=case.frames.time_T[:5])
    even = case.frames._replace(rgb_THWC=case.frames.rgb_THWC[[0, 1, 2, 3, 4, 4]])
    both = encode(case.base, {"a": odd, "b": even}, [])
    assert torch.equal(both["a"].features_KD, both["b"].features_KD) and (both["a"].frames, both["b"].frames) == (5, 6)
    assert both["a"].time_T.tolist() == [0.5, 2.5, 4.0]


# ---- pixels


def test_numbers_in_words():
    words = {
        1: "one",
        13: "thirteen",
        20: "twenty",
        21: "twenty-one",
        50: "fifty",
        64: "sixty-four",
        100: "one hundred",
        101: "one hundred and one",
        345: "three hundred and forty-five",
    }
    assert {n: _in_words(n) for n in words} == words


def test_a_system_message_replaces_vicunas_own(tmp_path):
    base = Case("video_llava", write("video_llava", tmp_path)).base  # this checkpoint has no template of its own
    text = base.tokenizer.decode(
        encode_prompt(base, [Message("system", "be short"), Message("user", "what ?")], None).ids_S
    )
    assert text == "<s>be short USER: what ? ASSISTANT:"
    text = base.tokenizer.decode(encode_prompt(base, [Message("user", "what ?")], None).ids_S)
    assert text.startswith("<s>A chat between a curious user") and text.endswith(" questions. USER: what ? ASSISTANT:")


@pytest.mark.parametrize(
    "name, chain",
    [
        ("llava", "[{st_mean: true}]"),
        ("llava_onevision", "[{v_cast: 0.5}]"),
        ("qwen3_vl", "[{pool: 2}, {vidcom2: 0.5}]"),
        ("smolvlm", "[{evs: 0.5}]"),
    ],
)
def test_every_stage_runs_on_it(tmp_path, name, chain):
    """From mp4 to PPO in 4 bits, with gradients recomputed: positions, features and deepstack all the way."""
    checkpoint = write(name, tmp_path / "base")
    recipe = small_recipe(checkpoint, tmp_path, f"features.prune={chain}", *QUICK)
    summary = pipeline.run(recipe)
    assert summary["finished"] and summary["ppo"]["kl_start"] == 0 and np.isfinite(summary["ppo"]["kl_end"])
    kept = {"llava": 6 + 16, "llava_onevision": 12 + 1, "qwen3_vl": 6, "smolvlm": 12}[name]
    assert (summary["features"]["frames"], summary["features"]["tokens_after"]) == (6, kept)
