"""`python kernels/bench/aot.py` compiles every kernel for every architecture of the table, without a GPU.

Triton carries its own ptxas, so a laptop can say what a kernel costs on an H100: registers per thread, bytes spilled,
shared memory per block. The table goes to docs/results/, one column per version of Triton that has been asked so far;
`tests/kernels/test_aot.py` holds the same compilations to no spills and the card's shared memory.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rlaif_kernels import triton_kernels as kernels
from rlaif_kernels.configs import TABLE, Config, Configs

# Shared memory that one block may opt in to, bytes (CUDA C++ programming guide, compute capabilities)
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"

_ROW_TYPES = {
    **dict.fromkeys(
        ("s_ptr", "ref_ptr", "bias_ptr", "logp_ptr", "lse_ptr", "entropy_ptr", "kl_ptr", "at_target_ptr"), "*fp32"
    ),
    **dict.fromkeys(("up_logp_ptr", "up_entropy_ptr", "up_kl_ptr"), "*fp32"),
    **dict.fromkeys(("inv_temperature", "softcap"), "fp32"),
    **dict.fromkeys(("s_stride", "dz_stride", "V", "row0"), "i32"),
    "target_ptr": "*i64",
    "valid_ptr": "*u8",
    "dz_ptr": "*bf16",
}
_FLAGS = {**dict.fromkeys(("BIAS", "SOFTCAP", "REF", "GRAD", "UPSTREAM", "REVERSE"), False), "UNIT": 1.0}
_ALL = {"BIAS": True, "SOFTCAP": True}
_GAE_TYPES = {
    **dict.fromkeys(("reward_ptr", "value_ptr", "advantage_ptr", "return_ptr"), "*fp32"),
    **dict.fromkeys(("gamma", "decay"), "fp32"),
    "real_ptr": "*u8",
    "T": "i32",
}
_GATHER_TYPES = {
    **dict.fromkeys(("index_ptr", "position_ptr", "frame_ptr", "position_out_ptr", "frame_out_ptr"), "*i64"),
    **dict.fromkeys(("features_ptr", "features_out_ptr"), "*bf16"),
    **dict.fromkeys(("N", "K", "C"), "i32"),
}
_DISSIMILARITY_TYPES = {"features_ptr": "*bf16", "score_ptr": "*fp32", "P": "i32", "C": "i32", "tiny_norm": "fp32"}


class Case(NamedTuple):
    """One kernel with one set of compile-time choices."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, object]
    ragged: tuple[str, ...]  # integer arguments whose divisibility by 16 Triton would specialise on

    def config(self, table: Configs) -> Config:
        """Its entry in an architecture's table."""
        return getattr(table, self.name.split(":")[0])


def _rows(name: str, **flags: bool) -> Case:
    return Case(name, kernels.row_kernel, _ROW_TYPES, _FLAGS | flags, ("V",))


CASES = (
    _rows("rows: statistics"),
    _rows("rows: log-prob and gradient", GRAD=True),
    _rows("rows: gradient of log-prob and entropy, all options", **_ALL, GRAD=True, UPSTREAM=True),
    _rows("rows_with_reference: statistics", REF=True),
    _rows(
        "rows_with_reference: gradient of log-prob, entropy and KL, all options",
        **_ALL,
        REF=True,
        GRAD=True,
        UPSTREAM=True,
    ),
    _rows(
        "rows_with_reference: gradient with KL(reference || policy), all options",
        **_ALL,
        REF=True,
        GRAD=True,
        UPSTREAM=True,
        REVERSE=True,
    ),
    Case("gae", kernels.gae_kernel, _GAE_TYPES, {}, ("T",)),
    Case("dissimilarity", kernels.dissimilarity_kernel, _DISSIMILARITY_TYPES, {}, ("P", "C")),
    Case("gather", kernels.gather_kernel, _GATHER_TYPES, {"AXES": 3}, ("N", "K", "C")),
)


class Cost(NamedTuple):
    """What ptxas says of one compilation."""

    kernel: str
    arch: int
    aligned: bool  # sizes divisible by 16
    block: int
    warps: int
    registers: int  # per thread
    stack: int  # bytes
    spilled: int  # bytes, stores and loads together
    shared: int  # bytes per block


def compile_case(case: Case, arch: int, aligned: bool) -> Cost:
    """Compiles to a cubin; raises what Triton or ptxas raises."""
    config = case.config(TABLE[arch])
    constants = {**case.constants, "BLOCK": config.block}
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in constants else case.types[name] for name in names}
    plain = ("row0",)  # not specialised, whatever its value
    divisible = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and name not in plain and (aligned or name not in case.ragged))
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # a cache hit prints no log
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": config.num_warps, "enable_fp_fusion": True},
        )
    registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    stack, stores, loads = (int(number) for number in spills.groups())
    return Cost(
        case.name,
        arch,
        aligned,
        config.block,
        config.num_warps,
        registers,
        stack,
        stores + loads,
        binary.metadata.shared,
    )


def compile_all(archs: tuple[int, ...] = tuple(TABLE)) -> Iterator[Cost]:
    """Every case for every architecture, with sizes divisible by 16 and ragged."""
    for case in CASES:
        for arch in archs:
            for aligned in (True, False):
                yield compile_case(case, arch, aligned)


def main() -> None:
    """Writes kernels_aot.json and kernels_aot.md."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "kernels_aot.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[triton.__version__] = [cost._asdict() for cost in compile_all()]
    kernels_now = [cost["kernel"] for cost in found[triton.__version__]]
    # a column of a version that compiled other kernels than today's says nothing about these
    found = {version: costs for version, costs in found.items() if [c["kernel"] for c in costs] == kernels_now}
    path.write_text(json.dumps(found, indent=1) + "\n")
    versions = sorted(found)
    lines = ["# What the kernels cost, compiled ahead of time", ""]
    lines += [
        "Written by `python kernels/bench/aot.py`, without a GPU. Per version of Triton: registers per thread, bytes"
    ]
    lines += ["spilled, bytes of shared memory per block. Aligned: sizes divisible by 16.", ""]
    lines += [f"| kernel | arch | sizes | block | warps | {' | '.join(f'Triton {version}' for version in versions)} |"]
    lines += ["|" + "---|" * (5 + len(versions))]
    for costs in zip(*(found[version] for version in versions), strict=True):
        one = Cost(**costs[0])
        ptxas = " | ".join(f"{cost['registers']} / {cost['spilled']} / {cost['shared']}" for cost in costs)
        sizes = "aligned" if one.aligned else "ragged"
        lines += [f"| {one.kernel} | sm_{one.arch} | {sizes} | {one.block} | {one.warps} | {ptxas} |"]
    (RESULTS / "kernels_aot.md").write_text("\n".join(lines) + "\n")
    spilled = sum(cost["spilled"] for cost in found[triton.__version__])
    print(
        f"Triton {triton.__version__}: {len(found[triton.__version__])} compilations, {spilled} bytes spilled -> {path}"
    )


if __name__ == "__main__":
    main()
