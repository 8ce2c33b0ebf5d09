"""How a plugin looks: one name, one colour and one marker, the same in every figure and table of a report.

The colour tells the family, its shade and the marker which of the family it is.
"""

import functools
from dataclasses import dataclass
from itertools import cycle
from typing import Self

import pandas as pd
import seaborn as sns
from matplotlib import font_manager

from attnbench.report.names import display_names

FONT = "DejaVu Sans"  # comes with matplotlib, so that a report looks the same everywhere

# The darkest and the lightest shade of a family, on white and on black. Found by a search for five hues that stay apart
# with each of the three kinds of colour blindness; tests/test_report.py says how far.
SHADES = {
    "exact": (("#14265a", "#4572c9"), ("#6f9bf0", "#b5cbff")),
    "sparse": (("#b84a00", "#e87722"), ("#ff8b3d", "#ffb98a")),
    "quantized": (("#0f7a63", "#27a086"), ("#2fc4a2", "#8fe3cf")),
    "kernel": (("#a81fb5", "#d850e4"), ("#e879f2", "#f5b5fa")),
    "recurrent": (("#3d3215", "#94814c"), ("#b9a263", "#ddd0a3")),
    "": (("#333333", "#888888"), ("#9a9a9a", "#d5d5d5")),
}
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", "h", ">")


@dataclass(frozen=True)
class Style:
    """plugin -> what stands for it; built once a report, from all its plugins in alphabetical order.

    colours: on white. night: on black.
    """

    names: dict[str, str]
    families: dict[str, str]
    colours: dict[str, str]
    night: dict[str, str]
    markers: dict[str, str]

    @property
    def plugins(self) -> list[str]:
        return list(self.names)

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Self:
        names = display_names(frame)
        known = dict(zip(frame["plugin"], frame["family"], strict=True)) if "family" in frame else {}
        families = {plugin: known[plugin] if known.get(plugin) in SHADES else "" for plugin in names}
        markers = dict(zip(names, cycle(_MARKERS), strict=False))
        return cls(names, families, _shaded(families, 0), _shaded(families, 1), markers)

    def figure_name(self, plugin: str) -> str:
        """The name as matplotlib needs it: no mathematics, no leading underscore (which hides a label)."""
        name = "".join(c if c == "\u2026" or _has_glyph(c) else "?" for c in self.names[plugin])
        return ("\u200a" if name.startswith("_") else "") + name.replace("$", r"\$")


def shade(family: str, which: int = 0) -> str:
    """The colour that stands for a family as a whole. which: 0 on white, 1 on black."""
    colour: str = sns.blend_palette(SHADES[family][which], 3).as_hex()[1]
    return colour


def _shaded(families: dict[str, str], which: int) -> dict[str, str]:
    colours: dict[str, str] = {}
    for family, ends in SHADES.items():
        members = [plugin for plugin in families if families[plugin] == family]
        shades = sns.blend_palette(ends[which], len(members)).as_hex() if len(members) > 1 else [shade(family, which)]
        colours |= dict(zip(members, shades, strict=False))
    return colours


@functools.cache
def _has_glyph(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont(FONT))
    return font.get_char_index(ord(character)) != 0
