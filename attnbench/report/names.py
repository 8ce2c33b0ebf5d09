"""Short names of plugins, the same in every figure, table and line of a report."""

from collections.abc import Mapping

import pandas as pd

_LONGEST = 36  # characters of a name


def display_names(frame: pd.DataFrame) -> dict[str, str]:
    """`short_names` of the plugins of a frame."""
    return short_names(dict(zip(frame["plugin"], frame["variant"], strict=True)))


def short_names(variants: Mapping[str, str]) -> dict[str, str]:
    """Plugin -> a short name, sorted by plugin: the variant where a report has it once, else what differs in options.

    Two plugins never share a name. Characters that do not print become "?".
    """
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
