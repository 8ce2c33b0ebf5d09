"""`attnbench theory --against`: predictions beside rows of `attnbench parallel`, each worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from attnbench import Workload
from attnbench.commands import main
from attnbench.records import ceilings
from attnbench.records.judged import PARALLEL
from attnbench.theory.measured import against, formula
from attnbench.theory.roofline import Ceilings

# 2 * 8 heads * 1024^2 pairs * 128 operations in one process: 2^31. Whole keys or values: 2 MiB.
SHAPE = Workload(seq=1024, kv_seq=1024, heads=8, kv_heads=8, head_dim=64, value_dim=64, threads=1)
OPERATIONS, MIB = 2**31, 2**20
HERE = Ceilings("cpu", 2, {"float32": 4e10, "bfloat16": 4e10}, 1e12)


def row(scheme: str, world: int, latency_s: float | None, **changes: Any) -> dict[str, Any]:
    needed = dict.fromkeys(PARALLEL.needed)
    own = {"scheme": scheme, "world": world, "latency_s": latency_s, "status": "ok", "link_bytes_per_s": 2.0**30}
    return needed | SHAPE.as_dict() | own | changes


def test_two_processes_on_two_cores_compute_and_send_one_after_the_other() -> None:
    rows = [row("sdpa", 1, 0.2, link_bytes_per_s=None), row("ring", 2, 0.15, sent_bytes=2 * MIB + 300)]
    alone, ring = against(rows, HERE, cores=2)
    assert (alone.predicted_sent_bytes, alone.expected_s) == (0, 0.2)
    assert alone.least_s == pytest.approx(OPERATIONS / 2e10)  # one thread of the two that the ceilings are of
    # Half of keys and values, which at 1 GiB/s are 2/1024 s; each has a core, so half of the operations takes 0.1 s.
    assert (ring.sent_bytes, ring.predicted_sent_bytes) == (2 * MIB + 300, 2 * MIB)
    assert ring.expected_s == pytest.approx(0.1 + 2 / 1024)
    assert ring.least_s == pytest.approx(OPERATIONS / 2 / 2e10 + 2 / 1024)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (8, 0.05),  # a core for each and more: three quarters of the keys travel meanwhile
        (4, 0.05 + 3 / 1024),
        (2, 0.1 + 3 / 1024),  # two share a core
    ],
)
def test_cores_are_shared(cores: int, expected: float) -> None:
    found = against([row("sdpa", 1, 0.2), row("ring", 4, 0.3)], None, cores)
    assert found[1].least_s is None
    assert found[1].expected_s == pytest.approx(expected)


def test_only_the_same_problem_tells_how_fast_one_process_is() -> None:
    rows = [row("sdpa", 1, 0.2, phase="train"), row("ulysses", 2, 0.1), row("ring", 3, 0.1), row("ring", 2, None),
            row("mine", 2, 0.1), row("ring", 2, 0.1, status="wrong")]  # fmt: skip
    # 1024 tokens are no multiple of 3, nothing is known of mine, and what has no time, or is wrong, is left out.
    alone, ulysses = against(rows, HERE, 2)
    assert (alone.scheme, ulysses.scheme, ulysses.expected_s) == ("sdpa", "ulysses", None)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("sdpa", "whole"), ("ring", "ring"), ("ring:order=contiguous", "ring-contiguous"), ("mine", None),
     ("torch-ring:rotate=allgather", "torch-ring"), ("all-gather:order=contiguous", None)],
)  # fmt: skip
def test_a_schemes_formula(scheme: str, name: str | None) -> None:
    assert formula(scheme) == name


def shown(folder: Path, rows: list[dict[str, Any]], *options: str) -> Result:
    machine = {"cpu": "a CPU", "usable_threads": 2}
    (folder / "parallel.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    return CliRunner().invoke(main, ["theory", "--against", str(folder), *options])


def test_a_table_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("sdpa", 1, 0.2, seq=2048, kv_seq=2048),
        row("sdpa", 1, 0.2),
        row("ring", 2, 0.15, sent_bytes=2 * MIB + 300, peak_bytes=8 * MIB),
    ]
    said = shown(tmp_path, rows).output
    assert "The ceilings of that machine are not known here" in said
    monkeypatch.setattr(ceilings, "stored", lambda machine, device, threads: HERE)
    result = shown(tmp_path, rows)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith("2 cores")] == [
        f"{SHAPE.replace(seq=n, kv_seq=n).label()}, 2 cores" for n in (2048, 1024)
    ]
    (ring,) = (line for line in lines if line.startswith("ring"))
    # Half of query, key, value and output is 4 MiB, the other's keys and values 2 MiB, a block's output 1 MiB.
    assert " ".join(ring.split()) == "ring 2 2.00 MiB, +0.01% 8.00 MiB, +14% 150 ms 55.6 ms 102 ms 1.47x"
    rows = json.loads(shown(tmp_path, rows, "--json").stdout)["rows"]
    assert [each["world"] for each in rows] == [1, 1, 2]


def test_what_it_refuses(tmp_path: Path) -> None:
    result = shown(tmp_path, [row("mine", 2, 0.1)])
    assert (result.exit_code, result.output.splitlines()) == (2, [
        f"attnbench: {tmp_path} has no finished row of a scheme that a formula is known for"
    ])  # fmt: skip
    assert "drop the other options" in shown(tmp_path, [], "--seq", "2").output
