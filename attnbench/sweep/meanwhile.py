"""What a session sees while a worker runs a burst: its own clock, and who else had the cores."""

from __future__ import annotations

import os
import threading
import time
from typing import NamedTuple

from attnbench.devices import machine, others


class Seen(NamedTuple):
    """Of one burst, in seconds; None where the system does not tell.

    took_s: by the session's clock, less what it waited itself for a core, and the worker around its calls. cpu_s: of
    all cores, by the worker and its children. others_s: by everybody else. steal_s: taken by the host of this virtual
    machine. throttled_s: halted for a quota, in so many of its periods (throttled_periods, a count). waited_s: that the
    worker's threads were ready to run and had no core.
    """

    took_s: float
    cpu_s: float
    others_s: float | None
    steal_s: float | None
    throttled_s: float | None
    waited_s: float | None
    throttled_periods: int | None

    @property
    def sample(self) -> list[float | None]:
        """As the end of a record's sample has it."""
        return [None if x is None else round(x, 6) for x in self[1:]]


class Meanwhile:
    """What happens to a worker and on the machine from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._host, self._waited, self._used = others.host(), others.waited_s(pid), machine.cpu_seconds(pid)
        self._delayed = self._delays()
        self._began = time.monotonic()

    def seen(self, told_s: float | None) -> Seen:
        """Up to now. told_s: how long the worker says that its threads waited while the calls ran.

        It knows better, as what wakes it is no part of them; and it can't tell of more than is seen from here.
        """
        took = time.monotonic() - self._began
        own, its = (now - then for now, then in zip(self._delays(), self._delayed, strict=True))
        took -= own + max(0.0, its - (told_s or 0.0))
        cpu, waited = machine.cpu_seconds(self._pid) - self._used, others.waited_s(self._pid)
        host = others.host().since(self._host)
        if waited is not None and self._waited is not None and told_s is not None:
            waited = min(waited - self._waited, told_s)
        else:
            waited = None
        return Seen(
            took,
            cpu,
            None if host.busy_s is None else max(0.0, host.busy_s - cpu),
            host.steal_s,
            host.throttled_s,
            waited,
            host.throttled_periods,
        )

    def _delays(self) -> tuple[float, float]:
        """Seconds that this thread, and the worker's first, were ready to run and had no core."""
        own, its = (
            others.waited_s(os.getpid(), thread=threading.get_native_id()),
            others.waited_s(self._pid, thread=self._pid),
        )
        return own or 0.0, its or 0.0
