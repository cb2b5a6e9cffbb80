"""One run in several processes, the ranks, as `torchrun` or `accelerate launch` starts them. No other package knows
`torch.distributed`; in one process every function here does its work alone.

All ranks run the same program on the same values. Work without gradients is cut into items, which are dealt to the
ranks, and everybody gets every result in the order of the items (`spread`). An update is cut likewise (`deal`), and
its gradients are added up (`sum_gradients`). Rank 0 alone writes (`first`).

Every exchange begins with one small integer from each rank: is it well, or did its memory run out? So a rank that
fails in the middle of an update (`ran_out`) is heard wherever the others are, and all of them undo the update
(`PeerOutOfMemory`).

A rank that dies closes its connections. The others notice within a second, name it, and end.
"""

from .exchange import (
    alone,
    collect,
    deal,
    first,
    gather,
    ran_out,
    same,
    share,
    spread,
    sum_gradients,
    total,
    totals,
    wait,
    went_well,
)
from .meeting import check_folder, joined, refuse_several
from .world import PeerGone, PeerOutOfMemory, cores, count, device, is_first, on_this_machine, rank

__all__ = ["PeerGone", "PeerOutOfMemory", "alone", "check_folder", "collect", "cores", "count", "deal", "device"]
__all__ += ["first", "gather", "is_first", "joined", "on_this_machine", "ran_out", "rank", "refuse_several", "same"]
__all__ += ["share", "spread", "sum_gradients", "total", "totals", "wait", "went_well"]
