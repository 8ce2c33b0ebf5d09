"""The contract of a KV cache: what is kept of a layer's keys and values, in how many bytes, and what is read back.

A cache is a subclass of `KVCache` and an entry point in the group `attnbench.caches`. It is judged as a decoder uses
it: tokens join what is kept, in chunks; the queries of a chunk read everything through the cache, their own chunk too;
then the cache may let go of tokens. What is kept lies in tensors, whose memory is what the harness counts: a format has
the bits that it takes, scales, zero points and all.

Keys come as attention multiplies them, after RoPE (Su 2021, arXiv 2104.09864): a token stays where it was written, also
where others before it are gone. KIVI quantizes keys there too; KVQuant (Hooper 2024, arXiv 2401.18079) before RoPE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from attnbench.plugin import Configured, Plugin
from attnbench.workload import Workload

if TYPE_CHECKING:
    from torch import Tensor

State: TypeAlias = Any
"""Tensors, in tuples, lists or dicts; beside them numbers and None, which count as nothing."""


@dataclass(frozen=True)
class Kept:
    """What a layer has to attend to.

    key: (batch, kv_heads, kept, head_dim); value: (batch, kv_heads, kept, value_dim); of any float dtype.
    positions: which tokens they are, int64 (batch, kv_heads, kept) or (kept,); None: all so far, in order.
    """

    key: Tensor
    value: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What decodes from the packed form: a variant, and the step that it then has to do.

    workload: as asked, or with a shorter kv_seq where the cache keeps fewer tokens.
    """

    plugin: Plugin
    workload: Workload


class KVCache(Configured):
    """What is kept of the keys and values of a layer. Its name is that of its entry point; options become attributes.

    It may hold what no token changes (a rotation, levels); whatever depends on tokens belongs into the state.
    """

    family: ClassVar[str] = "quantized"
    """"exact", "quantized" or "sparse": what it gives up."""

    weighs: ClassVar[bool] = False
    """Whether `settle` wants to know how much attention was paid to each key."""

    def start(self, key: Tensor, value: Tensor) -> State:
        """A layer that keeps nothing yet. key, value: of no tokens, (batch, kv_heads, 0, dim), in the model's dtype."""
        raise NotImplementedError(f"{type(self).__name__} has no start")

    def append(self, state: State, key: Tensor, value: Tensor) -> State:
        """With new tokens behind what is kept: key (batch, kv_heads, new, head_dim), value (.., new, value_dim).

        The state that came in stays as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} has no append")

    def read(self, state: State) -> Kept:
        """What queries see, the tokens that were appended last behind all others."""
        raise NotImplementedError(f"{type(self).__name__} has no read")

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """Which keys a query sees beside those that come after it; None: all that are kept.

        queries, keys: positions, int64 and broadcastable. A cache that lets go of tokens at a chunk's end hides here
        from each query of the chunk what it would have let go of by then, token by token.
        """
        return None

    def settle(self, state: State, weights: Tensor | None) -> State:
        """After the new tokens' queries have read: what is kept from here on.

        weights: with `weighs`, what they paid to each key that was read, float32 (batch, kv_heads, kept): the sum over
        queries and over the heads that share the key.
        """
        return state

    def step(self, workload: Workload) -> Step | str:
        """What decodes from this form without widening it first; or in a few words why nothing does.

        workload: phase decode, one new token for `kv_seq` of them, in the model's dtype.
        """
        return "no kernel reads this form"


def tensors(state: State) -> Iterator[Tensor]:
    """All tensors of a state."""
    if hasattr(state, "untyped_storage"):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from tensors(part)
    elif isinstance(state, tuple | list):
        for part in state:
            yield from tensors(part)


def kept_bytes(state: State) -> int:
    """The memory that a state holds: what tensors share counts once, and what a view keeps alive counts whole."""
    held = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors(state)}
    return sum(held.values())
