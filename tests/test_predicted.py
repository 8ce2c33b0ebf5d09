"""Measured beside predicted: hand-made rows whose answers are known, and the tables that a report makes of them."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attnbench.analysis import growth, shares
from attnbench.analysis.memory import longest, saved
from attnbench.analysis.memory import workspace as workspace_of
from attnbench.records.schema import COLUMNS
from attnbench.report import prepare
from attnbench.report.style import Style
from attnbench.report.tables import predicted
from attnbench.report.tables.table import Table
from attnbench.stats import powers
from attnbench.stats.powers import BEFORE, BEYOND
from attnbench.theory import costs
from attnbench.workload import Workload

LENGTHS = (512, 1024, 2048, 4096)
D = 512  # d_m: 8 heads of 64
WEIGHTS = 12 * D**2 + 13 * D  # of a block: 4 d_m^2 of projections, 8 d_m^2 of the FFN, biases of 9 d_m, norms of 4 d_m
TOKEN = 4 * D  # bytes of one token's activation
BLOCK: dict[str, Any] = {"scope": "block", "block": "encoder", "norm": "pre"}


def row(plugin: str, seq: int, latency: float = 1.0, workspace: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A finished row whose tensors are those of theory; other columns by name."""
    sizes = {name: changes.pop(name) for name in list(changes) if name in Workload.__dataclass_fields__}
    w = Workload(**({"seq": seq, "kv_seq": seq} | sizes))
    inputs = costs.input_bytes(w) + costs.parameters(w) * w.itemsize
    outputs = costs.output_bytes(w)
    return (
        dict.fromkeys(COLUMNS)
        | w.as_dict()
        | {"run": "a-run", "plugin": plugin, "variant": plugin, "family": "exact", "status": "ok", "baseline": "sdpa"}
        | {"reason": "", "warnings": [], "implementation": "", "distribution": "", "converged": True}
        | {"latency_s": latency, "latency_low_s": 0.99 * latency, "latency_high_s": 1.01 * latency}
        | {"flops": costs.flops(w), "workspace_bytes": workspace, "predicted_workspace_bytes": workspace}
        | {"input_bytes": inputs, "output_bytes": outputs, "peak_bytes": inputs + outputs + workspace}
        | changes
    )


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=["run", *COLUMNS])


def only(table: pd.DataFrame, **which: Any) -> dict[str, Any]:
    for name, value in which.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return {str(name): value for name, value in table.iloc[0].to_dict().items()}


def naive_workspace(w: Workload) -> int:
    """Scores and probabilities, 4 bytes each, less the output, in whose place one of them goes."""
    return 4 * w.heads * (2 * w.seq**2 - w.seq * w.value_dim)


def blocks(crossing: int, **changes: Any) -> list[dict[str, Any]]:
    """Rows of attention alone and of blocks around it: attention takes as long as the FFN exactly at `crossing`.

    Everything else in the block takes time by its operations.
    """
    found = []
    for seq in LENGTHS:
        projections, ffn = 8 * seq * D**2, 16 * seq * D**2
        rest = projections + ffn
        attention = ffn * seq / crossing
        found.append(row("sdpa", seq, attention * 1e-10, workspace=2**20, **changes))
        found.append(row("sdpa", seq, (attention + rest) * 1e-10, workspace=2**20, **BLOCK, **changes))
    return found


def test_growth_finds_the_power_and_predicts_it_from_the_variants_own_operations() -> None:
    rows = [row("square", n, n**2.0 * 1e-9, workspace=8 * n * n) for n in LENGTHS]
    rows += [row("line", n, n * 1e-9, workspace=4096, variant_flops=1000 * n) for n in LENGTHS]
    table = growth.growth(frame(*rows))
    latency = only(table, plugin="square", quantity="latency")
    assert (latency["measured"], latency["predicted"]) == pytest.approx((2, 2))
    assert (latency["order"], latency["shortest"], latency["longest"]) == ("l^2", 512, 4096)
    assert only(table, plugin="square", quantity="workspace")["measured"] == pytest.approx(2)
    line = only(table, plugin="line", quantity="latency")
    assert (line["measured"], line["predicted"], line["order"]) == (pytest.approx(1), pytest.approx(1), "l")
    assert only(table, plugin="line", quantity="workspace")["predicted"] == pytest.approx(0)


def test_growth_is_predicted_over_the_lengths_that_were_measured() -> None:
    """Peak memory of a short block is mostly weights: at finite lengths no power of l is exact."""
    rows = [row("a", n, workspace=9 * n * TOKEN, **BLOCK) for n in LENGTHS]
    for r in rows:
        r["predicted_workspace_bytes"] = 0  # of attention alone
    rows[-1] |= {"status": "timeout", "latency_s": None, "peak_bytes": None, "workspace_bytes": None}
    memory = only(growth.growth(frame(*rows)), quantity="peak memory")
    assert memory["longest"] == 2048
    lengths = np.array([512, 1024, 2048])
    held = 4 * WEIGHTS + 11 * lengths * TOKEN  # input, output and nine more
    power = np.polyfit(np.log(lengths), np.log(held), 1)[0]
    assert 0.5 < power < 0.9
    assert (memory["measured"], memory["predicted"]) == pytest.approx((power, power))


def test_two_lengths_have_no_growth() -> None:
    rows = [row("a", n) for n in (512, 1024, 2048)]
    assert growth.growth(frame(*rows[:2])).empty
    assert not growth.growth(frame(*rows)).empty


@pytest.mark.parametrize(
    ("counts", "order"),
    [((1000, 4000), "l^2"), ((1000, 2010), "l"), ((5, 5), "constant"), ((1000, 2800), ""), ((1000, 8000), "")],
)
def test_the_order_is_named_where_operations_show_it(counts: tuple[int, int], order: str) -> None:
    lengths, all_counts = (256, 512, 1024), (5, *counts)  # the shortest does not count
    rows = [row("a", n, variant_flops=count) | {"length": n} for n, count in zip(lengths, all_counts, strict=True)]
    assert growth.order(rows) == order


def test_workspace_is_compared_where_it_was_predicted() -> None:
    rows = [
        row("a", n, workspace=w, predicted_workspace_bytes=100)
        for n, w in zip(LENGTHS, (50, 80, 100, 120), strict=True)
    ]
    rows += [row("b", n, predicted_workspace_bytes=None) for n in LENGTHS]
    found = only(workspace_of(frame(*rows)))
    assert (found["plugin"], found["cells"], found["ratio"], found["least"], found["most"]) == ("a", 4, 0.9, 0.5, 1.2)


def test_a_blocks_workspace_is_that_of_its_widest_moment() -> None:
    w = Workload(seq=512, kv_seq=512, **BLOCK)
    x = 512 * TOKEN
    # At ReLU: residual, norm and two of 4 d_m; less the output, which is not workspace.
    assert costs.block_workspace(w, attention=0) == (1 + 1 + 8 - 1) * x
    assert costs.block_workspace(w.replace(norm="post"), attention=0) == 8 * x
    # Stacked, the block's own input is no input of the call any more; further layers hold no more.
    assert costs.block_workspace(w.replace(layers=2), 0) == costs.block_workspace(w.replace(layers=8), 0) == 10 * x
    # Around scores: norm, query, key, value and attention's output, less the block's.
    assert costs.block_workspace(w, attention=100 * x) == (100 + 5 - 1) * x
    assert math.isnan(costs.block_workspace(w, math.nan))


def test_the_share_of_operations_stands_beside_that_of_time() -> None:
    """Operations a token are 4 l d_m for attention, 8 d_m^2 for projections and 16 d_m^2 for the FFN; d_m is 512."""
    table = shares.shares(frame(*blocks(crossing=2048)))
    assert only(table, length=512)["predicted"] == pytest.approx(4 / (4 + 8 + 16))
    assert only(table, length=2048)["predicted"] == pytest.approx(0.4)
    assert only(table, length=2048)["measured"] == pytest.approx(0.4)
    assert only(table, length=2048)["low"] == pytest.approx(0.4 * 0.99 / 1.01)


def test_the_share_of_a_variant_is_of_its_own_operations() -> None:
    own = 24 * 2048 * D**2 + 7_000_000  # projections and FFN, and what stands for attention
    rows = [row("linear", 2048), row("linear", 2048, 2.0, variant_flops=own, **BLOCK)]
    assert only(shares.shares(frame(*rows)))["predicted"] == pytest.approx(7_000_000 / own)


@pytest.mark.parametrize("crossing", [600, 1500, 3000])
def test_attention_outgrows_the_ffn_where_it_takes_as_long(crossing: int) -> None:
    found = only(growth.crossings(frame(*blocks(crossing))), what="attention over FFN")
    assert found["predicted"] == 4 * 512  # 4 l^2 d_m and 16 l d_m^2
    assert found["measured"] == pytest.approx(crossing, rel=1e-6)
    assert found["low"] < found["measured"] < found["high"]


@pytest.mark.parametrize(("crossing", "where"), [(100, BEFORE), (100_000, BEYOND)])
def test_a_crossing_outside_the_lengths_is_not_made_up(crossing: int, where: float) -> None:
    assert only(growth.crossings(frame(*blocks(crossing))), what="attention over FFN")["measured"] == where


def test_a_crossing_of_a_variant_that_grows_with_l_is_beyond() -> None:
    rows = []
    for n in LENGTHS:
        own = 24 * n * D**2 + 1000 * n
        rows += [row("linear", n), row("linear", n, 50.0, variant_flops=own, **BLOCK)]
    assert only(growth.crossings(frame(*rows)), plugin="linear")["predicted"] == BEYOND


def test_scores_outgrow_weights_and_activations_at_lengths_known_by_hand() -> None:
    rows = []
    for n in LENGTHS:
        held = naive_workspace(Workload(seq=n, kv_seq=n))
        rows += [row("naive", n, workspace=held), row("naive", n, 2.0, predicted_workspace_bytes=held, **BLOCK)]
    table = growth.crossings(frame(*rows))
    one = only(table, plugin="", what="scores over weights")
    assert one["predicted"] == math.ceil((WEIGHTS / 8) ** 0.5)  # 8 l^2
    moved = only(table, plugin="", what="scores over weights, input and output")
    assert moved["predicted"] == math.ceil((2 * D + (4 * D**2 + 32 * WEIGHTS) ** 0.5) / 16)  # 8 l^2 - 2 l d_m = weights
    kept = only(table, plugin="", what="scores over what a training step keeps")
    assert kept["predicted"] == pytest.approx(11 * 512 / 8, rel=0.01)  # 8 l^2 and 11 l d_m
    naive = only(table, plugin="naive", what="scores over weights")
    exactly = (512 + (512**2 + 4 * 16 * WEIGHTS) ** 0.5) / 32  # 16 l^2 - 512 l = weights
    assert naive["predicted"] == pytest.approx(exactly, rel=0.01)
    assert naive["measured"] == BEFORE  # at 512 it holds more already
    fused = [row("fused", n, workspace=4096, **shape) for n in LENGTHS for shape in ({}, BLOCK)]
    both = growth.crossings(frame(*rows, *fused))
    assert list(both["plugin"]).count("") == 3  # said once, whoever was measured
    assert set(both["plugin"]) == {"", "naive", "fused"}


def test_scores_crossing_is_measured_between_lengths() -> None:
    """With d_m = 2048 the weights are sixteen times as many: 8 heads of 256 cross at 1.8k, 16 l^2 - 2048 l = weights."""
    wide = {"head_dim": 256, "value_dim": 256}
    rows = []
    for n in LENGTHS:
        held = naive_workspace(Workload(seq=n, kv_seq=n, **wide))
        rows += [
            row("naive", n, workspace=held, **wide),
            row("naive", n, 2.0, predicted_workspace_bytes=held, **BLOCK, **wide),
        ]
    found = only(growth.crossings(frame(*rows)), plugin="naive", what="scores over weights")
    exactly = (2048 + (2048**2 + 4 * 16 * (12 * 2048**2 + 13 * 2048)) ** 0.5) / 32
    assert 1024 < exactly < 2048
    assert (found["measured"], found["predicted"]) == pytest.approx((exactly, exactly), rel=0.01)


@pytest.mark.parametrize(
    ("ratios", "at"),
    [
        ((0.25, 0.5, 1, 2), 2048),
        ((0.5, 2, 4, 8), 724),
        ((2, 2, 2, 2), BEFORE),
        ((0.1, 0.2, 0.3, 0.4), BEYOND),
        ((2, 0.5, 2, 4), 1448),  # the last time that it is below
        ((math.nan, 0.5, 2, 4), 1448),
    ],
)
def test_crossing(ratios: tuple[float, ...], at: float) -> None:
    assert powers.crossing(LENGTHS, ratios) == pytest.approx(at, rel=0.001)


@pytest.mark.parametrize("ratios", [(0.5, 0.6, math.nan, 2), (0.5, 0.6, 0.7, math.nan), (math.nan, 2, 2, 2)])
def test_a_crossing_is_unknown_where_what_decides_it_is(ratios: tuple[float, ...]) -> None:
    assert math.isnan(powers.crossing(LENGTHS, ratios))


def test_the_first_length() -> None:
    assert powers.first_length(lambda n: n * n >= 1_000_000) == 1000
    assert powers.first_length(lambda n: True, start=7) == 7
    assert powers.first_length(lambda n: False) == BEYOND


def test_the_longest_length_in_a_memory() -> None:
    """Tensors of 8192 bytes a token, and a workspace of 8 l^2: between lengths, beyond them and below them."""
    rows = [row("naive", n, workspace=8 * n * n) for n in LENGTHS]
    memories = {"small": 2**20, "inside": 8192 * 3000 + 8 * 3000**2, "large": 8192 * 50_000 + 8 * 50_000**2}
    table = longest(frame(*rows), memories)
    inside, large = only(table, memory="inside"), only(table, memory="large")
    assert (large["predicted"], large["measured"], large["extrapolated"]) == (
        50_000,
        pytest.approx(50_000, rel=1e-3),
        True,
    )
    assert inside["predicted"] == pytest.approx(3000, rel=1e-3)
    assert (inside["measured"], inside["extrapolated"]) == (pytest.approx(3000, rel=0.01), False)
    assert only(table, memory="small")["measured"] == BEFORE


def test_a_blocks_weights_do_not_bend_what_is_extrapolated() -> None:
    """Peak memory of short blocks grows as l^0.7; at a million tokens it is l."""
    rows = [row("fused", n, workspace=9 * n * TOKEN, **BLOCK) | {"predicted_workspace_bytes": 0} for n in LENGTHS]
    found = only(longest(frame(*rows), {"80 GB": 80 * 10**9}))
    assert found["predicted"] == (80 * 10**9 - 4 * WEIGHTS) // (11 * TOKEN) > 1_000_000
    assert found["measured"] == pytest.approx(found["predicted"], rel=1e-3)


def test_decoding_is_as_long_as_its_cache() -> None:
    rows = [row("sdpa", 1, kv_seq=n, phase="decode", mask="causal", workspace=1024) for n in LENGTHS]
    found = only(longest(frame(*rows), {"8 GiB": 2**33}))
    assert found["predicted"] == pytest.approx(2**33 / (2 * 4 * 8 * 64), rel=1e-3)


def test_a_ragged_batch_has_no_other_length() -> None:
    """Its entries' lengths are given one by one: nothing says what they would be in a longer batch."""
    for lengths, known in (("", True), ("512,300", False)):
        rows = [
            row("naive", n, batch=2, lengths=lengths, workspace=8 * n * n, **s) for n in LENGTHS for s in ({}, BLOCK)
        ]
        assert longest(frame(*rows), {"8 GiB": 2**33}).empty != known
        assert growth.crossings(frame(*rows)).empty != known


@pytest.mark.parametrize("plugin", ["sdpa", "naive"])
def test_saved_bytes_against_layers(plugin: str) -> None:
    """12 vectors a token and layer less the input (Rajbhandari 2020, section 3.2), two norms' statistics, and of each
    row of scores all of it, or where fused the logarithm of its sum."""
    rows, n = [], 512
    scores = 8 * n * (4 * n if plugin == "naive" else 4)
    for layers in (1, 2, 4, 8):
        w = Workload(seq=512, kv_seq=512, phase="train", layers=layers, **BLOCK)
        holds = naive_workspace(w) if plugin == "naive" else 4096
        measured = 1.05 * (layers * (12 * n * TOKEN + 4 * n * 4 + scores) - n * TOKEN)
        shape = BLOCK | {"layers": layers, "predicted_workspace_bytes": holds}
        rows += [
            row(plugin, 512, phase="train", saved_bytes=measured, **shape),
            row(plugin, 512, workspace=12345, **shape),
        ]
    table = saved(frame(*rows))
    assert list(table["layers"]) == [1, 2, 4, 8]
    assert list(table["ratio"]) == pytest.approx([1.05] * 4)
    assert set(table["inference"]) == {12345}
    flat = list(table["inference_predicted"])
    # ReLU's two of 4 d_m, residual and norm; naive's scores are 8 vectors a token, and 5 more are around them.
    assert flat[0] == (19 if plugin == "naive" else 9) * n * TOKEN
    assert flat[1] == flat[2] == flat[3] == flat[0] + n * TOKEN


def test_only_exact_attentions_activations_are_predicted() -> None:
    one = row("linear", 512, phase="train", saved_bytes=10**6, **BLOCK) | {"family": "kernel"}
    found = only(saved(frame(one)))
    assert found["measured"] == 10**6
    assert math.isnan(found["predicted"])
    assert math.isnan(found["inference"])


def told(rows: pd.DataFrame, memory: int | None = 2**34) -> list[Table]:
    prepared = prepare.prepared(rows)
    runs = [{"name": "a-run", "args": {"memory": memory}}]
    return predicted.tables(prepared, prepare.arrange(prepared, runs), runs, Style.of(prepared))


def test_a_report_has_the_tables_that_have_rows() -> None:
    train = [row("sdpa", n, phase="train", saved_bytes=2**24, **BLOCK) for n in LENGTHS]
    tables = told(frame(*blocks(1500), *train))
    titles = [table.title for table in tables]
    assert titles == ["Growth", "Workspace", "Attention's share of a block", "Where attention outgrows the rest of a block",
                      "The longest length that fits", "Kept for the backward pass"]  # fmt: skip
    for table in tables:
        assert table.text
        assert all(len(cells) == len(table.columns) for cells in table.rows)
        assert table.numeric <= set(table.columns)
        assert not any("nan" in cell or "inf" in cell for cells in table.rows for cell in cells)
    outgrows = next(cells for cells in tables[3].rows if cells[1] == "attention over FFN")
    assert outgrows[3] == "2.00k"
    assert outgrows[4] == "1.46k [1.42k, 1.52k]"
    assert tables[4].columns[2] == "16.0 GiB (the run's limit): predicted"


def test_a_run_that_measured_nothing_of_it_has_no_tables() -> None:
    failed = row("sdpa", 512) | {"status": "timeout", "latency_s": None}
    assert told(frame(failed), memory=None) == []
    assert told(frame()[:0], memory=None) == []


def test_stacks_do_not_share_a_fit() -> None:
    rows = [
        row("sdpa", n, n**power * 1e-9, layers=layers, **BLOCK) for layers, power in ((1, 1), (8, 2)) for n in LENGTHS
    ]
    table = growth.growth(frame(*rows))
    assert only(table, layers=1, quantity="latency")["measured"] == pytest.approx(1)
    assert only(table, layers=8, quantity="latency")["measured"] == pytest.approx(2)


def test_loads_no_torch() -> None:
    code = "import sys, attnbench.analysis.growth, attnbench.analysis.memory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
