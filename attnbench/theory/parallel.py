"""What attention costs across devices: bytes that each sends, operations, memory and the least time, by scheme.

Formulas alone, of one attention (scope attention) on `world` devices; no torch is loaded. Forward, or in phase train
with the backward pass. Schemes:

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
from fractions import Fraction

from attnbench.errors import AttnbenchError
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
class Device:
    """Rates of one device.

    flops_per_s: of products. bytes_per_s: of its memory. link_bytes_per_s: what it sends while it receives as much.
    overlaps: whether it can compute meanwhile, which processes that share cores can't: those copy the messages, too.
    """

    flops_per_s: float
    bytes_per_s: float
    link_bytes_per_s: float
    overlaps: bool = True

    def compute_s(self, step: Step) -> float:
        """Seconds of one such step on the device alone, by the roofline."""
        return max(step.flops / self.flops_per_s, step.moved / self.bytes_per_s)

    def link_s(self, step: Step) -> float:
        return step.sent / self.link_bytes_per_s


@dataclass(frozen=True)
class Prediction:
    """What one attention takes of so many devices.

    time_s: of a call, at least. compute_s: of it the slowest device computes; waits_s: the rest, when it waits for its
    link. link_s: the link is busy, hidden or not. sent_bytes, peak_bytes: of each device. link_bound_below: tokens; see
    the function. efficiency: the time of one device, over devices * time_s.
    """

    scheme: str
    devices: int
    time_s: float
    compute_s: float
    waits_s: float
    link_s: float
    sent_bytes: int
    peak_bytes: int
    link_bound_below: float
    efficiency: float


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


def unsupported(scheme: str, workload: Workload, world: int) -> str | None:
    """Why these devices can't share this attention so; None where they can.

    Raises:
        AttnbenchError: there is no such scheme.
    """
    w, how = workload, _scheme(scheme)
    if 0 < how.most < world:
        return f"{scheme} is for {how.most} device, not {world}"
    if w.scope != "attention" or w.decodes or w.lengths or w.masked.window or w.masked.tree:
        return "only attention alone is shared out, full or causal, in the phases forward and train, not ragged"
    if w.seq != w.kv_seq:
        return f"queries and keys that are shared out have one length, not {w.seq} and {w.kv_seq}"
    if how.by_heads and w.heads % world:
        return f"{world} devices can't share {w.heads} heads evenly"
    if how.by_heads and w.kv_heads % world and world % w.kv_heads:
        return f"{w.kv_heads} kv heads and {world} devices are no multiples of each other"
    if w.seq % (chunks := how.chunks(w, world)):
        return f"{w.seq} tokens can't be cut in {chunks} equal chunks"
    return None


def steps(scheme: str, workload: Workload, world: int) -> list[Step]:
    """Of the slowest device, in their order.

    Raises:
        AttnbenchError: see `unsupported`, whose words it has.
    """
    if world < 1:
        raise AttnbenchError(f"attention is shared by 1 device or more, not {world}")
    if why := unsupported(scheme, workload, world):
        raise AttnbenchError(why)
    return [step for step in _scheme(scheme).steps(workload, world) if step.times]


def sent_bytes(scheme: str, workload: Workload, world: int) -> int:
    """Bytes that each of `world` devices sends for one attention; in phase train with those of the backward pass.

    Payload alone, the same for all devices. Raises: AttnbenchError: see `unsupported`.
    """
    return sum(step.times * step.sent for step in steps(scheme, workload, world))


def flops(scheme: str, workload: Workload, world: int) -> int:
    """Operations of the slowest device. Raises: AttnbenchError: see `unsupported`."""
    return sum(step.times * step.flops for step in steps(scheme, workload, world))


def peak_bytes(scheme: str, workload: Workload, world: int) -> int:
    """Bytes that a device holds at most: its inputs, its output, and what the scheme holds beside them.

    Exact fused attention, which holds no scores: what a kernel needs besides is left out. Raises: AttnbenchError: see
    `unsupported`.
    """
    if why := unsupported(scheme, workload, world):
        raise AttnbenchError(why)
    return _scheme(scheme).peak(workload, world)


def compute_s(scheme: str, workload: Workload, world: int, device: Device) -> float:
    """Seconds that the slowest device computes. Raises: AttnbenchError: see `unsupported`."""
    return sum(step.times * device.compute_s(step) for step in steps(scheme, workload, world))


def link_s(scheme: str, workload: Workload, world: int, device: Device) -> float:
    """Seconds that the link is busy. Raises: AttnbenchError: see `unsupported`."""
    return sum(step.times * device.link_s(step) for step in steps(scheme, workload, world))


def time_s(scheme: str, workload: Workload, world: int, device: Device) -> float:
    """The least seconds of a call: of each step the longer of computing and sending where they overlap, else both.

    Latencies of messages are left out. Raises: AttnbenchError: see `unsupported`.
    """
    each = [(step.times, device.compute_s(step), device.link_s(step)) for step in steps(scheme, workload, world)]
    if _scheme(scheme).overlaps and device.overlaps:
        return sum(times * max(compute, link) for times, compute, link in each)
    return sum(times * (compute + link) for times, compute, link in each)


def link_bound_below(scheme: str, workload: Workload, world: int, device: Device) -> float:
    """The length in tokens below which some step's message takes longer than what it computes; 0 where none ever does.

    In closed form: of a step of length L operations are a L^2 + b L, and both what its memory moves and what is sent
    are proportional to L. Of a ring that is N K itemsize peak / (H link) tokens with a causal mask, half of that with
    a full one, forward. The workload's own length does not matter. Steps that only send are left out.

    Raises:
        AttnbenchError: see `unsupported`.
    """
    short = 2 * world
    one, two = (steps(scheme, workload.replace(seq=n, kv_seq=n), world) for n in (short, 2 * short))
    return max((_crossing(a, b, short, device) for a, b in zip(one, two, strict=True) if a.flops), default=0.0)


def predict(scheme: str, workload: Workload, world: int, device: Device) -> Prediction:
    """Raises: AttnbenchError: see `unsupported`."""
    time, compute = time_s(scheme, workload, world, device), compute_s(scheme, workload, world, device)
    return Prediction(
        scheme, world, time, compute, time - compute, link_s(scheme, workload, world, device),
        sent_bytes(scheme, workload, world), peak_bytes(scheme, workload, world),
        link_bound_below(scheme, workload, world, device), compute_s("whole", workload, 1, device) / world / time,
    )  # fmt: skip


def _crossing(one: Step, two: Step, length: int, device: Device) -> float:
    """Where a step that is `one` at this length, and `two` at twice as much, sends as long as it computes."""
    if device.link_s(one) <= one.moved / device.bytes_per_s:
        return 0.0
    square = Fraction(two.flops - 2 * one.flops, 2 * length**2)
    linear = Fraction(one.flops, length) - square * length
    return max(0.0, (device.link_s(one) / length * device.flops_per_s - float(linear)) / float(square))


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise AttnbenchError(f"no scheme {name!r}; there is: {', '.join(SCHEMES)}")
    return SCHEMES[name]


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
    """Beside its share all keys and values, and in training all their gradients: the same however many devices."""
    each = w.itemsize + (SUM if w.trains else 0)
    return _held(w, world) + (_elements(w) * each if world > 1 else 0)


SCHEMES: dict[str, Scheme] = {
    "ring": Scheme(_ring, _ring_peak, True, _zigzag),
    "ring-contiguous": Scheme(_contiguous_ring, _ring_peak, True, _whole),
    "torch-ring": Scheme(_torch_ring, _ring_peak, True, _zigzag),
    "ulysses": Scheme(_ulysses, _ulysses_peak, False, _whole, by_heads=True),
    "tensor-parallel": Scheme(_tensor_parallel, _tensor_parallel_peak, False, _one, by_heads=True),
    "all-gather": Scheme(_all_gather, _all_gather_peak, False, _zigzag),
    "whole": Scheme(_ring, _held, False, _one, most=1),
}
