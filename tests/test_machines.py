"""A run of several machines: nothing is fitted, joined, compared or chosen across two of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnbench.advice.submit import examine
from attnbench.analysis import between
from attnbench.analysis.frames import as_rows
from attnbench.analysis.growth import growth
from attnbench.analysis.shares import attention_share
from attnbench.errors import AttnbenchError
from attnbench.records import exports, machines
from attnbench.records.run import Run, load, read_metas, rows
from attnbench.records.schema import Row
from attnbench.records.submission import apart, content, read
from attnbench.report.numbers import grids
from attnbench.report.page import write_report
from attnbench.report.site import Board
from attnbench.sweep.settings import Asked
from attnbench.sweep.spread import ALL
from attnbench.workload import Workload

MACHINES = {
    f"{cpu}, 2 threads": {"cpu": cpu, "hardware_threads": 2, "memory_bytes": 1 << 30, "gpu": None, "libraries": {"torch": "2.13.0"}}
    for cpu in "AB"
}  # fmt: skip
FAST, SLOW = MACHINES
LENGTHS = {FAST: (512, 2048, 8192), SLOW: (1024, 4096, 16384)}


def row(machine: str, plugin: str, workload: Workload, seconds: float, speedup: float) -> Row:
    around = {"latency_s": seconds, "latency_low_s": seconds * 0.99, "latency_high_s": seconds * 1.01}
    paired = {"speedup": speedup, "speedup_low": speedup * 0.99, "speedup_high": speedup * 1.01}
    cell = {"plugin": plugin, "variant": plugin, "family": "exact", "baseline": "sdpa", "status": "ok", "processes": 10}
    own = {"distribution": "attnbench 0.1.0", "machine": machine, "node": f"host {machine[0]}", "converged": True}
    return cell | own | workload.as_dict() | around | paired


def made(root: Path, name: str, ceilings: Any = None, own: dict[str, Any] | None = None, threads: int = 1) -> Path:
    """Six lengths by turns on two machines, one of which takes ten times as long; its blocks are on the other."""
    asked = Asked.of(plugins="sdpa,fast", seq="512..16384", scope="attention", dtype="float32", device="cpu", threads=1)
    asked = replace(asked, sweep=replace(asked.sweep, threads=threads))
    meta = {"command": ["attnbench", "run"], "started": "2026-11-30", "finished": "2026-11-30", "args": asked.as_dict()}
    facts = own or MACHINES
    meta |= {"machine": facts[FAST], "machines": facts, "ceilings_of": ceilings or {}, "ceilings": None, "on": "ray"}
    with Run.create(root, name, meta | {"distributions": {"sdpa": "x", "fast": "x"}}) as run:
        for machine, lengths in LENGTHS.items():
            each = 1e-9 if machine == FAST else 1e-8
            for length in lengths:
                w = Workload(seq=length, kv_seq=length, mask="causal")
                run.append(
                    [row(machine, "sdpa", w, each * length**2, 1.0), row(machine, "fast", w, each * length**2 / 2, 2.0)]
                )
        return run.path


def test_rows_go_by_run_and_machine(tmp_path: Path) -> None:
    path = made(tmp_path, "run")
    frame, metas = load(path), read_metas(path)
    names = [f"{path.name} on {machine}" for machine in MACHINES]
    assert list(dict.fromkeys(frame["run"])) == [meta["name"] for meta in metas] == names
    assert [meta["machine"]["cpu"] for meta in metas] == ["A", "B"]
    assert dict(zip(frame["run"], frame["machine"], strict=True)) == dict(zip(names, MACHINES, strict=True))


def test_ceilings_are_each_machine_s_own(tmp_path: Path) -> None:
    path = made(tmp_path, "run", {FAST: {"device": "cpu"}})
    assert [meta["ceilings"] for meta in read_metas(path)] == [{"device": "cpu"}, None]


def test_growth_is_each_machine_s_own(tmp_path: Path) -> None:
    frame = load(made(tmp_path, "run"))
    for given in (frame, frame.assign(run="the same")):  # whoever drops the run's name mixes no machines either
        found = growth(given)
        assert len(found) == 4
        assert found["measured"].tolist() == pytest.approx([2.0] * 4)  # over both it would be far from that
        assert sorted(found["longest"]) == [8192, 8192, 16384, 16384]


def test_a_block_s_share_is_not_of_another_machine_s_attention(tmp_path: Path) -> None:
    path = made(tmp_path, "run")
    w = Workload(seq=512, kv_seq=512, mask="causal", scope="block", block="decoder-only", norm="pre")
    with Run.open(path) as run:
        run.append([row(SLOW, "sdpa", w, 1.0, 1.0)])
    assert attention_share(load(path).assign(run="one")).empty
    with Run.open(path) as run:
        run.append([row(FAST, "sdpa", w, 1.0, 1.0)])
    assert len(attention_share(load(path).assign(run="one"))) == 1


def test_a_report_shows_each_apart_and_says_so(tmp_path: Path) -> None:
    path = made(tmp_path, "run")
    told = [grid.heading for grid in grids(load(path), read_metas(path))]
    assert len(told) == 2
    assert all(f"on {machine}" in heading for machine, heading in zip(MACHINES, told, strict=True))
    write_report(load(path), read_metas(path), tmp_path / "page")
    text = (tmp_path / "page" / "report.md").read_text()
    assert "The rows come from one run on 2 machines, each with panels of its own" in text


def test_compare_pairs_what_was_measured_on_one_machine(tmp_path: Path) -> None:
    one = made(tmp_path, "one")
    other = made(tmp_path, "other", own=dict(reversed(MACHINES.items())))
    changes = between.compare_by_machine(load(one), load(other), read_metas(one), read_metas(other), 0.02)
    assert {change.verdict for change in changes.changes} == {"same"}
    assert len(changes.changes) == 12
    swapped = made(tmp_path, "swapped", own=dict(zip(MACHINES, reversed(MACHINES.values()), strict=True)))
    apart = between.compare_by_machine(load(one), load(swapped), read_metas(one), read_metas(swapped), 0.02)
    assert apart.changes == []
    assert len(apart.only_base) == len(apart.only_new) == 12
    far = made(tmp_path, "far", own={name: facts | {"cpu": "C"} for name, facts in MACHINES.items()})
    with pytest.raises(AttnbenchError, match="different machines"):
        between.compare_by_machine(load(one), load(far), read_metas(one), read_metas(far), 0.02)


def test_what_is_shared_says_of_each_machine_what_it_lacks(tmp_path: Path) -> None:
    found = examine(made(tmp_path, "run"))
    told = [each.what for each in found.missing]
    assert told == [f"{machine}: the machine was not calibrated for cpu with 1 threads" for machine in MACHINES]
    assert len(told) == 2  # and no cell is missed
    alike = examine(made(tmp_path, "run", threads=ALL))  # each node with its own
    assert [each.what for each in alike.missing] == told
    with pytest.raises(AttnbenchError, match="can't name them all"):
        examine(made(tmp_path, "run"), "a laptop")


def test_a_leaderboard_has_both(tmp_path: Path) -> None:
    path = made(tmp_path, "run")
    file = tmp_path / "run.attnbench.json"
    file.write_bytes(content(read(path)))
    assert [part.length for part in apart(read(file))] == [6, 6]
    board = Board()
    assert board.add(read(path)) is None
    assert board.add(read(file)) == path
    page = board.write(tmp_path / "site").read_text()
    assert "2 machines" in page
    assert board.rows == 12


def test_a_file_of_one_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnbenchError, match="of several"):
        exports.pytest_benchmark([made(tmp_path, "run")])


def test_an_older_run_is_of_the_machine_that_its_run_json_names(tmp_path: Path) -> None:
    w = Workload(seq=16, kv_seq=16)
    with Run.create(tmp_path, "old", {"machine": MACHINES[FAST]}) as run:
        run.append([{"plugin": "sdpa", **w.as_dict(), "status": "ok"}])
    assert rows(run.path)[0]["machine"] == FAST
    assert load(run.path)["machine"].tolist() == [FAST]
    assert list(machines.of_run({"machine": MACHINES[FAST]})) == [FAST]


@pytest.mark.parametrize("damage", [lambda meta: meta | {"machines": []}, lambda meta: meta | {"machines": {"A": 3}}])
def test_machines_that_are_none_are_one_line(
    damage: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    path = made(tmp_path, "run")
    (path / "run.json").write_text(json.dumps(damage(json.loads((path / "run.json").read_text()))))
    with pytest.raises(AttnbenchError, match="is damaged"):
        as_rows(load(path))
