"""Ways to share one attention out among devices: what each device does, sends and holds. See `theory.parallel`.

- "ring" (Liu 2023, "Ring attention with blockwise transformers", arXiv 2310.01889, section 3): queries stay, blocks of
  keys and values go round while the block in hand is computed. A causal mask is balanced by zig-zag order: of 2 N
  chunks device i has the i-th and the i-th from the end (Llama team 2024, arXiv 2407.21783, section 3.3.2).
- "ring-contiguous": the same with tokens in their order, where the last device sees all keys and sets the time.
- "torch-ring": torch 2.13's ring behind `context_parallel`, where the sums of gradients make N hops, not N - 1.
- "ulysses" (Jacobs 2023, "DeepSpeed Ulysses", arXiv 2309.14509, section 3.1): all-to-alls of query, key, value and
  output, between which a device has some heads of all tokens. Fewer kv heads than devices are repeated.
- "tensor-parallel" (Shoeybi 2019, "Megatron-LM", arXiv 1909.08053, section 3): a device has some heads all the way.
  Attention sends nothing, but what W_O gives is a sum over devices: one all-reduce, and one more backward.
- "all-gather": every device gets all keys and values first (Llama team 2024, section 3.3.2), and backward once more,
  and what it adds to their gradients goes to who owns them, in float32. Zig-zag order, too.
- "whole": one device that has all.

A ring all-reduce sends 2 (N - 1) / N of the tensor from each device, an all-gather half of that
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnbench.theory import costs
from attnbench.workload import Workload

SUM = 4
"""Bytes of an element of what is added up over blocks, such as the gradients of keys and values that go round."""


@dataclass(frozen=True)
class Step:
    """What the slowest device does between two messages.

    flops: operations. moved: bytes in its own memory, at least. sent: bytes that it sends, to one or more others.
    times: so many steps like that follow each other.
    """

    flops: int
    moved: int
    sent: int
    times: int = 1


@dataclass(frozen=True)
class Scheme:
    """A way to share attention out.

    steps: of (workload, world), in their order. peak: bytes that a device holds at most. overlaps: a step's message is
    under way while it computes. chunks: what a length has to be a multiple of. by_heads: it shares heads out.
    most: devices; 0 for as many as there are.
    """

    steps: Callable[[Workload, int], list[Step]]
    peak: Callable[[Workload, int], int]
    overlaps: bool
    chunks: Callable[[Workload, int], int]
    by_heads: bool = False
    most: int = 0


def _forward(w: Workload, sent: int, times: int = 1) -> Step:
    """A forward pass of a device's own problem."""
    return Step(costs.flops(w), costs.min_bytes(w), sent, times)


def _backward(w: Workload, sent: int, times: int = 1) -> Step:
    """Of each product two more; query, key, value, output and its gradient are read, three gradients written."""
    trained = w.replace(phase="train")
    return Step(costs.flops(trained) - costs.flops(w), costs.min_bytes(trained), sent, times)


def _both(local: Workload, trains: bool, forward: int = 0, backward: int = 0) -> list[Step]:
    """Of a scheme that does the whole of a pass in one step, what is sent in each."""
    return [_forward(local, forward), *([_backward(local, backward)] if trains else [])]


def _elements(w: Workload) -> int:
    """Of keys and values."""
    return w.batch * w.kv_heads * w.kv_seq * (w.head_dim + w.value_dim)


def _whole(w: Workload, world: int) -> int:
    return world


def _zigzag(w: Workload, world: int) -> int:
    return 2 * world if w.is_causal and world > 1 else world


def _one(w: Workload, world: int) -> int:
    return 1


def _ring(w: Workload, world: int) -> list[Step]:
    return _around(w, world, _seen(w, world))


def _torch_ring(w: Workload, world: int) -> list[Step]:
    return _around(w, world, _seen(w, world), first=0)


def _contiguous_ring(w: Workload, world: int) -> list[Step]:
    return _around(w, world, w.seq // world)


def _seen(w: Workload, world: int) -> int:
    """Of another device's block, in zig-zag order: one of two chunks by all rows, or both by half of them."""
    return w.seq // world // (2 if w.is_causal and world > 1 else 1)


def _around(w: Workload, world: int, seen: int, first: int = 1) -> list[Step]:
    """seen: keys of another device's block that each query sees, on average. first: see `_back_around`."""
    part = w.seq // world
    # Its own block first, which it can compute without anyone.
    own = w.replace(seq=part, kv_seq=part, phase="forward")
    other = own.replace(kv_seq=seen, mask="full")
    block = _elements(own) * w.itemsize
    if world == 1:
        return _both(own, w.trains)
    around = [_forward(own, block), _forward(other, block, world - 2), _forward(other, 0)]
    return around + (_back_around(own, other, world, first) if w.trains else [])


def _back_around(own: Workload, other: Workload, world: int, first: int) -> list[Step]:
    """Keys and values go round once more, and a step behind them the sum of their gradients.

    first: the step whose gradients are the first to be sent, one while the next is computed. Where it is 1 the owner,
    who computes its own block in step 0, keeps its share until the sum of the others' comes home: N - 1 hops.
    """
    block, sums, alone = _elements(own) * own.itemsize, _elements(own) * SUM, min(first, world - 2)
    return [
        _backward(own, block),
        _backward(other, block, alone),
        _backward(other, block + sums, world - 2 - alone),
        _backward(other, sums if world - 1 > first else 0),
        Step(0, 0, sums),
    ]


def _own_heads(w: Workload, world: int) -> Workload:
    """A device's heads of all tokens; of kv heads at least one."""
    return w.replace(heads=w.heads // world, kv_heads=max(w.kv_heads // world, 1), phase="forward")


def _ulysses(w: Workload, world: int) -> list[Step]:
    local = _own_heads(w, world)
    # Of each tensor a device keeps 1 / N, which is the same before and after.
    sent = costs.min_bytes(local) * (world - 1) // world
    return _both(local, w.trains, sent, sent)


def _tensor_parallel(w: Workload, world: int) -> list[Step]:
    sent = 2 * (world - 1) * w.batch * w.seq * w.width * w.itemsize // world
    return _both(_own_heads(w, world), w.trains, sent, sent)


def _all_gather(w: Workload, world: int) -> list[Step]:
    """Backward, keys and values are gathered once more, and what each device adds to their gradients is sent on."""
    others = (world - 1) * _elements(w) // world
    rows = w.replace(seq=w.seq // world, mask="full", phase="forward")
    made = _both(rows, w.trains, others * w.itemsize, others * (w.itemsize + SUM))
    whole = costs.flops(w.replace(phase="forward")) // world  # zig-zag order gives each device as many pairs
    return [Step(times * whole, step.moved, step.sent) for step, times in zip(made, (1, 2), strict=False)]


def _held(w: Workload, world: int) -> int:
    """A device's share of inputs and outputs, and in training of what fused attention keeps of each row."""
    return (costs.min_bytes(w) + _kept(w)) // world


def _kept(w: Workload) -> int:
    return costs.saved_bytes(w, scores=False) if w.trains else 0


def _ring_peak(w: Workload, world: int) -> int:
    """Beside its share a block that another device owns and one that arrives, and what the block in hand gives.

    That joins a sum over blocks in float32: forward the output; backward the query's gradient, and of keys and values
    the gradients' sums, of which one comes and one goes.
    """
    if world == 1:
        return _held(w, world)
    elements, rows = _elements(w) // world, w.batch * w.heads * w.seq // world
    blocks = min(world - 1, 2) * elements * w.itemsize
    if w.trains:
        return _held(w, world) + blocks + elements * (2 * SUM + w.itemsize) + rows * w.head_dim * SUM
    return _held(w, world) + blocks + rows * w.value_dim * SUM  # the sum is more than the output by 4 bytes - itemsize


def _ulysses_peak(w: Workload, world: int) -> int:
    """Its share by tokens and the same by heads; forward the output by heads alone, before it is exchanged."""
    if world == 1:
        return _held(w, world)
    by_tokens = (costs.min_bytes(w) if w.trains else costs.input_bytes(w)) // world
    by_heads = _own_heads(w, world).replace(phase=w.phase)
    return by_tokens + costs.min_bytes(by_heads) + _kept(by_heads)


def _tensor_parallel_peak(w: Workload, world: int) -> int:
    """Its heads, and what W_O gives, whole on each device; in training the gradient of x likewise."""
    local = _own_heads(w, world).replace(phase=w.phase)
    whole = (1 + w.trains) * w.batch * w.seq * w.width * w.itemsize if world > 1 else 0
    return costs.min_bytes(local) + _kept(local) + whole


def _all_gather_peak(w: Workload, world: int) -> int:
    """Beside its share all keys and values, or in training all their gradients and as many from the others.

    That is the same however many devices there are. It sees blocks of keys as a ring does, and adds up as that does.
    """
    if world == 1:
        return _held(w, world)
    each, dim = (2 * SUM, w.head_dim) if w.trains else (w.itemsize, w.value_dim)
    return _held(w, world) + _elements(w) * each + w.batch * w.heads * w.seq // world * dim * SUM


SCHEMES: dict[str, Scheme] = {
    "ring": Scheme(_ring, _ring_peak, True, _zigzag),
    "ring-contiguous": Scheme(_contiguous_ring, _ring_peak, True, _whole),
    "torch-ring": Scheme(_torch_ring, _ring_peak, True, _zigzag),
    "ulysses": Scheme(_ulysses, _ulysses_peak, False, _whole, by_heads=True),
    "tensor-parallel": Scheme(_tensor_parallel, _tensor_parallel_peak, False, _one, by_heads=True),
    "all-gather": Scheme(_all_gather, _all_gather_peak, False, _zigzag),
    "whole": Scheme(_ring, _held, False, _one, most=1),
}
