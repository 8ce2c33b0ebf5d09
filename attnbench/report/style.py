"""How a plugin looks: one name, one colour and one marker, the same in every figure and table of a report."""

import functools
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Self

import pandas as pd
import seaborn as sns
from matplotlib import font_manager

from attnbench.report.names import display_names

FONT = "DejaVu Sans"  # comes with matplotlib, so that a report looks the same everywhere

# Seaborn's colour-blind-safe colours, the ones that stand out on white and from each other first; its yellow does not.
_COLOURS = [*(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 4, 3, 9, 7, 5, 6)), "#222222", "#6a3d9a"]
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", "h", ">")  # nine and eleven: ninety-nine before two look the same


@dataclass(frozen=True)
class Style:
    """plugin -> what stands for it; built once a report, from all its plugins in alphabetical order."""

    names: dict[str, str]
    colours: dict[str, str]
    markers: dict[str, str]

    @property
    def plugins(self) -> list[str]:
        return list(self.names)

    @property
    def marks(self) -> dict[str, Any]:
        """Seaborn's arguments that make each plugin look like itself."""
        return {"hue": "plugin", "style": "plugin", "palette": self.colours, "markers": self.markers, "legend": False}

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Self:
        names = display_names(frame)
        return cls(names, *(dict(zip(names, cycle(each), strict=False)) for each in (_COLOURS, _MARKERS)))

    def figure_name(self, plugin: str) -> str:
        """The name as matplotlib needs it: no mathematics, no leading underscore (which hides a label)."""
        name = "".join(c if c == "\u2026" or _has_glyph(c) else "?" for c in self.names[plugin])
        return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


@functools.cache
def _has_glyph(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont(FONT))
    return font.get_char_index(ord(character)) != 0
