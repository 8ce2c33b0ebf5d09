"""Makes the pictures of the pages that README and docs show: `python -m tests.screenshots`."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium

from attnbench.records.submission import found_in, read
from attnbench.report.site import Board

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "reports/2026-11-30-cpu/index.html"
PICTURES = {"light": (1280, 940, "light"), "dark": (1280, 940, "dark"), "390": (390, 1640, "light")}


def main() -> None:
    """docs/page-*.png of the committed report and docs/leaderboard.png of the committed runs, in 256 colours."""
    with chromium() as browser:
        leaderboard(browser)
        for name, (width, height, scheme) in PICTURES.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            tab.goto(PAGE.as_uri())
            if name != "390":
                tab.evaluate("document.getElementById('explore').scrollIntoView()")
                tab.get_by_label("tiled at 2k").hover(force=True)
            kept(tab, f"page-{name}")


def leaderboard(browser: Browser) -> None:
    board = Board()
    for path in found_in([ROOT / "results"]):
        board.add(read(path))
    with tempfile.TemporaryDirectory() as folder:
        tab = browser.new_page(viewport={"width": 1280, "height": 1120})
        tab.goto(board.write(Path(folder)).as_uri())
        tab.locator("#board .pick").first.wait_for()
        kept(tab, "leaderboard")


def kept(tab: Page, name: str) -> None:
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    picture.save(ROOT / f"docs/{name}.png", optimize=True)


if __name__ == "__main__":
    main()
