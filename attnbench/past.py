"""What a plain KV cache keeps of the tokens before, of a batch whose entries are alike or each as long as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from attnbench.errors import AttnbenchError
from attnbench.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor


class Cache(NamedTuple):
    """Keys (batch, kv_heads, capacity, head_dim) and values (.., capacity, value_dim), of which `length` are there."""

    key: Tensor
    value: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int) -> Cache:
        """A cache with these in it, and room for `capacity` tokens in all."""
        rooms = [x.new_empty(*x.shape[:2], capacity, x.shape[-1]) for x in (key, value)]
        return cls(rooms[0], rooms[1], 0).append(key, value)

    def append(self, key: Tensor, value: Tensor) -> Cache:
        """With these behind what is there, written in place: no key is copied twice.

        Raises:
            AttnbenchError: there is no room for them.
        """
        end = self.length + key.shape[2]
        if end > self.key.shape[2]:
            raise AttnbenchError(f"a cache of {self.key.shape[2]} tokens has no room for {end}")
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        return Cache(self.key, self.value, end)

    @property
    def keys(self) -> Tensor:
        return self.key[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self.value[:, :, : self.length]


class _Ragged(NamedTuple):
    """As `Cache`, of entries of which each has so many of `lengths`, from its first row on."""

    key: Tensor
    value: Tensor
    lengths: tuple[int, ...]

    def append(self, key: Tensor, value: Tensor, counts: Sequence[int]) -> _Ragged:
        """With the first so many of each entry behind what is there, written in place."""
        ends = tuple(at + count for at, count in zip(self.lengths, counts, strict=True))
        for b, (at, end) in enumerate(zip(self.lengths, ends, strict=True)):
            self.key[b, :, at:end] = key[b, :, : end - at]
            self.value[b, :, at:end] = value[b, :, : end - at]
        return _Ragged(self.key, self.value, ends)


def ragged(
    workload: Workload, call: Callable[..., Tensor]
) -> tuple[Callable[..., _Ragged], Callable[..., tuple[Tensor, Any]]]:
    """How a ragged batch's new tokens join their pasts: `start` and `step` of a `plugin.Decoding`.

    call: (query, key, value) -> out, which takes all entries, padded.
    """
    w, entries = workload, workload.entries()
    past, new = [entry.past for entry in entries], [entry.new for entry in entries]

    def start(key: Tensor, value: Tensor, capacity: int) -> _Ragged:
        rooms = [x.new_zeros(*x.shape[:2], max(capacity, w.kv_seq), x.shape[-1]) for x in (key, value)]
        return _Ragged(rooms[0], rooms[1], (0,) * w.batch).append(key, value, past)

    def step(state: _Ragged, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, _Ragged]:
        state = state.append(key, value, new)
        return call(query, *(x[:, :, : w.kv_seq] for x in (state.key, state.value))), state

    return start, step
