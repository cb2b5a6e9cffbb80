"""The comparison with peers: ours runs, a peer that cannot run costs its own row, and the page keeps its text."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

SIZES = dict(width=128, layers=1, vocabulary=2304, new_tokens=4, frames=2, side=56, videos=4, records=2, rank=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lab.bench.peers.work import Sizes, prepare

    folder = tmp_path_factory.mktemp("peers")
    prepare(folder, Sizes(**SIZES, steps=3))
    return folder


def test_only_plain_words_are_drawn(folder):
    """EOS, special tokens and rows of the head that no token has cannot come up, so answers have one length."""
    from lab.bench.peers.work import QUESTION, plain_words

    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "checkpoint")
    words = {tokenizer.convert_tokens_to_ids(f"Ġ{word.strip()}") for word in plain_words(tokenizer)}
    asked = tokenizer(QUESTION, return_tensors="pt")
    torch.manual_seed(0)
    drawn = model.generate(**asked, do_sample=True, top_k=0, max_new_tokens=16, num_return_sequences=8)
    answers = drawn[:, asked["input_ids"].shape[1] :]
    assert answers.shape == (8, 16) and len(words) > 300 and set(answers.flatten().tolist()) <= words
    for ids in answers.tolist():
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_ours_is_measured_and_a_peer_that_cannot_run_costs_its_own_row(folder, tmp_path):
    from lab.bench.peers.__main__ import measure
    from lab.bench.peers.table import BEGIN, END, write_tables
    from lab.bench.peers.work import Sizes
    from lab.bench.peers.worker import Row

    rows = (
        Row("ours", None, "sft", "video"),
        Row("absent", "absent", "sft", "video"),
        Row("LLaMA-Factory", "llamafactory", "sft", "video"),
    )
    pythons = {None: sys.executable, "llamafactory": sys.executable}  # which has no LLaMA-Factory
    found = measure(rows, pythons, folder, rounds=1)
    ours, absent, peer = json.loads(json.dumps(found))
    (step,) = ours["steps"]
    assert 0 < step["processor_seconds"] < 60 and step["peak_bytes"] > ours["facts"]["imported_bytes"] > 2**27
    prompt = step["forward: tokens"] / 2 - SIZES["new_tokens"]
    assert 4 < prompt < 100 and step["forward: seconds"] > 0
    assert not absent["steps"] and absent["why"] == "no environment was given: --env absent=PYTHON"
    assert not peer["steps"] and peer["why"] == "ModuleNotFoundError: No module named 'llamafactory'"
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    write_tables(page, {"sizes": asdict(Sizes()), "tasks": {"sft": {"commit": "c0ffee", "rows": found}}})
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nAfter.\n") and "old" not in text
    assert f"| ours | video | {step['seconds']:.2f} | {step['processor_seconds']:.2f} | 1.00 |" in text
    assert "- LLaMA-Factory did not run: `ModuleNotFoundError: No module named 'llamafactory'`." in text
