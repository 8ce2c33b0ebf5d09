"""Two runs side by side: verdicts on made-up figures whose answer is known, and the command on real files."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnbench.analysis import between
from attnbench.errors import AttnbenchError
from attnbench.records.run import as_frame, rows
from attnbench.workload import Workload

RUN = Path(__file__).parents[1] / "results" / "2026-11-29-cpu"
MACHINE = {"cpu": "A", "hardware_threads": 2, "memory_bytes": 1, "gpu": None, "libraries": {"torch": "2.13.0"}}
META = {"machine": MACHINE}


def row(
    plugin: str = "fast", seconds: float = 1.0, half: float = 0.005, speedup: float | None = None, **more: Any
) -> dict[str, Any]:
    """A cell in ten processes, with an interval of so much to either side of both figures."""
    around = {"latency_s": seconds, "latency_low_s": seconds * (1 - half), "latency_high_s": seconds * (1 + half)}
    if speedup:
        around |= {"speedup": speedup, "speedup_low": speedup * (1 - half), "speedup_high": speedup * (1 + half)}
    cell = {
        "plugin": plugin,
        "variant": plugin,
        "family": "exact",
        "status": "ok",
        "reason": "",
        "baseline": "sdpa",
        "processes": 10,
    }
    return cell | Workload(seq=512, kv_seq=512).as_dict() | around | more


def change(
    base: dict[str, Any], new: dict[str, Any], metas: Any = (META, META), margin: float = 0.02
) -> between.Change:
    (found,) = between.compare(as_frame([base]), as_frame([new]), metas, margin).changes
    return found


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ({"seconds": 1.0}, "same"),
        ({"seconds": 1.01}, "same"),  # it is certain that it is slower, and by less than anybody asked for
        ({"seconds": 1.1}, "slower"),
        ({"seconds": 0.9}, "faster"),
        ({"seconds": 1.1, "half": 0.2}, "can't tell"),
        ({"seconds": 1.0, "half": 0.2}, "can't tell"),
        ({"seconds": 1.02, "half": 0.02}, "can't tell"),
        ({"seconds": 1.025, "processes": 1}, "can't tell"),  # processes may differ by as much
        ({"seconds": 1.2, "processes": 1}, "slower"),
        ({"seconds": 1.2, "latency_low_s": None}, "can't tell"),
    ],
)
def test_a_verdict_says_what_the_interval_says(new: dict[str, Any], verdict: str) -> None:
    assert change(row(), row(**new)).verdict == verdict


def test_a_ratio_is_base_over_new_with_both_widths() -> None:
    found = change(row(seconds=2.0, half=0.03), row(seconds=1.0, half=0.04))
    assert found.ratio == 2.0
    assert found.low == pytest.approx(2.0 * math.exp(-0.05), rel=2e-3)
    assert found.high == pytest.approx(2.0 * math.exp(0.05), rel=2e-3)


def test_what_a_slow_day_did_to_both_variants_cancels_out() -> None:
    """All calls take 1.5 times as long on the second day; speedups over the baseline stay."""
    found = change(row(seconds=1.0, speedup=2.0), row(seconds=1.5, speedup=2.0))
    assert (found.paired, found.ratio, found.verdict) == (True, 1.0, "same")
    newer = {"machine": MACHINE | {"libraries": {"torch": "2.14.0"}}}
    found = change(row(seconds=1.0, speedup=2.0), row(seconds=1.5, speedup=2.0), (META, newer))
    assert (found.paired, found.verdict) == (False, "slower")  # the baseline is another one there
    baseline = change(row("sdpa", 1.0, speedup=1.0), row("sdpa", 1.5, speedup=1.0))
    assert (baseline.paired, baseline.verdict) == (False, "slower")


@pytest.mark.parametrize(
    ("base", "new", "verdict", "is_worse"),
    [
        ("ok", "wrong", "broken", True),
        ("ok", "timeout", "broken", True),
        ("ok", "skipped", "can't tell", False),
        ("crashed", "ok", "mended", False),
        ("error", "error", "can't tell", False),
    ],
)
def test_a_cell_without_a_number(base: str, new: str, verdict: str, is_worse: bool) -> None:
    found = change(*(row(status=status) for status in (base, new)))
    assert (found.verdict, found.ratio, found.is_worse(0.05)) == (verdict, None, is_worse)


def test_worse_is_what_is_slower_by_more_for_certain() -> None:
    found = change(row(), row(seconds=1.1, half=0.01))
    assert found.is_worse(0.05)
    assert not found.is_worse(0.09)


def test_cells_of_one_run_alone_are_named() -> None:
    one, other, both = row("one"), row("other"), row("both")
    found = between.compare(as_frame([one, both]), as_frame([both, other]), (META, META), 0.02)
    assert [c.plugin for c in found.changes] == ["both"]
    assert ([p for p, _ in found.only_base], [p for p, _ in found.only_new]) == (["one"], ["other"])


@pytest.mark.parametrize(
    "different", [{"cpu": "B"}, {"hardware_threads": 4}, {"environment": {"OMP_PROC_BIND": "true"}}]
)
def test_other_machines_are_refused_with_what_differs(different: dict[str, Any]) -> None:
    with pytest.raises(AttnbenchError, match="different machines") as raised:
        between.check_same_machine([META, {"machine": MACHINE | different}])
    assert str(next(iter(different.values()))).strip("{}").split(":")[-1].strip(" '") in str(raised.value)
    between.check_same_machine([META, {"machine": MACHINE | {"libraries": {"torch": "2.14.0"}}}])


def attnbench(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "attnbench", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def slower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed run with int8 half as fast again everywhere, and naive wrong at one length."""
    path = tmp_path_factory.mktemp("runs") / "slower"
    shutil.copytree(RUN, path)
    lines = []
    for line in (path / "cells.jsonl").read_text().splitlines():
        content = json.loads(line)
        for cell in content["cells"]:
            if cell["variant"] == "int8":
                for name in ("latency_s", "latency_low_s", "latency_high_s"):
                    cell[name] = cell[name] and cell[name] * 1.5
                for name in ("speedup", "speedup_low", "speedup_high"):
                    cell[name] = cell[name] and cell[name] / 1.5
            if (cell["plugin"], cell["seq"]) == ("naive", 512):
                cell |= {"status": "wrong", "latency_s": None, "reason": "planted"}
        lines.append(json.dumps(content))
    (path / "cells.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_the_command_finds_what_was_planted(slower: Path) -> None:
    done = attnbench("compare", RUN, slower, "--json", "--fail-over", "5%")
    told = json.loads(done.stdout)
    assert (done.returncode, len(told["cells"])) == (1, len(rows(RUN)))
    verdicts = {(cell["variant"], cell["seq"], cell["scope"]): cell["verdict"] for cell in told["cells"]}
    ratios = [cell["ratio"] for cell in told["cells"] if cell["variant"] == "int8" and cell["ratio"]]
    assert ratios == pytest.approx([1 / 1.5] * len(ratios))
    slow = [at for at, verdict in verdicts.items() if verdict == "slower"]
    assert len(slow) >= 3
    assert {plugin for plugin, _, _ in slow} == {"int8"}
    broken = [at for at, verdict in verdicts.items() if verdict == "broken"]
    assert {(plugin, seq) for plugin, seq, _ in broken} == {("naive", 512)}
    assert attnbench("compare", RUN, slower).returncode == 0


def test_a_run_is_not_worse_than_itself() -> None:
    done = attnbench("compare", RUN, RUN, "--fail-over", "1%")
    assert (done.returncode, done.stderr) == (0, "")
    assert not {"slower", "faster", "broken"} & set(done.stdout.split())


def test_markdown_is_a_table_that_a_pull_request_takes(slower: Path) -> None:
    lines = attnbench("compare", RUN, slower, "--markdown").stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [row for row in rows(RUN) if row["status"] == "ok"]
    assert len(table) == len(cells) + 2 * len({(row["seq"], row["scope"]) for row in cells})
    assert {line.count("|") for line in table} == {8}


def test_what_is_no_run_or_no_share_is_one_line(tmp_path: Path) -> None:
    for words in (("compare", RUN, tmp_path), ("compare", RUN, RUN, "--fail-over", "fast")):
        done = attnbench(*words)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
