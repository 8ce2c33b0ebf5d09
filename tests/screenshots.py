"""Makes the pictures of the page that README and docs show: `python -m tests.screenshots`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "reports/2026-11-29-cpu-4/index.html"
PICTURES = {"light": (1280, 940, "light"), "dark": (1280, 940, "dark"), "390": (390, 1640, "light")}


def main() -> None:
    """docs/page-*.png of the committed report, in 256 colours."""
    with chromium() as browser:
        for name, (width, height, scheme) in PICTURES.items():
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
            tab.goto(PAGE.as_uri())
            if name != "390":
                tab.evaluate("document.getElementById('explore').scrollIntoView()")
                tab.get_by_label("tiled at 2k").hover(force=True)
            picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            picture.save(ROOT / f"docs/page-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
