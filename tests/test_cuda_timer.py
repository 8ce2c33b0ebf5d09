"""Timing on a GPU: what the timer makes of a device whose times are known, and of a real one.

The device that is made up has a host that starts work, a stream that does it in order, events and graphs. The timer
runs on it as it is; what is compared is what it says with what the device was told to take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnbench.devices import cuda_timer
from attnbench.devices.bursts import burst_size
from attnbench.devices.cuda_timer import CudaTimer

GRAPH_S, FLUSH_S = 5e-6, 1e-4


class Device:
    """A host and a stream, each with its own time; a call takes `host_s` of one and `device_s` of the other."""

    def __init__(self, host_s: float, device_s: float, captures: bool = True) -> None:
        self.host_s, self.device_s, self.captures = host_s, device_s, captures
        self.now = self.free = 0.0
        self.captured: list[float] | None = None
        self.called = 0

    def work(self, seconds: float) -> None:
        if self.captured is not None:
            self.captured.append(seconds)
        else:
            self.free = max(self.free, self.now) + seconds

    def call(self, *_: Any) -> str:
        if self.captured is not None and not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.called += 1
        self.now += self.host_s
        self.work(self.device_s)
        return "out"

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    @contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.captured = graph.work
        try:
            yield
        finally:
            self.captured = None


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = max(self.device.free, self.device.now)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.work: list[float] = []

    def replay(self) -> None:
        self.device.now += GRAPH_S
        self.device.work(sum(self.work))


def made(monkeypatch: pytest.MonkeyPatch, device: Device, l2: str = "kept") -> CudaTimer:
    buffer = SimpleNamespace(zero_=lambda: device.work(FLUSH_S))
    for name, fake in {
        "cuda.Event": lambda **_: Event(device),
        "cuda.CUDAGraph": lambda: Graph(device),
        "cuda.graph": device.graph,
        "cuda.stream": lambda _: nullcontext(),
        "cuda.current_stream": lambda: None,
        "cuda.synchronize": device.synchronize,
        "empty": lambda *_, **__: buffer,
    }.items():
        monkeypatch.setattr(f"torch.{name}", fake)
    monkeypatch.setattr(cuda_timer, "clock", lambda: device.now)
    return CudaTimer(device.call, [SimpleNamespace(device="cuda")], l2)  # type: ignore[list-item]


@pytest.mark.parametrize("l2", ["kept", "flushed"])
@pytest.mark.parametrize(
    ("host_s", "device_s", "how"),
    [(1e-5, 1e-3, "events"), (1e-5, 5e-2, "events"), (5e-5, 2e-5, "graph"), (1e-3, 2e-6, "graph")],
)
def test_latency_is_the_devices_own_and_wall_time_is_that_of_both(
    monkeypatch: pytest.MonkeyPatch, l2: str, host_s: float, device_s: float, how: str
) -> None:
    device = Device(host_s, device_s)
    timer = made(monkeypatch, device, l2)
    call_s, spent = timer.warm_up()
    assert timer.how == how
    assert call_s == pytest.approx(device_s, rel=0.03 + (GRAPH_S / device_s if l2 == "flushed" else 0.1))
    assert spent == pytest.approx(device.now)
    calls, head = burst_size(call_s)
    for _ in range(2):
        began = device.now
        block, out = timer.burst(calls, head)
        assert out == "out"
        assert block.seconds / block.calls == pytest.approx(device_s, rel=0.05)
        assert block.wall_s == pytest.approx(max(host_s, device_s), rel=0.05)
        assert block.total_seconds == pytest.approx(device.now - began)
        assert began <= block.start < device.now


def test_flushing_is_outside_of_the_time_and_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(1e-5, 1e-3)
    timer = made(monkeypatch, device, "flushed")
    timer.warm_up()
    began, called = device.now, device.called
    block, _ = timer.burst(20)
    assert block.seconds == pytest.approx(20 * 1e-3)
    eager = device.called - called - 20  # in front, by the host's clock
    assert device.now - began == pytest.approx(20 * (1e-3 + FLUSH_S) + eager * 1e-3, rel=0.02)


def test_a_call_that_can_not_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(5e-5, 2e-5, captures=False)
    timer = made(monkeypatch, device)
    timer.warm_up()
    assert timer.how == "events, launch-bound: operation not permitted when stream is capturing"
    block, _ = timer.burst(100)
    assert block.seconds / 100 == pytest.approx(5e-5, rel=0.05)  # the host's time, which is all that is to be had


@pytest.mark.parametrize("calls", [1, 63, 64, 65, 1000])
def test_a_block_is_as_many_calls_as_it_says(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    timer = made(monkeypatch, Device(5e-5, 2e-5))
    timer.warm_up()
    assert timer.how == "graph"
    block, _ = timer.burst(calls)
    assert block.calls == calls
    assert block.seconds == pytest.approx(calls * 2e-5, abs=1.1 * GRAPH_S)  # the first replay is waited for


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["kept", "flushed"])
def test_on_a_gpu_a_long_call_is_timed_by_events(l2: str) -> None:
    cycles = 2_000_000
    x = [torch.empty(1, device="cuda")]
    timer = CudaTimer(lambda _: torch.cuda._sleep(cycles), x, l2)
    call_s, _ = timer.warm_up()
    assert timer.how == "events"
    block, _ = timer.burst(10)
    assert block.seconds / 10 == pytest.approx(call_s, rel=0.2)
    assert 2e8 < cycles / call_s < 4e9  # the clock's frequency
    assert block.wall_s == pytest.approx(call_s, rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("l2", ["kept", "flushed"])
def test_on_a_gpu_what_waits_for_the_host_is_replayed(l2: str) -> None:
    q, k, v = (torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    timer = CudaTimer(scaled_dot_product_attention, [q, k, v], l2)
    call_s, _ = timer.warm_up()
    assert timer.how == "graph"
    block, out = timer.burst(200)
    assert block.wall_s is not None
    assert block.seconds / 200 < block.wall_s
    assert block.seconds / 200 == pytest.approx(call_s, rel=0.5)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v))


@pytest.mark.gpu
def test_on_a_gpu_what_asks_for_a_value_can_not_be_replayed() -> None:
    x = torch.ones(4, device="cuda")
    timer, stream = CudaTimer(lambda x: x * x.sum().item(), [x]), torch.cuda.current_stream()
    timer.warm_up()
    assert timer.how.startswith("events, launch-bound: ")
    assert torch.cuda.current_stream() == stream
    block, _ = timer.burst(10)
    assert block.seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_on_a_gpu_a_training_step_can_be_replayed(backward: bool) -> None:
    x = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)

    def step(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        out = scaled_dot_product_attention(leaf, leaf, leaf)
        return torch.autograd.grad(out, leaf, torch.ones_like(out))[0] if backward else out.detach()

    timer = CudaTimer(step, [x])
    timer.warm_up()
    assert timer.how == "graph"
    _, out = timer.burst(10)
    torch.testing.assert_close(out, step(x))
