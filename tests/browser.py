"""A real Chromium, the system's own: what playwright would download is not to be had on every network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from attnbench.records.run import load, read_metas
from attnbench.report import page
from attnbench.report.page import write_report

RESULTS = Path(__file__).parents[1] / "results"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium (Debian's package chromium)")
    with sync_playwright() as playwright:
        # No sandbox: it needs rights that root in a container lacks, and the page is our own.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser) -> Iterator[tuple[Page, list[str], list[str]]]:
    """A tab, the addresses that it asks for, and the errors that it says; closed behind the block."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    tab, asked, errors = context.new_page(), list[str](), list[str]()
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    yield tab, asked, errors
    context.close()


def written(out: Path, *runs: str, pictures: tuple[str, ...] = ("overview",)) -> Path:
    """The page of committed runs, with a few pictures alone: drawing takes the most time by far."""
    folders = [RESULTS / run for run in runs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "FIGURES", {name: page.FIGURES[name] for name in pictures})
        return write_report(load(folders), read_metas(folders), out)
