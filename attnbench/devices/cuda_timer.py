"""Timing on a GPU, where a call returns before its work is done: events on the device's own clock around the work.

Three things make such times lie, and each is seen to:

- the host starts kernels more slowly than the GPU does them: then the events stand around its waiting. Such a call is
  captured as a CUDA graph, whose replay leaves the host out; what a call takes with it is recorded as the wall time.
- inputs that lie in the L2 cache from the call before. They are left there or flushed out as the run asked, as
  triton.testing.do_bench does it: a buffer larger than the cache is zeroed before each call, outside its events.
- memory that is asked for while the clock runs: one untimed call first, as nothing stays cached between turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import torch
from torch import Tensor

from attnbench.devices.bursts import BURST_SECONDS, Burst, Timer, burst_size, clock

_FLUSHED_BYTES = 256 << 20  # what triton.testing.do_bench zeroes; several times the L2 of any GPU so far
_LAUNCH_BOUND = 0.8  # the host's share of a burst from which on the GPU is taken to wait for it
_WALL_SECONDS = 5e-3  # of calls by the host's clock beside a burst that is timed in another way
_GRAPH_CALLS = 64  # captured together, as starting a graph takes microseconds too


class CudaTimer(Timer):
    """Times bursts of one call with CUDA events.

    l2: "kept" leaves in the L2 cache what the call before left there, "flushed" empties it before each call.
    """

    def __init__(self, call: Callable[..., Any], tensors: Sequence[Tensor], l2: str = "kept") -> None:
        super().__init__(call, tensors)
        self.how, self.flushes = "events", l2 == "flushed"
        self._graphed = False
        self._host_s = 0.0  # of a call, by the host's clock
        self._turns: Iterator[Sequence[Tensor]] = cycle([tensors])

    def warm_up(self, last_s: float = 0.0) -> tuple[float, float]:
        """As on a CPU. Then it is known whether the GPU waits for the host; if so, bursts replay a graph."""
        call_s, spent = super().warm_up(last_s)
        began = clock()
        calls, _ = burst_size(call_s)
        device_s, enqueued_s, _ = self._eager(calls)
        if enqueued_s > _LAUNCH_BOUND * device_s:
            self.how, self._graphed = self._try_graph()
            call_s, _ = super().warm_up()
        return call_s, spent + clock() - began

    def _try_graph(self) -> tuple[str, bool]:
        try:
            self._capture(1)
        except RuntimeError as problem:  # a call that waits for the GPU, as .item() does, can't be captured
            torch.cuda.synchronize()
            return f"events, launch-bound: {(str(problem).splitlines() or [''])[0][:100]}", False
        return "graph", True

    def burst(
        self, calls: int, head: int = 0, given: Sequence[Sequence[Tensor]] = (), keep: int = -1
    ) -> tuple[Burst, Any]:
        """Times `calls` calls after at least one untimed one. Where it replays or flushes, the last call's output."""
        self._turns = cycle(given or [self.tensors])
        began = clock()
        for _ in range(max(1, head)):
            self.call(*next(self._turns))
        torch.cuda.synchronize()
        start = clock()
        if not (self._graphed or self.flushes):
            seconds, _, out = self._eager(calls, keep)
            self._host_s = (clock() - start) / calls
            return Burst(start, calls, seconds, clock() - began, self._host_s), out
        few = min(calls, ceil(_WALL_SECONDS / (self._host_s or BURST_SECONDS)))
        self._eager(few)
        self._host_s = (clock() - start) / few
        start = clock()
        seconds, out = self._flushed(calls) if self.flushes else self._replayed(calls)
        return Burst(start, calls, seconds, clock() - began, self._host_s), out

    def _eager(self, calls: int, keep: int = -1) -> tuple[float, float, Any]:
        """Seconds of a burst on the device, seconds until the host had started it all, and the output to keep."""
        first, last = _event(), _event()
        start = clock()
        first.record()
        out = self._calls(self._turns, calls, keep)
        last.record()
        enqueued = clock() - start
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3, enqueued, out

    def _replayed(self, calls: int) -> tuple[float, Any]:
        together = min(calls, _GRAPH_CALLS)
        rest, _ = self._capture(calls % together) if calls % together else (None, None)
        graph, out = self._capture(together)  # the one whose output is kept
        graph.replay()
        torch.cuda.synchronize()
        first, last = _event(), _event()
        first.record()
        if rest:
            rest.replay()
        for _ in range(calls // together):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3, out

    def _flushed(self, calls: int) -> tuple[float, Any]:
        """Each call between events of its own: while the buffer is zeroed, the host gets ahead."""
        buffer = torch.empty(_FLUSHED_BYTES // 4, dtype=torch.int32, device=self.tensors[0].device)
        graph, out = self._capture(1) if self._graphed else (None, None)
        pairs = [(_event(), _event()) for _ in range(calls)]
        for first, last in pairs:
            buffer.zero_()
            first.record()
            if graph:
                graph.replay()
            else:
                out = self._calls(self._turns, 1, -1)
            last.record()
        torch.cuda.synchronize()
        return sum(first.elapsed_time(last) for first, last in pairs) / 1e3, out

    def _capture(self, calls: int) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of so many calls, and the output that the last of them writes at each replay."""
        graph = torch.cuda.CUDAGraph()
        # The outer one comes back to this stream: where a capture fails, torch's own end of it does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            out = self._calls(self._turns, calls, -1)
        return graph, out


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
