"""What a GPU says of itself, from the raw numbers of NVML."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from attnbench.devices import nvml


class Library:
    """NVML's functions with the numbers of one GPU, in NVML's units."""

    NVMLError, NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = RuntimeError, "sm", "memory", 0

    def __init__(self, reasons: int = 0, pids: tuple[int, ...] = (), missing: str = "") -> None:
        processes = [SimpleNamespace(pid=pid, usedGpuMemory=1000 + pid) for pid in pids]
        self.answers = {
            "ClockInfo": {"sm": 1755, "memory": 2619}.__getitem__,
            "Temperature": lambda _: 41,
            "PowerUsage": lambda: 412_345,
            "EnforcedPowerLimit": lambda: 700_000,
            "CurrentClocksEventReasons": lambda: reasons,
            "TotalEnergyConsumption": lambda: 5_000,
            "ComputeRunningProcesses": lambda: processes,
            "GraphicsRunningProcesses": lambda: processes[:1],  # one that computes and draws is told twice
        }
        self.missing = missing

    def __getattr__(self, name: str) -> Any:
        what = name.removeprefix("nvmlDeviceGet")
        if what not in self.answers:
            raise AttributeError(name)

        def ask(handle: str, *more: Any) -> Any:
            assert handle == "handle"
            if what == self.missing:
                raise self.NVMLError("not supported")
            return self.answers[what](*more)

        return ask


def test_units_are_those_of_the_columns() -> None:
    gpu = nvml.Gpu("handle", Library(pids=(os.getpid(),)))
    assert gpu.state() == {
        "clock_hz": 1.755e9,
        "memory_clock_hz": 2.619e9,
        "temperature_c": 41.0,
        "power_w": pytest.approx(412.345),
        "power_cap_w": 700.0,
        "throttled": "",
        "other_processes": 0,
    }
    assert tuple(gpu.state()) == nvml.STATE
    assert gpu.energy_j() == 5.0
    assert gpu.process_bytes() == 1000 + os.getpid()


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        (pynvml.nvmlClocksEventReasonGpuIdle, ""),
        (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, ""),
        (pynvml.nvmlClocksEventReasonSwPowerCap, "power cap"),
        (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "too hot"),
        (
            pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwSlowdown,
            "power cap, slowed down by the hardware",
        ),
    ],
)
def test_what_holds_the_clocks_down_is_said_in_words(reasons: int, said: str) -> None:
    assert nvml.Gpu("handle", Library(reasons)).state()["throttled"] == said


def test_workers_of_the_same_server_are_no_other_processes() -> None:
    siblings = [child.pid for child in psutil.Process(os.getppid()).children()]
    pids = (os.getpid(), *siblings, 2**30)
    assert nvml.Gpu("handle", Library(pids=pids)).state()["other_processes"] == 1


def test_where_it_does_not_see_this_process_it_can_not_tell_others_apart() -> None:
    gpu = nvml.Gpu("handle", Library(pids=(2**30,)))
    assert gpu.state()["other_processes"] is None
    assert gpu.process_bytes() is None


@pytest.mark.parametrize(
    ("missing", "column"),
    [
        ("ClockInfo", "clock_hz"),
        ("PowerUsage", "power_w"),
        ("EnforcedPowerLimit", "power_cap_w"),
        ("CurrentClocksEventReasons", "throttled"),
        ("ComputeRunningProcesses", "other_processes"),
    ],
)
def test_what_a_gpu_does_not_tell_is_none(missing: str, column: str) -> None:
    state = nvml.Gpu("handle", Library(missing=missing)).state()
    assert state[column] is None
    assert state["temperature_c"] == 41.0


def test_no_energy_counter() -> None:
    assert nvml.Gpu("handle", Library(missing="TotalEnergyConsumption")).energy_j() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_driver_there_is_none() -> None:
    assert nvml.current() is None
    assert nvml.driver() is None


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    gpu = nvml.current()
    assert gpu is not None
    before = gpu.energy_j()
    for _ in range(4000):
        x @ x
    state = gpu.state()
    torch.cuda.synchronize()
    after = gpu.energy_j()
    assert before is not None
    assert after is not None
    assert 5 < after - before < 5000  # some tenths of a second of some hundred watts
    assert 3e8 < state["clock_hz"] < 4e9
    assert 50 < state["power_w"] < 1.5 * state["power_cap_w"]
    assert 10 < state["temperature_c"] < 110
    assert state["throttled"] is not None
