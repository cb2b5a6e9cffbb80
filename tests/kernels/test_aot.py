"""Every kernel of every configuration, compiled for every architecture of the table, without a GPU."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("kernels_aot", ROOT / "kernels" / "bench" / "aot.py")
aot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(aot)


# Most kernels take fewer registers where 16 divides the sizes, so the other ones are the quick tests' part.
@pytest.mark.parametrize("aligned", [pytest.param(True, marks=pytest.mark.slow), False], ids=["aligned", "ragged"])
@pytest.mark.parametrize("arch", aot.TABLE)
@pytest.mark.parametrize("case", aot.CASES, ids=lambda case: case.name)
def test_compiles_without_a_spill(case, arch, aligned, tmp_path, monkeypatch):
    monkeypatch.setattr(aot.triton.knobs.cache, "dir", str(tmp_path))
    cost = aot.compile_case(case, arch, aligned)
    assert cost.spilled == 0, cost
    assert cost.shared <= aot.SHARED_LIMIT[arch], cost
    assert cost.registers * cost.warps * 32 <= 65536, f"one block does not fit the register file: {cost}"


def test_the_gate_sees_a_spill():
    """16384 elements in four warps cannot stay in registers; if nothing is seen of it, the log is read wrongly."""
    case = aot.CASES[3]
    wide = aot.TABLE[80]._replace(rows_with_reference=aot.Config(16384, 4))
    before = aot.TABLE[80]
    try:
        aot.TABLE[80] = wide
        assert aot.compile_case(case, 80, aligned=True).spilled > 0
    finally:
        aot.TABLE[80] = before


def test_every_type_of_every_case_is_an_argument():
    for case in aot.CASES:
        assert set(case.types) | set(case.constants) | {"BLOCK"} == set(case.kernel.arg_names), case.name
