"""Runs in the formats of other tools: each format is one function from runs to the bytes of a file."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.errors import AttnbenchError
from attnbench.records import strict
from attnbench.records.machines import identity
from attnbench.records.run import labelled, load, read_metas, rows
from attnbench.records.schema import COLUMNS, COUNTS, Row
from attnbench.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

_LAYOUT = "5.3.1"  # the version of pytest-benchmark whose layout is written
_MIB = 2**20


@dataclass(frozen=True)
class Format:
    """One way to write runs.

    write: from run folders to the file's content. Raises AttnbenchError as `records.rows` does, and where the format
        can't hold these runs.
    text: it can go to a terminal.
    failed: rows without a value are in it too.
    """

    write: Callable[[Sequence[Path]], bytes]
    text: bool = True
    failed: bool = True


def csv(runs: Sequence[Path]) -> bytes:
    """The tidy table of `records.load`, a row a cell; several warnings are set apart by spaces."""
    frame = _table(runs)
    frame["warnings"] = frame["warnings"].map(" ".join)
    return frame.to_csv(index=False).encode()


def parquet(runs: Sequence[Path]) -> bytes:
    """The tidy table of `records.load`. A column has one type, whatever the rows hold, so that files can be joined."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pandas(_table(runs), preserve_index=False)
    index = table.schema.get_field_index("warnings")  # of type list<null> where no row has a warning
    table = table.set_column(index, "warnings", table["warnings"].cast(pa.list_(pa.string())))
    out = BytesIO()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue()


def pytest_benchmark(runs: Sequence[Path]) -> bytes:
    """What `pytest-benchmark compare` reads: a benchmark for each row, a group for each workload, seconds a call.

    A round is a timed burst and `iterations` its calls, which is what pytest-benchmark means by both.

    Raises:
        AttnbenchError: the runs are from several machines, or two rows would have one name.
    """
    metas = read_metas(runs)
    if len({identity(meta.get("machine", {})) for meta in metas}) > 1:
        raise AttnbenchError("a pytest-benchmark file is of one machine, these runs are of several; export them apart")
    machine: dict[str, Any] = metas[0].get("machine", {})
    content = {
        "machine_info": _machine_info(machine),
        "commit_info": _commit_info(machine.get("git")),
        "benchmarks": [_benchmark(plugin, problem, row) for (plugin, problem), row in _named(runs).items()],
        "datetime": metas[0].get("started"),
        "version": _LAYOUT,
    }
    return _json(content)


def github_action(runs: Sequence[Path]) -> bytes:
    """What github-action-benchmark reads as `tool: customSmallerIsBetter`: latency and peak memory of each row.

    `range` is half the latency's interval; it is left out where there were too few rounds for one.

    Raises:
        AttnbenchError: two rows would have one name.
    """
    entries: list[dict[str, Any]] = []
    for (plugin, problem), row in _named(runs).items():
        low, high = row.get("latency_low_s"), row.get("latency_high_s")
        about = [str(row.get("implementation") or plugin)]
        if row.get("rounds") is not None:
            about.append(f"{row['rounds']} rounds")
        if row.get("speedup") is not None and row.get("baseline"):
            about.append(f"{row['speedup']:.3g} x {row['baseline']}")
        latency = {"name": f"{plugin} {problem}: latency", "unit": "ms", "value": _rounded(1e3 * row["latency_s"])}
        if low is not None and high is not None:
            latency["range"] = f"± {1e3 * (high - low) / 2:.2g}"
        entries.append(latency | {"extra": ", ".join(about)})
        if row.get("peak_bytes") is not None:
            peak = {"unit": "MiB", "value": _rounded(row["peak_bytes"] / _MIB), "extra": about[0]}
            entries.append({"name": f"{plugin} {problem}: peak memory"} | peak)
    return _json(entries)


FORMATS = {
    "csv": Format(csv),
    "parquet": Format(parquet, text=False),
    "pytest-benchmark": Format(pytest_benchmark, failed=False),
    "github-action": Format(github_action, failed=False),
}


def without_value(runs: Sequence[Path]) -> int:
    """How many rows a format that holds values only leaves out: those not `ok`, or without a latency or a burst."""
    return sum(not _has_value(row) for run in labelled(runs).values() for row in rows(run))


def _has_value(row: Row) -> bool:
    return row["status"] == "ok" and row.get("latency_s") is not None and bool(_bursts(row))


def _bursts(row: Row) -> list[tuple[int, float]]:
    """Calls and seconds of each sample that has both."""
    samples = row.get("samples") or []
    return [(calls, seconds) for _, _, _, calls, seconds, *_ in samples if calls and seconds is not None]


def _table(runs: Sequence[Path]) -> "pd.DataFrame":
    """`records.load` with columns whose type does not hang on whether some row lacks a value."""
    frame = load(runs)
    for column in COUNTS:
        fits = frame[column].abs() < 2**63  # a plugin may say of itself what it likes
        frame[column] = frame[column].where(fits).round().astype("Int64")
    return frame


def _named(runs: Sequence[Path]) -> dict[tuple[str, str], Row]:
    """The rows with a value by plugin and by what was computed, in words; but for the seed: no speed depends on it."""
    named: dict[tuple[str, str], Row] = {}
    for run in labelled(runs).values():
        for row in rows(run):
            if _has_value(row):
                workload = Workload.from_dict(row)
                name = row["plugin"], f"{workload.label()} {workload.device} threads={workload.threads}"
                if name in named:
                    raise AttnbenchError(f"two rows are {' '.join(name)}; export these runs apart")
                named[name] = row
    return named


def _benchmark(plugin: str, problem: str, row: Row) -> dict[str, Any]:
    workload = Workload.from_dict(row).as_dict()
    extra = [c for c in COLUMNS if c not in workload and c not in ("plugin", "status", "reason", "traceback")]
    return {
        "group": problem,
        "name": plugin,
        "fullname": f"{plugin}[{problem}]",
        "params": {"plugin": plugin, **workload},
        "param": problem,
        "extra_info": {column: row.get(column) for column in extra},
        "options": {},
        "stats": _stats(_bursts(row)),
    }


def _stats(bursts: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """pytest-benchmark's statistics of the seconds a call took in each burst."""
    data = [seconds / calls for calls, seconds in bursts]
    ordered, n = sorted(data), len(data)
    mean = statistics.fmean(data)
    deviation = statistics.stdev(data) if n > 1 else 0.0
    # A quartile is the median of a half; of an odd number, the mean of the halves with and without the middle.
    half, rest = n // 2, n - n // 2
    q1 = (statistics.median(ordered[: half or 1]) + statistics.median(ordered[:rest])) / 2
    q3 = (statistics.median(ordered[-(half or 1) :]) + statistics.median(ordered[half:])) / 2
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)  # Tukey's fences
    strange = sum(abs(x - mean) > deviation for x in data)
    outside = sum(not low <= x <= high for x in data)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": deviation,
        "rounds": n,
        "median": statistics.median(data),
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": outside,
        "stddev_outliers": strange,
        "outliers": f"{strange};{outside}",
        "ld15iqr": min(x for x in ordered if x >= low),
        "hd15iqr": max(x for x in ordered if x <= high),
        "ops": 1 / mean if mean else 0.0,
        "total": sum(data),
        "data": data,
        "iterations": int(statistics.median_low(calls for calls, _ in bursts)),
    }


def _machine_info(machine: dict[str, Any]) -> dict[str, Any]:
    """The machine under pytest-benchmark's names, and all that attnbench knows of it under its own."""
    system = dict(zip(("system", "release", "machine"), str(machine.get("system", "")).split(), strict=False))
    cpu = {"brand_raw": machine.get("cpu"), "count": machine.get("hardware_threads"), "flags": machine.get("features")}
    return {**system, "python_version": machine.get("python"), "cpu": cpu, "attnbench": machine}


def _commit_info(described: str | None) -> dict[str, Any]:
    """`described`: of the checkout that attnbench ran from, as `git describe --always --dirty` says it."""
    described = described or "unversioned"
    commit = described.removesuffix("-dirty")
    when = {"time": None, "author_time": None, "dirty": commit != described}
    return {"id": commit, **when, "project": "attnbench", "branch": "(unknown)"}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _json(content: Any) -> bytes:
    return (strict.dumps(content, indent=1) + "\n").encode()
