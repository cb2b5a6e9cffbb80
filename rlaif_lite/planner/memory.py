"""Bytes of what a forward, a backward and a rollout hold, from shapes: the formulas that the plan adds up.

What autograd keeps was counted tensor by tensor and is exact (a test holds it against saved-tensor hooks on 4-bit bases
with LoRA). What a step holds beyond that is fitted to peaks of torch's CPU allocator, which a test holds too. The
constants that only a GPU could confirm are marked ASSUMED: none of them was measured on one.

Letters, per token: H width, Q query width, I width of the feed-forward, E bytes of the base's dtype. Adapters are
float32.
"""

from math import prod

from transformers.utils import output_capturing

from rlaif_kernels.rows import chunk_size

from ..model.memory import BLOCK, maps_blocks
from ..recipe import Features, Model
from ..rollout import slot_bytes, slot_length
from ..rollout.loop import PREFILL_TOKENS
from .shapes import Shapes, frame_size

ADAPTER = 4  # bytes of a parameter that is trained; its gradient takes as much, Adam's two moments twice that
DRAW = 32  # bytes per slot and vocabulary entry while a token is drawn: float32 logits, float64 probabilities
CUBLAS = 32 << 20  # ASSUMED: its workspace on newer cards, inside torch's allocator
CONTEXT = 1 << 29  # ASSUMED: the CUDA context, outside of torch's allocator
FRAGMENTATION = 0.05  # of the peak: what the allocator reserves and cannot use (docs/dry_run.md)
CLAIM = 12  # ASSUMED: tokens of a claim that an answer is divided into

# A CPU's heap grows by what a forward allocates and not by what it keeps: the hole of a freed tensor does not fit the
# next of the same size. Measured on Linux's malloc, 1280 to 3840 tokens: 1.7 to 2.7 bytes for every byte kept. Blocks
# of 32 MiB and more, of a large base of 1 MiB and more (`map_blocks`), are mapped apart and given back.
HEAP = 2.5
MAPPED = 32 << 20


def saved_by_layer(shapes: Shapes, section: Model, length: int) -> int:
    """Bytes that one layer keeps for the backward, per token of a row of `length`."""
    H, Q, I, E = shapes.width, shapes.query, shapes.ffn, shapes.dtype.itemsize
    targets = set(section.lora.targets)
    qkv, mlp = len(targets & {"q_proj", "k_proj", "v_proj"}), len(targets & {"gate_proj", "up_proj"})
    norms = 2 * ((E if shapes.fused_norms else 4) * H + 4)  # what goes in, else in float32; and their scales
    attention = E * 4 * Q + 4 * shapes.text.num_attention_heads  # q, k, v (repeated), out; lse
    feed_forward = E * 3 * I  # gate, its activation, up
    # the adapters of one input share it (model/lora.py); attention's output is kept already
    inputs = E * H * (bool(qkv) + bool(mlp)) + E * I * ("down_proj" in targets)
    return norms + attention + feed_forward + inputs


def training(shapes: Shapes, section: Model, rows: int, length: int, head: int = 0) -> int:
    """Peak of a forward and backward of `rows` x `length` tokens, beside weights and gradients of the adapters. `head`:
    bytes of the logits, which are gone when the backward reaches the layers."""
    H, I, E = shapes.width, shapes.ffn, shapes.dtype.itemsize
    layer, tokens = saved_by_layer(shapes, section, length), rows * length
    in_backward = 8 * I if E == 4 else 4 * I + 7 * H
    if section.gradient_checkpointing:
        kept, inside = shapes.layers * E * H, layer + in_backward
    else:
        kept, inside = shapes.layers * layer, in_backward
    final_norm = 22 * H * tokens  # its backward
    return tokens * (kept + 4 * H) + max(tokens * inside + E * shapes.largest, final_norm, head)


def forward(shapes: Shapes, rows: int, length: int) -> int:
    """Peak of a forward without gradients."""
    H, I, E, tokens = shapes.width, shapes.ffn, shapes.dtype.itemsize, rows * length
    masks = (2 if E == 4 else 1) * E * tokens * length  # of rows with branches; on a CPU with a copy
    if E == 4:
        return tokens * (10 * I + 17 * H) + masks + E * shapes.largest
    # the residual and the norms; gate, up and their product, or two of them while a weight is dense
    return tokens * 8 * H + masks + max(6 * I * tokens, 4 * I * tokens + E * shapes.largest)


def logits(shapes: Shapes, tokens: int, on_gpu: bool) -> int:
    """One chunk of logits for `tokens` scored positions, their hidden states, the float32 gradient of their log-probs
    and that of the loss."""
    chunk = chunk_size(tokens, shapes.vocabulary, 4, on_gpu) * shapes.vocabulary * 4
    return chunk + (2 * shapes.dtype.itemsize + 4) * tokens * shapes.width


def slots(shapes: Shapes, count: int, prompt: int, new: int) -> int:
    """Keys and values of `count` answers in flight, and of the prompts that wait beside them."""
    waiting = min(count, max(1, PREFILL_TOKENS // prompt))
    held = count * slot_bytes(shapes.text, slot_length(prompt, new), shapes.dtype)
    return held + waiting * slot_bytes(shapes.text, prompt, shapes.dtype)


def sampling(shapes: Shapes, count: int, prompt: int, new: int) -> int:
    """What prefilling prompts, or else drawing the next tokens, takes."""
    waiting = min(count, max(1, PREFILL_TOKENS // prompt))
    shared = shapes.text.num_key_value_heads != shapes.text.num_attention_heads  # one layer's, repeated for every head
    repeated = 2 * shapes.dtype.itemsize * count * slot_length(prompt, new) * shapes.query * shared
    drawing = forward(shapes, count, 1) + max(repeated, DRAW * count * shapes.vocabulary)
    return max(forward(shapes, waiting, prompt), drawing)


def on_heap(shapes: Shapes, tokens: int, kept: int) -> int:
    """What `kept` bytes of activations of `tokens` at a time cost a CPU's heap, see HEAP."""
    mapped = BLOCK if maps_blocks(shapes.config) else MAPPED
    return int(kept * HEAP) if tokens * shapes.ffn * shapes.dtype.itemsize < mapped else kept


def tower(shapes: Shapes, section: Features, clips: int, on_gpu: bool) -> int:
    """Encoding the frames of one video at once, whole and in `clips`: pixels, and activations of the vision tower."""
    vision, E = shapes.config.vision_config, shapes.dtype.itemsize
    area = lambda frames: frames * prod(frame_size(shapes, section, frames))
    pixels = area(section.frames) + clips * area(section.clip_frames)
    side = shapes.images.patch.side if shapes.images.patch else vision.patch_size
    # SigLIP and CLIP name their layers and their feed-forward; of LLaVA's, old releases keep the output of every layer
    named = "vision_feature_layer" in shapes.config.to_dict() and not hasattr(output_capturing, "select_hidden_states")
    layers = vision.num_hidden_layers + 1 if named else 0
    ffn = vision.to_dict().get("intermediate_size", 4 * vision.hidden_size)
    frames = 3 * pixels * (E + 4 * (not on_gpu))  # the float32 of the GPU's copy is in host memory
    fused = vision.to_dict().get("hidden_act", "").startswith("gelu")  # in one kernel; CLIP's takes three
    return int(frames + E * pixels / side**2 * ((layers + 4) * vision.hidden_size + (3 - fused) * ffn))
