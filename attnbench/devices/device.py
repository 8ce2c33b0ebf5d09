"""What a device is to whoever plans a sweep, and what a worker asks of it. A file each; here alone one is named."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from attnbench.devices import machine
from attnbench.devices.bursts import BURST_SECONDS, Timer, clock
from attnbench.workload import DEVICES

if TYPE_CHECKING:
    from torch import Tensor

MEMORY = ("peak_bytes", "workspace_bytes", "saved_bytes", "built_bytes", "first_call_bytes")
"""The columns that `peak`, `kept_bytes` and `large_bytes` fill."""


class Device:
    """One kind of device. What a kind does not say of itself is that of one that torch computes on and no more.

    It loads no torch by itself: what says what a sweep must know is read in a process without it, and everything from
    `begin` on is for a worker, about the process that asks.
    """

    l2: ClassVar[tuple[str, ...]] = ()
    """What can be asked of its L2 cache, the default first: see `cuda_timer`."""

    reuses: ClassVar[bool] = True
    """One process serves one variant for all its workloads, as it takes seconds to begin on the device."""

    limits_process: ClassVar[bool] = False
    """What a process may map is what it may use of the device."""

    worker_bytes: ClassVar[int] = 600 << 20
    """Of a worker beside its tensors: resident ones on a CPU, context and kernels elsewhere."""

    burst_s: ClassVar[float] = BURST_SECONDS
    """A burst is at least this long."""

    guessed_flops_per_s: ClassVar[float] = 1e12
    """Only until a first cell has been measured."""

    def missing(self) -> str | None:
        """None, or why there is none here, in a few words."""
        return "attnbench knows no such device"

    def usual_dtype(self) -> str:
        """Computed in where nothing is asked: what models run in where it is fast."""
        return "float32"

    def facts(self) -> dict[str, Any]:
        """What run.json says of it beside the machine, all JSON."""
        return {}

    def unmeasured(self) -> dict[str, str]:
        """What of a row, or of a run's limits, can't be had here, and why."""
        return dict.fromkeys(MEMORY, "torch does not tell this device's memory")

    def free_bytes(self) -> int:
        """Of its memory, what can be allocated now. Where it does not say, it is taken to share the machine's."""
        return machine.available_memory()

    def cache_bytes(self) -> int | None:
        """Of its last-level caches together; None where it does not say."""
        return None

    group_backend: ClassVar[str] = "gloo"
    """By which processes of a `torch.distributed` group that compute on it talk to each other."""

    def one_of(self, rank: int, world: int) -> str | None:
        """This process is one of so many that compute together, each on its own where there are several of the device.

        Returns why there are too few for that; None where it has taken one, or all share what there is.
        """
        return None

    def begin(self, limit: int | None) -> None:
        """A worker begins to prepare a workload, with so much of the device's memory."""

    def before_timing(self) -> None:
        """Memory has been measured: from now on time is."""

    def clocks(self) -> tuple[Any, ...]:
        """Modules and classes of torch that time is told by on it."""
        return ()

    def synchronise(self) -> None:
        """Waits until the device has done all that it was given."""

    def timer(self, call: Callable[..., Any], tensors: Sequence[Tensor], l2: str = "") -> Timer:
        """What times this call. l2: one of `l2`."""
        return Timer(call, tensors, self.synchronise, self.burst_s)

    def once(self, call: Callable[..., Any], tensors: Sequence[Tensor]) -> tuple[float, Any]:
        """Seconds of one call by the host's clock, from nothing to do to all done, and what it returned."""
        self.synchronise()
        start = clock()
        out = call(*tensors)
        self.synchronise()
        return clock() - start, out

    def peak(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """Runs one call. What it returned, and the bytes held at its peak beside those before, output included."""
        return call(), None

    def held(self, call: Callable[[], Any]) -> tuple[Any, int | None]:
        """Runs one call. What it gives, and the bytes that are held more than before as long as that lives."""
        before = self.kept_bytes()
        kept = call()
        after = self.kept_bytes()
        return kept, None if before is None or after is None else after - before

    def kept_bytes(self) -> int | None:
        """Bytes that this process holds of the device's memory."""
        return None

    def large_bytes(self) -> int | None:
        """Bytes of tensors and other large blocks that are allocated, and not given back, in this process."""
        return self.kept_bytes()

    def reserved_bytes(self) -> int | None:
        """The most that torch had taken since `peak` began, what it keeps for later included."""
        return None

    def process_bytes(self) -> int | None:
        """What the device says this process holds, context and all."""
        return None

    def state(self) -> dict[str, Any]:
        """How it is while it works: clocks, temperature, power and who else is there; empty where it does not say."""
        return {}

    def energy_j(self) -> float | None:
        """What it has used since some moment that stays the same."""
        return None

    def give_back(self) -> None:
        """Gives memory that torch keeps for later back, as this process will be idle while others run."""

    def release(self) -> None:
        """Frees all that nothing refers to any more."""
        gc.collect()
        self.give_back()


@cache
def of(name: str) -> Device:
    """The device that a workload names: `DEVICE` of the file with its name."""
    found: Device = import_module(f"attnbench.devices.{name}").DEVICE
    return found


def describe() -> dict[str, Any]:
    """What `machine.describe` tells and every device, all JSON, for a worker too."""
    found = machine.describe()
    for name in DEVICES:
        found |= of(name).facts()
    return found
