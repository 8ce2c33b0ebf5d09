"""The leaderboard: what its files hold, and the page in a real Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import RESULTS, chromium, watched
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, expect

from attnbench.commands import main
from attnbench.records.submission import content, of_rows, read
from attnbench.report import site as site_page
from attnbench.report.site import Board
from attnbench.workload import Workload

RUNS = ("2026-11-25-decode", "2026-11-29-cpu-isa-avx2", "2026-11-29-zen5-isa-avx2", "2026-11-29-zen5-isa-auto")
NASTY = "<img src=x onerror=alert(1)> & 'co'"


def renamed(source: Path, to: Path, name: str, **changed: Any) -> Path:
    """A run's file, as if another machine had measured it."""
    shared = read(source)
    meta = shared.meta | {"machine": shared.meta["machine"] | {"named": name, "memory_bytes": 2**35}} | changed
    to.write_bytes(content(of_rows(to, meta, shared.rows())))
    return to


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    runs, files = out / "runs", out / "files"
    files.mkdir()
    for run in RUNS:
        shutil.copytree(RESULTS / run, runs / run)
    renamed(runs / RUNS[3], files / "box.attnbench.json", NASTY)
    renamed(runs / RUNS[3], files / "twin.attnbench.json", NASTY)
    (files / "torn.attnbench.json").write_text('{"submission": 1')
    done = CliRunner().invoke(main, ["site", str(runs), str(files), "--out", str(out / "public")])
    assert done.exit_code == 1
    assert "left out:" in done.output
    assert "torn.attnbench.json is no JSON" in done.output
    assert "twin.attnbench.json is the run of" in done.output
    return out / "public"


def rows_of(site: Path) -> list[list[Any]]:
    """All rows of all shapes, with each number of a name as it is."""
    found = []
    for path in (site / "data").glob("*.js"):
        parts = re.fullmatch(r"arrived\((\d+), (.*)\);\n", path.read_text(), re.DOTALL)
        assert parts
        assert parts[1] == path.stem
        told = json.loads(parts[2])
        assert all(0 <= row[7] < len(told["commands"]) for row in told["rows"])
        found += told["rows"]
    return found


def test_each_cell_of_each_run_is_a_row_as_it_was_measured(site: Path) -> None:
    runs = [read(RESULTS / run) for run in RUNS]
    want = sorted(
        repr((row["plugin"], row["latency_s"], row["speedup"], row["peak_bytes"]))
        for shared in [*runs, runs[3]]
        for row in shared.rows()
        if row["status"] == "ok"
    )
    index = json.loads(re.search(r'id="data">(.*?)</script>', (site / "index.html").read_text(), re.DOTALL)[1])  # type: ignore[index]
    had = [row for row in rows_of(site) if len(row) == 17]
    assert sorted(repr((index["plugins"][row[1]][2], row[9], row[12], row[15])) for row in had) == want
    assert len(rows_of(site)) == 160 + 40
    assert {NASTY} < set(index["machines"])
    assert len(set(index["machines"])) == len(index["machines"])


def test_shapes_are_what_is_computed_whatever_the_machine_and_dtype(tmp_path: Path) -> None:
    def shared(name: str, **size: Any) -> Any:
        cell = {"plugin": "a:x=1", "variant": "a", "family": "exact", "status": "ok", "reason": "", "latency_s": 1.0}
        return of_rows(Path(name), {"started": name}, [cell | Workload(seq=64, kv_seq=64).as_dict() | size])

    board = Board()
    for i, size in enumerate(
        ({}, {"dtype": "bfloat16"}, {"threads": 9}, {"seed": 3}, {"kv_seq": 128}, {"head_dim": 32})
    ):
        assert board.add(shared(str(i), **size)) is None
    assert board.add(shared("5", head_dim=32)) == Path("5")
    board.write(tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["0.js", "1.js", "2.js"]
    assert (tmp_path / "data/0.js").read_text().count("attnbench run --plugins a:x=1") == 4


def test_no_two_shapes_have_the_same_words() -> None:
    """A field that a workload gets tells shapes apart by its words, or `report.prepare.dimensions` lacks it."""
    plain, block = Workload(seq=64, kv_seq=64), Workload(seq=64, kv_seq=64, scope="block", block="encoder", norm="pre")
    changes: dict[str, Any] = {
        "seq": 32, "kv_seq": 128, "batch": 2, "heads": 16, "kv_heads": 4, "head_dim": 32, "value_dim": 32, "mask": "window:9",
        "softmax_scale": 0.5, "softcap": 9.0, "bias": "alibi", "sinks": True, "phase": "train", "lengths": "9", "inputs": "outlier",
    }  # fmt: skip
    of_block = {"block": "decoder-only", "norm": "post", "style": "llama", "layers": 3}
    assert {*changes, *of_block, *site_page._ANY, "scope"} == {each.name for each in fields(Workload)}
    shapes = [plain, *(plain.replace(**{name: value}) for name, value in changes.items())]
    shapes += [block, *(block.replace(**{name: value}) for name, value in of_block.items())]
    told = {tuple(site_page._words(shape).values()) for shape in shapes}
    assert len(told) == len(set(shapes))


def test_what_is_nothing_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, said in ((tmp_path / "none", "is not there"), (tmp_path / "empty", "holds no run")):
        done = CliRunner().invoke(main, ["site", str(given), "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert said in done.output
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Browser, site: Path) -> Iterator[Page]:
    """The page, which asks for its own files alone and says no error."""
    with watched(browser) as (tab, asked, errors):
        tab.goto((site / "index.html").as_uri())
        expect(tab.locator("#count")).to_contain_text("rows")
        yield tab
    assert all(url.startswith(site.as_uri()) for url in asked)
    assert errors == []


def choose(tab: Page, name: str, label: str) -> None:
    tab.locator("#controls label", has=tab.locator(f"span:text-is('{name}')")).locator("select").select_option(
        label=label
    )


def column(tab: Page, number: int) -> list[str]:
    return tab.locator(f"#board tbody td:nth-child({number})").all_text_contents()


def test_rows_are_filtered_and_sorted_and_none_is_averaged(opened: Page) -> None:
    choose(opened, "length", "8k")
    choose(opened, "mask", "full mask")
    expect(opened.locator("#heading")).to_contain_text("full mask, length 8k")
    both = set(column(opened, 7))
    assert both == {"float32", "bfloat16"}
    choose(opened, "dtype", "bfloat16")
    assert set(column(opened, 7)) == {"bfloat16"}
    choose(opened, "machine", NASTY)
    assert set(column(opened, 4)) == {NASTY}
    ratios = [float(text.split("x")[0]) for text in column(opened, 2)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) == 5
    opened.get_by_role("button", name="time").click()
    units = {"ms": 1.0, "s": 1000.0}
    times = [float(n) * units[u] for n, u in (text.split(" [")[0].split() for text in column(opened, 3))]
    assert times == sorted(times)
    assert opened.locator("#chart circle").count() == 5
    opened.get_by_placeholder("variant, machine").fill("int8 qkpv")
    assert len(column(opened, 1)) == 1


def test_a_row_tells_where_it_is_from_and_what_repeats_it(opened: Page) -> None:
    choose(opened, "machine", NASTY)
    opened.locator("#board .pick").first.click()
    about = opened.locator("#about")
    expect(about).to_contain_text(NASTY)
    expect(about).to_contain_text("box.attnbench.json")
    assert about.locator("pre").text_content().startswith("attnbench run --plugins ")  # type: ignore[union-attr]
    opened.locator("#chart circle").first.hover()
    expect(opened.locator("#tip")).to_contain_text("machine")
    opened.get_by_role("button", name="Close").click()
    expect(about).to_be_hidden()


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1280, "dark")])
def test_the_page_fits_and_can_be_read(browser: Browser, site: Path, width: int, scheme: Any) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto((site / "index.html").as_uri())
    expect(tab.locator("#count")).to_contain_text("rows")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    found = Axe().run(tab)
    assert [each["id"] for each in found.response["violations"]] == []
    tab.close()
