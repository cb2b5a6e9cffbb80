"""Frames as the families' own processors make pixels of them: sizes, filling, settings in all spellings."""

import json
import math

import numpy as np
import pytest
import transformers
from PIL import Image

from family_checkpoints import FRAME, PATCH, write
from rlaif_lite.data.records import Message
from rlaif_lite.errors import ModelError
from rlaif_lite.model.families import FAMILIES
from rlaif_lite.model.pixels import image_spec, to_patches, to_pixels
from rlaif_lite.video.decode import View, decode_views
from rlaif_lite.video.frame_size import FrameSize

FRAMES, STEP, FPS, SECONDS = 6, 2, 2.0, 6.0
QUESTION = "<video>\nwhat happens in the video ?"
TURNS = [Message("system", "be short"), Message("user", QUESTION)]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pixels_are_those_of_the_familys_image_processor(tmp_path, name):
    """transformers' own processors without torchvision. For Qwen2-VL an image counts as the same frame twice."""
    folder = write(name, tmp_path)
    spec = image_spec(folder, any_size=name == "qwen2_vl")
    height, width = spec.size.of(1)(40, 48)
    rgb_THWC = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    kind = {"llava": "LlavaImageProcessorPil", "qwen2_vl": "Qwen2VLImageProcessorPil"}[name]
    own = getattr(transformers, kind).from_pretrained(folder)(
        [Image.fromarray(rgb) for rgb in rgb_THWC], return_tensors="pt"
    )
    if name == "llava":
        assert (height, width) == (32, 38)  # the shorter side is 32, 3 columns go on either side
        got = to_pixels(rgb_THWC, spec)
    else:
        assert (height, width) == (32, 48)
        got, grid_13 = to_patches(to_pixels(rgb_THWC.repeat(2, 0), spec), spec.patch)
        assert grid_13.tolist() == [[3, 4, 6]] and own["image_grid_thw"].tolist() == [[1, 4, 6]] * 3
    assert got.shape == own["pixel_values"].shape and (got - own["pixel_values"]).abs().max() <= 1e-6


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (32, 32), (31, 48)])
def test_llava_frames_are_filled_up_to_a_square_of_the_mean_colour(tmp_path, shape):
    """As the release does (`image_aspect_ratio: pad`): in the middle transformers' own pixels, around it the mean."""
    folder = write("llava", tmp_path)
    path = folder / "preprocessor_config.json"
    own_settings = {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own_settings))
    spec = image_spec(folder)
    rgb_THWC = np.full((2, *shape, 3), (200, 30, 90), dtype=np.uint8)
    own = transformers.LlavaImageProcessorPil.from_pretrained(folder)(
        [Image.fromarray(rgb) for rgb in rgb_THWC], return_tensors="pt"
    )["pixel_values"]
    height, width = spec.size.of(1)(*shape)
    assert max(height, width) == 32
    got = to_pixels(np.full((2, height, width, 3), (200, 30, 90), dtype=np.uint8), spec)
    assert got.shape == own.shape == (2, 3, 32, 32)
    # the edge between frame and filling is blurred by their resize, some lines on either side
    differs_HW = ((got - own).abs() > 0.02).any(1).any(0)
    assert differs_HW.sum() <= 32 * 8 and (shape != (32, 32) or not differs_HW.any())
    filled_HW = (got == 0).all(1).all(0)
    assert filled_HW.sum() == 32 * 32 - height * width


def test_frame_sizes_are_those_of_the_processors():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    size = FrameSize(multiple=28, min_pixels=128 * 784, max_pixels=768 * 784)
    for height, width in ((360, 640), (1080, 1920), (64, 64), (480, 100), (720, 1280), (1234, 77)):
        assert size.of(8)(height, width) == smart_resize(height, width, 28, 128 * 784, 768 * 784)
        shared = size._replace(max_of_video=True).of(4)
        assert shared(height, width) == smart_resize(height, width, 28, 128 * 784, 192 * 784)
    limited = size._replace(limit=200 * 784).of(50)
    assert math.prod(limited(1080, 1920)) <= 200 * 784 and limited.min_pixels == 128 * 784
    assert FrameSize(20, 30)(99, 7) == (20, 30)


def test_every_spelling_of_the_settings(tmp_path):
    """Bounds of the area, of a frame or a video; the video's settings before the image's; a square for SmolVLM."""
    for name, want in (("qwen2_vl", (256, 1536)), ("qwen3_vl", (512 / 6, 1536)), ("video_llama_3", (256, 1536))):
        family = FAMILIES[name]
        size = image_spec(write(name, tmp_path / name), any_size=True, of_video=family.of_video).size.of(6)
        assert (size.min_pixels, size.max_pixels, size.multiple) == (*want, 2 * PATCH)
    assert image_spec(write("smolvlm", tmp_path / "smolvlm")).size(90, 160) == (FRAME, FRAME)
    (tmp_path / "qwen2_vl" / "preprocessor_config.json").write_text('{"patch_size": 8, "merge_size": 2}')
    with pytest.raises(ModelError, match="preprocessor_config.json does not say 'temporal_patch_size'"):
        image_spec(tmp_path / "qwen2_vl", any_size=True)


def test_frames_are_decoded_to_the_size_that_fits_them(tmp_path):
    paths = []
    for i in range(3):
        Image.fromarray(np.full((60, 90, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    for size, shape in (
        (FrameSize(multiple=16, min_pixels=256, max_pixels=1600), (32, 48)),
        (FrameSize(32, 32, 32), (32, 48)),
        (FrameSize(32, 40), (32, 40)),
    ):
        assert decode_views(paths, {"v": View(3)}, size=size)["v"].rgb_THWC.shape == (3, *shape, 3)
