"""Sees every operator on the GPU's tensors: bytes held and moved, arithmetic, launches, and what the host waits for.

Tensors on "cuda" are FakeTensors; those on the CPU are real and run as ever. A small tensor of the GPU has a real twin
on the CPU for as long as its values follow from the CPU's alone: so it is known how many elements a mask keeps. Where a
value is asked for that no twin knows (a sampled token, a loss), one of two `fillers` is the answer.
"""

import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import StageError
from ..planner.memory import CUBLAS
from .allocator import UNIT, Allocator, Block, round_up
from .cards import Card, fuses, seconds

PACKAGE = str(Path(__file__).parent.parent)
OURS = (PACKAGE, str(Path(PACKAGE).parent / "kernels"))
HERE = str(Path(__file__).parent)
TWIN = 1 << 20  # elements of the largest tensor that has a twin
HOST = 1 << 20  # elements of the largest copy to the host that is filled; larger ones are zero pages, never touched
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "resize_", "set_"}
UNWRITTEN = {f"aten::{name}" for name in NO_KERNEL - {"lift_fresh"}}
COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
READS = {"_local_scalar_dense", "is_nonzero", "equal"}


class Tracker(TorchDispatchMode):
    """`sums` counts from the beginning, seconds included; `live` and `peak` are bytes of tensors on the GPU."""

    def __init__(self, card: Card, fillers: tuple[int, int] = (1, 2), trace: bool = False, expandable: bool = False):
        super().__init__()
        self.card, self.fillers, self.trace = card, fillers, trace
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sums: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()  # by line
        self.copies: Counter[str] = Counter()  # from the host, by line
        self.seconds: Counter[str] = Counter()  # by operator
        self.live = self.peak = 0
        self.allocator = Allocator(expandable)
        self._workspace: Block | None = None
        self.at_peak: dict[str, int] = {}  # with `trace`: bytes by the line that allocated them
        self._held: dict[int, tuple[Block, int, str]] = {}
        self._by_line: Counter[str] = Counter()
        self._highest, self._at_highest = 0, False
        self._stale: weakref.WeakSet = weakref.WeakSet()  # storages of twins that are no longer true

    # ---- memory

    def begin(self) -> None:
        """Let peaks begin at what is held now, and give the allocator's free segments back."""
        self.peak = self._highest = self.live
        self.at_peak = {}
        self.allocator.empty_cache()
        for counter in (self.syncs, self.copies, self.seconds):
            counter.clear()

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = max(UNIT, round_up(storage.nbytes(), UNIT))
        line = self.where() if self.trace else ""
        self._held[key] = (self.allocator.allocate(size), size, line)
        weakref.finalize(storage, self._free, key)
        self._by_line[line] += size
        self.live += size
        self._risen()

    def _risen(self) -> None:
        self.peak = max(self.peak, self.live)
        if self.live > self._highest:
            self._highest, self._at_highest = self.live, True

    def _free(self, key: int) -> None:
        if self._at_highest and self.trace:
            self.at_peak = dict(self._by_line)
        self._at_highest = False
        block, size, line = self._held.pop(key)
        self.allocator.free(block)
        self._by_line[line] -= size
        self.live -= size

    def _within(self, name: str, size: int) -> None:
        """Bytes that an operator holds while it runs."""
        self.allocator.free(self.allocator.allocate(size))
        self.peak = max(self.peak, self.live + size)
        if self.live + size > self._highest:
            self._highest, self._at_highest = self.live + size, False
            self.at_peak = {**self._by_line, f"within {name}, {self.where()}": size} if self.trace else {}

    def held_at_peak(self) -> dict[str, int]:
        """Bytes by the line that allocated them, the most first."""
        found = self._by_line if self._at_highest else self.at_peak
        return {line: size for line, size in sorted(found.items(), key=lambda each: -each[1]) if size}

    # ---- where

    def where(self) -> str:
        """The innermost line of this package that led here, and the line of the library that it called."""
        frame, inner = sys._getframe(1), ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(OURS) and not name.startswith(HERE):
                return f"{Path(name).relative_to(Path(PACKAGE).parent)}:{frame.f_lineno}" + (inner and f" < {inner}")
            library = name.partition("site-packages/")[2]
            if not inner and library and not library.startswith("torch/"):
                inner = f"{library}:{frame.f_lineno}"
            frame = frame.f_back
        return inner or "outside of the package"

    # ---- operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        ins = tensors((args, kwargs))
        to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not to_gpu and not any(isinstance(tensor, FakeTensor) for tensor in ins):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "device":
            return func(*args, **kwargs)
        on_gpu = [tensor for tensor in ins if tensor.device.type == "cuda"]
        if on_gpu and name in READS:
            return self._read(name, on_gpu[0])
        if on_gpu and name not in COPIES:
            self._same_device(name, args, ins)
        if name == "bincount":
            return self._evenly(args[0], args[2])
        if name in INDEXING:
            args = (args[0], self._indices(args[1]), *args[2:])
            ins = tensors((args, kwargs))
        if name == "copy_" and not isinstance(args[0], FakeTensor):  # what arrives on the host has no value
            self._wait("copy to the host")
            return args[0]
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except DynamicOutputShapeException:
            return self._sized_by_values(func, args, kwargs, ins)
        outs = tensors(out)
        self._follow(func, args, kwargs, ins, outs)
        for tensor in outs:
            if tensor.device.type == "cuda":
                self._hold(tensor)
        if name in COPIES and on_gpu and outs[0].device.type == "cpu":
            self._wait("copy to the host")
            return self._on_host(on_gpu[0], outs[0])
        if name in COPIES and outs[0].device.type == "cuda" and any(t.device.type == "cpu" for t in ins):
            self.copies[self.where()] += 1
            self.sums["host_copies"] += 1
        if not func.is_view and name not in NO_KERNEL:
            self._count(func, name, args, kwargs, ins, out, outs)
        return out

    def kernel(self, name: str, operands: list[Tensor]) -> None:
        """One launch of a kernel that torch does not dispatch, on what it reads and writes."""
        self._same_device(name, (), operands)
        moved = sum(bytes_of(each) for each in {each.untyped_storage()._cdata: each for each in operands}.values())
        self._launch(name, moved, 0, 4)

    def add(self, cost: Counter) -> None:
        """Work that is done again as it was counted before, with one launch by the host (a CUDA graph)."""
        self.sums.update(cost)

    def _count(self, func, name, args, kwargs, ins, out, outs) -> None:
        moved = sum(bytes_of(tensor) for tensor in (*ins, *outs) if tensor.device.type == "cuda")
        sizes = [tensor.element_size() for tensor in ins if tensor.is_floating_point()]
        if name == "gemm_4bit":
            self._gemm_4bit(args[0], *args[2])
            return
        flops = (
            flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            if func._overloadpacket in flop_registry
            else 0
        )
        if name in ("embedding", "index", "gather", "index_select"):
            moved = 2 * bytes_of(outs[0])
        elif name in INDEXING or name in ("scatter_", "scatter_add_"):
            moved = 3 * max((bytes_of(tensor) for tensor in ins[1:]), default=0)
        elif name in ("masked_scatter", "masked_scatter_"):  # the prefix sum of the expanded mask
            self._within(name, 9 * outs[0].numel())
        elif name == "sort":
            self._within(name, 2 * bytes_of(ins[0]))
        if flops:
            self._blas()
        # what is multiplied has the smallest elements: sums of products, and attention's statistics, are float32 anyway
        self._launch(name, moved, flops, min(sizes, default=4))

    def _blas(self) -> None:
        """The workspace of cuBLAS, which torch's allocator holds from the first matmul on."""
        if self._workspace is None:
            self._workspace = self.allocator.allocate(CUBLAS)
            self.live += CUBLAS
            self._by_line["cuBLAS"] += CUBLAS
            self._risen()

    def _gemm_4bit(self, input_MK: Tensor, n: int, k: int) -> None:
        """bitsandbytes' matmul: fused, or the dense weight is made and thrown away within it."""
        self._blas()
        rows, size = input_MK.numel() // k, input_MK.element_size()
        operands, flops = size * rows * (n + k), 2 * rows * n * k
        if fuses(self.card, rows, n, k):
            self._launch("gemm_4bit", operands + n * k // 2, flops, size)
            return
        scales = 4 * n * k // 64
        self._within("gemm_4bit", n * k * size + 2 * scales)
        self._launch("dequantise scales", 2 * scales, 0, 4)
        self._launch("dequantise scales", 2 * scales, 0, 4)
        self._launch("dequantise", n * k // 2 + scales + n * k * size, 0, size)
        self._launch("gemm_4bit", operands + n * k * size, flops, size)

    def _launch(self, name: str, moved: int, flops: int, itemsize: int) -> None:
        self.sums["launches"] += 1
        self.sums["bytes_moved"] += moved
        self.sums["flops"] += flops
        took = seconds(self.card, moved, flops, itemsize)
        self.sums["seconds"] += took
        self.seconds[name] += took

    def _same_device(self, name: str, args: tuple, ins: list[Tensor]) -> None:
        """Raises StageError for an operator that reads the CPU's tensors and the GPU's; single numbers may come from
        anywhere, and an index from the host is copied."""
        where = {tensor.device.type for tensor in ins if tensor.dim()}
        if name in INDEXING and args[0].device.type == "cuda":
            for index in args[1]:
                if index is not None and index.device.type == "cpu":
                    self.copies[self.where()] += 1
                    self.sums["host_copies"] += 1
        elif len(where) > 1:
            shapes = [(str(tensor.device), tuple(tensor.shape)) for tensor in ins]
            raise StageError(f"{name} at {self.where()} reads tensors of the CPU and of the GPU: {shapes}")

    # ---- values

    def _wait(self, what: str) -> None:
        self.syncs[f"{what}, {self.where()}"] += 1
        self.sums["syncs"] += 1

    def _twin(self, tensor: Tensor) -> Tensor | None:
        if not isinstance(tensor, FakeTensor):
            return tensor
        twin = getattr(tensor, "twin", None)
        return None if twin is None or twin.untyped_storage() in self._stale else twin

    def _follow(self, func, args, kwargs, ins: list[Tensor], outs: list[Tensor]) -> None:
        """Do on the twins what was done on the tensors."""
        twins = {id(tensor): self._twin(tensor) for tensor in ins}
        small = all(tensor.numel() <= TWIN for tensor in (*ins, *outs))
        drawn = torch.Tag.nondeterministic_seeded in func.tags or func._schema.name in UNWRITTEN
        if not small or drawn or any(twin is None for twin in twins.values()):
            for tensor in outs:
                if id(tensor) in twins and (twin := twins[id(tensor)]) is not None:
                    self._stale.add(twin.untyped_storage())
            return
        options = kwargs if kwargs.get("device") is None else {**kwargs, "device": torch.device("cpu")}
        found = func(*swapped(args, twins), **swapped(options, twins))
        for tensor, twin in zip(outs, tensors(found), strict=True):
            if isinstance(tensor, FakeTensor):
                tensor.twin = twin

    def _read(self, name: str, tensor: Tensor):
        self._wait("value read")
        twin = self._twin(tensor)
        if twin is not None and name != "equal":
            return twin.item()
        if tensor.dtype == torch.bool or name != "_local_scalar_dense":
            return True
        return float(self.fillers[0]) if tensor.is_floating_point() else self.fillers[0]

    def _on_host(self, source: Tensor, copy: Tensor) -> Tensor:
        twin = self._twin(source)
        if twin is not None:
            return twin.to(copy.dtype, copy=True)
        if copy.numel() <= HOST:
            by_turns = torch.tensor(self.fillers).repeat(copy.numel() // 2 + 1)[: copy.numel()]
            return by_turns.to(copy.dtype).view(copy.shape)
        return torch.from_numpy(np.zeros(bytes_of(copy), np.uint8)).view(copy.dtype).view(copy.shape)

    def _indices(self, indices) -> list:
        """Boolean masks as the indices that they are turned into, which waits for the device."""
        out = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8) and isinstance(index, FakeTensor):
                at = self._sized_by_values(torch.ops.aten.nonzero.default, (index,), {}, [index])
                for column, twin in zip(at.unbind(1), at.twin.unbind(1), strict=True):
                    column.twin = twin
                    out.append(column)
            else:
                out.append(index)
        return out

    def _evenly(self, number_N: Tensor, bins: int) -> Tensor:
        """Counts of numbers that are not known: the same in each bin, but for the rest."""
        self._wait("largest number")
        rest = number_N.numel() % bins
        twin = torch.full((bins,), number_N.numel() // bins) + (torch.arange(bins) < rest)
        return self._made(twin, "bincount", number_N)

    def _sized_by_values(self, func, args, kwargs, ins: list[Tensor]):
        """An operator whose result has as many elements as the values say, which the host waits for. A mask that
        nobody knows is taken to keep everything."""
        name = func._schema.name.partition("::")[2]
        self._wait(f"size of {name}")
        twins = {id(tensor): self._twin(tensor) for tensor in ins}
        if name == "nonzero" and ins[0].dtype == torch.bool and twins[id(ins[0])] is None:
            twins[id(ins[0])] = torch.ones(ins[0].shape, dtype=torch.bool)
        if any(twin is None for twin in twins.values()):
            raise StageError(f"A dry run cannot know how many elements {name} gives at {self.where()}.")
        found = func(*swapped(args, twins), **swapped(kwargs, twins))
        if isinstance(found, Tensor):
            return self._made(found, name, ins[0])
        return tuple(self._made(each, name, ins[0]) for each in found)

    def _made(self, twin: Tensor, name: str, source: Tensor) -> Tensor:
        with self.fake:
            out = torch.empty(twin.shape, dtype=twin.dtype, device="cuda")
        out.twin = twin
        self._hold(out)
        self._launch(name, bytes_of(source) + bytes_of(out), 0, 8)
        return out


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def tensors(tree) -> list[Tensor]:
    """All tensors in lists, tuples and dictionaries. No closure calls itself here: such a cycle would keep tensors
    until the next collection, and peaks would be too high."""
    out, todo = [], [tree]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            out.append(item)
        elif isinstance(item, (list, tuple)):
            todo += reversed(item)
        elif isinstance(item, dict):
            todo += reversed(list(item.values()))
    return out


def swapped(tree, twins: dict[int, Tensor]):
    """The same tree with each tensor replaced by its twin."""
    if isinstance(tree, Tensor):
        return twins[id(tree)]
    if isinstance(tree, dict):
        return {key: swapped(item, twins) for key, item in tree.items()}
    return type(tree)(swapped(item, twins) for item in tree) if isinstance(tree, (list, tuple)) else tree
