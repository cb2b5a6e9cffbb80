"""The bench of selectors: which points there are, and its table from points that ran."""

import json

from lab.bench.pruners import KEYS, LAYOUT, OTHERS, SELECTORS, Point, chain_of, points, table
from rlaif_lite.recipe import load_recipe
from rlaif_lite.video import prune


def test_points_are_those_that_a_selector_can_reach(tmp_path):
    found = points([1, 2], [])
    assert len(found) == len(set(found)) == 2 * 19 and found[0] == Point(1, "all tokens", None)
    shares = {name: [p.share for p in found if p.seed == 1 and p.selector == name] for name in SELECTORS}
    assert shares["evs"] == shares["random"] == shares["dtd"] == [0.5, 0.25, 0.15, 0.1]
    assert shares["vidcom2"] == shares["v_cast"] == [0.5, 0.25]  # a token of each of 12 frames
    assert points([1], ["pool"]) == [Point(1, "pool", None)]
    keys = [key.format(seed=1) if key.startswith("data.world") else key for key in KEYS]
    for point in found[:11]:
        recipe = load_recipe("tiny", [*keys, f"features.prune={json.dumps(chain_of(point, tmp_path))}"])
        for step in recipe.features.prune[-1:]:
            ((name, value),) = step.model_dump().items()
            assert name == "pool" or prune.count_kept(name, value, *LAYOUT) <= LAYOUT[0] * LAYOUT[1] // 2
    assert OTHERS["all tokens"] == []


def test_changes_are_paired_by_seed():
    def row(seed: int, name: str, share: float | None, f1: float, most: int) -> dict:
        figures = {"F1": f1, "hallucination": 0.2, "judge": 0.8, "malformed": 0.0, "commit": "abc"}
        return {"seed": seed, "selector": name, "share": share, "tokens": 10.0, "fewest": 10, "most": most} | figures

    rows = [row(1, "all tokens", None, 0.8, 10), row(2, "all tokens", None, 0.9, 10)]
    rows += [row(1, "dtd", 0.5, 0.7, 14), row(2, "dtd", 0.5, 0.8, 10), row(1, "evs", 0.5, 0.6, 10)]
    text = table(
        {"points": rows, "seeds": [1, 2], "machine": {"cpu": "a CPU"}, "command": "go", "costs": {"evs": 12.3}}
    )
    assert "| all tokens |  | 2 | 10 | 0.850 |" in text and "| evs | 50% | 1 | 10 | 0.600 (-0.200) |" in text
    assert "| dtd | 50% | 2 | 10.0 (10 to 14) | 0.750 (-0.100, -0.100 to -0.100) |" in text
    assert "5 of 38 points have run." in text and "| evs | 12 |" in text and "Commit abc" in text
