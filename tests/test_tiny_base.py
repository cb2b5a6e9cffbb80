"""The embedded base: the shipped files, the sheets it is trained on, and its pretraining script."""

import json
import random
from importlib.resources import files
from pathlib import Path

import decord
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from core import record_of
from lab.embedded_base import pretrain
from lab.embedded_base.card import to_nf4
from lab.embedded_base.network import forward, pooled_features
from lab.embedded_base.sheet import NUMBER, VIDEO_TOKENS, Sheet, collate, encode
from lab.embedded_base.tasks import BEFORE_PAIRS, SHEET, WITH_PAIRS, add_pair, clip_view, draw, whole_view
from rlaif_lite.data.records import Message
from rlaif_lite.data.world import facts_of, write_video
from rlaif_lite.data.world_text import caption, describe, pair, verdicts
from rlaif_lite.model import inputs
from rlaif_lite.model.base import load_base
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.recipe import Model

BASE = Path(str(files("rlaif_lite.tiny") / "base"))


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve videos of a world that was not trained on: frames (N,24,32,32,3) and facts."""
    folder, frames = tmp_path_factory.mktemp("videos"), []
    for index in range(12):
        write_video(folder / "v.mp4", 100, "test", index)
        frames.append(decord.VideoReader(str(folder / "v.mp4"), width=32, height=32).get_batch(range(24)).asnumpy())
    return np.stack(frames), [facts_of(100, "test", index) for index in range(12)]


def pixels(frames_FHWC):
    """As preprocessor_config.json says."""
    said = json.loads((BASE / "preprocessor_config.json").read_text())
    scaled = torch.from_numpy(frames_FHWC).float() * said["rescale_factor"]
    mean, std = torch.tensor(said["image_mean"]), torch.tensor(said["image_std"])
    return ((scaled - mean) / std).permute(0, 3, 1, 2)


def test_tokenizer_knows_every_word(tokenizer):
    text = "<s> <video> context : first a red circle left and a yellow star . response A : also a better ? <ans> A </s>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]
    assert encode(text) == ids


def test_chat_template(tokenizer):
    turns = [
        {"role": "user", "content": "<video> describe the clip"},
        {"role": "assistant", "content": "a red circle left ."},
    ]
    assert (
        tokenizer.apply_chat_template(turns, tokenize=False)
        == "<s> <video> describe the clip <ans> a red circle left . </s>"
    )
    assert (
        tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        == "<s> <video> describe the clip <ans>"
    )
    parts = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "describe the clip"}]}, turns[1]]
    out = tokenizer.apply_chat_template(parts, return_dict=True, return_assistant_tokens_mask=True)
    assert tokenizer.decode(out["input_ids"]) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert (
        tokenizer.decode([t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m])
        == "a red circle left . </s>"
    )


def test_shipped_files():
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 10e6
    assert not [path for path in BASE.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_plain_generate_captions_clips(base, tokenizer, videos):
    """Through nothing but transformers."""
    frames, facts = videos
    prompt = tokenizer(
        "<s> " + "<video> " * VIDEO_TOKENS + "describe the clip <ans>", add_special_tokens=False, return_tensors="pt"
    )
    right = 0
    for video in range(12):
        view = list(clip_view(video % 3, None))
        out = base.generate(
            **prompt, pixel_values_videos=pixels(frames[video, view])[None], max_new_tokens=16, do_sample=False
        )
        text = tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
        right += text == caption(facts[video], video % 3)
    assert right >= 10


def test_clip_views_follow_the_sampling_rule():
    assert whole_view(None) == tuple(int((i + 0.5) * 24 / 6) for i in range(6))
    assert clip_view(1, None) == tuple(8 + int((i + 0.5) * 8 / 6) for i in range(6))


def test_sheet_paths_equal_the_plain_sequence(base, videos):
    """Every branch of a sheet gives what transformers' own forward gives for that path alone, pixels and all."""
    frames, facts = videos
    sheet = Sheet(SHEET)
    root = sheet.root(0, whole_view(None))
    context = sheet.text("context : " + describe(facts[0]), root)
    sheet.ask("q", "what is the colour first ?", "red .", root)
    sheet.ask("q", "claim : also a yellow star ?", "no .", context)
    sheet.check("c", describe(facts[1]), verdicts(describe(facts[1]), facts[0]), context)
    with torch.no_grad():
        batch = collate([sheet])
        ours = forward(base, batch, pooled_features(base, frames)).last_BLD @ base.lm_head.weight.t()
        for number, path in ((2, (0, 2)), (3, (0, 1, 3)), (4, (0, 1, 4))):
            ids = [token for token, segment in zip(sheet.tokens, sheet.segment, strict=True) if segment in path]
            alone = base(
                input_ids=torch.tensor([ids]), pixel_values_videos=pixels(frames[0, list(whole_view(None))])[None]
            ).logits[0]
            columns = [column for column, segment in enumerate(sheet.segment) if segment == number]
            torch.testing.assert_close(
                ours[0, columns], alone[-len(columns) :], atol=0.15, rtol=0
            )  # features are kept in bfloat16


def test_parallel_pair_branches_do_not_see_each_other(base, videos):
    """Positions and mask against a loop over the definition; then each branch against itself alone."""
    frames, facts = videos
    a, b, margin = pair(facts[0], random.Random(0))
    sheet = Sheet(SHEET)
    root = sheet.root(0, whole_view(None))
    add_pair(sheet, root, a, b, margin, facts[0])
    batch = collate([sheet])
    first, second, close = (
        [column for column, segment in enumerate(sheet.segment) if segment == number] for number in (1, 2, 3)
    )
    start = VIDEO_TOKENS + 1
    assert batch.positions_BL[0, first].tolist() == list(range(start, start + len(first)))
    assert batch.positions_BL[0, second].tolist() == list(range(start, start + len(second)))
    after = start + max(len(first), len(second))
    assert batch.positions_BL[0, close].tolist() == [after, after + 1, after + 2]
    for query in range(close[-1] + 1):
        for key in range(close[-1] + 1):
            blind = (query in second and key in first) or (query in first and key in second)
            assert (batch.mask_B1LL[0, 0, query, key] == 0) == (key <= query and not blind)
    alone = Sheet(SHEET)
    root = alone.root(0, whole_view(None))
    branch = alone.branch("B", b, verdicts(b, facts[0]), root, 0.0)
    with torch.no_grad():
        pooled = pooled_features(base, frames)
        together = forward(base, batch, pooled).last_BLD[0, second]
        by_itself = forward(base, collate([alone]), pooled).last_BLD[
            0, [c for c, s in enumerate(alone.segment) if s == branch]
        ]
    torch.testing.assert_close(together, by_itself, atol=1e-3, rtol=0)


def test_a_run_builds_the_layout_that_was_trained(base, videos):
    """The pairwise record of the world, read by `model.inputs`, against the sheet: tokens, positions, mask, logits."""
    frames, facts = videos
    a, b, margin = pair(facts[0], random.Random(0))
    sheet = Sheet(SHEET)
    root = sheet.root(0, whole_view(None))
    add_pair(sheet, sheet.text("context : " + describe(facts[0]), root), a, b, margin, facts[0])
    length = 1 + max(column for column, segment in enumerate(sheet.segment) if segment == 4)  # the first order only
    loaded = load_base(Model(quantization="none"), torch.device("cpu"))
    with torch.no_grad():
        pooled = pooled_features(base, frames)
        visual = base.model.multi_modal_projector(pooled[0, list(whole_view(None))].float().flatten(0, 1))
        features = record_of(visual, VIDEO_TOKENS, list(range(VIDEO_TOKENS)))
        content = f"<video> context : {describe(facts[0])} <|> response A : {a} <|> response B : {b} <|> better ?"
        row = encode_prompt(loaded, [Message("user", content)], features)
        batch, trained = inputs.collate(loaded, [row]), collate([sheet])
        assert row.ids_S == sheet.tokens[:length] and row.position_CS[0].tolist() == sheet.positions[:length]
        assert torch.equal(batch.attention[0, 0] == 0, trained.mask_B1LL[0, 0, :length, :length] == 0)
        hidden = inputs.decode(loaded, batch)
        ours = forward(base, trained, pooled).last_BLD[:, :length]
    torch.testing.assert_close(hidden, ours, atol=1e-3, rtol=0)


def test_sheet_targets():
    facts = {"events": [["red", "circle", "left"]] * 3, "star": None}
    sheet = Sheet(64)
    sheet.check("c", "first a red cross left .", verdicts("first a red cross left .", facts), sheet.root(None))
    words = [(sheet.tokens[c], sheet.target[c]) for c in range(64) if sheet.weight[c] > 0.5]
    assert words == [(NUMBER["red"], NUMBER["yes"]), (NUMBER["cross"], NUMBER["no"]), (NUMBER["left"], NUMBER["yes"])]
    assert sheet.target[len(sheet.tokens) - 1] == NUMBER["-"] and sheet.tokens[-1] == NUMBER["</s>"]
    with pytest.raises(ValueError, match="free columns"):
        sheet.text("red " * 64, 0)


@pytest.mark.parametrize("weak", [False, True])
def test_weak_video_learns_nothing_from_the_whole_video(weak):
    """In the weak setting no target hangs on the whole video alone: all but the clip captions stand below a context."""
    seen_without_context = 0
    for seed in range(150):
        rng = random.Random(seed)
        sheet = draw(WITH_PAIRS if seed % 2 else BEFORE_PAIRS, 0, facts_of(100, "sft", seed), rng, weak, 0)
        assert len(sheet.tokens) <= SHEET
        contexts = [
            n
            for n in range(len(sheet.ends))
            if NUMBER["context"] in np.array(sheet.tokens)[np.array(sheet.segment) == n][:1]
        ]
        for kind, columns in sheet.spans:
            segment = sheet.segment[columns.start]
            seen_without_context += kind != "clip caption" and not set(contexts) & set(sheet.ancestors[segment])
        for letter in sheet.letters:
            seen_without_context += not set(contexts) & set(sheet.ancestors[sheet.segment[letter[0]]])
        if weak:
            assert not any(sheet.weight[c] > 0 for c in range(len(sheet.tokens)) if sheet.segment[c] in contexts)
    assert (seen_without_context == 0) == weak


def test_nf4_of_the_shipped_weights(base):
    """bitsandbytes' CPU kernel is wrong for widths that are no multiple of 64; NF4 proper errs by about .09."""
    import copy

    from bitsandbytes.nn import Linear4bit

    exact = dict(base.model.language_model.named_modules())
    quantised = copy.deepcopy(base)
    to_nf4(quantised)
    checked = 0
    for name, module in quantised.model.language_model.named_modules():
        if isinstance(module, Linear4bit):
            assert module.in_features % 64 == 0 and not module.support_avx512bf16_for_cpu
            weight = exact[name].weight
            x = torch.eye(module.in_features)
            error = (module(x).t() - weight).norm() / weight.norm()
            assert error < 0.12
            checked += 1
    assert checked == 7 * base.config.text_config.num_hidden_layers


def test_pretraining_runs_and_repeats(tmp_path):
    """A few steps of the script, twice: the same weights, a checkpoint that loads, a card."""
    options = pretrain.Options(
        out=tmp_path / "one",
        videos=8,
        vision_steps=2,
        steps=2,
        minutes=0,
        processes=1,
        rows=2,
        rate=3e-3,
        seed=0,
        weak=False,
        cache=tmp_path / "cache",
        every=2,
        card_videos=1,
        held_out=2,
    )
    weights = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pretrain.work(0, options._replace(out=tmp_path / name))
        weights.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert "| clip caption |" in (tmp_path / "one" / "README.md").read_text()
    assert json.loads((tmp_path / "one" / "log.jsonl").read_text())["step"] == 2
