"""Block-sparse attention by the C++ kernel of `tiled`: which keys each of its strips goes through."""

from __future__ import annotations

from itertools import groupby

from ..native.attention import Plan
from .patterns import Pattern

STRIP_ROWS, BLOCK_KEYS = 128, 512  # the kernel's tile


def plan(mask: Pattern) -> Plan:
    """What each strip of query rows computes: the runs of blocks that its block of queries sees.

    A band alone is one run for each strip, within which the kernel follows its edges.
    """
    some, every = (table.tolist() for table in mask.blocks())
    strips = []
    for row, (touched, whole) in enumerate(zip(some, every, strict=True)):
        kinds = [(full and mask.far is not None) if seen else None for seen, full in zip(touched, whole, strict=True)]
        ranges, at = [], 0
        for kind, run in groupby(kinds):
            end = at + len(list(run))
            if kind is not None:
                ranges.append((at * mask.block, min(end * mask.block, mask.kv_seq), kind))
            at = end
        first, last = row * mask.block, min((row + 1) * mask.block, mask.seq)
        step = -(-(last - first) // -(-(last - first) // STRIP_ROWS))  # even strips of at most STRIP_ROWS
        strips += [(i, min(i + step, last), tuple(ranges)) for i in range(first, last, step)]
    low, high = mask.band.tolist()
    return Plan(tuple(strips), (low, high))
