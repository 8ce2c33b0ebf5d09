"""The seam of devices: one more is its file and its line, and a system that is not Linux measures what it can.

Both are tried on a whole sweep. What has to be changed is changed at the start of every Python process that it starts,
since devices are asked in workers.
"""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from altered import ROOT, attnbench, measured, reported

from attnbench.devices.device import Device, of
from attnbench.workload import DEVICES

# What a new device is, said of the first CPU as torch can name it apart: its file, and its line in `DEVICES`.
NEW_DEVICE = """
import sys, types
from attnbench.devices.device import Device
from attnbench.workload import DEVICES, DeviceKind

class Twin(Device):
    def usual_dtype(self):
        return "bfloat16"
    def missing(self): return None

DEVICES["cpu:0"] = DeviceKind()
sys.modules["attnbench.devices.cpu:0"] = types.SimpleNamespace(DEVICE=Twin())
"""
# macOS has no prctl, mallopt, malloc_trim, /proc, /sys and sched_getaffinity; libraries may go on using them.
NOT_LINUX = """
import builtins, ctypes, os, pathlib, sys

class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "mallopt", "malloc_trim"):
            raise AttributeError(name)
        return super().__getattr__(name)

def opened(file, *rest, _open=open, **named):
    if str(file).startswith(("/proc", "/sys")) and sys._getframe(1).f_globals.get("__name__", "").startswith("attnbench"):
        raise FileNotFoundError(2, "No such file or directory", file)
    return _open(file, *rest, **named)

def read_text(self, *rest, _read=pathlib.Path.read_text, **named):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return _read(self, *rest, **named)

ctypes.CDLL, builtins.open, pathlib.Path.read_text = Library, opened, read_text
del os.sched_getaffinity
"""


def missing(row: dict[str, Any]) -> set[str]:
    return {name for name, value in row.items() if value is None or value != value}


def test_a_device_is_its_file_and_its_line(tmp_path: Path) -> None:
    machine, row = measured(tmp_path, NEW_DEVICE, "--device", "auto")
    assert (row["device"], row["dtype"]) == ("cpu:0", "bfloat16")  # preferred to the host, in its own dtype
    assert row["latency_s"] > 0
    assert {"peak_bytes", "workspace_bytes"} <= missing(row)
    assert {"peak_bytes", "workspace_bytes"} <= set(machine["unmeasured"])
    page = reported(tmp_path, NEW_DEVICE)
    assert all(reason in page for reason in machine["unmeasured"].values())
    assert "cpu:0" in attnbench(tmp_path, NEW_DEVICE, "plugins", "naive", "--device", "cpu:0")


def test_without_what_linux_has_all_else_is_measured(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    on_linux, whole = measured(here, "", "--phase", "train")
    elsewhere, row = measured(there, NOT_LINUX, "--phase", "train")
    assert on_linux["unmeasured"] == {}
    lost = missing(row) - missing(whole) - {"latency_low_s", "latency_high_s"}  # none on a machine that is too restless
    assert lost == {"peak_bytes", "workspace_bytes", "saved_bytes", "built_bytes", "first_call_bytes"}
    assert set(elsewhere["unmeasured"]) == lost | {"--memory"}
    page = reported(there, NOT_LINUX)
    assert all(reason in page for reason in elsewhere["unmeasured"].values())
    assert math.isclose(row["implementation_rel_l2"], whole["implementation_rel_l2"], rel_tol=0.5)
    assert "timer" in attnbench(there, NOT_LINUX, "doctor", "--seconds", "2", codes=(0, 1))  # 1: the machine is busy


def test_every_device_is_a_file_that_says_the_same() -> None:
    for name in DEVICES:
        found = of(name)
        assert isinstance(found, Device)
        assert type(found).__module__ == f"attnbench.devices.{name}"


class Slow(Device):
    """Work is done a while after the call came back."""

    def __init__(self) -> None:
        self.waited = 0

    def synchronise(self) -> None:
        self.waited += 1


def test_a_device_without_a_clock_is_waited_for_once_a_burst() -> None:
    device, calls = Slow(), []
    timer = device.timer(lambda x: calls.append(x) or len(calls), [torch.ones(1)])
    burst, out = timer.burst(5, head=1)
    assert (len(calls), out, device.waited, burst.calls) == (6, 6, 1, 5)
    device.once(lambda: None, [])
    assert device.waited == 3  # before and behind


def test_outside_their_room_nobody_asks_for_a_device_by_name() -> None:
    package = ROOT / "attnbench"
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "devices"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
                assert not set(compared) & set(DEVICES), f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("is_cuda", "cuda"), f"{path}:{node.lineno}"


def test_a_large_block_is_seen_though_the_heap_had_room_for_it() -> None:
    """In a process of its own, whose heap has a large piece free between two that are taken."""
    code = """
import ctypes, torch
from attnbench.devices.cpu import DEVICE, libc
here = libc()
here.malloc.restype, here.malloc.argtypes, here.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
here.mallopt(-3, 32 << 20)
taken = [here.malloc(1 << 20) for _ in range(9)]
for piece in taken[::2]:
    here.free(piece)
DEVICE.begin(None)
before = DEVICE.large_bytes()
kept = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(3)]
print(DEVICE.large_bytes() - before >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"
