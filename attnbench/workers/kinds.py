"""What every message between a session and its workers is: a request, or an answer."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What a worker says."""


A_co = TypeVar("A_co", bound=Answer, covariant=True)


class Request(msgspec.Struct, Generic[A_co], frozen=True, tag=True):
    """What a session asks, to be answered by an A_co or a `Failure`."""
