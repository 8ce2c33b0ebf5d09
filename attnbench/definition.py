"""What a variant may define: the mathematical function that its implementation error is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Definition: softmax over the keys that are visible, of Q K^T * scale, times V.

    allowed: keys a query may see beside the workload's mask; gets broadcastable int64 row and key indices and
        returns a bool tensor, True where the key takes part. None allows all.
    operands: what the variant makes of query, key and value before it multiplies them, such as quantization.
        Gets and returns (query, key, value); what it returns is taken to float64 as it is. There may be more key and
        value heads than before, as many as query has, and other dims.
    smooth: operands can be differentiated, and gradients are held to what comes of that; one head of what it returns
        may be made of all heads that it gets.
    weights: what the variant makes of softmax's weights before it multiplies V by them, such as quantization: on
        float64 (.., rows, kv_seq), each row by itself. None leaves them as they are.
    chosen: keys a query may see beside those, where that hangs on what query and key hold: (query, key, rows) -> bool
        (batch, heads, n, kv_seq), True where the key takes part. Gets query (batch, heads, seq, head_dim) and key
        (batch, kv_heads, kv_seq, head_dim) whole, as the variant gets them or with the same numbers in float64, and the
        rows that are asked for, int64 (n,). It may be asked of some key heads and their query heads alone, and must say
        the same. A row must see a key at least. No gradient goes through it.

    A choice is sharp: where a score is rounded otherwise, another key is taken. So a variant calls the function that it
    gives as `chosen`, or what that is made of, and there the order of a sum must not show, nor how many rows are asked
    for: such as scores summed in float64, rounded to float32, and among equal ones the later key first.
    """

    allowed: Callable[[Tensor, Tensor], Tensor] | None = None
    operands: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    weights: Callable[[Tensor], Tensor] | None = None
    smooth: bool = False
    chosen: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Maps:
    """Definition: several softmax maps over the keys that are visible, each times its weight, added, times V.

    parts: of each map, what is made of a query and of a key before they are multiplied, on float64 tensors
        (..., head_dim) -> (..., n), and its weight. Scores are times the workload's scale.
    """

    parts: tuple[tuple[Callable[[Tensor], Tensor], float], ...]


@dataclass(frozen=True)
class FeatureMap:
    """Definition: phi(q) . sum phi(k) v^T / phi(q) . sum phi(k), over the keys that the workload's mask shows.

    query, key: phi for each side, on float64 tensors (..., head_dim) -> (..., features).
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Recurrence:
    """Definition: a state S (batch, kv_heads, head_dim, value_dim), 0 at first, that each token changes: out = q_t S_t.

    query, key: what is made of either side before, on float64 tensors (..., head_dim), such as a scale or a norm.
    update: (S, k_t, v_t, *gates_t) -> the next S, in float64; k_t (batch, kv_heads, head_dim), v_t (batch, kv_heads,
        value_dim), and of each gate (batch, kv_heads, n). Not in place: it is differentiated.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    update: Callable[..., Tensor]


@dataclass(frozen=True)
class Formula:
    """Definition: what none of the others can say, a function of all queries, keys and values of a key/value head.

    call: of float64 tensors (group, seq, head_dim), (kv_seq, head_dim) and (kv_seq, value_dim) to (group, seq,
        value_dim); it is differentiated. The workload's mask is its own affair.
    """

    call: Callable[[Tensor, Tensor, Tensor], Tensor]


Definition: TypeAlias = Softmax | Maps | FeatureMap | Recurrence | Formula
"""The mathematical function that a variant computes; the implementation error is measured against it."""
