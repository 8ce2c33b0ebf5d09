"""What every message between a session and its workers is, a request or an answer, and what several speak of."""

from __future__ import annotations

from typing import Generic, TypeAlias, TypeVar

import msgspec

from attnbench.plugin import Value

Columns: TypeAlias = dict[str, float | str | bool | None]
"""Figures of a cell, by their column of a record."""


class Choice(msgspec.Struct, frozen=True):
    """An option of a plugin or a cache: see `plugin.Option`."""

    default: Value
    help: str
    choices: tuple[Value, ...]


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What a worker says."""


A_co = TypeVar("A_co", bound=Answer, covariant=True)


class Request(msgspec.Struct, Generic[A_co], frozen=True, tag=True):
    """What a session asks, to be answered by an A_co or a `Failure`."""
