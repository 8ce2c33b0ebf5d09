"""Bursts that had to wait for a core: seen by the scheduler's word, kept out of the figures, and told where they matter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attnbench.devices.others import waited_s
from attnbench.stats.doubts import of_samples
from attnbench.stats.held_up import held_up, matters, without
from attnbench.sweep.cell import Measured
from attnbench.sweep.meanwhile import Meanwhile, Seen
from attnbench.sweep.precision import intervals

Sample = list[float | None]
SPIN = "while True: pass"


def sample(turn: int, seconds: float = 0.02, waited: float | None = 0.0, steal: float | None = 0.0) -> Sample:
    return [0, turn, 0.1 * turn, 10, seconds, seconds, 0.0, steal, 0.0, waited]


@pytest.mark.parametrize(
    ("one", "held"),
    [
        (sample(0), False),
        (sample(0, waited=0.0003), False),
        (sample(0, seconds=0.003, waited=0.00009), False),  # a thread's wake-up
        (sample(0, seconds=0.003, waited=0.00011), True),
        (sample(0, waited=0.0005), True),
        (sample(0, steal=0.01), True),
        (sample(0, waited=0.0003, steal=0.0003), True),  # together they are too much
        (sample(0, waited=None, steal=None), False),  # a system that does not tell
        (sample(0)[:5], False),  # of a run before 0.2.0
    ],
)
def test_what_was_lost_counts_by_its_share(one: Sample, held: bool) -> None:
    assert held_up([one]) == ({(0, 0)} if held else set())


def test_rounds_that_waited_leave_the_figures_in_both_members_of_a_pair() -> None:
    """Rounds 0 to 3 of the one and 10 to 13 of the other took twice as long, for want of a core."""

    def measured(base: float, slow: range) -> Measured:
        found = Measured({})
        draw = np.random.default_rng(slow.start)
        for turn in range(24):
            seconds = base * float(np.exp(draw.normal(0, 1e-3))) * (2 if turn in slow else 1)
            found.samples.append(sample(turn, seconds, waited=seconds / 2 if turn in slow else 0.0))
        return found

    one, other = measured(0.02, range(4)), measured(0.01, range(10, 14))
    latency, speedup = intervals(other, one, 0.95)
    assert speedup is not None
    assert latency.high == pytest.approx(0.001, rel=0.01)
    assert (speedup.low, speedup.high) == (pytest.approx(2, rel=0.01), pytest.approx(2, rel=0.01))
    assert len(other.held_up) == 4
    for each in (one, other):  # the same seconds, and nobody tells who waited
        each.samples = [s[:5] for s in each.samples]
    blind = intervals(other, one, 0.95)[1]
    assert blind is not None
    assert blind.half_width is None  # rounds that resemble their neighbours are worth too few


def test_where_too_few_would_be_left_all_stay_and_it_is_said() -> None:
    samples = [sample(i, 0.02 + 1e-5 * i, waited=0.01 if i > 4 else 0.0) for i in range(20)]
    values = {(0.0, float(i)): i for i in range(20)}
    assert without(values, held_up(samples)) == values
    assert matters(samples)
    assert "disturbed" in of_samples(samples, 0.02, precise=True)
    few = [sample(i, 0.02 + 1e-5 * i, waited=0.01 if i > 17 else 0.0) for i in range(20)]
    assert len(without(values, held_up(few))) == 18
    assert not matters(few)
    assert "disturbed" not in of_samples(few, 0.02, precise=True)


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this system keeps no statistics of its scheduler"
)
def test_a_process_that_has_to_share_its_core_is_seen_to_wait() -> None:
    core = min(os.sched_getaffinity(0))

    def pinned() -> None:
        os.sched_setaffinity(0, {core})

    with subprocess.Popen([sys.executable, "-c", SPIN], preexec_fn=pinned) as alone:
        time.sleep(0.3)
        meanwhile = Meanwhile(alone.pid)
        with subprocess.Popen([sys.executable, "-c", SPIN], preexec_fn=pinned) as other:
            time.sleep(1.0)
            seen, less = meanwhile.seen(9.0), meanwhile.seen(0.1)
            other.kill()
        alone.kill()
    assert seen.waited_s is not None
    assert seen.waited_s > 0.2  # half of a second, but for who else is here
    assert 0.1 < seen.cpu_s < 0.9
    assert seen.sample[-2] == pytest.approx(seen.waited_s, abs=1e-6)
    assert less.waited_s == 0.1  # what it says itself, as far as that is seen from here
    assert less.took_s < seen.took_s - 0.05  # the rest delayed its telling, which is no part of what it tells
    assert meanwhile.seen(None).waited_s is None


@pytest.mark.parametrize(
    ("claimed_s", "took_s", "rounds", "lies"),
    [
        (0.00083, 0.0049, 1, False),  # a tick of a busy machine, in the only burst
        (0.010, 0.060, 1, True),
        (0.003, 0.0035, 20, False),
        (0.003, 0.009, 20, True),
        (0.003, 0.009, 5, False),  # no interval, so nothing is claimed for it
    ],
)
def test_a_clock_is_contradicted_by_more_than_a_busy_machine_does(
    claimed_s: float, took_s: float, rounds: int, lies: bool
) -> None:
    seen = Seen(took_s, claimed_s, None, None, None, None, None)
    one = Measured({}, bursts=[(claimed_s, seen)] * rounds)
    assert (one.contradiction(None) is not None) == lies


def test_who_is_gone_or_nowhere_told_of_waits_for_nothing(tmp_path: Path) -> None:
    assert waited_s(1, tmp_path) is None
    (tmp_path / "7/task/7").mkdir(parents=True)
    (tmp_path / "7/task/7/schedstat").write_text("5 1500000000 3\n")
    (tmp_path / "7/task/8").mkdir()
    (tmp_path / "7/task/8/schedstat").write_text("5 500000000 3\n")
    assert waited_s(7, tmp_path) == 2.0
