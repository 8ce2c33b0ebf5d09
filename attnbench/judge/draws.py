"""Values and places of a call's tensors that tame ones hide a mistake in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGE = 40.0  # times a query: scores of a hundred and more, beyond what float32's exponential holds
_HUGE = 1e4  # the largest score
_TINY = 2.0**-133  # times a query and a key: below the smallest number of float32 and bfloat16 with all its digits


@dataclass(frozen=True)
class Values:
    """What is made of query, key and value once they are drawn.

    what: in a few words. change: in place. blown: rounding is blown up by large scores, so that an answer need only be
    finite and about right, and in half precision in the hull of the values.
    """

    what: str
    change: Callable[[Tensor, Tensor, Tensor], None]
    blown: bool = True


def _large(query: Tensor, key: Tensor, value: Tensor) -> None:
    query.mul_(_LARGE)


def _dominant(query: Tensor, key: Tensor, value: Tensor) -> None:
    key[:, :, 0] = 3.0 * query.mean((1, 2)).sign()[:, None]


def _alike(query: Tensor, key: Tensor, value: Tensor) -> None:
    key.copy_(key[:, :, :1].expand_as(key))


def _huge(query: Tensor, key: Tensor, value: Tensor) -> None:
    shared = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    most = (query.float() @ shared.mT).abs().max() * query.shape[-1] ** -0.5
    query.copy_(query.float() * (_HUGE / most))


def _hidden(query: Tensor, key: Tensor, value: Tensor) -> None:
    """The last key, which a causal mask hides from all queries but the last."""
    key[:, :, -1] = 20.0 * query.mean((1, 2)).sign()[:, None]
    value[:, :, -1].mul_(_LARGE)


def _zero(query: Tensor, key: Tensor, value: Tensor) -> None:
    query.zero_()
    key.zero_()


def _tiny(query: Tensor, key: Tensor, value: Tensor) -> None:
    query.copy_(query.double() * _TINY)
    key.copy_(key.double() * _TINY)


VALUES = {
    "large": Values("large scores", _large),
    "dominant": Values("a key that stands out", _dominant),
    "alike": Values("keys that are all alike", _alike),
    "huge": Values("scores up to 1e4 either way", _huge),
    "hidden": Values("a hidden key that stands out", _hidden),
    "zero": Values("queries and keys of 0", _zero, blown=False),
    "tiny": Values("queries and keys of denormal numbers", _tiny, blown=False),
}
"""By the word for them in a case."""


@dataclass(frozen=True)
class Laid:
    """Tensors as a call gets them; `fill` gives them values. Whatever lies around them is NaN and must stay that.

    whole: the memory that each is a view of; None where it fills all of it.
    """

    views: list[Tensor]
    own: list[Tensor]
    whole: list[Tensor | None]

    def fill(self, values: Sequence[Tensor]) -> None:
        """values: contiguous, of the same shapes; of what is expanded the first of each head and batch entry count."""
        for own, value in zip(self.own, values, strict=True):
            own.copy_(value[tuple(slice(n) for n in own.shape)])

    def surroundings(self) -> list[Tensor]:
        """Each piece of memory as it is, to be compared with later."""
        return [whole.clone() for whole in self.whole if whole is not None]

    def overrun(self, before: Sequence[Tensor]) -> bool:
        """Whether a call has written beside the tensors that it got, or into them."""
        now = (whole for whole in self.whole if whole is not None)
        return not all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(now, before, strict=True))


_BESIDE = 5  # rows of NaN before and behind


def _contiguous(like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.empty_like(like)
    return x, x, None


def _transposed(like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """As a block hands them on: a view of (batch, length, heads, dim)."""
    x = torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return x, x, None


def _slice(like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """As of a cache that is longer: rows of NaN before and behind."""
    batch, heads, length, dim = like.shape
    whole = like.new_full((batch, heads, length + 2 * _BESIDE, dim), float("nan"))
    x = whole[:, :, _BESIDE : _BESIDE + length]
    return x, x, whole


def _columns(like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Neighbours of a row are not neighbours in memory."""
    whole = like.new_full((*like.shape[:-1], 2 * like.shape[-1]), float("nan"))
    x = whole[..., ::2]
    return x, x, whole


def _expanded(like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """One head for all heads and batch entries, with strides of 0."""
    one = like.new_empty((1, 1, *like.shape[2:]))
    return one.expand_as(like), one, None


LAYS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "slice": _slice,
    "columns": _columns,
    "expanded": _expanded,
}
"""How tensors (batch, heads, length, dim) lie, by the word for it in a case: the view, what of it is filled, and what
it is a view of."""


def lay(like: Sequence[Tensor], how: str) -> Laid:
    """Memory for tensors like these, which lie in a certain way; sinks, (heads,), in the one that there is."""
    views, own, whole = zip(*(LAYS[how if x.ndim == 4 else "contiguous"](x) for x in like), strict=True)
    return Laid(list(views), list(own), list(whole))
