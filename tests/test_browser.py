"""The page in a real Chromium: clicked through, walked through by keys, printed, on a phone, and without scripts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import RESULTS, chromium, watched, written
from playwright.sync_api import Browser, Page, expect

from attnbench.analysis.frames import as_rows
from attnbench.records.run import load, read_metas
from attnbench.report import page as report
from attnbench.report import units
from attnbench.report.page import write_report
from attnbench.report.prepare import prepared
from attnbench.report.repeat import repeat_command

BFLOAT16, PHASES, FLOAT32 = "2026-11-29-cpu-2", "2026-11-25-phases-2", "2026-11-29-cpu"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def one(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("one"), BFLOAT16)


@pytest.fixture(scope="module")
def several(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("several"), PHASES, FLOAT32)


@pytest.fixture
def opened(browser: Browser, one: Path) -> Iterator[Page]:
    """A page that asks for nothing but itself and says no error, which is found out when it is closed."""
    with watched(browser) as (tab, asked, errors):
        tab.goto(one.as_uri())
        yield tab
    assert [url for url in asked if not url.startswith("data:")] == [
        url for url in asked if url.endswith("/index.html")
    ]
    assert errors == []


def choose(tab: Page, choice: str, text: str) -> None:
    tab.locator(f"[data-choice={choice}] select").select_option(label=text)


def named(tab: Page) -> list[str]:
    return tab.locator("#chart .name").all_text_contents()


def numbers(tab: Page, column: int) -> list[float]:
    """Of the first table of results, in the order shown: what each cell of a column begins with, in seconds or times."""
    texts = tab.locator(f"table[data-panel='0'] tbody tr:visible td:nth-child({column})").all_text_contents()
    units = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "x": 1.0}
    found = [re.match(r"([\d.]+) ?(µs|ms|s|x)", text) for text in texts]
    return [float(each[1]) * units[each[2]] for each in found if each]


def test_the_winner_is_named_before_anything_is_clicked(opened: Page) -> None:
    expect(opened.locator("#winner")).to_have_text(
        re.compile(r"Fastest at 8k: linear 40\.9x sdpa, error 0\.45; of the exact: tiled 2\.62x sdpa")
    )
    assert opened.locator("#rank .who").first.text_content() == "linear"
    opened.locator("#lengths").get_by_label("512").check()
    expect(opened.locator("#winner")).to_contain_text("Fastest at 512: linear 6.11x sdpa")


def test_every_variant_is_named_at_its_end(opened: Page) -> None:
    assert sorted(named(opened)) == sorted(load([RESULTS / BFLOAT16])["variant"].unique())
    boxes = [box for name in opened.locator("#chart .name").all() if (box := name.bounding_box())]
    heights = sorted(box["y"] for box in boxes)
    assert all(other - one > 10 for one, other in pairwise(heights))


def test_tables_are_sorted_by_click_and_by_key(opened: Page) -> None:
    head = opened.locator("table[data-panel='0'] th").nth(2)
    head.get_by_role("button").click()
    assert numbers(opened, 3) == sorted(numbers(opened, 3))
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert numbers(opened, 3) == sorted(numbers(opened, 3), reverse=True)
    assert len(numbers(opened, 3)) == 66


def test_a_row_of_results_has_its_command_under_the_pointer(opened: Page) -> None:
    for panel, scope in (("0", "attention"), ("1", "block")):
        for row in opened.locator(f"table[data-panel='{panel}'] tbody tr").all()[::13]:
            length, variant = row.locator("td").all_text_contents()[:2]
            command = row.get_attribute("title") or ""
            assert f"--plugins {variant}:" in command or f"--plugins {variant}," in command
            assert f"--scope {scope} " in command
            assert f"--seq {int(length.removesuffix('k')) * (1024 if 'k' in length else 1)} " in command


def test_results_are_filtered_by_text_and_by_family(opened: Page) -> None:
    opened.locator("#filter-text").fill("8k")
    expect(opened.locator("#filter-count")).to_have_text("11 of 110 rows")
    opened.locator("#filter-family").select_option("exact")
    expect(opened.locator("#filter-count")).to_have_text("4 of 110 rows")
    shown = opened.locator("table[data-panel='0'] tbody tr:visible td:nth-child(2)").all_text_contents()
    assert sorted(shown) == ["naive", "sdpa", "tiled", "xformers"]
    opened.locator("#filter-text").fill("nothing of the kind")
    expect(opened.locator("#filter-count")).to_have_text("0 of 110 rows")


def test_another_baseline_is_a_ratio_of_medians_and_says_so(opened: Page) -> None:
    expect(opened.locator("#paired")).to_be_empty()
    choose(opened, "baseline", "tiled")
    expect(opened.locator("#paired")).to_contain_text("Unpaired")
    frame = load([RESULTS / BFLOAT16])
    at = frame[(frame["scope"] == "attention") & (frame["seq"] == 8192)].set_index("variant")["latency_s"]
    told = opened.locator("#rank li").filter(has_text="naive").locator(".value").text_content() or ""
    assert float(told.removesuffix("x")) == pytest.approx(at["tiled"] / at["naive"], rel=0.01)
    assert opened.locator("#chart .interval").count() == 0
    choose(opened, "baseline", "sdpa (the run's)")
    expect(opened.locator("#paired")).to_be_empty()
    assert opened.locator("#chart .interval").count() > 0


def test_what_is_shown_and_the_scale_are_chosen(opened: Page) -> None:
    ticks = opened.locator("#chart .axis").first.locator("text")
    label = opened.locator("#chart .label").first
    for kind, unit, says in (
        ("Time", "ms", "median time of a call: lower is faster"),
        ("Memory", "MiB", "peak memory"),
        ("Error", "0.01", "error against softmax"),
        ("Speedup", "x", "speedup over sdpa: higher is faster"),
    ):
        choose(opened, "show", kind)
        expect(label).to_contain_text(says)
        assert any(unit in text for text in ticks.all_text_contents())
    before = ticks.all_text_contents()
    choose(opened, "scale", "linear")
    after = ticks.all_text_contents()
    assert before != after
    values = [float(text.removesuffix("x")) for text in after]
    assert values[0] == 0
    assert values[2] - values[1] == pytest.approx(values[1] - values[0])
    opened.locator("#families").get_by_text("recurrent").click()
    assert len(named(opened)) == 7


def test_phase_and_dtype_are_chosen(browser: Browser, several: Path) -> None:
    tab = browser.new_page()
    tab.goto(several.as_uri())
    choose(tab, "phase", "train")
    expect(tab.locator("#gone")).to_contain_text("No number: int8 (unsupported")
    assert "int8" not in named(tab)
    choose(tab, "dtype", "float32")
    expect(tab.locator("[data-choice=phase] select")).to_have_value("forward")  # the only one measured in float32
    assert "int8" in named(tab)
    tab.close()


def test_a_run_whose_baseline_failed_is_compared_with_another(browser: Browser, tmp_path: Path) -> None:
    frame = load([RESULTS / BFLOAT16])
    numbers = [name for name in frame if name.startswith(("speedup", "approximation"))]
    frame[numbers] = math.nan
    frame["status"] = frame["status"].mask(frame["variant"] == "sdpa", "crashed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "FIGURES", {})
        index = write_report(frame, read_metas([RESULTS / BFLOAT16]), tmp_path)
    tab = browser.new_page()
    tab.goto(index.as_uri())
    expect(tab.locator("#paired")).to_contain_text("Unpaired: the run measured in pairs with sdpa.")
    assert len(named(tab)) == 10
    choose(tab, "show", "Error")
    expect(tab.locator("#picture")).to_have_text("Nothing here has a number of this kind.")
    tab.close()


def told(tab: Page) -> str:
    return tab.locator("#tip").inner_text()


def test_a_point_tells_number_interval_and_command_under_the_pointer(opened: Page) -> None:
    frame = prepared(load([RESULTS / BFLOAT16]), read_metas([RESULTS / BFLOAT16]))
    (row,) = as_rows(frame[(frame["variant"] == "int8") & (frame["seq"] == 8192) & (frame["scope"] == "attention")])
    expect(opened.locator("#tip")).to_be_hidden()
    opened.get_by_label("int8 at 8k: 3.29x").hover(force=True)
    expect(opened.locator("#tip strong")).to_have_text("int8 at 8k")
    assert "3.29x [3.03x, 5.24x]" in told(opened)
    assert opened.locator("#tip code").text_content() == repeat_command(row)
    opened.mouse.move(5, 5)
    expect(opened.locator("#tip")).to_be_hidden()


def test_every_point_has_the_command_of_its_row(opened: Page) -> None:
    """Through the keyboard: the points are walked through by arrow keys, Enter keeps what is told, Escape lets it go."""
    first = opened.locator("#chart .point[tabindex='0']")
    first.focus()
    plugin = (first.get_attribute("aria-label") or "").split()[0]
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        assert f"--seq {length} " in told(opened)
        assert f"--plugins {plugin}:" in told(opened)
        opened.keyboard.press("ArrowRight")
    assert "at 16k" in told(opened)
    opened.keyboard.press("ArrowUp")
    assert plugin not in told(opened).splitlines()[0]
    opened.keyboard.press("Enter")
    expect(opened.locator("#tip button")).to_be_focused()
    opened.keyboard.press("Escape")
    expect(opened.locator("#tip")).to_be_hidden()


def colour(tab: Page) -> str:
    return str(tab.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark_are_the_system_s_or_chosen(browser: Browser, one: Path) -> None:
    for scheme, paper, button in (("light", "rgb(255, 255, 255)", "Dark"), ("dark", "rgb(20, 23, 28)", "Light")):
        tab = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
        tab.goto(one.as_uri())
        assert colour(tab) == paper
        line = tab.locator("#chart .series").first.get_attribute("style")
        tab.get_by_role("button", name=button).click()
        assert colour(tab) != paper
        assert tab.locator("#chart .series").first.get_attribute("style") != line
        tab.close()


def test_it_prints_in_black_on_white_without_what_is_clicked(browser: Browser, one: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto(one.as_uri())
    tab.emulate_media(media="print")
    assert colour(tab) == "rgb(255, 255, 255)"
    for hidden in ("#controls", "#theme", "#filter", "nav"):
        expect(tab.locator(hidden)).to_be_hidden()
    expect(tab.locator("#chart svg")).to_be_visible()
    expect(tab.locator("#winner")).to_be_visible()
    assert tab.pdf(format="A4").startswith(b"%PDF")
    tab.close()


def test_a_phone_of_390_pixels_needs_no_scrolling_sideways(browser: Browser, one: Path, several: Path) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    for path in (one, several):
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        box = tab.locator("#chart svg").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    tab.close()


def test_without_scripts_pictures_tables_and_commands_are_there(browser: Browser, one: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(one.as_uri())
    expect(tab.locator("#explore")).to_be_hidden()
    expect(tab.locator("#filter")).to_be_hidden()
    assert tab.locator("figure img").first.evaluate("img => img.naturalWidth") > 500
    assert tab.locator("table[data-panel='0'] tbody tr").count() == 66
    assert "attnbench run --plugins" in (tab.locator("pre.commands").first.text_content() or "")
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing_serious(browser: Browser, several: Path, scheme: Any, width: int) -> None:
    tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    tab.goto(several.as_uri())
    tab.locator("#chart .point[tabindex='0']").focus()
    tab.keyboard.press("Enter")  # with the tip open
    found = Axe().run(tab).response["violations"]
    serious = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []
    tab.close()


@pytest.mark.slow
def test_a_page_of_2000_cells_stays_under_3_megabytes(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, runs = load([RESULTS / BFLOAT16]), read_metas([RESULTS / BFLOAT16])
    many = pd.concat([frame.assign(seed=seed) for seed in range(19)], ignore_index=True)
    assert len(many) >= 2000
    monkeypatch.setattr(report, "FIGURES", {"overview": report.FIGURES["overview"]})
    index = write_report(many, runs, tmp_path)
    assert index.stat().st_size < 3_000_000
    tab = browser.new_page()
    tab.goto(index.as_uri())
    expect(tab.locator("#filter-count")).to_have_text(f"{len(many)} of {len(many)} rows")
    choose(tab, "seed", "seed 18")
    expect(tab.locator("#winner")).to_contain_text("Fastest at 8k")
    tab.close()


def test_pictures_that_find_no_room_lie_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_ROOM", 900_000)
    text = written(tmp_path, BFLOAT16, pictures=("overview", "speedup", "memory")).read_text()
    beside = re.findall(r'href="(figures/[\w-]+\.svg)"', text)
    assert 0 < len(beside) < 4
    assert text.count("data:image/svg+xml") + len(beside) == 3
    assert all((tmp_path / name).is_file() for name in beside)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert sum(len(panel["rows"]) for panel in data["panels"]) == 110


VALUES = [0, 1, 2.6, 2.604, 0.0999, 9.996, 99.96, 123.4, 1234.4, 3.1e-4, 5e-7, 1536, 3e7, None]


@pytest.mark.parametrize(
    ("script", "python"),
    [("ratio", units.ratio), ("seconds", units.seconds), ("bytes", units.size), ("error", units.error)],
)
def test_a_number_reads_as_in_the_tables(opened: Page, script: str, python: Any) -> None:
    assert opened.evaluate(f"(values) => values.map(tell.{script})", VALUES) == [python(value) for value in VALUES]


def test_an_axis_has_no_zeros_at_the_end(opened: Page) -> None:
    texts = ["64.0x", "0.250x", "100 ms", "1.0e-7", "2.50 GiB", "0.10"]
    assert opened.evaluate("(texts) => texts.map(tell.tick)", texts) == [
        "64x", "0.25x", "100 ms", "1e-7", "2.5 GiB", "0.1"
    ]  # fmt: skip
