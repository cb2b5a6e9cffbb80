"""The frozen base: one checkpoint, loaded once, in 4 bits, shared by every role.

Only the decoder's linear layers are quantised (NF4, double quantisation); embeddings, head, vision tower and
projector keep their dtype. Nothing in here is ever trained: `fingerprint()` before and after a run proves it.

Two traps of bitsandbytes on the CPU are closed here. Its packed bfloat16 path for AVX512 replaces the weights at the
first forward in evaluation mode and then gives wrong gradients, silently: it is switched off on every layer. And it
dequantises wrongly when a layer's input width is not a multiple of the block size of 64: such a base is refused.

Shapes: B rows, S positions, D width, V vocabulary.
"""

import hashlib
import inspect
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from ..errors import ModelError
from ..recipe import Model
from . import unsloth_loader
from .families import CHAT_TEMPLATES, Encoded, Family, family_of
from .memory import map_blocks, maps_blocks, out_of_memory
from .norms import fuse_norms, fuses_norms
from .pixels import ImageSpec, image_spec, read_file, read_json
from .windows import batch_windows

# Noise that no user can act on: bitsandbytes announces that an optional kernel is not installed, transformers is
# asked by a name that is to change (the new one is not there in 5.17), and it draws a bar for each checkpoint.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
transformers_logging.disable_progress_bar()

QUANT_BLOCK = 64
HUB_S = 5.0  # seconds until the hub must have answered once
TINY = Path(__file__).parent.parent / "tiny"
EMBEDDED = {"embedded": TINY / "base", "embedded_weak": TINY / "base_weak"}


class Base:
    """A frozen video language model. Made by `load_base`; adapters are put on it by `model.roles.Roles`."""

    def __init__(self, model: nn.Module, tokenizer, family: Family, images: ImageSpec, path: str, quantization: str):
        self.model = model
        self.tokenizer = tokenizer
        self.family = family
        self.images = images
        self.path = path
        self.quantization = quantization
        self.loader = "transformers"
        self.checkpointed: list[nn.Module] = []  # what recomputes in the backward, with `model.gradient_checkpointing`
        self.dense_rollouts: bool | str = "auto"  # see `rollout/dense.py`
        self.placeholder_id: int = getattr(model.config, f"{family.placeholder}_token_id")
        self.eos_id: int = tokenizer.eos_token_id
        self.decoder = model.get_decoder()
        # transformers renames this argument: both names work until 5.40, and the old one warns
        known = inspect.signature(type(self.decoder).forward).parameters
        self.cache_argument = "cache" if "cache" in known else "past_key_values"
        self.width: int = self.decoder.config.hidden_size
        self.head_weight_VD: Tensor = model.get_output_embeddings().weight
        # Special tokens other than EOS are neither sampled nor scored: a placeholder in an answer would be taken for a
        # video at the next forward. So with rows of the head that stand for no token.
        self.ban_bias_V = torch.zeros(len(self.head_weight_VD), dtype=torch.float32, device=self.head_weight_VD.device)
        self.ban_bias_V[len(tokenizer) :] = -1e30
        banned = banned_ids(tokenizer, model.config) - {self.eos_id}
        self.ban_bias_V[[id for id in sorted(banned) if id < len(self.head_weight_VD)]] = -1e30

    @property
    def device(self) -> torch.device:
        return self.head_weight_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight_VD.dtype

    def limit_pixels(self, pixels: int | None) -> None:
        """Bound the area of a frame, for towers that take any size (`features.max_pixels`)."""
        self.images = self.images._replace(size=self.images.size._replace(limit=pixels))

    @property
    def has_tower(self) -> bool:
        return getattr(self.model.base_model, self.family.tower[0]) is not None

    def drop_tower(self) -> None:
        """Free vision tower and projector: after the features stage no process needs them."""
        for name in self.family.tower:
            setattr(self.model.base_model, name, None)

    @torch.no_grad()
    def encode(self, pixels_TCHW: Tensor) -> Encoded:
        """Frames (a multiple of what the family merges in time) through the frozen tower and projector."""
        if not self.has_tower:
            raise ModelError(
                "The vision tower was dropped after the features stage; load the base again to encode frames."
            )
        return self.family.encode(self.model, pixels_TCHW.to(self.device, self.dtype), self.images)

    def unknown_share(self, ids: Sequence[int]) -> float:
        """The share of tokens that stand for words which the tokenizer does not know."""
        return list(ids).count(self.tokenizer.unk_token_id) / max(1, len(ids))

    def fingerprint(self) -> str:
        """sha256 over the bytes of every parameter that belongs to the base (adapters left out)."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                continue
            data = parameter.data.contiguous().view(torch.uint8).cpu()
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(data.numpy().tobytes())
            if parameter.dtype == torch.uint8:  # packed 4-bit weights: their scales are weights as well
                for key, value in sorted(parameter.quant_state.as_dict(packed=True).items()):
                    digest.update(key.encode())
                    digest.update(value.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def bytes(self) -> dict[str, int]:
        """Bytes held by the base: the quantised linears of the decoder, and everything else."""
        quantised = other = 0
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                continue
            size = parameter.numel() * parameter.element_size()
            if parameter.dtype == torch.uint8:
                quantised += size
            else:
                other += size
        return {"quantised": quantised, "other": other}


def banned_ids(tokenizer, config: PretrainedConfig) -> set[int]:
    """Ids of special tokens, EOS among them, and of image, video and vision tokens by any name."""
    banned = set(tokenizer.all_special_ids)
    banned |= {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for key, value in config.to_dict().items():
        if key.startswith(("image_", "video_", "vision_")) and key.endswith(("_token_id", "_token_index")):
            banned |= set() if value is None else {value}
    return banned


def resolve_base(name: str) -> str:
    """`embedded` and `embedded_weak` -> the checkpoints that ship with the package; else a folder or a hub id."""
    return str(EMBEDDED[name]) if name in EMBEDDED else os.path.expanduser(name)


def read_config(section: Model) -> PretrainedConfig:
    """The base's config.json; raises ModelError when it is not a checkpoint's."""
    if os.path.isfile(section.base):
        raise ModelError(
            f"`model.base: {section.base}` is a {'GGUF ' if section.base.endswith('.gguf') else ''}file; a base is a "
            "folder with config.json, weights and tokenizer. Of a language model in GGUF, `python -m lab.smol_world` "
            "makes one with a vision tower (docs/smol_world.md)."
        )
    require_hub(section)
    try:
        return AutoConfig.from_pretrained(resolve_base(section.base), revision=section.revision)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ModelError(
            f"`model.base: {section.base}` cannot be read as a transformers checkpoint: {error}"
        ) from error


def require_hub(section: Model) -> None:
    """Raise ModelError where a base must be downloaded and the hub does not answer. The client itself would try six
    times, for half a minute."""
    name, revision = resolve_base(section.base), section.revision
    if os.path.isdir(name) or in_cache(name, revision):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_S)
    except (HfHubHTTPError, ValueError):  # the hub has answered, or the name is none: AutoConfig says which
        return
    except Exception as error:  # of the HTTP client, which one depends on the hub's version
        raise ModelError(
            f"`model.base: {section.base}` is not a folder on this disk, not in the hub's cache, and the hub does not "
            f"answer ({error}). Check the name and the network, or give a folder."
        ) from error


def in_cache(name: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this disk has the base's config.json."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except ValueError:  # no repository can have this name
        return False


def load_base(section: Model, device: torch.device, tower: bool = True) -> Base:
    """Load the recipe's base, frozen, on `device`.

    Raises ModelError: unsupported family, a width that 4-bit quantisation cannot take, a folder that is not a
    checkpoint, a loader that cannot serve.
    """
    path = resolve_base(section.base)
    config = read_config(section)
    family = family_of(config)
    dtype = torch_dtype(section, device)
    quantization = None
    refuse_quantised(config, section.base)
    if section.quantization == "nf4":
        check_widths(config, section.base)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # full prefixes: a short name such as "visual" would match nothing and switch off the head's own exclusion
            llm_int8_skip_modules=[*(f"model.{part}" for part in family.tower), "lm_head"],
        )
    if device.type == "cpu" and maps_blocks(config):
        map_blocks()
    theirs = section.loader == "unsloth"
    if theirs:
        unsloth_loader.refuse(section, config, device)
    try:
        # unsloth does not say which tensors came from the checkpoint. So transformers looks first, without any memory.
        loaded: tuple = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=section.revision,
            dtype=dtype,
            device_map={"": "meta" if theirs else device},
            quantization_config=None if theirs else quantization,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        raise ModelError(
            f"`model.base: {section.base}` is not loaded: {type(error).__name__}: {error}. A weight file is missing, "
            "cut or of another model; download the checkpoint again."
        ) from error
    model, info = loaded
    refuse_incomplete(info, section.base)
    if theirs:
        model = unsloth_loader.load(section, path, config, quantization, dtype, device)
    return finish(model, section, device, tower)


def finish(model: nn.Module, section: Model, device: torch.device, tower: bool) -> Base:
    """A model whose weights are there -> the frozen base, with its tokenizer and its image processor's settings."""
    path, family = resolve_base(section.base), family_of(model.config)
    if section.quantization == "nf4" and device.type == "cpu":
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
        for parameter in model.parameters():
            if parameter.dtype != torch.uint8:  # a view of the weight file: one of them keeps the whole file in memory
                parameter.data = parameter.data.clone()
    # cuDNN's attention, which torch prefers on Hopper and Blackwell, makes a plan for every new length. Its plans for a
    # forward with and without gradients differ, so equal log-probs of the two could not be counted on.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.requires_grad_(False)
    model.eval()
    if family.any_size:
        batch_windows(getattr(model.base_model, family.tower[0]))
    if fuses_norms(section, device):
        fuse_norms(model)
    tokenizer = load_tokenizer(section, model)
    named = named_template(section)
    tokenizer.chat_template = named or chat_template(path, section.revision, tokenizer, family)
    if named:
        family = family._replace(template=None)
    images = image_spec(path, section.revision, any_size=family.any_size, of_video=family.of_video)
    base = Base(model, tokenizer, family, images, path, section.quantization)
    base.loader, base.dense_rollouts = section.loader, section.dense_rollouts
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.checkpointed = [m for m in base.decoder.modules() if vars(m).get("gradient_checkpointing")]
    if not tower:
        base.drop_tower()
    return base


# what transformers, safetensors and bitsandbytes raise at files that are not whole
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, AttributeError, ImportError, SafetensorError)


def refuse_quantised(config: PretrainedConfig, name: str) -> None:
    """Raises ModelError for a checkpoint whose weights are quantised already, in whatever way."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    found = found if isinstance(found, dict) else found.to_dict()
    raise ModelError(
        f"`model.base: {name}` is quantised already (config.json: `quantization_config`, method "
        f"{found.get('quant_method', 'unknown')}). Give the original checkpoint: `model.quantization` quantises it "
        f"here."
    )


def refuse_incomplete(info: dict, name: str) -> None:
    """Raises ModelError unless every tensor of the model came from the checkpoint. `info` is transformers' own."""
    for key, what in (("missing_keys", "are not in the checkpoint"), ("mismatched_keys", "have another shape there")):
        if found := sorted(map(str, info[key])):
            raise ModelError(
                f"`model.base: {name}` is not loaded: {len(found)} tensors of the model {what}, the first {found[0]}. "
                "They would be random. Download the checkpoint again."
            )
    if info["error_msgs"]:
        raise ModelError(f"`model.base: {name}` is not loaded: {info['error_msgs'][0]}. Download the checkpoint again.")


def load_tokenizer(section: Model, model: nn.Module):
    """The checkpoint's tokenizer. Raises ModelError: none that can be read, no EOS, tokens that the model has no row
    for."""
    path, name = resolve_base(section.base), section.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=section.revision)
    except Exception as error:  # each tokenizer class fails in its own way at missing and damaged files
        raise ModelError(
            f"`model.base: {name}` has no tokenizer that can be read: {type(error).__name__}: {error}. Copy "
            "tokenizer.json and tokenizer_config.json from the checkpoint's origin."
        ) from error
    if not len(tokenizer):
        raise ModelError(f"`model.base: {name}` has an empty tokenizer; copy tokenizer.json from its origin.")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"`model.base: {name}` has a tokenizer without `eos_token`: no answer would ever end. Set it in "
            "tokenizer_config.json."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= rows:
        raise ModelError(
            f"`model.base: {name}`: token {token!r} has the id {last}, the model has {rows} embeddings. Tokenizer and "
            "weights belong to different models."
        )
    return tokenizer


def base_digest(section: Model) -> str:
    """What the base is, for telling whether it changed: the template that the recipe names and, of a folder, the small
    files whole and of each weight file its name, size, first and last MiB (hashing 15 GB would take longer than
    loading them); of a hub id, the id and the revision."""
    path = Path(resolve_base(section.base))
    digest = hashlib.sha256(f"{section.base}@{section.revision}".encode() if not path.is_dir() else b"")
    digest.update((named_template(section) or "").encode())
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.suffix in (".json", ".safetensors", ".jinja"):
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            with open(file, "rb") as data:
                digest.update(data.read(1 << 20))
                data.seek(max(0, size - (1 << 20)))
                digest.update(data.read())
    return digest.hexdigest()[:16]


def torch_dtype(section: Model, device: torch.device) -> torch.dtype:
    """The dtype of everything that is not quantised: bfloat16 on a GPU, float32 on a CPU, unless the recipe says."""
    if section.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[section.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def named_template(section: Model) -> str | None:
    """The text of the template that the recipe names; None: the checkpoint's own is meant."""
    name = section.chat_template
    if name is None or name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES.get(name)
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"`model.chat_template: {name}` cannot be read as a Jinja file: {error}") from error


def chat_template(path: str, revision: str | None, tokenizer, family: Family) -> str:
    """The checkpoint's own chat template: the processor's before the tokenizer's, which may know no videos."""
    processors = None
    if read_file(path, "chat_template.jinja", revision) is None:  # else the tokenizer has it
        processors = read_json(path, "chat_template.json", revision)
    template = processors["chat_template"] if processors else tokenizer.chat_template or family.fallback_template
    if template is None:
        raise ModelError(f"{path} has no chat template (chat_template.jinja); take it from the base's original files.")
    return template


def check_widths(config, name: str) -> None:
    """Raises ModelError for a base that 4 bits cannot hold."""
    text = config.get_text_config()
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    for what, width in (
        ("hidden_size", text.hidden_size),
        ("heads x head_dim", heads),
        ("intermediate_size", text.intermediate_size),
    ):
        if width % QUANT_BLOCK:
            raise ModelError(
                f"`{name}` has {what} = {width}, not a multiple of {QUANT_BLOCK}: 4-bit blocks would cross rows and be "
                "dequantised wrongly on a CPU. Set `model.quantization: none` for this base."
            )
