"""`attnbench parallel`: its rows, table, file and figure, and what becomes of a group in which one process fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from attnbench import Workload
from attnbench.commands import main
from attnbench.records.judged import PARALLEL
from attnbench.report.figures.parallel import parallel as draw
from attnbench.sizes import Sweep
from attnbench.sweep import parallel
from attnbench.workers.about_parallel import SchemeInstance
from attnbench.workers.messages import Facts, Found

SMALL = ("--seq", "32", "--heads", "2", "--head-dim", "16", "--dtype", "float32", "--device", "cpu", "--threads", "1",
         "--precision", "90%", "--budget", "600")  # fmt: skip

FAULTY = """
import os, signal, time
import torch.distributed as dist
import torch
from attnbench.parallel import Scheme

class Kind(Scheme):
    def build(self, workload, group):
        calls = 0
        def call(query, key, value):
            nonlocal calls
            calls += 1
            if calls == 2 and group.rank() == 1:
                self.fail()
            dist.all_reduce(torch.ones(1), group=group)
            return query * 1
        return call

    def fail(self): pass

class Killed(Kind):
    def fail(self): os.kill(os.getpid(), signal.SIGKILL)

class Hangs(Kind):
    def fail(self): time.sleep(1000)

class Raises(Kind):
    def fail(self): raise ValueError("no more of this")

class Twice(Kind):
    def tokens(self, workload, rank, world): return [range(0, workload.seq // world)]

class Forward(Kind):
    trains = False
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside attnbench that offers schemes which fail."""
    folder = tmp_path / "offered"
    info = folder / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "faulty_schemes.py").write_text(FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    names = {"killed": "Killed", "hangs": "Hangs", "raises": "Raises", "wrong": "Kind", "twice": "Twice",
             "forward": "Forward", "none": "os"}  # fmt: skip
    lines = [f"{name} = faulty_schemes:{of}" for name, of in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[attnbench.parallel]", *lines]) + "\n")
    monkeypatch.syspath_prepend(str(folder))


def run(folder: Path, *arguments: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(main, ["parallel", *SMALL, "--out", str(folder), *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    (written,) = folder.glob("*/parallel.json")
    return result.stdout, json.loads(written.read_text())


def test_rows_table_file_figure_and_report(tmp_path: Path) -> None:
    said, found = run(tmp_path / "runs", "--plugins", "ring,ulysses", "--world", "2", "--phase", "train")
    (folder,) = (tmp_path / "runs").iterdir()
    assert PARALLEL.read(folder)["rows"] == found["rows"]
    assert [(row["scheme"], row["world"]) for row in found["rows"]] == [("sdpa", 1), ("ring", 2), ("ulysses", 2)]
    for row in found["rows"]:
        assert row["status"] == "ok", row
        assert row["samples"]
        assert row["latency_s"] > 0
        assert row["speedup"] > 0
        assert 0 <= row["framing_bytes"] == row["sent_bytes"] - row["predicted_sent_bytes"] < 20_000
        assert (row["sent_bytes"] > 0) == (row["world"] > 1)
        assert len(row["peak_bytes_by_rank"]) == row["world"]
        assert row["peak_bytes"] == max(row["peak_bytes_by_rank"])
        assert row["implementation_rel_l2"] == row["approximation_rel_l2"] < 1e-6
        assert row["value_gradient_rel_l2"] < 1e-6
    assert {path.name for path in folder.iterdir()} >= {"parallel.json", "parallel.png", "parallel.svg"}
    assert said.count("over sdpa in one") == 1
    assert "1x2x32x16 float32 causal train on cpu, 1 thread a process" in said
    out = tmp_path / "page"
    assert CliRunner().invoke(main, ["report", str(folder), "--out", str(out)]).exit_code == 0
    assert (out / "figures/processes.png").is_file()
    page = (out / "report.md").read_text()
    assert "## One attention, several processes" in page
    assert "| ulysses | 2 |" in page


def test_whatever_one_process_does_is_a_row_and_nothing_is_left(faulty: None, tmp_path: Path) -> None:
    specs = "killed,hangs,raises,wrong,twice,forward,none,ulysses"
    sizes = ("--world", "2", "--heads", "3", "--phase", "train", "--timeout", "12")
    _, found = run(tmp_path / "runs", "--plugins", specs, *sizes, code=1)
    became = {row["scheme"]: (row["status"], row["reason"]) for row in found["rows"]}
    assert became["sdpa"][0] == "ok"
    assert became["killed"] == ("crashed", "rank 1: killed by SIGKILL")
    waited = "no answer from rank 1 within 12 s (--timeout), for which the others waited"
    assert became["hangs"] == ("timeout", waited)
    assert became["raises"][0] == "error"
    assert became["raises"][1].startswith("rank 1: at ")
    assert became["raises"][1].endswith("ValueError: no more of this")
    assert became["wrong"][0] == "wrong"
    assert "implementation error" in became["wrong"][1]
    assert became["twice"] == ("wrong", "its parts put together are not the whole that they were of")
    assert became["forward"] == ("unsupported", "it has no backward pass")
    assert became["none"][0] == "error"
    assert became["ulysses"] == ("unsupported", "3 heads do not split evenly among 2 processes")
    assert not psutil.Process().children(recursive=True)


# arguments, and what is said of them
USAGE = (
    (("--plugins", "rign"), "no scheme is called 'rign'; did you mean ring"),
    (("--plugins", "ring:ordr=zigzag"), "no option 'ordr'; did you mean order?"),
    (("--mask", "window:8"), "--mask window:8: processes share attention with mask full or causal"),
    (("--phase", "decode"), "'decode' is none of forward, train"),
    (("--world", "0"), "--world must be between 1"),
    (("--dtype", "float8"), "'float8' is none of"),
)


@pytest.mark.parametrize(("arguments", "says"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_bad_usage_is_a_line_and_nothing_is_written(arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["parallel", *SMALL, "--out", str(tmp_path / "runs"), *arguments])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_needs_more_memory_than_there_is_is_skipped_before_anything_starts() -> None:
    w = Workload(seq=64, kv_seq=64, mask="causal")
    schemes = [SchemeInstance(name, "a:B", {}, [[None, None]], [[0, 9]]) for name in ("sdpa", "ring")]
    facts = Facts({"threads_at_once": 1, "usable_threads": 2}, {"cpu": Found(None, 1 << 20)})
    asked = parallel.Asked(plugins="ring", worlds=(2,), sweep=Sweep(threads=1))
    contest = parallel._Contest(None, Path(), asked, facts, w)  # type: ignore[arg-type]
    contest.run(list(parallel._members(schemes, 0, w, asked)), 1.0)
    rows = list(contest.rows())
    assert [(row["scheme"], row["world"], row["status"]) for row in rows] == [
        ("sdpa", 1, "skipped"),
        ("ring", 2, "skipped"),
    ]
    assert "GiB for its processes are over" in rows[1]["reason"]
    assert rows[1]["predicted_sent_bytes"] == 9
    assert set(PARALLEL.needed) <= set(rows[1])


LINES = (
    ({"status": "ok", "latency_s": 2e-3, "speedup": 1.5}, "ring x 2, 64 tokens: 2 ms, 1.5x sdpa's"),
    ({"status": "ok", "latency_s": 2e-3, "speedup": None}, "ring x 2, 64 tokens: 2 ms"),
    ({"status": "crashed", "reason": "rank 1: gone"}, "ring x 2, 64 tokens: crashed: rank 1: gone"),
)


@pytest.mark.parametrize(("row", "line"), LINES)
def test_a_row_in_a_line(row: dict[str, Any], line: str) -> None:
    assert parallel.line({"scheme": "ring", "world": 2, "seq": 64} | row) == line


def test_a_figure_draws_without_memory_or_the_baseline() -> None:
    row = {
        "scheme": "ring", "variant": "ring", "batch": 1, "heads": 8, "kv_heads": 2, "head_dim": 64, "value_dim": 64,
        "seq": 64, "dtype": "float32", "device": "cpu", "mask": "full", "phase": "forward", "threads": 1,
        "warnings": ["crowded"], "peak_bytes": None,
    }  # fmt: skip
    figure = draw([row | {"world": 2, "latency_s": 2e-3}, row | {"world": 4, "latency_s": 1e-3}])
    assert len(figure.axes) == 1
    assert "1x8/2x64x64 float32 full forward on cpu" in figure.get_suptitle()
