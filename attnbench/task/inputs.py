"""The inputs of a workload: drawn from its distribution and seed, or taken from a model (see `captured`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from random import Random

import torch
from torch import Tensor

from attnbench.task import captured
from attnbench.workload import Workload

# FlashAttention-3 (Shah 2024, section 4.3): N(0, 1) + N(0, 100) * Bernoulli(0.001).
_OUTLIER_DEVIATION, _OUTLIER_SHARE = 10.0, 0.001


def shapes(workload: Workload, gates: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Shapes of what the timed call gets: query, key, value and gates; for a block x and, for a decoder, memory.

    x is (batch, seq, width), memory (batch, kv_seq, width). Decoding, keys, values and gates are those of new tokens,
    and a decoder has its memory already. Sinks are (heads,), behind them. Training, the gradient of the output is the
    last one.
    """
    w = workload
    if w.scope == "block":
        out: tuple[int, ...] = (w.batch, w.seq, w.width)
        found = [out, (w.batch, w.kv_seq, w.width)] if w.block == "decoder" and not w.decodes else [out]
    else:
        out = (w.batch, w.heads, w.seq, w.value_dim)
        found = [(w.batch, w.heads, w.seq, w.head_dim), *_token_shapes(w, w.new, gates)]
        found += [(w.heads,)] if w.sinks else []
    return [*found, out] if w.trains else found


def past(workload: Workload, gates: Sequence[int], layer: int) -> list[Tensor]:
    """Key, value and gates of the tokens that a decoding step of scope attention finds there, in one layer."""
    tensors = [_empty(workload, shape) for shape in _token_shapes(workload, workload.past, gates)]
    if workload.activations:
        fill(tensors[2:], workload, -1 - layer, first=3)
        captured.fill_past(tensors[:2], workload)
        return tensors
    long = [workload.on_host and tensor.numel() > _DRAWN for tensor in tensors]
    drawn = [x.new_empty(_DRAWN) if is_long else x for x, is_long in zip(tensors, long, strict=True)]
    fill(drawn, workload, -1 - layer)
    places = Random((workload.seed << 20) + layer)
    for tensor, pool, is_long in zip(tensors, drawn, long, strict=True):
        if is_long:
            _patch(tensor.view(-1), pool, places)
    return tensors


_DRAWN, _PIECE = 1 << 22, 65_521  # values of a past that are drawn; of a longer one pieces are copied from among them


def _patch(tensor: Tensor, pool: Tensor, places: Random) -> None:
    """Fills a long tensor, (values,), with pieces of the pool that begin anywhere: drawing takes ten times as long.

    A piece has a prime number of values, so that the vectors of two pieces are hardly ever cut alike.
    """
    for at in range(0, len(tensor), _PIECE):
        piece = tensor[at : at + _PIECE]
        start = places.randrange(len(pool) - len(piece) + 1)
        torch.mul(pool[start : start + len(piece)], places.choice((1, -1)), out=piece)


def _token_shapes(w: Workload, length: int, gates: Sequence[int]) -> list[tuple[int, ...]]:
    return [(w.batch, w.kv_heads, length, n) for n in (w.head_dim, w.value_dim, *gates)]


def fill(tensors: Sequence[Tensor], workload: Workload, draw: int, first: int = 0) -> None:
    """Overwrites the tensors with the `draw`-th set of values of this workload. first: the place of the first one.

    A model gives query, key and value; gates, and in training the output's gradient, are drawn.

    Raises:
        AttnbenchError: the model's activations were not captured.
    """
    if workload.activations and not first:
        captured.fill(tensors[:3], workload, draw)
        tensors, first = tensors[3:], 3
    for i, tensor in enumerate(tensors, first):
        # CUDA draws on its own device; every plugin still sees the same values for the same draw.
        generator = torch.Generator(tensor.device).manual_seed(((workload.seed << 20) + (draw << 4) + i) % (1 << 63))
        tensor.normal_(generator=generator)
        if workload.inputs == "outlier":
            hit = torch.empty_like(tensor, dtype=torch.float32).uniform_(generator=generator) < _OUTLIER_SHARE
            noise = torch.empty_like(tensor).normal_(std=_OUTLIER_DEVIATION, generator=generator)
            tensor.add_(noise.mul_(hit))


def empty(workload: Workload, gates: Sequence[int] = (), strided: bool = False) -> list[Tensor]:
    """Tensors of the right shapes, dtype and device, not filled yet.

    strided: those of heads as a block hands them on, views of (batch, length, heads, dim).
    """
    if not strided or workload.scope == "block":
        return [_empty(workload, shape) for shape in shapes(workload, gates)]
    plain = empty(workload, gates)
    return [x if x.ndim == 1 else x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]


def _empty(workload: Workload, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, workload.dtype), device=workload.device)


_LINE, _PLACES = 128, 1024  # bytes between the places at which a tensor may begin, and how many places there are
_PERIOD, _ALTERED, _FEW = 4096, 512, 64  # elements, and how many of so many `alter` changes, or changes `few` of
_SOME = 8  # times so many elements, where what changed is looked for in passing
_VIEWS = 128  # of each tensor; further calls get them in other combinations
_SETS = _VIEWS**2


class Pools:
    """The values that calls see, each call through views of its own that begin at places of their own.

    So no call is given what another was, and what was computed for one answers no other. Nothing is copied in between,
    and the same memory stays in the caches. Places and values come from numbers that only who asks for the calls knows.
    """

    _pools: list[Tensor]
    _values: list[Tensor]

    def __init__(self, workload: Workload, gates: Sequence[int] = ()) -> None:
        self._workload, self._shapes = workload, shapes(workload, gates)
        self._step = _LINE // workload.itemsize
        self._strides = [_strides(shape) for shape in self._shapes]
        sizes = [-(-(prod(shape) + _PLACES * self._step) // _PERIOD) for shape in self._shapes]
        self._pools = [_empty(workload, (size, _PERIOD)) for size in sizes]
        self._values = [_empty(workload, (size, _PERIOD)) for size in sizes]

    def draw(self, number: int) -> None:
        """All values."""
        fill(self._values, self._workload, number)
        for pool, values in zip(self._pools, self._values, strict=True):
            pool.copy_(values)

    def alter(self, number: int, few: bool = False) -> None:
        """Some of the values, so that who knows a call's tensors by where they are or by a look at them is mistaken.

        The others stay as calls have left them: what was written there shows. few: so few that a look at some values
        hardly meets one of them, and enough to tell an output that was kept from the right one.
        """
        altered = _FEW if few else _ALTERED
        columns = torch.tensor(Random(number).sample(range(_PERIOD), altered), device=self._workload.device)
        drawn = [values.new_empty(len(values), altered) for values in self._values]
        fill(drawn, self._workload, number)
        for pool, values, some in zip(self._pools, self._values, drawn, strict=True):
            values[:, columns] = some
            pool.data[:, columns] = some  # a tensor's version does not tell of it

    def views(self, count: int, number: int) -> list[list[Tensor]]:
        """Tensors for so many calls, contiguous and of the right shapes; the same number gives the same places.

        No two calls get the same, up to `_SETS`, which is the most. The first call's are the same for any count.
        """
        count = min(count, _SETS)
        few, made = min(count, _VIEWS), []
        for i in range(len(self._pools)):
            drawn = Random(f"{number}/{i}")
            first, further = drawn.randrange(_PLACES), drawn.sample(range(1, _PLACES), few - 1)
            made.append([self._view(i, (first + place) % _PLACES) for place in (0, *further)])
        return [[views[(n + i * (n // few)) % few] for i, views in enumerate(made)] for n in range(count)]

    def _view(self, i: int, place: int) -> Tensor:
        return self._pools[i].as_strided(self._shapes[i], self._strides[i], place * self._step)

    def touch(self) -> None:
        """Reads all values once: what others did meanwhile has taken them out of the caches."""
        for pool in self._pools:
            if pool.numel():
                pool.view(torch.int32).amax()

    def are_changed(self, number: int | None = None) -> bool:
        """Whether a call has written into them; with a number only of some of them, which it says."""
        for pool, values in zip(self._pools, self._values, strict=True):
            some = slice(None) if number is None else Random(number).sample(range(len(pool)), min(_SOME, len(pool)))
            if not torch.equal(pool[some], values[some]):
                return True
        return False


class Sets(Pools):
    """The same of what a model gave: some sets of inputs that lie one behind the other.

    Values that were shifted by a little would be no model's any more, so a call's views begin at another head: they are
    the heads of a set and, behind its last one, those of the next. Decoding, each head has its own past, so there they
    begin at another set. Where `Pools` alters some values, all are drawn anew.
    """

    def __init__(self, workload: Workload, gates: Sequence[int] = ()) -> None:
        self._workload, self._shapes = workload, shapes(workload, gates)
        self._strides = [_strides(shape) for shape in self._shapes]
        sets, self._written = captured.sets(workload), False
        self._pools = [_empty(workload, (sets * workload.batch, *_of_entry(shape))) for shape in self._shapes]
        self._values = [torch.empty_like(pool) for pool in self._pools]
        own = workload.batch * workload.kv_heads
        self._starts = range(0, (sets - 1) * own + 1, own if workload.decodes else 1)

    def alter(self, number: int, few: bool = False) -> None:
        self._written |= self.are_changed()
        fill(self._values, self._workload, number)
        for pool, values in zip(self._pools, self._values, strict=True):
            pool.data.copy_(values)

    def views(self, count: int, number: int) -> list[list[Tensor]]:
        """As `Pools.views`, but that calls get the same again after all sets, or all heads, have been given."""
        places = Random(number).sample(self._starts, len(self._starts))[:count]
        made = [[self._view(i, place) for i in range(len(self._pools))] for place in places]
        return [made[n % len(made)] for n in range(min(count, _SETS))]

    def _view(self, i: int, place: int) -> Tensor:
        each = prod(_of_entry(self._shapes[i])) // self._workload.kv_heads
        return self._pools[i].as_strided(self._shapes[i], self._strides[i], place * each)

    def are_changed(self, number: int | None = None) -> bool:
        return self._written or super().are_changed(number)


def _of_entry(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(heads, length, dim), or (heads,) of sinks."""
    return shape[1:] if len(shape) > 1 else shape


def pools(workload: Workload, gates: Sequence[int] = ()) -> Pools:
    """The values that calls of this workload see."""
    return (Sets if workload.activations else Pools)(workload, gates)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor that is contiguous."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
