"""Docstrings here tell of parameters and fields in lines such as `seq, kv_seq: lengths`, of which this makes lists."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?:^|(?<=\.) )([a-z]\w*(?:,\s[a-z]\w*)*):\s", re.MULTILINE)
STAR = re.compile(r"(`[^`]*`)|\*")


class Fields(griffe.Extension):
    """Puts a list item where a line or sentence begins with names of an object's own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = listed(obj.docstring.value, names(obj))
            obj.docstring.value = STAR.sub(lambda found: found[1] or r"\*", text)  # it is never meant for emphasis


def names(obj: griffe.Object) -> set[str]:
    """Parameters of a function, fields of a class."""
    if isinstance(obj, griffe.Function):
        return {parameter.name for parameter in obj.parameters}
    return set(obj.members) if isinstance(obj, griffe.Class) else set()


def listed(text: str, known: set[str]) -> str:
    """The text of a docstring with an item for each that it names."""
    found = [match for match in FIELD.finditer(text) if set(re.split(r",\s", match[1])) <= known]
    if not found:
        return text
    out, in_list = text[: found[0].start()].rstrip(), False
    for match, end in zip(found, [*(match.start() for match in found[1:]), len(text)], strict=True):
        said, *after = text[match.end() : end].strip().split("\n\n", 1)
        spelled = ", ".join(f"`{name}`" for name in re.split(r",\s", match[1]))
        out += ("\n" if in_list else "\n\n") + f"- {spelled}: {' '.join(said.split())}"
        out += "".join(f"\n\n{rest.rstrip()}" for rest in after)
        in_list = not after
    return out
