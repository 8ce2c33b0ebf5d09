"""What a wrong output is the right answer to: the mistakes that are made most, told by trying each in float64.

A hint tells nothing of what is right, which is `values`' to say; it is looked for in small problems of exact attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnbench.judge import deviation
from attnbench.workload import Workload

_BLOCKS = (16, 32, 64, 128)
_CLEAR = 4  # times as near as to what is right


@dataclass(frozen=True)
class _Way:
    """Attention in some way. heads: the key head of each query head. keys: how many. padded: further ones of 0.

    bias: (heads, seq, kv_seq), added to scores; None for none.
    """

    scale: float
    offset: int
    heads: Tensor
    keys: int
    padded: int = 0
    dim: int = -1
    bias: Tensor | None = None
    unweighted: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k, v = (x[:, self.heads, : self.keys].double() for x in (key, value))  # (batch, heads, keys, dim)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, self.padded)) for x in (k, v))
        rows, at = torch.arange(query.shape[2])[:, None], torch.arange(k.shape[2])
        hidden = ((at > rows + self.offset) & (at < self.keys)).to(query.device)  # (seq, keys)
        scores = query.double() @ k.mT * self.scale  # (batch, heads, seq, keys)
        if self.bias is not None:
            scores += torch.nn.functional.pad(self.bias[..., : self.keys], (0, self.padded)).to(scores.device)
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.unweighted:
            return scores.exp() @ v
        return scores.softmax(self.dim).nan_to_num() @ v  # (batch, heads, seq, value_dim)


def hint(workload: Workload, tensors: Sequence[Tensor], out: Tensor, family: str, off: float) -> str:
    """What the output is the right answer to, in a few words; "" where that isn't known.

    tensors: query, key and value, as in `Workload`. out: (batch, heads, seq, value_dim). off: its relative L2 error.
    """
    allowed = min(deviation.tolerance(workload, family), off / _CLEAR)
    for words, way in _ways(workload):
        should = way(*tensors)
        if deviation.compare(out, should).rel_l2 <= allowed:
            return words
    return ""


def _ways(w: Workload) -> Iterator[tuple[str, _Way]]:
    """The mistakes that would show in this workload."""
    far, each = w.kv_seq, torch.arange(w.heads)
    right = _Way(w.scale, w.offset if w.is_causal else far, each // w.group, w.kv_seq)
    if w.biased is not None:
        distance = torch.arange(w.kv_seq) - torch.arange(w.seq)[:, None] - w.offset  # (seq, kv_seq)
        right = replace(right, bias=w.biased(distance))
        yield from _biased_ways(w, right, distance)
    scales = {"1": 1.0, "1 / head_dim": 1 / w.head_dim, "1 / sqrt(head_dim)": w.head_dim**-0.5,
              "1 / sqrt(value_dim)": w.value_dim**-0.5,
              "sqrt(head_dim)": w.head_dim**0.5}  # fmt: skip
    for name, scale in scales.items():
        if abs(scale - w.scale) > 1e-3 * w.scale:
            yield f"scores times {name}", replace(right, scale=scale)
    if w.is_causal:
        yield "no causal mask", replace(right, offset=far)
        if w.offset:
            yield "a causal mask aligned top-left", replace(right, offset=0)
        yield "a causal mask that shows one key too many", replace(right, offset=w.offset + 1)
        yield "a causal mask that hides the last key it should show", replace(right, offset=w.offset - 1)
    if w.group > 1 and w.kv_heads > 1:
        yield "query head i on key head i % kv_heads", replace(right, heads=each % w.kv_heads)
        yield "all query heads on the first key head", replace(right, heads=each * 0)
    for block in _BLOCKS:
        if rest := w.kv_seq % block:
            if w.kv_seq > block:
                yield f"no keys behind the last whole {block}", replace(right, keys=w.kv_seq - rest)
            yield f"keys of 0 up to a multiple of {block}", replace(right, padded=block - rest)
    yield "softmax over the queries", replace(right, dim=-2)
    yield "weights that are not divided by their sum", replace(right, unweighted=True)


def _biased_ways(w: Workload, right: _Way, distance: Tensor) -> Iterator[tuple[str, _Way]]:
    assert right.bias is not None
    assert w.biased is not None
    yield "no bias", replace(right, bias=None)
    yield "a bias of the other sign", replace(right, bias=-right.bias)
    yield "a bias that is multiplied by the scale", replace(right, bias=w.scale * right.bias)
    if w.offset:
        yield "distances between a query's row and a key's", replace(right, bias=w.biased(distance + w.offset))
    if w.bias == "alibi" and w.heads & (w.heads - 1):
        slope = 2.0 ** (-8 * torch.arange(1, w.heads + 1, dtype=torch.float64) / w.heads)  # (heads,)
        yield "slopes 2^(-8 i / heads), whatever the heads", replace(right, bias=slope[:, None, None] * -distance.abs())
    if w.bias == "relative":
        other = replace(w.biased, causal=not w.is_causal)
        yield f"the buckets of a {'full' if w.is_causal else 'causal'} mask", replace(right, bias=other(distance))
