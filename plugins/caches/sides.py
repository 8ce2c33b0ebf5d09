"""What the caches are put together from: a `Side` keeps the keys of a layer, or its values, in some form.

All it keeps is a function of the tokens so far, however they came: in one go or one by one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from attnbench.cache import Kept, KVCache, State
from attnbench.plugin import Option

FULL = torch.bfloat16  # of tokens that are kept in full
Narrowed: TypeAlias = "tuple[Tensor, ...]"


class Side(Protocol):
    """Keys or values: tokens (batch, kv_heads, n, dim) join what is kept; `read` gives all of them back, as floats."""

    def start(self, x: Tensor) -> State: ...

    def append(self, state: State, x: Tensor) -> State: ...

    def read(self, state: State) -> Tensor: ...


@dataclass(frozen=True)
class Full:
    """As they are, in `dtype`; None: in the model's."""

    dtype: torch.dtype | None = FULL

    def start(self, x: Tensor) -> Tensor:
        return x.to(self.dtype or x.dtype)

    def append(self, state: Tensor, x: Tensor) -> Tensor:
        return torch.cat((state, x.to(state.dtype)), 2)

    def read(self, state: Tensor) -> Tensor:
        return state


@dataclass(frozen=True)
class Codes:
    """Made narrow on arrival, and never touched again.

    narrow: float32 (batch, kv_heads, n, dim) to tensors whose third dimension goes with the tokens: one each, or one
        for a group of them, in which they must then come. widen: these and dim -> float32 as it came.
    """

    narrow: Callable[[Tensor], Narrowed]
    widen: Callable[[Narrowed, int], Tensor]

    def start(self, x: Tensor) -> tuple[Narrowed, int]:
        return self.narrow(x.float()), x.shape[-1]

    def append(self, state: tuple[Narrowed, int], x: Tensor) -> tuple[Narrowed, int]:
        kept, dim = state
        new = self.narrow(x.float())
        return tuple(torch.cat(pair, 2) for pair in zip(kept, new, strict=True)), dim

    def read(self, state: tuple[Narrowed, int]) -> Tensor:
        return self.widen(*state)


@dataclass(frozen=True)
class Late:
    """The last tokens stay in full: `due` says how many of n have gone on into `side`, never fewer than before."""

    side: Side
    due: Callable[[int], int]

    def start(self, x: Tensor) -> State:
        return self.side.start(x), x.to(FULL), 0

    def append(self, state: State, x: Tensor) -> State:
        inner, rest, gone = state
        rest = torch.cat((rest, x.to(rest.dtype)), 2)  # (batch, kv_heads, waiting, dim)
        if now := self.due(gone + rest.shape[2]) - gone:
            inner, rest = self.side.append(inner, rest[:, :, :now]), rest[:, :, now:].clone()
        return inner, rest, gone + now

    def read(self, state: State) -> Tensor:
        inner, rest, _ = state
        return torch.cat((self.side.read(inner), rest.float()), 2)


@dataclass(frozen=True)
class Turned:
    """Kept after an orthogonal matrix (dim, dim), read back before it: a large number is spread over all of its row."""

    side: Side
    matrix: Callable[[int], Tensor]

    def start(self, x: Tensor) -> State:
        return self.side.start(x.float())

    def append(self, state: State, x: Tensor) -> State:
        return self.side.append(state, x.float() @ self._of(x))

    def read(self, state: State) -> Tensor:
        x = self.side.read(state).float()
        return x @ self._of(x).mT

    def _of(self, x: Tensor) -> Tensor:
        return self.matrix(x.shape[-1]).to(x.device)


@dataclass(frozen=True)
class Fitted:
    """Kept after a change that is fitted to the first `tokens`, which wait in full until there are so many.

    fit: what is fitted to them, float32 of any shape, from (batch, kv_heads, tokens, dim). before, after: a change of
        tokens by that, and its way back.
    """

    side: Side
    tokens: int
    fit: Callable[[Tensor], Tensor]
    before: Callable[[Tensor, Tensor], Tensor]
    after: Callable[[Tensor, Tensor], Tensor]

    def start(self, x: Tensor) -> State:
        return self.side.start(x), x.to(FULL), None

    def append(self, state: State, x: Tensor) -> State:
        inner, rest, fitted = state
        x = x.to(FULL)  # all of them, as some have to wait in that
        if fitted is None:
            rest = torch.cat((rest, x), 2)
            if rest.shape[2] < self.tokens:
                return inner, rest, None
            fitted = self.fit(rest[:, :, : self.tokens].float())
            x, rest = rest, rest[:, :, :0].clone()
        return self.side.append(inner, self.before(x.float(), fitted)), rest, fitted

    def read(self, state: State) -> Tensor:
        inner, rest, fitted = state
        return rest if fitted is None else self.after(self.side.read(inner).float(), fitted)


def smoothed(side: Side, tokens: int) -> Fitted:
    """Less the mean of the first tokens."""
    return Fitted(side, tokens, lambda x: x.mean(2, keepdim=True), torch.sub, torch.add)


ONE_SIDE: Mapping[str, Option] = {
    "keys": Option(True, "whether keys are kept so; else in bfloat16"),
    "values": Option(True, "whether values are kept so; else in bfloat16"),
}


class TwoSides(KVCache):
    """A cache that keeps every token, keys and values each in a form of their own."""

    options: ClassVar[Mapping[str, Option]] = ONE_SIDE
    keys: bool = True
    values: bool = True

    @abstractmethod
    def sides(self) -> tuple[Side, Side]:
        """Of keys and of values, where both are kept so."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        key, value = self.sides()
        self._key = key if self.keys else Full()
        self._value = value if self.values else Full()

    def start(self, key: Tensor, value: Tensor) -> State:
        return self._key.start(key), self._value.start(value)

    def append(self, state: State, key: Tensor, value: Tensor) -> State:
        return self._key.append(state[0], key), self._value.append(state[1], value)

    def read(self, state: State) -> Kept:
        return Kept(self._key.read(state[0]), self._value.read(state[1]))
