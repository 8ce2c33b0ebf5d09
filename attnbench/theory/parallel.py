"""What attention costs across devices: bytes that each sends, operations, memory and the least time, by scheme.

Formulas alone, of one attention (scope attention) on `world` devices; no torch is loaded. Forward, or in phase train
with the backward pass. `schemes` describes each scheme, with its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from attnbench.errors import AttnbenchError
from attnbench.theory.schemes import SCHEMES, Scheme, Step
from attnbench.workload import Workload


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
