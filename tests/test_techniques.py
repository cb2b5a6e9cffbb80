"""The techniques' table: switching one off does what it says and leaves the arithmetic of the step as it was."""

import pytest
import torch

from core import SHORT_STEP
from rlaif_lite import profiler
from rlaif_lite.model.base import Base
from rlaif_lite.phases import listen
from rlaif_lite.profiler import inputs
from rlaif_lite.profiler.recorder import Recorder
from rlaif_lite.recipe import load_recipe

KEYS = [*SHORT_STEP, "ppo.group_size=4", "ppo.minibatch=4"]


@pytest.fixture(scope="module")
def bench():
    from lab.bench import techniques

    return techniques


def test_one_step_without_each(bench, monkeypatch):
    """From the same state a step ends with the same policy, and without a technique the work is where it should be."""
    for name, value in (("PROMPT_TOKENS", 5), ("FRAME", (56, 56)), ("VIDEOS", (2, 2))):
        monkeypatch.setattr(inputs, name, value)
    towers = []
    encode = Base.encode
    monkeypatch.setattr(Base, "encode", lambda base, pixels: (towers.append(1), encode(base, pixels))[1])
    recipe = load_recipe("recipes/vlm_rlaif_7b_24gb.yaml", KEYS)
    found = {}
    with profiler.opened(recipe, 1, None, profiler.Random(small=True)) as (work, _):
        given = bench.plain_ppo.prepare(work)
        trained = work.roles.parameters("policy") + work.roles.parameters("value")
        start = [p.detach().clone() for p in trained]
        for technique in (t for t in bench.TECHNIQUES if not t.keys):
            for parameter, old in zip(trained, start, strict=True):
                parameter.data.copy_(old)
            for optimizer in given.optimizers.values():
                optimizer.state.clear()
            towers.clear()
            recorder = Recorder(torch.device("cpu"))
            with listen(recorder), recorder, bench.switched_off(technique, given):
                assert bench.plain_ppo.ours(given, 0) == 20
            moved = torch.cat([p.detach().flatten() for p in trained])
            found[technique.name] = recorder.costs["prefill"].count, len(towers), moved
    prefilled, passes, moved = found.pop("all of them")
    assert passes == 0 and (moved != torch.cat([p.flatten() for p in start])).any()
    assert found["shared prefill"][0] == 4 * prefilled
    # a prefill; the policy, reference, reward and value read two micro-batches; policy and value are updated on them
    assert found["cached features"][1] == 1 + 4 * 2 + 2 * 2
    for name, (_, _, other) in found.items():  # Adam's first step is the rate's size wherever a gradient is not 0
        assert ((moved - other).abs() > 0.1 * recipe.ppo.lr).float().mean() < 0.01, name


def test_page_of_the_table(bench):
    """Ratios are to the line with everything on; what does not fit is said."""
    rows = {
        "all of them": {"peak_memory_bytes": 2**20 * 100, "tokens_per_second": 50.0, "instead": ""},
        "4-bit base": {"peak_memory_bytes": 2**20 * 250, "tokens_per_second": 60.0, "instead": "its weights in full"},
        "checkpointing": {"why": "out of memory", "instead": "all activations kept"},
    }
    text = bench.as_markdown(
        {
            "recipe": "r",
            "small": True,
            "machine": {"device": "cpu"},
            "techniques": rows,
            "commit": "abc",
            "command": "python x",
        }
    )
    assert "| none |  | 100.0 | 1.00 | 50.0 | 1.00 |" in text
    assert "| 4-bit base | its weights in full | 250.0 | 2.50 | 60.0 | 1.20 |" in text
    assert "| checkpointing | all activations kept | out of memory |" in text and "no forecast of a GPU's" in text
