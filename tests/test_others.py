"""What the machine's cores did for others: read from the real /proc, and from folders made as the kernel makes them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from attnbench.devices import machine
from attnbench.devices.others import Host, host

LINUX = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
# A tick is a hundredth of a second: 10 s of user, 2 s of nice, 3 s of system, 0.5 s of irq, 0.25 s of softirq.
STAT = "cpu  1000 200 300 99999 88888 50 25 700 400 30\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 1 2 3\n"


def place(folder: Path, stat: str = STAT, own: str = "0::/\n") -> dict[str, Path]:
    (folder / "stat").write_text(stat)
    (folder / "own").write_text(own)
    return {"stat": folder / "stat", "root": folder / "cgroup", "own": folder / "own"}


def count(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text(text)


@LINUX
def test_a_process_that_spins_is_seen() -> None:
    before = host()
    with psutil.Popen([sys.executable, "-c", "while True: pass"]) as spinning:
        try:
            while (used := machine.cpu_seconds(spinning.pid)) < 0.5:
                time.sleep(0.02)
        finally:
            spinning.kill()
    meanwhile = host().since(before)
    assert meanwhile.busy_s is not None
    assert meanwhile.busy_s > used / 2  # ticks are given to whoever runs when they come
    assert meanwhile.steal_s is not None


def test_waiting_and_idling_is_not_busy_and_guests_count_once(tmp_path: Path) -> None:
    found = host(**place(tmp_path))
    assert (found.busy_s, found.steal_s) == (pytest.approx(15.75), pytest.approx(7.0))


@pytest.mark.parametrize("stat", ["", "cpu\n", "cpu 1 2 3\n", "cpu a b c d e f g h\n", "intr 1 2 3 4 5 6 7 8\n"])
def test_what_the_system_does_not_tell_is_none(stat: str, tmp_path: Path) -> None:
    where = place(tmp_path, stat)
    assert host(**where) == Host(None, None, None, None)
    where["stat"].unlink()
    assert host(**where) == Host(None, None, None, None)


def test_halts_count_at_every_level_above(tmp_path: Path) -> None:
    where = place(tmp_path, own="0::/slice/job\n")
    count(where["root"], "usage_usec 900\n")  # the root has no quota
    count(where["root"] / "slice", "usage_usec 5\nnr_periods 9\nnr_throttled 3\nthrottled_usec 1500000\n")
    count(where["root"] / "slice/job", "usage_usec 5\nnr_periods 9\nnr_throttled 1\nthrottled_usec 250000\n")
    count(where["root"] / "another", "throttled_usec 99000000\n")
    before = host(**where)
    assert before.throttled_s == pytest.approx(1.75)
    count(where["root"] / "slice/job", "usage_usec 5\nnr_periods 9\nnr_throttled 2\nthrottled_usec 750000\n")
    since = host(**where).since(before)
    assert (since.throttled_s, since.throttled_periods) == (pytest.approx(0.5), 1)


def test_the_first_version_counts_in_nanoseconds(tmp_path: Path) -> None:
    where = place(tmp_path, own="4:memory:/job\n2:cpu,cpuacct:/job\n0::/\n")
    count(where["root"] / "cpu,cpuacct/job", "nr_periods 8\nnr_throttled 2\nthrottled_time 3500000000\n")
    assert host(**where)[2:] == (pytest.approx(3.5), 2)


def test_what_came_since_is_known_where_both_ends_are() -> None:
    before, after = Host(1.0, None, 0.25, 3), Host(3.5, 2.0, 0.75, 5)
    assert after.since(before) == Host(2.5, None, 0.5, 2)
