"""The roofline: bounds from hand-made ceilings, claims that can't be, how ceilings are measured and kept, the report."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_report import RUN, markdown_cells, read, rows

from attnbench.commands import main
from attnbench.devices import machine
from attnbench.devices.device import of
from attnbench.errors import AttnbenchError
from attnbench.records import ceilings
from attnbench.records.run import read_meta
from attnbench.report import page
from attnbench.report.figures.roofline import roofline as draw
from attnbench.report.page import write_report
from attnbench.report.prepare import arrange, prepared
from attnbench.report.style import Style
from attnbench.theory import costs, roofline
from attnbench.theory.roofline import Ceilings, impossible
from attnbench.workers import ask, calibration
from attnbench.workers.server import Forkserver
from attnbench.workload import Workload

SMALL = partial(calibration.measure, shapes=((1, 64, 64, 64), (2, 64, 32, 64)), read_bytes=1 << 20, seconds=0.005)


def make(cache: float | None = None, threads: int = 1, device: str = "cpu", **rates: float) -> Ceilings:
    """Ceilings of 10 GB/s and, unless given, of 100, 200 and 400 GFLOP/s."""
    known = rates or {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}
    return Ceilings(
        device,
        threads,
        known,
        1e10,
        None if cache is None else int(cache),
        at={"memory": "8 MiB"},
        measured="2025-01-01T00:00:00+00:00",
    )


# The bounds


@pytest.mark.parametrize(
    ("dtype", "quantized", "rates", "expected"),
    [
        ("float32", False, {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}, ("float32", 1e11)),
        ("float32", True, {"float32": 1e11, "int8": 4e11}, ("int8", 4e11)),
        ("float32", True, {"float32": 5e11, "int8": 4e11}, ("float32", 5e11)),
        ("float32", False, {"float32": 1e11, "bfloat16": 6e11}, ("float32 by three bfloat16 products", 2e11)),
        ("bfloat16", False, {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}, ("bfloat16", 2e11)),
        ("bfloat16", False, {"float32": 1e11, "bfloat16": 3e10}, ("float32", 1e11)),
        ("float16", False, {"float32": 1e11, "bfloat16": 2e11}, ("float32", 1e11)),
        ("bfloat16", False, {"int8": 4e11}, None),
    ],
)
def test_the_highest_rate_that_could_apply_holds(
    dtype: str, quantized: bool, rates: dict[str, float], expected: tuple[str, float] | None
) -> None:
    assert make(**rates).of(Workload(seq=64, kv_seq=64, dtype=dtype), quantized) == (
        expected and (expected[0], pytest.approx(expected[1]))
    )


def test_operations_bound_a_long_sequence() -> None:
    w = Workload(seq=1024, kv_seq=1024)
    over = roofline.roof(w, "exact", costs.flops(w), make(cache=1))
    assert over is not None
    assert over.bound == "compute"
    assert over.attainable_s == pytest.approx(2 * 8 * 1024**2 * 128 / 1e11)
    assert over.intensity == pytest.approx(costs.flops(w) / costs.min_bytes(w))
    half = roofline.roof(w, "sparse", costs.flops(w) / 2, make(cache=1))
    assert half is not None
    assert half.attainable_s == pytest.approx(over.attainable_s / 2)


DECODE = Workload(seq=1, kv_seq=4096, phase="decode", mask="causal")
READ = (2 * 8 + 2 * 8 * 4096) * 64 * 4  # query and output, and 4096 keys and values


PAST = 2 * 8 * 4095 * 64 * 4


@pytest.mark.parametrize(
    ("family", "state", "moved"),
    [
        ("exact", None, READ),
        ("exact", 1000.0, READ),  # whatever it keeps: all of the past counts
        ("quantized", PAST / 4, READ - PAST * 3 / 4),
        ("recurrent", 1000.0, READ - PAST + 1000),
    ],
)
def test_memory_bounds_a_decoding_step_that_no_cache_holds(family: str, state: float | None, moved: float) -> None:
    flops = costs.flops(DECODE)
    for cache, bound in ((moved / 2 - 1, "memory"), (moved / 2, "compute"), (None, "compute")):
        over = roofline.roof(DECODE, family, flops, make(cache, float32=1e15), state)
        assert over is not None
        assert over.bound == bound
        assert over.attainable_s == pytest.approx(moved / 1e10 if bound == "memory" else flops / 1e15)
        assert over.intensity == pytest.approx(flops / moved)


@pytest.mark.parametrize(("family", "state"), [("sparse", 1e6), ("recurrent", None), ("recurrent", math.nan)])
def test_of_an_unknown_past_nothing_is_said(family: str, state: float | None) -> None:
    assert roofline.roof(DECODE, family, 1.0, make(), state) is None
    assert roofline.roof(W, family, 1.0, make(), state) is not None


@pytest.mark.parametrize("other", [{"threads": 2}, {"device": "cuda"}, {"int8": 1e11}])
def test_ceilings_of_something_else_say_nothing(other: dict[str, Any]) -> None:
    w = Workload(seq=64, kv_seq=64)
    assert roofline.roof(w, "exact", 1.0, make(**other)) is None
    assert impossible(row(w, 1e-12), make(**other)) is None


def test_a_gpu_does_not_ask_for_threads() -> None:
    w = Workload(seq=64, kv_seq=64, device="cuda", threads=8)
    assert roofline.roof(w, "exact", 1.0, make(device="cuda")) is not None


# Claims


def row(w: Workload, latency_s: float | None, family: str = "exact", own: int | None = None) -> dict[str, Any]:
    """As a session makes it."""
    known = {"family": family, "flops": costs.flops(w), "variant_flops": own or costs.flops(w)}
    return w.as_dict() | known | {"latency_s": latency_s, "plugin": "x"}


W = Workload(seq=1024, kv_seq=1024)
LEAST = costs.flops(W) / 1e11  # seconds at float32's ceiling


@pytest.mark.parametrize(
    ("family", "dtype", "latency_s", "own", "is_impossible"),
    [
        ("exact", "float32", LEAST, None, False),
        ("exact", "float32", LEAST / 1.24, None, False),
        ("exact", "float32", LEAST / 1.26, None, True),
        ("exact", "float32", LEAST / 1.26, 1, True),  # whatever it says of itself
        ("exact", "bfloat16", LEAST / 2.4, None, False),
        ("exact", "bfloat16", LEAST / 2.6, None, True),
        ("quantized", "float32", LEAST / 4.9, None, False),
        ("quantized", "float32", LEAST / 5.1, None, True),
        ("sparse", "float32", LEAST / 100, costs.flops(W) // 50, False),
        ("sparse", "float32", LEAST / 100, costs.flops(W) // 10, True),
        ("sparse", "float32", LEAST / 100, None, False),  # it gave no count of its own
        ("kernel", "float32", LEAST / 6, costs.flops(W) + 1, True),
        ("exact", "float32", None, None, False),
        ("exact", "float32", 0.0, None, False),
        ("exact", "float32", math.nan, None, False),
    ],
)
def test_a_claim_above_the_ceiling_is_impossible(
    family: str, dtype: str, latency_s: float | None, own: int | None, is_impossible: bool
) -> None:
    found = impossible(row(W.replace(dtype=dtype), latency_s, family, own), make())
    assert bool(found) == is_impossible


def test_a_causal_claim_counts_what_the_mask_shows() -> None:
    causal = W.replace(mask="causal")
    assert impossible(row(causal, LEAST / 2), make()) is None
    assert impossible(row(causal, LEAST / 2.6), make())


def test_training_counts_three_passes() -> None:
    train = W.replace(phase="train")
    assert impossible(row(train, LEAST * 2.5), make()) is None
    assert impossible(row(train, LEAST * 2.3), make())


def test_a_decoding_step_of_a_state_is_not_held_to_a_count_over_all_keys() -> None:
    assert impossible(row(DECODE, 1e-9, "recurrent", 10**9), make()) is None


def test_the_reason_names_claim_and_ceiling() -> None:
    assert impossible(row(W, LEAST / 10), make()) == (
        "claims 1 TFLOP/s, this machine's ceiling for float32 is 0.1 (attnbench calibrate)"
    )


def test_without_a_calibration_nothing_is_judged() -> None:
    assert impossible(row(W, 1e-12), None) is None


# Ceilings on disk

FACTS = {"cpu": "Some CPU", "hardware_threads": 2, "memory_bytes": 2**33, "gpu": None, "libraries": {"torch": "2.13"}}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnbench"


def test_ceilings_come_back_as_they_went(cache: Path) -> None:
    path = ceilings.store(make(cache=2**25), FACTS)
    assert list(cache.iterdir()) == [path]
    assert ceilings.stored(FACTS, "cpu", 1) == make(cache=2**25)


@pytest.mark.parametrize(
    ("facts", "device", "threads"),
    [
        (FACTS, "cpu", 2),
        (FACTS, "cuda", 1),
        (FACTS | {"cpu": "Other CPU"}, "cpu", 1),
        (FACTS | {"libraries": {}}, "cpu", 1),
    ],
)
def test_another_machine_has_ceilings_of_its_own(cache: Path, facts: dict[str, Any], device: str, threads: int) -> None:
    ceilings.store(make(), FACTS)
    assert ceilings.stored(facts, device, threads) is None


def test_a_relative_cache_folder_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ceilings.stored_at(FACTS, "cpu", 1).parent == tmp_path / ".cache" / "attnbench"


GOOD = json.loads(json.dumps(make().as_dict()))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", "\x00", *(json.dumps(GOOD | change) for change in (
        {"operations_per_s": {"float32": 0}},
        {"operations_per_s": {"float32": "fast"}},
        {"operations_per_s": [1]},
        {"bytes_per_s": math.nan},
        {"bytes_per_s": None},
        {"threads": "two"},
        {"cache_bytes": "big"},
        {"cache_bytes": math.inf},
        {"at": 3},
    ))],
)  # fmt: skip
def test_a_broken_file_is_none(cache: Path, content: str) -> None:
    path = ceilings.store(make(), FACTS)
    path.write_text(content)
    assert ceilings.stored(FACTS, "cpu", 1) is None


def test_a_cache_that_cannot_be_written_is_one_line(cache: Path) -> None:
    cache.parent.mkdir()
    cache.touch()
    with pytest.raises(AttnbenchError, match="set XDG_CACHE_HOME"):
        ceilings.store(make(), FACTS)


def test_the_last_level_caches_are_added_up(tmp_path: Path) -> None:
    for cpu, index, level, shared, size in (
        (0, 0, 1, "0", "32K"), (0, 3, 3, "0-1", "32768K"), (1, 3, 3, "0-1", "32768K"), (2, 3, 3, "2-3", "16M"), (3, 3, 3, "2-3", ""),
    ):  # fmt: skip
        folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in (("level", level), ("shared_cpu_list", shared), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert machine.cache_bytes(tmp_path) == 48 << 20
    assert machine.cache_bytes(tmp_path / "nowhere") is None


# Measuring


def test_a_ceiling_is_no_lower_than_a_product_timed_by_hand() -> None:
    threads = torch.get_num_threads()
    found = calibration.measure("cpu", 1, shapes=((1, 256, 256, 256),), read_bytes=1 << 22, seconds=0.1)
    assert torch.get_num_threads() == threads
    assert {"float32", "bfloat16", "int8"} <= set(found.operations_per_s) <= set(found.at)
    assert (found.device, found.threads) == ("cpu", 1)
    assert found.bytes_per_s > 0
    assert Ceilings.from_dict(json.loads(json.dumps(found.as_dict()))) == found
    a = torch.randn(64, 64)
    timed, _ = of("cpu").timer(torch.mm, [a, a]).burst(1)
    assert 2 * 64**3 / timed.seconds <= found.operations_per_s["float32"]


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 2**29)
    with pytest.raises(AttnbenchError, match=r"needs 1\.0 GiB of free memory, there are 0\.5"):
        calibration.measure("cpu", 1, read_bytes=2**29)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(AttnbenchError, match="no CUDA device"):
        SMALL("cuda", 1)
    with Forkserver(1) as server, pytest.raises(AttnbenchError, match="no CUDA device"):
        ask.ask_ceilings(server, "cuda", 1)


@pytest.mark.gpu
def test_a_gpu_is_calibrated() -> None:
    found = calibration.measure("cuda", 1, shapes=((1, 256, 256, 256),), read_bytes=1 << 26, seconds=0.05)
    assert {"float32", "bfloat16", "float16", "int8"} == set(found.operations_per_s)
    assert found.disturbed == 0


def test_the_command_prints_and_keeps_and_a_run_takes_it_along(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(ask, "ask_ceilings", lambda _server, device, threads: SMALL(device, threads))
    monkeypatch.setattr(calibration, "_others", lambda: 0.0)
    result = CliRunner().invoke(
        main, ["calibrate", "--only", "ceilings", "--threads", "1", "--device", "cpu"], catch_exceptions=False
    )
    assert result.exit_code == 0
    (kept,) = cache.iterdir()
    for said in ("float32 products", "bfloat16 products", "int8 products", "reading memory", f"with 1 thread: {kept}"):
        assert said in result.stdout
    words = ["run", "--plugins", "sdpa", "--seq", "16", "--scope", "attention", "--budget", "1", "--threads", "1"]
    CliRunner().invoke(main, [*words, "--out", str(tmp_path / "results")])
    (folder,) = (tmp_path / "results").iterdir()
    assert read_meta(folder)["ceilings"] == json.loads(kept.read_text(), object_hook=_without_machine)


def _without_machine(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "machine"}


def test_a_disturbed_calibration_is_not_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    disturbed = Ceilings("cpu", 2, {"float32": 1e11}, 1e10, disturbed=0.3, at={"float32": "x", "memory": "y"})
    monkeypatch.setattr(ask, "ask_ceilings", lambda _server, device, threads: disturbed)
    result = CliRunner().invoke(
        main, ["calibrate", "--only", "ceilings", "--threads", "2", "--device", "cpu"], catch_exceptions=False
    )
    assert result.exit_code == 1
    assert "not kept: others used 0.6 of the 2 cores meanwhile" in result.stdout
    assert not cache.exists()


# The report

CALIBRATED = RUN | {"ceilings": make(threads=2, float32=1e12, int8=4e12).as_dict()}


def attention(**axes: Any) -> pd.DataFrame:
    frame = rows(scope="attention", **axes)
    sparse = frame["family"] == "sparse"
    flops = frame["batch"] * frame["heads"] * frame["seq"] * frame["kv_seq"] * 256
    return frame.assign(flops=flops, variant_flops=(flops / 4).where(sparse, flops))


def test_columns_tell_how_much_was_reached() -> None:
    frame = prepared(attention(seq=(1024,)), [CALIBRATED]).set_index("plugin")
    naive, int8 = frame.loc["naive"], frame.loc["int8"]
    sparse = frame.loc["block-sparse:pattern=window:window=256"]
    flops = 8 * 1024**2 * 256
    assert naive["attainable_s"] == pytest.approx(flops / 1e12)
    assert naive["roofline_fraction"] == pytest.approx(flops / 1e12 / 0.040)
    assert naive["achieved_flops_per_s"] == pytest.approx(flops / 0.040)
    assert int8["roofline_fraction"] == pytest.approx(flops / 4e12 / 0.008)
    assert sparse["roofline_fraction"] == pytest.approx(flops / 4 / 1e12 / 0.012)
    assert list(frame["ceiling"]) == ["float32", "float32", "float32", "int8"]
    assert set(frame["bound"]) == {"compute"}


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        RUN | {"ceilings": None},
        RUN | {"ceilings": {"float32": 1e12}},
        CALIBRATED | {"name": "another run"},
        RUN | {"ceilings": make(threads=4).as_dict()},
    ],
    ids=["none", "null", "broken", "another run's", "other threads"],
)
def test_without_ceilings_there_is_no_figure(run: dict[str, Any]) -> None:
    frame = prepared(attention(seq=(512, 1024)), [run])
    assert frame.get("roofline_fraction", pd.Series(dtype=float)).isna().all()
    assert draw(arrange(frame, [run]), Style.of(frame)) is None


def test_without_ceilings_a_report_has_neither_figure_nor_column(tmp_path: Path) -> None:
    index = write_report(attention(seq=(512,)), [RUN], tmp_path)
    assert not list((tmp_path / "figures").glob("roofline*"))
    assert "of attainable" not in read(index).text


def test_with_ceilings_there_are_both(tmp_path: Path) -> None:
    index = write_report(attention(seq=(512, 1024)), [CALIBRATED], tmp_path)
    assert {path.name for path in (tmp_path / "figures").glob("roofline*")} == {"roofline.png", "roofline.svg"}
    assert "of attainable" in read(index).text
    assert page.FIGURES["roofline"][0] in read(index).text
    table, _ = markdown_cells(tmp_path / "report.md")
    (naive,) = (line for line in table if line[:2] == ["1k", "naive"] and len(line) > 8)
    assert "5.37%" in naive


def test_of_two_runs_each_has_its_own() -> None:
    both = pd.concat([attention(seq=(512,)), attention(seq=(512,)).assign(run="two")])
    frame = prepared(both, [CALIBRATED, RUN | {"name": "two"}])
    known = frame["roofline_fraction"].notna()
    assert known.equals(frame["run"] != "two")


def test_the_figure_shows_each_cell_under_its_roof() -> None:
    frame = prepared(attention(), [CALIBRATED])
    figure = draw(arrange(frame, [CALIBRATED]), Style.of(frame))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines() if line.get_marker() != "None"}
    assert points == set(zip(frame["intensity"], frame["achieved_flops_per_s"], strict=True))
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in points)
    names = {text.get_text() for text in ax.texts if text.get_gid() == "end of a line"}
    roofs = {"float32: 1 TFLOP/s", "int8: 4 TFLOP/s", "memory:\n9.31 GiB/s"}
    assert {text.get_text() for text in ax.texts} == roofs | names
    assert names == {"block-sparse", "int8", "naive", "sdpa"}
