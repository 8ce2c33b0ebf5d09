"""How a session decides and which processes it keeps; what it measures is tested through `attnbench run`."""

from __future__ import annotations

import os
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.nn.functional import scaled_dot_product_attention

from attnbench.plugin import Attention, Plugin
from attnbench.sweep import rounds
from attnbench.sweep.cell import Cell, Measured
from attnbench.sweep.contest import Contest
from attnbench.sweep.precision import look
from attnbench.sweep.returns import Worth
from attnbench.sweep.rows import figures
from attnbench.sweep.session import Session, Unwatched, measure
from attnbench.sweep.settings import Settings
from attnbench.theory.roofline import Ceilings
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload


def cell(name: str) -> Cell:
    return Cell(name, name, "", "", Workload(seq=64, kv_seq=64))


def measured(rounds: int, launches: int) -> Measured:
    """Of a cell whose rounds agree within a thousandth."""
    found = Measured({})
    found.plan(rounds, launches)
    noise = np.random.default_rng(0).normal(0, 1e-3, 25)
    found.samples = [[0, i, 0.0, 1, 1 + x] for i, x in enumerate(noise)]
    return found


def test_a_baseline_without_looks_of_its_own_leaves_with_the_last_of_the_others() -> None:
    """Several processes were planned for cells that then failed; the one that is left is looked at by rounds."""
    base, other = cell("base"), cell("other")
    known = {base: measured(40, 5), other: measured(200, 1)}
    settings = Settings("base", precision=0.02, budget=1, timeout=1, memory=1)

    last = {c: known[c].samples.pop() for c in known}
    look([base, other], base, known, by_process=False, precision=0.02)
    assert not known[base].converged
    for c, sample in last.items():
        known[c].samples.append(sample)
    look([base, other], base, known, by_process=False, precision=0.02)
    assert known[other].converged
    assert known[base].converged
    theirs, ours = (figures(c, known[c], known[base], settings) for c in (other, base))
    assert theirs["confidence"] == pytest.approx(1 - 0.05 * 0.2 / 4)
    assert ours["confidence"] == theirs["confidence"]


def test_what_no_machine_can_do_is_wrong() -> None:
    ceilings = Ceilings("cpu", 1, {"float32": 1e9}, 1e9)
    session: Any = Session(SimpleNamespace(), Settings("base", 0.02, 1, 1, 1, ceilings=ceilings))
    one = cell("base")
    one.family = "exact"
    took = 1e-3  # seconds, for 8.4e6 operations
    known = {one: Measured({}, samples=[[0, i, 0.0, 1, took] for i in range(8)])}
    row = session._row(Contest([one], one, known), one)
    assert row["status"] == "wrong"
    assert "ceiling for float32 is 0.001" in row["reason"]
    assert row.get("latency_s") is None
    assert len(row["samples"]) == 8


class Named(Plugin):
    """Says which process it runs in; fails or dies at some lengths."""

    def build(self, workload: Workload) -> Attention:
        if workload.seq == 48:
            raise RuntimeError("not this length")
        if workload.seq == 80:
            os._exit(3)
        return Attention(scaled_dot_product_attention, str(os.getpid()))


def test_what_is_too_dear_for_a_round_keeps_the_call_that_measured_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "allot", lambda cells, *_, **__: dict.fromkeys(cells, 0))
    nothing: Worth = lambda *_: {}  # noqa: E731
    cells = [
        Cell(name, name, "", "test_session:Named", Workload(seq=64, kv_seq=64, heads=1, kv_heads=1))
        for name in ("one", "other")
    ]
    with Forkserver(1) as server:
        rows = measure(
            server, Settings("one", precision=0.5, budget=600, timeout=300, memory=8 << 30), cells, worth=nothing
        )
    for row in rows:
        assert (row["status"], row["reason"], row["rounds"], row["converged"]) == ("ok", "", 1, False)
        ((process, turn, start, calls, seconds),) = row["samples"]
        assert (process, turn, calls, seconds) == (0, 0, 1, row["latency_s"])
        assert start > 0
        assert row["workspace_bytes"] is not None
        assert row["implementation_rel_l2"] < 1e-5
        assert (row["latency_low_s"], row["warnings"]) == (None, ["few-rounds"])
    assert rows[1]["speedup"] == pytest.approx(rows[0]["latency_s"] / rows[1]["latency_s"])


def test_what_judging_takes_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cell without a round, which is judged in its own process when all is over, after a single call."""
    monkeypatch.setattr(rounds, "allot", lambda cells, *_, **__: dict.fromkeys(cells, 0))
    nothing: Worth = lambda *_: {}  # noqa: E731
    workload = Workload(seq=1024, kv_seq=1024, heads=4, kv_heads=4)
    one = Cell("int8", "int8", "", "attnbench_plugins.int8:Int8", workload, family="quantized")
    with Forkserver(2) as server:
        (row,) = measure(server, Settings("", 0.5, budget=600, timeout=300, memory=8 << 30), [one], worth=nothing)
    assert (row["status"], row["rounds"], row["warnings"]) == ("ok", 1, ["few-rounds"])
    assert 0 < row["implementation_rel_l2"] < 1e-2


def processes(reuse: bool, names: tuple[str, ...], lengths: tuple[int, ...]) -> list[tuple[str, str]]:
    """Status and process of each variant at each length, variant by variant."""
    cells = [
        Cell(name, name, "", "test_session:Named", Workload(seq=seq, kv_seq=seq, heads=1, kv_heads=1))
        for seq in lengths
        for name in names
    ]
    settings = Settings("one", precision=0.5, budget=200, timeout=60, memory=8 << 30, reuse=reuse)
    with Forkserver(1) as server:
        rows = measure(server, settings, cells)
    return [(r["status"], r.get("implementation", "")) for name in names for r in rows if r["plugin"] == name]


def test_one_process_serves_a_variant_until_something_goes_wrong_in_it() -> None:
    found = processes(reuse=True, names=("one", "other"), lengths=(32, 48, 64, 80, 96))
    assert [status for status, _ in found] == ["ok", "error", "ok", "crashed", "ok"] * 2
    for first, _, second, _, third in (found[:5], found[5:]):
        assert len({first[1], second[1], third[1]}) == 3, "what failed must not serve the next workload"
    assert len({process for _, process in found if process}) == 6, "each variant has its own"


def test_one_process_serves_all_workloads_where_nothing_goes_wrong() -> None:
    kept, fresh = (processes(reuse, names=("one",), lengths=(32, 64, 96)) for reuse in (True, False))
    assert {status for status, _ in (*kept, *fresh)} == {"ok"}
    assert len({process for _, process in kept}) == 1
    assert len({process for _, process in fresh}) == 3


@pytest.mark.parametrize("status", ["crashed", None])
def test_what_ended_before_keeps_its_status_whatever_it_does_between_its_calls(status: str | None) -> None:
    session: Any = Session(SimpleNamespace(), Settings("", 0.02, 1, 1, 1))
    one = cell("one")
    one.family = "exact"
    busy = Measured({}, samples=[[0, i, 0.0, 1, 1 + i / 100] for i in range(8)])
    busy.idle.add(1.0, 1.0)
    if status:
        one.end(status, "why")
    row = session._row(Contest([one], None, {one: busy}), one)
    assert (row["status"], row["reason"]) == (
        ("crashed", "why") if status else ("wrong", "it keeps 1.0 cores busy between its calls")
    )
    assert "latency_s" not in row


class Heard(Unwatched):
    """Keeps what is said of cells."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def cell(self, cell: Cell, doing: str) -> None:
        self.said.append((cell.plugin, doing))


def test_no_variant_is_favoured_by_its_place_in_a_round_or_by_when_its_process_starts() -> None:
    names, heard = ("one", "other"), Heard()
    cells = [
        Cell(name, name, "", "test_session:Named", Workload(seq=seq, kv_seq=seq, heads=1, kv_heads=1))
        for seq in range(32, 36)
        for name in names
    ]
    settings = Settings("one", precision=0.5, budget=120, timeout=60, memory=8 << 30)
    nothing: Worth = lambda *_: {}  # noqa: E731
    with Forkserver(1) as server:
        rows = measure(server, settings, cells, heard, nothing)
    bursts = sorted((row["seq"], s[0], s[2], row["plugin"]) for row in rows for s in row["samples"])
    pairs = [(a[3], b[3]) for a, b in pairwise(bursts) if a[:2] == b[:2]]
    assert len(pairs) > 40
    assert all(a != b for a, b in pairs), "what follows itself finds its own caches warm"
    started = [name for name, doing in heard.said if doing == "getting ready"]
    assert set(started[::2]) == set(names), "which of two starts first is drawn"
