"""How a plugin looks: one name, one colour and one marker, the same in every figure and table of a report."""

import functools
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Self

import pandas as pd
import seaborn as sns
from matplotlib import font_manager

FONT = "DejaVu Sans"  # comes with matplotlib, so that a report looks the same everywhere

# Seaborn's colour-blind-safe colours, the ones that stand out on white and from each other first; its yellow does not.
_COLOURS = [*(sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 4, 3, 9, 7, 5, 6)), "#222222", "#6a3d9a"]
_MARKERS = ("o", "s", "^", "D", "v", "p", "<", "h", ">")  # nine and eleven: ninety-nine before two look the same
_LONGEST = 36  # characters of a name


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


def display_names(frame: pd.DataFrame) -> dict[str, str]:
    """Plugin -> a short name, sorted by plugin: the variant where a report has it once, else what differs in options.

    Two plugins never share a name. Characters that do not print become "?".
    """
    variants = dict(zip(frame["plugin"], frame["variant"], strict=True))
    plugins = sorted(variants)
    options = {plugin: plugin.removeprefix(variants[plugin]).split(":")[1:] for plugin in plugins}
    names: dict[str, str] = {}
    for plugin in plugins:
        family = [p for p in plugins if variants[p] == variants[plugin]]
        differing = [_brief(option) for option in options[plugin] if any(option not in options[p] for p in family)]
        name = " ".join([variants[plugin], *differing]) if len(family) > 1 else variants[plugin]
        name = _shorten("".join(c if c.isprintable() else "?" for c in name).strip() or "(no name)")
        number = 2
        unique = name
        while unique in names.values():
            unique, number = f"{name} #{number}", number + 1
        names[plugin] = unique
    return names


def _brief(option: str) -> str:
    """ "pattern=bigbird" as "bigbird": a word speaks for itself, a number or a yes does not."""
    value = option.partition("=")[2]
    return value if value[:1].isalpha() and value not in ("true", "false", "True", "False") else option


def _shorten(name: str) -> str:
    head = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[:head]}\u2026{name[head + 1 - _LONGEST :]}"


@functools.cache
def _has_glyph(character: str) -> bool:
    font = font_manager.get_font(font_manager.findfont(FONT))
    return font.get_char_index(ord(character)) != 0
