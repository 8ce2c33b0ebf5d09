"""How a session decides from what it has measured; what it measures is tested through `attnbench run`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from attnbench.bench.plan import Cell
from attnbench.bench.session import Session, Settings, _Measured
from attnbench.roofline import Ceilings
from attnbench.workload import Workload


def cell(name: str) -> Cell:
    return Cell(name, name, "", "", Workload(seq=64, kv_seq=64))


def measured(rounds: int, launches: int) -> _Measured:
    """Of a cell whose rounds agree within a thousandth."""
    found = _Measured({})
    found.plan(rounds, launches)
    noise = np.random.default_rng(0).normal(0, 1e-3, 25)
    found.samples = [[0, i, 0.0, 1, 1 + x] for i, x in enumerate(noise)]
    return found


def test_a_baseline_without_looks_of_its_own_leaves_with_the_last_of_the_others() -> None:
    """Several processes were planned for cells that then failed; the one that is left is looked at by rounds."""
    session: Any = Session(SimpleNamespace(), Settings("base", precision=0.02, budget=1, timeout=1, memory=1))
    base, other = cell("base"), cell("other")
    session._baseline, session._measured = base, {base: measured(40, 5), other: measured(200, 1)}
    live = [SimpleNamespace(cell=base), SimpleNamespace(cell=other)]

    session._look(live, 24, by_process=False)
    assert not session._measured[base].converged
    session._look(live, 25, by_process=False)
    assert session._measured[other].converged
    assert session._measured[base].converged
    assert session._figures(other)["confidence"] == pytest.approx(1 - 0.05 * 0.2 / 4)
    assert session._figures(base)["confidence"] == session._figures(other)["confidence"]


def test_what_no_machine_can_do_is_wrong() -> None:
    ceilings = Ceilings("cpu", 1, {"float32": 1e9}, 1e9)
    session: Any = Session(SimpleNamespace(), Settings("base", 0.02, 1, 1, 1, ceilings=ceilings))
    one = cell("base")
    one.family = "exact"
    took = 1e-3  # seconds, for 8.4e6 operations
    session._measured = {one: _Measured({}, samples=[[0, i, 0.0, 1, took] for i in range(8)])}
    session._baseline = one
    row = session._row(one)
    assert row["status"] == "wrong"
    assert "ceiling for float32 is 0.001" in row["reason"]
    assert row.get("latency_s") is None
    assert len(row["samples"]) == 8
