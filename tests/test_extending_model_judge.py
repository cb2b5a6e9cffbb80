"""The examples of docs/extending/family.md and judge.md, run as they are written."""

import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers as hf

from family_checkpoints import FRAME, PATCH, TINY, build_tokenizer, processor_files
from rlaif_lite.data.records import Message
from rlaif_lite.judge.claims import AnswerToJudge
from rlaif_lite.judge.outside import Case
from rlaif_lite.model.base import load_base
from rlaif_lite.model.families import FAMILIES
from rlaif_lite.model.inputs import collate, decode, encode_prompt
from rlaif_lite.model.pixels import to_pixels
from rlaif_lite.recipe import Claims, Model
from rlaif_lite.stages.features import encode
from rlaif_lite.video.decode import Frames

DOCS = Path(__file__).parent.parent / "docs" / "extending"


def run_page(name: str) -> dict:
    """What the page's Python blocks define, run in order in one namespace."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S):
        exec(compile(block, name, "exec"), names)
    return names


def vipllava(folder: Path) -> Path:
    """A tiny random checkpoint."""
    tokenizer = build_tokenizer(TINY["llava"])
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    vision = size | {"hidden_size": 32, "image_size": FRAME, "patch_size": PATCH, "model_type": "clip_vision_model"}
    text = size | {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = hf.VipLlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image, vision_feature_layers=[-2, -1]
    )
    torch.manual_seed(0)
    hf.VipLlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, settings in processor_files("llava").items():
        (folder / file).write_text(json.dumps(settings))
    return folder


def test_the_family_of_the_page_gives_the_models_own_forward(tmp_path):
    before = dict(FAMILIES)
    try:
        run_page("family.md")
        base = load_base(Model(base=str(vipllava(tmp_path)), quantization="none"), torch.device("cpu"), tower=True)
        check_row(base)
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)


def check_row(base) -> None:
    rgb_THWC = np.random.default_rng(0).integers(0, 256, (3, FRAME, FRAME, 3), dtype=np.uint8)
    frames = Frames(rgb_THWC=rgb_THWC, time_T=np.arange(3.0), duration=3.0, source="decord", reason="", timed=True)
    row = encode_prompt(base, [Message("user", "<video>\nwhat happens ?")], encode(base, {"v": frames}, [])["v"])
    batch = collate(base, [row])
    with torch.no_grad():
        ours_SD = decode(base, batch)[0]
        own_SD = base.model.base_model(
            input_ids=batch.ids_BS,
            attention_mask=torch.ones_like(batch.ids_BS),
            pixel_values=to_pixels(rgb_THWC, base.images),
            return_dict=True,
        ).last_hidden_state[0]
    assert (ours_SD - own_SD).abs().max() <= 1e-6


def test_the_judge_of_the_page_judges():
    page = run_page("judge.md")
    answers = [AnswerToJudge(None, "what ?", text, None) for text in ("A dog. A cat.", "A dog. A dog. A cat.", "")]
    found = page["judge_repeats"](None, answers, Claims(), 8)
    assert [verdict.score for verdict in found] == [2.0, 1.0, 0.0] and all(verdict.has_mass for verdict in found)
    cases = [Case("a", "qa", "what ?", "a dog", "A dog "), Case("b", "qa", "what ?", "a dog", "a cat")]
    verdicts = page["ExactMatch"]().judge(cases)
    assert [(v.id, v.correct, v.score) for v in verdicts] == [("a", True, 5.0), ("b", False, 0.0)]
