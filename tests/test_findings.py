"""The first lines of a page, on made-up figures."""

from __future__ import annotations

from typing import Any

import pytest

from attnbench.records.run import as_frame
from attnbench.report.findings import findings
from attnbench.report.prepare import arrange, prepared
from attnbench.report.style import Style
from attnbench.workload import Workload


def row(
    plugin: str, seq: int, speedup: float, error: float | None = 1e-3, low: float | None = 0.0, **more: Any
) -> dict[str, Any]:
    """low: where the interval begins, 0 for 1% below the speedup, None for no interval."""
    low = 0.99 * speedup if low == 0 else low
    family = more.pop("family", "exact" if error is not None and error <= 1e-3 else "quantized")
    workload = Workload(
        seq=seq, kv_seq=seq, **{k: more.pop(k) for k in ("scope", "block", "norm", "mask") if k in more}
    )
    figures = {"latency_s": 1 / speedup, "speedup": speedup, "speedup_low": low, "speedup_high": low and 1.01 * speedup}
    cell = {"plugin": plugin, "variant": plugin, "family": family, "status": "ok", "reason": "", "baseline": "sdpa"}
    return cell | workload.as_dict() | figures | {"approximation_rel_l2": error} | more


def told(*rows: dict[str, Any]) -> list[str]:
    frame = prepared(as_frame(rows))
    return findings(arrange(frame, []), Style.of(frame))


BASE = [row("sdpa", seq, 1.0) for seq in (512, 8192)]


def test_each_line_is_a_finding_with_its_figures() -> None:
    fast = [row("tiled", 512, 4.36), row("tiled", 8192, 2.62)]
    close = [row("int8", 512, 4.7, 7e-3), row("int8", 8192, 3.29, 5.1e-3)]
    rough = [row("linear", 512, 6.1, 0.67), row("linear", 8192, 40.9, 0.45)]
    assert told(*BASE, *fast, *close, *rough) == [
        "Exact: tiled is 2.62x sdpa at 8k; 4.36x at 512.",
        "Within 1% of softmax attention: int8 is 3.29x sdpa at 8k for an error of 0.51%; 4.70x at 512.",
        "Whatever the error: linear is 40.9x sdpa at 8k for an error of 45%; 6.10x at 512.",
    ]


def test_what_is_no_gain_is_no_finding() -> None:
    slow = [row("naive", seq, 0.3) for seq in (512, 8192)]
    unsure = [row("int8", seq, 1.2, 5e-3, low=0.9) for seq in (512, 8192)]
    slower_than_exact = [row("linear", 8192, 1.1, 0.5), row("tiled", 8192, 2.0)]
    assert told(*BASE, *slow) == ["Exact: nothing is faster than sdpa for certain at 512 to 8k."]
    assert told(*BASE, *slow, *unsure) == ["Exact: nothing is faster than sdpa for certain at 512 to 8k."]
    assert told(*BASE, *slower_than_exact) == ["Exact: tiled is 2.00x sdpa at 8k."]
    assert told(*BASE, row("ssd", 8192, 5.0, None, family="recurrent")) == []  # it computes something else


def test_a_length_with_an_interval_counts_for_more_than_a_longer_one_without() -> None:
    rows = [row("tiled", 512, 3.0), row("tiled", 8192, 9.0, low=None)]
    assert told(*BASE, *rows) == ["Exact: tiled is 3.00x sdpa at 512."]
    assert told(*BASE, row("tiled", 8192, 9.0, low=None)) == ["Exact: tiled is 9.00x sdpa at 8k."]


@pytest.mark.parametrize("problems", [1, 2, 4, 9])
def test_there_are_five_at_most_and_the_first_of_each_problem_comes_before(problems: int) -> None:
    rows = []
    for seed in range(problems):
        for plugin, speedup, error in (
            ("sdpa", 1.0, 1e-3),
            ("tiled", 2.0, 1e-3),
            ("int8", 3.0, 5e-3),
            ("linear", 4.0, 0.5),
        ):
            rows.append(row(plugin, 512, speedup, error, low=0.0) | {"seed": seed})
    lines = told(*rows)
    assert len(lines) == min(5, 3 * problems)
    assert sum("xact: tiled" in line for line in lines) == min(5, problems)
