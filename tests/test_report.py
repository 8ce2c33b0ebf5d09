"""The report: what it says of given rows, that its figures show them, and that names are data."""

from __future__ import annotations

import itertools
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import rgb_to_hsv, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from attnbench.analysis.frames import as_rows
from attnbench.records.schema import COLUMNS
from attnbench.report import drawing, labels, numbers, page, units
from attnbench.report.figures import block, deviation, inputs, latency, memory, overview, speedup, tradeoff, winners
from attnbench.report.page import write_report
from attnbench.report.prepare import Panel, arrange, prepared
from attnbench.report.repeat import repeat_command
from attnbench.report.style import SHADES, Style, display_names, shade
from attnbench.report.tables import inputs as tables
from attnbench.sizes import Sweep
from attnbench.sweep.settings import Asked, Given
from attnbench.workload import Workload

# plugin: family, seconds a call at 1024, exponent, implementation and approximation error
VARIANTS = {
    "naive": ("exact", 0.040, 2.0, 3e-7, 3e-7),
    "sdpa:backend=auto": ("exact", 0.015, 2.0, 2e-7, 2e-7),
    "block-sparse:pattern=window:window=256": ("sparse", 0.012, 1.0, 3e-7, 0.5),
    "int8": ("quantized", 0.008, 2.0, 4e-5, 9e-3),
}
BASELINE = "sdpa:backend=auto"
RUN: dict[str, Any] = {
    "schema": 1,
    "name": "2025-01-01-cpu",
    "command": ["attnbench", "run", "--plugins", "all", "--seq", "512..2048"],
    "started": "2025-01-01T10:00:00+00:00",
    "finished": "2025-01-01T10:05:00+00:00",
    "machine": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 2**33, "gpu": None, "libraries": {"torch": "2.13.0"}},
    "seconds": {"wall": 200.0, "calls": 140.0, "compilation": 20.0, "elsewhere": 40.0},
    "distributions": {"attnbench": "0.1.0"},
}


def rows(*names: str, run: str = "2025-01-01-cpu", noise: float = 0.01, **axes: Any) -> pd.DataFrame:
    """A frame as `records.load` gives it: every variant at every workload, all of them fine."""
    sweep = Sweep(**({"seq": (512, 1024, 2048), "threads": 2, "mask": ("full",)} | axes))
    table = []
    for workload in sweep.workloads():
        for plugin in names or tuple(VARIANTS):
            family, unit, power, wrong, far = VARIANTS[plugin]
            latency = unit * workload.batch * (workload.kv_seq / 1024) ** power
            base = VARIANTS[BASELINE][1] * workload.batch * (workload.kv_seq / 1024) ** 2
            speedup = {f"speedup{end}": base / latency * by for end, by in _ends(noise)} if plugin != BASELINE else {}
            table.append(
                dict.fromkeys(COLUMNS)
                | workload.as_dict()
                | {f"latency{end}_s": latency * by for end, by in _ends(noise)}
                | {"speedup": 1.0, "speedup_low": 1.0, "speedup_high": 1.0}
                | speedup
                | {
                    "run": run,
                    "plugin": plugin,
                    "variant": plugin.split(":")[0],
                    "family": family,
                    "implementation": "plain torch",
                    "distribution": "attnbench 0.1.0",
                    "baseline": BASELINE,
                    "status": "ok",
                    "reason": "",
                    "rounds": 20,
                    "converged": True,
                    "peak_bytes": 2**20 * workload.kv_seq // 512,
                    "workspace_bytes": 2**19 * workload.kv_seq // 512,
                    "input_bytes": 2**18 * workload.kv_seq // 512,
                    "output_bytes": 2**17 * workload.kv_seq // 512,
                    "flops_per_s": 1e11,
                    "implementation_rel_l2": wrong,
                    "approximation_rel_l2": far,
                    "tolerance": 2e-5 if family in ("exact", "sparse") else 1e-3,
                    "warnings": [],
                }
            )
    return pd.DataFrame(table, columns=["run", *COLUMNS])


def _ends(noise: float) -> tuple[tuple[str, float], ...]:
    return (("", 1.0), ("_low", 1 - noise), ("_high", 1 + noise))


def fail(frame: pd.DataFrame, which: pd.Series, status: str, reason: str) -> pd.DataFrame:
    """The frame with some cells without a number."""
    numbers = [c for c in frame if c.startswith(("latency", "speedup", "peak", "approximation", "implementation_"))]
    frame = frame.copy()
    frame.loc[which, numbers] = math.nan
    frame.loc[which, ["status", "reason"]] = [status, reason]
    return frame


class Page(HTMLParser):
    """What a browser would see: elements, texts of table cells and of headings, and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "td":
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.cells[-1] += data


def read(path: Path) -> Page:
    return Page(path.read_text())


def markdown_cells(path: Path) -> tuple[list[list[str]], set[str]]:
    """The tables' rows as a reader sees them, and the kinds of everything on the page."""
    kinds, table = set(), []
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        kinds.add(token.type)
        kinds |= {child.type for child in token.children or []}
        if token.type == "tr_open":
            table.append([])
        if token.type == "inline" and table and token.level > 3:
            table[-1].append("".join(child.content for child in token.children or []))
    return table, kinds


# Units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.seconds(0.00342), "3.42 ms"),
        (units.seconds(0.00342, 0.0034, 0.00345), "3.42 ms [3.40, 3.45]"),
        (units.seconds(0.9999), "1.00 s"),
        (units.seconds(125.0), "125 s"),
        (units.seconds(2.5e-10), "0.250 ns"),
        (units.seconds(0), "0 s"),
        (units.seconds(math.nan), "-"),
        (units.seconds(None), "-"),
        (units.seconds(0.001, math.nan, 2.0), "1.00 ms"),
        (units.size(0), "0 B"),
        (units.size(1023), "1023 B"),
        (units.size(170 * 2**20), "170 MiB"),
        (units.size(1.5 * 2**30), "1.50 GiB"),
        (units.ratio(2.31, 2.25, 2.38), "2.31x [2.25, 2.38]"),
        (units.ratio(1.0), "1x"),
        (units.ratio(1.0, 0.98, 1.02), "1.00x [0.98, 1.02]"),
        # An interval that leaves out 1 must not be rounded onto it.
        (units.ratio(1.004, 1.001, 1.007), "1.004x [1.001, 1.007]"),
        (units.ratio(0.0123, 0.0121, 0.0125), "0.0123x [0.0121, 0.0125]"),
        (units.error(3.14e-7), "3.1e-7"),
        (units.error(8.8e-3), "0.0088"),
        (units.error(0.93), "0.93"),
        (units.error(0), "0"),
        (units.error(math.inf), "-"),
        (units.percent(0.125), "12.5%"),
        (units.rate(1.84e11), "184 GFLOP/s"),
        (units.length(512), "512"),
        (units.length(1000), "1000"),
        (units.length(1024), "1k"),
        (units.length(1536), "1.5k"),
        (units.length(131072), "128k"),
        (units.lengths([512.0, 4096.0]), "512 to 4k"),
        (units.lengths([512.0]), "512"),
        (units.energy(0.0032), "3.20 mJ"),
        (units.frequency(1.755e9), "1755 MHz"),
        (units.power(412.3), "412 W"),
        (units.temperature(41.0), "41 °C"),
        (units.power(math.nan), "-"),
        (units.count(1, "query", "queries"), "1 query"),
        (units.count(2, "query", "queries"), "2 queries"),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected


def test_two_machines_stand_side_by_side(tmp_path: Path) -> None:
    short = {"scope": "attention", "seq": (512,)}
    frames = [rows("sdpa:backend=auto", "int8", run=name, **short) for name in ("one", "other")]
    runs = [RUN | {"name": name, "standard": 1} for name in ("one", "other")]
    runs[1]["machine"] = RUN["machine"] | {"cpu": "Another CPU"}
    frame = pd.concat(frames, ignore_index=True)
    write_report(frame, runs, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Machines side by side" in text
    assert "| scope | mask | length | variant | one: Some CPU, 2 cores | other: Another CPU, 2 cores |" in text
    assert text.count("| attention | full | 512 | int8 |") == 1
    write_report(frame, [runs[0], RUN | {"name": "other"}], tmp_path)
    assert "side by side" not in (tmp_path / "report.md").read_text()


# The command that repeats a row

WORKLOADS = [
    Workload(seq=4096, kv_seq=4096, threads=2),
    Workload(seq=1, kv_seq=4096, batch=4, threads=2),
    Workload(seq=512, kv_seq=1024, mask="causal", inputs="outlier", seed=7),
    Workload(seq=512, kv_seq=512, heads=32, kv_heads=8, head_dim=128, value_dim=64, dtype="bfloat16", device="cuda"),
    Workload(seq=512, kv_seq=512, scope="block", block="encoder", norm="pre"),
    Workload(seq=512, kv_seq=512, scope="block", block="encoder", norm="post", mask="causal"),
    Workload(seq=512, kv_seq=512, scope="block", block="decoder-only", norm="pre", mask="causal"),
    Workload(seq=512, kv_seq=1024, scope="block", block="decoder", norm="post", mask="causal"),
    Workload(seq=512, kv_seq=256, scope="block", block="decoder", norm="pre", mask="causal", heads=4, kv_heads=4),
    Workload(seq=1, kv_seq=512, phase="decode", mask="causal"),
    Workload(seq=4, kv_seq=4, phase="decode", mask="full"),
    Workload(
        seq=1, kv_seq=512, phase="decode", mask="causal", scope="block", block="decoder-only", norm="pre", layers=4
    ),
    Workload(seq=1, kv_seq=512, phase="decode", mask="causal", scope="block", block="decoder", norm="pre"),
    Workload(seq=512, kv_seq=512, phase="train", scope="block", block="encoder", norm="pre", layers=2),
    Workload(seq=512, kv_seq=512, scope="block", block="decoder-only", norm="pre", mask="causal", style="llama"),
    Workload(seq=512, kv_seq=512, heads=9, kv_heads=3, mask="causal", inputs="smollm2:3"),
    Workload(seq=512, kv_seq=512, heads=12, kv_heads=12, head_dim=32, value_dim=32, mask="causal", inputs="minilm:0"),
    Workload(seq=512, kv_seq=512, mask="window:64", softmax_scale=0.1, softcap=50.0),
    Workload(seq=512, kv_seq=512, mask="causal", bias="relative", seed=3),
    Workload(seq=512, kv_seq=512, mask="window:64", scope="block", block="decoder-only", norm="pre"),
    Workload(seq=512, kv_seq=512, mask="window:64", scope="block", block="encoder", norm="pre"),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=Workload.label)
def test_the_command_measures_the_row_again(workload: Workload) -> None:
    from attnbench.commands import find

    words = shlex.split(repeat_command(workload.as_dict() | {"plugin": "int8", "baseline": "sdpa"}))
    assert words[:2] == ["attnbench", "run"]
    given = find("run").make_context("run", words[2:]).params
    assert given["plugins"].split(",") == ["int8", "sdpa"]
    asked = Asked.of(**{name: value for name, value in given.items() if name in Given.__annotations__})
    assert asked.sweep.workloads() == [workload]


@pytest.mark.parametrize(
    ("plugin", "baseline", "expected"),
    [
        ("int8", "sdpa", ["--plugins", "int8,sdpa"]),
        ("sdpa", "sdpa", ["--plugins", "sdpa"]),
        ("int8", "naive", ["--plugins", "int8,naive", "--baseline", "naive"]),
        ("int8", math.nan, ["--plugins", "int8"]),
        ("int8", None, ["--plugins", "int8"]),
        ("int8", "", ["--plugins", "int8"]),
        ("$(rm -r x); 'q'\"\n", "sdpa", ["--plugins", "$(rm -r x); 'q'\"\n,sdpa"]),
    ],
)
def test_the_command_names_the_baseline_and_quotes(plugin: str, baseline: Any, expected: list[str]) -> None:
    words = shlex.split(repeat_command(WORKLOADS[0].as_dict() | {"plugin": plugin, "baseline": baseline}))
    named = [i for i, word in enumerate(words) if word in ("--plugins", "--baseline")]
    assert [word for i in named for word in words[i : i + 2]] == expected


# Panels


@pytest.mark.parametrize(
    ("axes", "titles"),
    [
        ({"scope": "attention"}, [""]),
        ({}, ["attention alone", "encoder block (pre-norm)"]),
        ({"scope": "attention", "mask": ("full", "causal")}, ["full mask", "causal mask"]),
        (
            {"scope": "attention", "dtype": ("float32", "bfloat16"), "batch": (1, 4)},
            ["float32, batch 1", "float32, batch 4", "bfloat16, batch 1", "bfloat16, batch 4"],
        ),
        ({"scope": "attention", "heads": (8, 32), "kv_heads": (8,)}, ["8 heads", "32 heads on 8 kv heads"]),
        ({"scope": "attention", "head_dim": (64,), "value_dim": (64, 32)}, None),
        ({"scope": "attention", "seq": (1,), "kv_seq": (512, 1024, 2048)}, [""]),
        ({"scope": "attention", "seq": (1, 16), "kv_seq": (512, 1024)}, ["1 query", "16 queries"]),
        ({"scope": "attention", "seq": (512, 1024), "kv_seq": (4096,)}, [""]),
    ],
)
def test_every_dimension_that_varies_gets_its_panel(axes: dict[str, Any], titles: list[str] | None) -> None:
    panels = arrange(rows("naive", **axes), [RUN])
    if titles is None:  # the smaller first
        titles = ["head dim 64, value dim 32", "head dim 64"]
    assert [panel.title for panel in panels] == titles
    for panel in panels:
        assert not panel.frame["length"].duplicated().any()


@pytest.mark.parametrize(
    ("axes", "axis", "lengths"),
    [
        ({"seq": (512, 1024)}, "length", [512, 1024]),
        ({"seq": (1,), "kv_seq": (512, 1024)}, "key length", [512, 1024]),
        ({"seq": (512, 1024), "kv_seq": (4096,)}, "length", [512, 1024]),
    ],
)
def test_the_axis_is_what_grows(axes: dict[str, Any], axis: str, lengths: list[int]) -> None:
    (panel,) = arrange(rows("naive", scope="attention", **axes), [RUN])
    assert (panel.axis, list(panel.frame["length"])) == (axis, lengths)


def test_a_batch_that_shrinks_as_the_length_grows_is_one_problem() -> None:
    parts = [rows("naive", scope="attention", seq=(n,), batch=(4096 // n,)) for n in (512, 1024, 2048)]
    (panel,) = arrange(pd.concat(parts, ignore_index=True), [RUN])
    assert "batch x length = 4k" in panel.shared


@pytest.mark.parametrize(
    ("second", "cpu", "panels"),
    [
        ({"seq": (4096, 8192)}, "Some CPU", 1),  # the runs complete each other
        ({"seq": (4096, 8192)}, "Other CPU", 2),
        ({"seq": (2048, 4096)}, "Some CPU", 2),  # 2048 twice
    ],
)
def test_runs_are_kept_apart_where_they_compete(second: dict[str, Any], cpu: str, panels: int) -> None:
    runs = [RUN, RUN | {"name": "two", "machine": RUN["machine"] | {"cpu": cpu}}]
    both = pd.concat([rows("naive", scope="attention"), rows("naive", scope="attention", run="two", **second)])
    found = arrange(both.reset_index(drop=True), runs)
    assert len(found) == panels
    assert all(panel.title.startswith("run ") for panel in found) == (panels == 2)


# Names, colours and markers


def named(*plugins: str) -> dict[str, str]:
    return display_names(pd.DataFrame({"plugin": plugins, "variant": [p.split(":")[0] for p in plugins]}))


@pytest.mark.parametrize(
    ("plugins", "names"),
    [
        (["sdpa:backend=auto"], ["sdpa"]),
        (["sdpa:backend=auto", "sdpa:backend=math"], ["sdpa auto", "sdpa math"]),
        (
            ["bs:pattern=window:window=256:block=128", "bs:pattern=window:window=512:block=128"],
            ["bs window=256", "bs window=512"],
        ),
        (["a:x=true", "a:x=false"], ["a x=false", "a x=true"]),
        (["a\n\tb"], ["a??b"]),
        ([""], ["(no name)"]),
    ],
)
def test_names_are_as_short_as_they_may_be(plugins: list[str], names: list[str]) -> None:
    assert list(named(*plugins).values()) == names


def test_long_names_are_cut_and_stay_apart() -> None:
    names = named("x" * 90 + "y" * 90, "x" * 91 + "y" * 90, "x" * 90 + "z" * 90).values()
    assert len(set(names)) == 3
    assert all(len(name) <= 40 for name in names)


def test_no_two_of_ninety_plugins_look_the_same() -> None:
    plugins = [f"plugin-{i}" for i in range(90)]
    style = Style.of(pd.DataFrame({"plugin": plugins, "variant": plugins}))
    assert len({(style.colours[p], style.markers[p]) for p in plugins}) == 90


# Figures


def recorded() -> pd.DataFrame:
    """Two scopes, a variant that ends early, a wrong one, and a cell that did not converge."""
    frame = rows(seq=(512, 1024, 2048, 4096))
    frame = fail(frame, (frame["plugin"] == "naive") & (frame["seq"] == 4096), "skipped", "17 GiB are over 12 GiB")
    wrong = (frame["plugin"] == "int8") & (frame["seq"] == 512) & (frame["scope"] == "attention")
    frame = fail(frame, wrong, "wrong", "implementation error 0.03")
    frame.loc[wrong, "implementation_rel_l2"] = 0.03
    frame.loc[(frame["plugin"] == "int8") & (frame["seq"] == 1024), "converged"] = False
    return frame


def everything() -> pd.DataFrame:
    return prepared(recorded())


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    frame = everything()
    panels, style = arrange(frame, [RUN]), Style.of(frame)
    made = {
        "latency": latency.latency(panels, style),
        "memory": memory.memory(panels, style),
        "speedup": speedup.speedup(panels, style),
        "errors": deviation.deviation(panels, style),
        "trade": tradeoff.tradeoff(panels[0], style),
        "share": block.attention_share(panels, style),
        "amdahl": block.amdahl(panels, style),
        "overview": overview.overview(panels[0], style, "Some CPU"),
    }
    found = {name: figure for name, figure in made.items() if figure}
    assert found.keys() == made.keys()
    return found


NAMES = ("latency", "memory", "speedup", "errors", "trade", "share", "amdahl", "overview")


@pytest.mark.parametrize(
    ("figure", "column", "scale"),
    [
        ("latency", "latency_s", 1),
        ("memory", "peak_bytes", 1),
        ("speedup", "speedup", 1),
        ("share", "share", 100),
        ("amdahl", "amdahl", 1),
    ],
)
def test_lines_are_the_rows(drawn: dict[str, Figure], figure: str, column: str, scale: float) -> None:
    frame = everything()
    style = Style.of(frame)
    shown = [panel for panel in arrange(frame, [RUN]) if panel.frame[column].notna().any()]
    for ax, panel in zip(drawn[figure].axes, shown, strict=True):
        for plugin in style.plugins:
            part = panel.frame[(panel.frame["plugin"] == plugin) & panel.frame[column].notna()]
            if figure == "amdahl" and part.empty:  # the baseline gains nothing over itself
                continue
            expected = np.column_stack([part["length"], scale * part[column]])
            lines = [line for line in ax.get_lines() if to_hex(line.get_color()) == style.colours[plugin]]
            paths = [line.get_xydata() for line in lines]
            assert any(np.shape(p) == expected.shape and np.allclose(p, expected) for p in paths), plugin


@pytest.mark.parametrize("name", NAMES)
def test_a_line_is_named_at_its_end_in_its_colour(drawn: dict[str, Figure], name: str) -> None:
    style = Style.of(everything())
    for ax in drawn[name].axes:
        named = [text for text in ax.texts if text.get_gid() == "end of a line"]
        for text in named:
            (plugin,) = (p for p in style.plugins if text.get_text().split()[0] == style.figure_name(p))
            assert to_hex(text.get_color()) == to_hex(labels.ink(style.colours[plugin]))
            lines = [line for line in ax.get_lines() if to_hex(line.get_color()) == style.colours[plugin]]
            assert any(text.xy in [tuple(point) for point in line.get_xydata()] for line in lines)
        if name in ("latency", "memory", "speedup"):
            assert len(named) == 4


def test_a_family_has_a_colour_and_its_members_have_shades_of_it() -> None:
    plugins = {"a": "exact", "b": "exact", "c": "sparse", "d": "sparse", "e": "unheard-of"}
    style = Style.of(
        pd.DataFrame({"plugin": list(plugins), "variant": list(plugins), "family": list(plugins.values())})
    )
    assert len(set(style.colours.values())) == 5
    hue = {p: rgb_to_hsv(to_rgb(style.colours[p]))[0] for p in plugins}
    assert abs(hue["a"] - hue["b"]) < 0.03
    assert abs(hue["c"] - hue["d"]) < 0.03
    assert abs(hue["a"] - hue["c"]) > 0.2


# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0: what is seen without one kind of cone, in linear RGB.
SEEN = {
    "by most": np.eye(3),
    "without L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "without M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "without S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("who", SEEN)
def test_families_stay_apart_with_each_kind_of_colour_blindness(who: str) -> None:
    """By CIE76: a difference of 2 to 3 is just seen, one of 20 is another colour."""

    def lab(colour: str) -> np.ndarray:
        c = np.array(to_rgb(colour))
        linear = np.clip(SEEN[who] @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
        to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
        xyz = to_xyz @ linear / [0.9505, 1, 1.0888]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    seen = [lab(shade(family)) for family in SHADES if family]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_letters_can_be_read_on_white() -> None:
    assert labels.ink("#14265a") == to_rgb("#14265a")
    red, green, blue = (round(255 * c) for c in labels.ink("#e87722"))
    assert (red, green, blue) < (0xE8, 0x77, 0x22)


def test_what_is_emulated_is_dashed_and_said() -> None:
    frame = rows(scope="attention")
    frame["emulated"] = frame["plugin"] == "int8"
    style = Style.of(frame)
    figure = latency.latency(arrange(prepared(frame), [RUN]), style)
    assert figure is not None
    dashed = {to_hex(line.get_color()) for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"}
    assert dashed == {style.colours["int8"]}
    assert "dashed: emulated, its time is not the variant's own" in [t.get_text() for t in figure.legends[0].texts]
    (grid,) = numbers.grids(frame, [RUN])
    assert [head for head in grid.heads if "(emulated)" in head] == ["int8 (emulated)"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps(drawn: dict[str, Figure], name: str) -> None:
    figure = drawn[name]
    FigureCanvasAgg(figure).draw()
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    plots = [ax.get_window_extent() for ax in figure.axes]
    for legend in legends:
        box = legend.get_window_extent()
        assert not any(_area(box, plot) for plot in plots), "a legend over the data"
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, "a legend cut off"
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            ticks = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            assert len(ticks) >= 2
            assert not any(_area(a, b) for a, b in itertools.combinations(ticks, 2)), "tick labels overlap"
    for ax in figure.axes:
        texts = [Text.get_window_extent(text) for text in ax.texts]  # without the line to its point
        assert not any(_area(a, b) for a, b in itertools.combinations(texts, 2)), "names in the plot overlap"
    outside = [ax.get_tightbbox() for ax in figure.axes]
    assert not any(_area(a, b) for a, b in itertools.combinations(outside, 2)), "one panel's labels over another"


def _area(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return float(both.width * both.height) if both else 0.0


def test_lengths_are_the_ticks(drawn: dict[str, Figure]) -> None:
    labels = [label.get_text() for label in drawn["latency"].axes[0].xaxis.get_ticklabels()]
    assert labels == ["512", "1k", "2k", "4k"]


def test_many_lengths_do_not_crowd_the_axis() -> None:
    frame = prepared(rows("naive", BASELINE, scope="attention", seq=tuple(range(512, 16385, 512))))
    figure = latency.latency(arrange(frame, [RUN]), Style.of(frame))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    ticks = [label.get_window_extent() for label in figure.axes[0].xaxis.get_ticklabels()]
    assert len(ticks) >= 5
    assert not any(_area(a, b) for a, b in itertools.combinations(ticks, 2))


def test_a_name_tells_the_exponent(drawn: dict[str, Figure]) -> None:
    texts = [text.get_text() for text in drawn["latency"].axes[0].texts]
    assert [text for text in texts if text.startswith("sdpa")] == ["sdpa $l^{\\,2.00}$"]


def test_a_cell_without_a_number_is_told_below_the_axes_and_is_no_mark_inside(drawn: dict[str, Figure]) -> None:
    axes = drawn["latency"].axes
    below = [[text.get_text() for text in ax.texts if text.get_gid() == "no number"] for ax in axes]
    assert below[0] == ["no number: int8 512 (wrong), naive 4k (skipped)"]
    assert below[1] == ["no number: naive 4k (skipped: 17 GiB are over 12 GiB)"]
    assert not [
        line for figure in drawn.values() for ax in figure.axes for line in ax.get_lines() if line.get_marker() == "x"
    ]


def test_the_line_below_is_one_line_whatever_has_no_number() -> None:
    frame = rows(scope="attention", seq=(512,))
    frame = pd.concat(
        [frame.assign(plugin=f"variant-{i}", variant=f"variant-{i}") for i in range(20)], ignore_index=True
    )
    frame = prepared(fail(frame, frame["family"] == "int8", "error", "x"))
    frame.loc[:, "status"] = "error"
    (panel,) = arrange(frame, [RUN])
    told = labels.missing(panel, Style.of(frame), 70)
    assert len(told) <= 70 + len(" and 19 more (see the tables)")
    assert told.endswith("more (see the tables)")


def test_the_fastest_is_named_over_each_length() -> None:
    frame = prepared(rows(scope="attention"))
    frame.loc[(frame["plugin"] == "int8") & (frame["seq"] == 512), "latency_s"] = 1e-4
    frame = frame.assign(speedup=math.nan, speedup_low=math.nan, speedup_high=math.nan)
    frame = frame.assign(latency_low_s=frame["latency_s"], latency_high_s=frame["latency_s"])
    (panel,) = arrange(frame, [RUN])
    found = list(winners.spans(panel.frame, (400.0, 2600.0)))
    assert [(span.plugin.split(":")[0], span.told) for span in found] == [("int8", True), ("block-sparse", True)]
    assert (found[0].left, found[1].right) == (400.0, 2600.0)
    assert found[0].right == found[1].left == pytest.approx(math.sqrt(1024 * 2048))


def test_every_point_is_named_and_the_front_is_bold(drawn: dict[str, Figure]) -> None:
    texts = drawn["trade"].axes[2].texts
    assert {text.get_text() for text in texts} == {"sdpa", "int8", "block-sparse", "naive"}
    # naive is as exact as sdpa, and slower
    assert {text.get_text() for text in texts if text.get_fontweight() == "bold"} == {"sdpa", "int8", "block-sparse"}


def front(*ratios: float) -> pd.DataFrame:
    """Rows of one workload: each variant a tenth of a decade further off, and faster by its ratio."""
    frame = prepared(rows("naive", scope="attention", seq=(512,)))
    table = pd.concat([frame] * len(ratios), ignore_index=True)
    names = [f"variant-{i}-of-a-front" for i in range(len(ratios))]
    errors = [10 ** (-2 + 0.1 * i) for i in range(len(ratios))]
    return table.assign(plugin=names, variant=names, family="kernel", approximation_rel_l2=errors,
                        speedup=np.cumprod(ratios), baseline="other", length=512)  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "named"),
    [
        ((1.0,), 1),
        ((1.0, 1.1), 2),
        ((1.0, *[1.1] * 4), 5),
        ((1.0, 2.0, 2.0, 2.0), 4),
        ((1.0, *[1.02] * 5), 6),
        ((1.0, 0.2, 0.5), 3),  # the best of all stands in the corner
        ((1.0, 8.0, 8.0, 0.01), 4),
    ],
)
def test_a_name_covers_no_point_and_no_other_name_and_stays_inside(ratios: tuple[float, ...], named: int) -> None:
    frame = front(*ratios)
    figure = tradeoff.tradeoff(Panel("", "", "length", frame), Style.of(frame))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    (ax,) = figure.axes
    names = [text.get_window_extent() for text in ax.texts]
    assert len(names) == named
    reach = 4 * figure.dpi / 72  # half a marker
    for x, y in ax.transData.transform(frame[["approximation_rel_l2", "speedup"]].to_numpy(dtype=float)):
        point = Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
        assert not any(_area(point, name) for name in names)
    assert not any(_area(a, b) for a, b in itertools.combinations(names, 2))
    room = ax.get_window_extent()
    assert all(_area(name, room) == pytest.approx(name.width * name.height) for name in names)


def test_tolerances_are_drawn_beside_the_implementation_error_alone(drawn: dict[str, Figure]) -> None:
    left, right, *_ = drawn["errors"].axes
    tolerances = [{t.get_text() for t in ax.texts if t.get_text().startswith("tolerance")} for ax in (left, right)]
    assert tolerances == [{"tolerance (exact, sparse)", "tolerance (quantized)"}, set()]
    assert "right?" in left.get_title()
    assert "cost?" in right.get_title()


def test_what_a_logarithm_cannot_show_is_left_out() -> None:
    frame = prepared(rows("naive", BASELINE, scope="attention"))
    frame.loc[frame["plugin"] == "naive", ["latency_s", "latency_low_s", "latency_high_s", "peak_bytes"]] = 0.0
    frame["approximation_rel_l2"] = math.inf
    frame.loc[frame["plugin"] == "naive", "implementation_rel_l2"] = 0.0
    panels, style = arrange(frame, [RUN]), Style.of(frame)
    for draw in (latency.latency, memory.memory, deviation.deviation):
        figure = draw(panels, style)
        assert figure is not None
        FigureCanvasAgg(figure).draw()
        low, high = figure.axes[0].get_ylim()
        assert 0 < low < high < math.inf


@pytest.mark.parametrize("run", ["$x", "$x$", "a" * 200, "a b " * 50])
def test_a_title_fits_whatever_the_run_is_called(run: str) -> None:
    frame = pd.concat([rows("naive", scope="attention", run=name) for name in (run, "two")])
    frame = prepared(frame)
    figure = latency.latency(arrange(frame, [RUN]), Style.of(frame))
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    assert not any(_area(a, b) for a, b in itertools.combinations(titles, 2))


@pytest.mark.parametrize(
    "draw", [latency.latency, memory.memory, speedup.speedup, deviation.deviation, block.attention_share, block.amdahl]
)
def test_there_is_no_figure_of_nothing(draw: Callable[..., Figure | None]) -> None:
    frame = rows()
    frame = prepared(fail(frame, frame["status"] == "ok", "timeout", "120 s"))
    assert draw(arrange(frame, [RUN]), Style.of(frame)) is None


# Pages


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(matplotlib.rcParams)
    yield write_report(recorded(), [RUN], tmp_path_factory.mktemp("report"))
    assert dict(matplotlib.rcParams) == before
    assert not plt.get_fignums()


def test_the_folder_holds_pages_and_figures(report: Path) -> None:
    assert report.name == "index.html"
    stems = ["overview", "latency", "memory", "speedup", "errors", "speed-vs-error", "speed-vs-error-2"]
    expected = {f"{stem}.{kind}" for stem in [*stems, "attention-share", "amdahl"] for kind in ("png", "svg")}
    assert {path.name for path in (report.parent / "figures").iterdir()} == expected
    assert {path.name for path in report.parent.iterdir()} == {"index.html", "report.md", "figures"}


def test_the_html_page_needs_nothing_else(report: Path) -> None:
    seen = read(report)
    assert all(address.startswith(("data:", "#")) for address in seen.addresses)
    assert sum(address.startswith("data:image/svg+xml") for address in seen.addresses) == 9
    assert not {"link", "iframe", "object"} & set(seen.tags)
    text = report.read_text()
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_the_markdown_page_links_figures_that_are_there(report: Path) -> None:
    tokens = MarkdownIt("commonmark").parse((report.parent / "report.md").read_text())
    images = [c.attrs["src"] for t in tokens for c in t.children or [] if c.type == "image"]
    assert len(images) == 9
    assert all((report.parent / str(image)).is_file() for image in images)


def test_both_pages_say_the_same(report: Path) -> None:
    seen = read(report)
    table, _ = markdown_cells(report.parent / "report.md")
    assert {"8.00 ms [7.92, 8.08]", "1.88x [1.86, 1.89]"} <= set(seen.cells)
    in_markdown = {cell for line in table for cell in line}
    assert set(seen.cells) <= in_markdown


@pytest.mark.parametrize(
    "fact",
    [
        "32 cells of 4 variants: 29 ok, 2 skipped, 1 wrong.",
        "Attention alone: the fastest exact variant is sdpa at 512 to 4k (the baseline).",
        "Wrong answers from int8 (1 wrong): their latencies do not count.",
        "2 of 29 finished cells did not reach the precision asked for",
        "17 GiB are over 12 GiB",
        "implementation error 0.03",
        "attnbench run --plugins all --seq 512..2048",
        "200 s: 70% in calls of the variants, 10% in compilation, 20% elsewhere (overhead)",
        "Some CPU",
        "8.00 GiB",
        "block-sparse:pattern=window:window=256",
    ],
)
def test_the_page_says(report: Path, fact: str) -> None:
    assert fact in read(report).text
    assert fact.replace("|", r"\|") in (report.parent / "report.md").read_text()


def test_averages_say_over_how_many_cells(report: Path) -> None:
    table, _ = markdown_cells(report.parent / "report.md")
    # Attention: 1024 and 2048 are left, since int8 is wrong at 512 and naive ends before 4096.
    assert ["attention alone", "naive", "0.375x", "2 of 4"] in table
    assert ["encoder block (pre-norm)", "naive", "0.375x", "3 of 4"] in table


def test_every_row_has_its_command(report: Path) -> None:
    text = read(report).text
    for row in as_rows(everything()):
        assert repeat_command(row) in text


def test_every_finished_cell_is_in_the_results(report: Path) -> None:
    table, _ = markdown_cells(report.parent / "report.md")
    assert sum(len(line) > 8 and line[0][0].isdigit() for line in table) == 29


def test_the_same_rows_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    frame = everything()
    figure = memory.memory(arrange(frame, [RUN]), Style.of(frame))
    assert figure is not None
    drawing.save(figure, tmp_path / "memory")
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (report.parent / "figures" / path.name).read_bytes(), path.name


def test_figures_of_an_earlier_report_go_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("latency-7.png", "overview.svg", "mine.png", "latency.txt"):
        (folder / name).touch()
    write_report(rows()[:0], [RUN], tmp_path)
    assert {path.name for path in folder.iterdir()} == {"mine.png", "latency.txt"}


EVIL = [
    "../x",
    "<script>alert(1)</script>",
    "a|b",
    "*a* _b_ `c` ~~d~~ $e$",
    "[a](http://x.y)",
    "![a](b)",
    "&amp;",
    "_hidden",
    r"\$\|",
]


def test_names_are_data(tmp_path: Path) -> None:
    frame = pd.concat([rows("naive", scope="attention", seq=(512,)).assign(plugin=n, variant=n) for n in EVIL])
    frame["reason"] = [f"{name}\n\n# {name}" for name in frame["plugin"]]
    frame["run"] = EVIL[1]
    failed = fail(frame.reset_index(drop=True), pd.Series(range(len(EVIL))) % 2 == 0, "error", "")
    failed["reason"] = frame["reason"].to_list()
    failed["traceback"] = "```\n</pre><script>alert(2)</script>"
    out = tmp_path / "out"
    write_report(failed, [RUN | {"name": EVIL[1], "command": ["attnbench", *EVIL]}], out)

    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert all(path.stem in page.FIGURES for path in (out / "figures").iterdir())
    seen = read(out / "index.html")
    assert not {"strong", "em", "b"} & set(seen.tags)
    assert seen.tags.count("script") == len(page._SCRIPTS) + 1  # attnbench's own, and the data
    assert set(EVIL) <= set(seen.cells)
    table, kinds = markdown_cells(out / "report.md")
    assert not {"html_inline", "link_open", "em_open", "s_open", "code_inline"} & kinds
    names = [line[0] for line in table if len(line) == 6 and line[2] in ("exact",)]
    assert sorted(names) == sorted(EVIL)


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    frame = pd.concat([rows("naive", scope="attention", seq=(512,)).assign(plugin=n, variant=n) for n in EVIL])
    frame = prepared(frame)
    figure = speedup.speedup(arrange(frame, [RUN]), Style.of(frame))
    assert figure is not None
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters stay letters
        figure.savefig(tmp_path / "x.svg")
    drawn = {
        text.strip("\u200a").removesuffix(" 0.375x")
        for text in ElementTree.parse(tmp_path / "x.svg").getroot().itertext()
    }
    assert set(EVIL) <= drawn


@pytest.mark.parametrize(
    ("which", "says", "stems"),
    [
        (lambda f: f[:0], "There is no cell in this report", set()),
        (lambda f: fail(f, f["status"] == "ok", "timeout", "took over 120 s"), "No cell finished", set()),
        (
            lambda f: f[f["plugin"] == "int8"][:1],
            "1 cell of 1 variant: 1 ok.",
            {"overview", "latency", "memory", "speedup", "errors", "speed-vs-error"},
        ),
        (
            lambda f: fail(f, f["plugin"] == BASELINE, "crashed", "signal 11").assign(speedup=math.nan),
            "Failed: sdpa (1 crashed) (reasons below).",
            {"overview", "latency", "memory", "errors"},
        ),
        # An older record has fewer columns.
        (
            lambda f: f[["run", "plugin", "status", "latency_s", *Workload.__dataclass_fields__]],
            "4 cells of 4 variants: 4 ok.",
            {"overview", "latency"},
        ),
    ],
    ids=["none", "only failed", "one row", "no baseline", "few columns"],
)
def test_a_poor_run_still_makes_a_report(
    tmp_path: Path, which: Callable[[pd.DataFrame], pd.DataFrame], says: str, stems: set[str]
) -> None:
    index = write_report(which(rows(scope="attention", seq=(512,))), [RUN], tmp_path)
    assert says in read(index).text
    assert {path.stem for path in (tmp_path / "figures").glob("*.png")} == stems


def test_mixed_machines_are_named_and_kept_apart(tmp_path: Path) -> None:
    other = RUN | {"name": "two", "machine": {"cpu": "Other CPU", "gpu": "Some GPU"}, "finished": None}
    both = pd.concat([rows("int8", BASELINE, scope="attention", seq=(512,), run=run) for run in (RUN["name"], "two")])
    text = read(write_report(both, [RUN, other], tmp_path)).text
    assert "2 runs on 2 machines (Some CPU, 2 cores; Some GPU)" in text
    assert "Run two: the fastest exact variant is sdpa" in text
    assert "not finished: the rows are those measured so far" in text
    table, _ = markdown_cells(tmp_path / "report.md")
    assert ["run two", "int8", "1.88x", "1 of 1"] in table


ON_A_GPU = {
    "timing": "graph", "l2": "kept", "wall_s": 7e-5, "energy_j": 0.0123, "reserved_bytes": 3 * 2.0**20,
    "start_clock_hz": 1.98e9, "end_clock_hz": 1.755e9, "start_power_w": 300.0, "end_power_w": 690.0,
    "start_temperature_c": 41.0, "end_temperature_c": 41.0, "start_throttled": "", "end_throttled": "power cap",
    "start_other_processes": 0.0, "end_other_processes": 0.0,
}  # fmt: skip


def test_a_gpu_row_says_what_the_gpu_did(tmp_path: Path) -> None:
    frame = rows(BASELINE, "int8", scope="attention", seq=(512,), device="cuda").assign(**ON_A_GPU)
    text = read(write_report(frame, [RUN], tmp_path)).text
    for fact in (
        "graph",
        "70.0 µs",
        "12.3 mJ",
        "3.00 MiB",
        "1980 MHz to 1755 MHz",
        "300 W to 690 W",
        "41 °C",
        "- to power cap",
    ):
        assert fact in text
    assert "41 °C to" not in text


def test_a_cpu_has_no_table_of_a_gpu(report: Path) -> None:
    assert "What the GPU did" not in (report.parent / "report.md").read_text()


def test_kept_and_flushed_caches_are_not_compared() -> None:
    kept, flushed = (rows(BASELINE, scope="attention", device="cuda").assign(l2=l2) for l2 in ("kept", "flushed"))
    assert [p.title for p in arrange(pd.concat([kept, flushed], ignore_index=True), [RUN])] == ["", "L2 cache flushed"]
    words = repeat_command(flushed.iloc[0].to_dict()).split()
    assert words[words.index("--l2") + 1] == "flushed"
    assert "--l2" not in repeat_command(kept.iloc[0].to_dict())


@pytest.mark.parametrize(
    ("text", "language", "fence"),
    [("a", "sh", "```sh"), ("a ```` b", "", "`````"), ("``", "", "```")],
)
def test_a_fence_is_longer_than_what_it_holds(text: str, language: str, fence: str) -> None:
    assert page.fenced(text, language).splitlines() == [fence, text, fence.removesuffix(language)]


def test_a_report_pings_nobody() -> None:
    assert page.escape_markdown("@you #12") == "@\u200byou #\u200b12"


def test_importing_the_report_does_not_load_matplotlib() -> None:
    code = "import sys, attnbench.report; sys.exit(bool({'matplotlib', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def by_inputs() -> pd.DataFrame:
    """Errors as above on normal inputs; on a model's those of int8 three times as large, of block-sparse half."""
    frame = rows(inputs="normal,outlier,smollm2:3", heads=(9,), kv_heads=(3,), scope="attention", seq=(512, 1024))
    times = {("int8", "smollm2:3"): 3.0, ("int8", "outlier"): 2.0, ("block-sparse", "smollm2:3"): 0.5}
    keys = zip(frame["variant"], frame["inputs"], strict=True)
    factor = [times.get((variant, inputs), 1.0) for variant, inputs in keys]
    frame["approximation_rel_l2"] *= factor
    gone = (frame["variant"] == "int8") & (frame["inputs"] == "smollm2:3") & (frame["seq"] == 1024)
    frame.loc[gone, ["status", "approximation_rel_l2"]] = ["skipped", math.nan]
    return frame


def test_errors_by_inputs_stand_side_by_side_those_first_that_noise_flatters(tmp_path: Path) -> None:
    seen = read(write_report(by_inputs(), [RUN], tmp_path))
    for word in ("normal inputs", "outlier inputs", "smollm2:3 inputs", "smollm2:3 over normal"):
        assert word in seen.text
    frame = prepared(by_inputs(), [RUN])
    panels, style = arrange(frame, [RUN]), Style.of(frame)
    (table,) = tables.by_inputs(panels, style)
    assert table.columns == ["length", "variant", "error on normal", "error on outlier", "error on smollm2:3",
                             "smollm2:3 over normal"]  # fmt: skip
    assert [row[:2] for row in table.rows] == [
        [length, name] for length, names in (("1k", ("naive", "sdpa", "block-sparse", "int8")),
                                             ("512", ("int8", "naive", "sdpa", "block-sparse"))) for name in names
    ]  # fmt: skip
    assert [row[2:] for row in table.rows if row[1] == "int8"] == [
        ["0.0090", "0.018", "-", "-"],
        ["0.0090", "0.018", "0.027", "3.00x"],
    ]
    figure = inputs.inputs(panels, style)
    assert figure is not None
    assert "length 512" in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["int8", "naive", "sdpa", "block-sparse"]
    assert "On smollm2:3 some are further off than on normal inputs at 512: int8 3.00x." in " ".join(seen.text.split())


@pytest.mark.parametrize("sorts", ["normal", "smollm2:3"])
def test_one_sort_of_inputs_is_compared_with_nothing(sorts: str, tmp_path: Path) -> None:
    frame = rows(inputs=sorts, heads=(9,), kv_heads=(3,), scope="attention", seq=(512,))
    write_report(frame, [RUN], tmp_path)
    assert not (tmp_path / "figures/errors-by-inputs.png").exists()
    assert "Error by inputs" not in (tmp_path / "report.md").read_text()
