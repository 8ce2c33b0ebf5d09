"""What a machine could do at best, and how much of that a cell reached. Loads no torch.

The roofline model (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for
multicore architectures"): work takes at least as long as its operations take at the highest rate of the machine, and
as moving its bytes takes at the highest rate of its memory. Both rates are measured, by `workers.calibration`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import msgspec

from attnbench.theory import costs
from attnbench.workload import Workload

MARGIN = 1.25
"""How far above a ceiling a claim has to be before it is impossible: clocks vary, and a better product may exist."""
_CACHES = 2.0  # bytes that are at least so many times the last-level cache come from memory, not from there
# Formats that a variant may compute a dtype's products in, with the rate that is left. Half precision may be taken to a
# wider format, which is the faster one on a CPU without instructions for it. Three bfloat16 products make one that
# is nearly float32's (Henry, Tang and Heinecke 2019), which pays off on matrix units.
_FORMATS = {
    "float32": {"float32": 1.0, "bfloat16": 1 / 3},
    "bfloat16": {"bfloat16": 1.0, "float16": 1.0, "float32": 1.0},
    "float16": {"float16": 1.0, "float32": 1.0, "bfloat16": 1 / 3},
}


@dataclass(frozen=True)
class Ceilings:
    """The highest rates that were found on one machine.

    device: "cpu" or "cuda". threads: of the CPU.
    operations_per_s: of matrix products by format, a dtype or "int8"; a multiplication and its addition are two.
    bytes_per_s: of reading from memory.
    cache_bytes: size of all last-level caches together; None where it is not known.
    disturbed: the share of the threads' cores that others took while it was measured.
    at: for each format, and for "memory", with what its rate was reached.
    measured: when, in ISO 8601.
    """

    device: str
    threads: int
    operations_per_s: dict[str, float]
    bytes_per_s: float
    cache_bytes: int | None = None
    disturbed: float = 0.0
    at: dict[str, str] = field(default_factory=dict)
    measured: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self | None:
        """The inverse of `as_dict`, from JSON; None where that holds no ceilings, or broken ones."""
        try:
            found = msgspec.convert(values, cls)
        except msgspec.ValidationError:
            return None
        rates = [*found.operations_per_s.values(), found.bytes_per_s]
        return found if all(math.isfinite(rate) and rate > 0 for rate in rates) else None

    def of(self, workload: Workload, quantized: bool) -> tuple[str, float] | None:
        """What products allow the most operations a second for such inputs, and how many.

        None where that is not known, or the ceilings are not of the workload's device and threads.
        quantized: whether int8 products count too.
        """
        shares = _FORMATS.get(workload.dtype, {}) | ({"int8": 1.0} if quantized else {})
        rates = self.operations_per_s
        known = [(share * rates[name], name, share) for name, share in shares.items() if name in rates]
        same = self.device == workload.device and (not workload.on_host or self.threads == workload.threads)
        if not known or not same:
            return None
        rate, name, share = max(known)
        return (name if share == 1 else f"{workload.dtype} by three {name} products"), rate


@dataclass(frozen=True)
class Roof:
    """The least time that a cell could take.

    attainable_s: seconds of a call.
    bound: "compute" or "memory", whichever takes longer.
    intensity: operations a byte that has to move.
    ceiling: the products that set the compute bound, and their rate ceiling_flops_per_s; the memory's rate is
        ceiling_bytes_per_s.
    """

    attainable_s: float
    bound: str
    intensity: float
    ceiling: str
    ceiling_flops_per_s: float
    ceiling_bytes_per_s: float


def roof(
    workload: Workload, family: str, operations: float, ceilings: Ceilings, state_bytes: float | None = None
) -> Roof | None:
    """The roof over a variant; None where the ceilings are not of its device, threads or dtype.

    operations: as the variant does them. A variant that computes in another format than its inputs' is judged by the
    highest rate that could apply. Memory bounds nothing where the bytes would fit the caches, or these are not known.
    state_bytes: of what it keeps of the past, decoding. Only an exact variant has to read the past as it was; without
    this nothing is known of others, nor of a sparse one, which reads a part.
    """
    found = ceilings.of(workload, quantized=family == "quantized")
    moved: float = costs.min_bytes(workload)
    if workload.decodes and family != "exact":
        if family == "sparse" or state_bytes is None or not math.isfinite(state_bytes):
            return None
        moved += state_bytes - sum(map(costs.cache_bytes, costs.unpadded(workload)))
    if not found:
        return None
    name, rate = found
    compute, memory = operations / rate, moved / ceilings.bytes_per_s
    far = ceilings.cache_bytes is not None and moved > _CACHES * ceilings.cache_bytes
    bound = "memory" if far and memory > compute else "compute"
    least = memory if bound == "memory" else compute
    return Roof(least, bound, operations / moved, name, rate, ceilings.bytes_per_s)


def impossible(row: Mapping[str, Any], ceilings: Ceilings | None) -> str | None:
    """Why this row's latency can't be true: it stands for more operations a second than the machine can do.

    row: as a session makes it, finished. ceilings: None where the machine was not calibrated; then nothing is judged.
    An exact or a quantized variant has to do the products of all pairs that the mask shows, whatever it says. Others
    are taken at their own count, where they give one: theirs is exact attention's otherwise, which they need not do.
    Nor need they do again in a decoding step what they count for all keys.
    """
    latency, family = row.get("latency_s"), row.get("family")
    if ceilings is None or not latency or not latency > 0:
        return None
    workload = Workload.from_dict(dict(row))
    # A sparse or recurrent variant may multiply in int8 too.
    found = ceilings.of(workload, quantized=family != "exact")
    operations = necessary = costs.flops(workload)
    if family not in ("exact", "quantized"):
        operations = row.get("variant_flops") or 0
        if operations == necessary or workload.decodes:
            return None
    if not found or not operations / latency > MARGIN * found[1]:
        return None
    ceiling = f"this machine's ceiling for {found[0]} is {found[1] / 1e12:.4g} (attnbench calibrate)"
    return f"claims {operations / latency / 1e12:.4g} TFLOP/s, {ceiling}"


QUIET = 0.1
"""Ceilings are worth keeping where others took at most this share of the threads' cores while they were measured."""
