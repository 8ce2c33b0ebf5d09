"""attnbench doctor: what it reads is judged, and the A/A is real."""

from __future__ import annotations

import sys
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from attnbench.commands import main
from attnbench.sweep import doctor

FACTS = {"usable_threads": 4, "cores": 2, "cgroup_cpus": None, "governor": None}


def checks(threads: int = 2, **changes: Any) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.look(FACTS | changes, threads, seconds=0.05)}


@pytest.mark.parametrize(
    ("threads", "quota", "advice"),
    [
        (2, None, ""),
        (3, None, "--threads 2 is steadier"),
        (5, None, "--threads 4 or fewer"),
        (2, 1.5, "--threads 1"),
        (2, 2.0, ""),
    ],
)
def test_threads_fit_the_cores_and_the_cgroup(threads: int, quota: float | None, advice: str) -> None:
    found = checks(threads, cgroup_cpus=quota)["threads"].advice
    assert advice in found
    assert bool(found) == bool(advice)


@pytest.mark.parametrize(("governor", "amiss"), [("performance", False), ("powersave", True), (None, False)])
def test_the_clock_should_be_fixed(governor: str | None, amiss: bool) -> None:
    assert bool(checks(governor=governor)["frequency"].advice) == amiss


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "C++ compiler" in checks()["compiler"].advice


def test_others_at_work_are_seen() -> None:
    with psutil.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            load = {check.name: check for check in doctor.look(FACTS, 2, seconds=1)}["load"]
        finally:
            busy.kill()
    assert "close other programs" in load.advice


IDLE = {
    "clock_hz": 3.45e8, "memory_clock_hz": 2.6e9, "temperature_c": 31.0, "power_w": 70.4, "power_cap_w": 700.0,
    "throttled": "", "other_processes": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("state", "found", "advice"),
    [
        (IDLE, "Some GPU, 345 MHz, 31 °C, 70 W, cap 700 W, 0 other processes", ""),
        (IDLE | {"other_processes": 1}, "1 other process", "stop the other processes"),
        (IDLE | {"other_processes": None, "power_w": None}, "31 °C, cap 700 W, others unknown", ""),
        (IDLE | {"throttled": "too hot"}, "0 other processes", "held down: too hot"),
        (None, "NVML tells nothing", "will go unseen"),
    ],
)
def test_a_gpu_is_looked_at(state: dict[str, Any] | None, found: str, advice: str) -> None:
    check = checks(gpu="Some GPU", gpu_state=state)["GPU"]
    assert found in check.found
    assert advice in check.advice
    assert bool(check.advice) == bool(advice)
    assert "GPU" not in checks(gpu=None)


def test_the_command_tries_and_tells() -> None:
    result = CliRunner().invoke(main, ["doctor", "--threads", "1", "--seconds", "3"])
    assert result.exit_code in (0, 1)
    assert "Traceback" not in result.output
    assert "smallest difference" in result.stdout
    assert "sdpa against itself is" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last == "fit to measure on" if result.exit_code == 0 else last.endswith("to mend")
