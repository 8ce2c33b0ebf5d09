"""int8 attention's memory of the past: keys and values in 8 bits with a scale for each token, half of what bf16 takes.

Keys are smoothed by the mean over the first tokens, those that the cache is made from: tokens that come later find the
mean fixed, as their integers could not follow it. Subtracting any one vector from all keys leaves softmax as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Cache, Decoding, Implementation
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler
from ..pieces import hidden, parts
from .quantization import quantize

KEYS = 4096  # keys widened at a time


class Int8Cache(NamedTuple):
    """A cache of int8 keys and values, one of their float32 scales (.., capacity, 1), and the mean.

    mean: float32 (batch, kv_heads, 1, head_dim).
    """

    integers: Cache
    scales: Cache
    mean: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int) -> Int8Cache:
        """A cache with these tokens in it, and room for `capacity` in all."""
        mean = past_mean(key)
        (k8, k_scale), (v8, v_scale) = _narrow(key, value, mean)
        return cls(Cache.of(k8, v8, capacity), Cache.of(k_scale, v_scale, capacity), mean)

    def append(self, key: Tensor, value: Tensor) -> Int8Cache:
        """With these tokens quantized behind what is there, as `Cache.append`."""
        (k8, k_scale), (v8, v_scale) = _narrow(key, value, self.mean)
        return Int8Cache(self.integers.append(k8, v8), self.scales.append(k_scale, v_scale), self.mean)


def _narrow(key: Tensor, value: Tensor, mean: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Key less the mean, and value, as int8 (.., length, dim) with scales (.., length, 1)."""
    return [quantize(x, 1) for x in (key.float() - mean, value.float())]


def past_mean(key: Tensor) -> Tensor:
    """K's mean over tokens (batch, kv_heads, 1, head_dim) in float32; 0 where there is none yet."""
    return key.sum(2, keepdim=True, dtype=torch.float32) / max(1, key.shape[2])


def operands(workload: Workload, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the cache makes of query, key and value, in float64: the definition of what a step computes."""
    narrow = [quantize(query.float(), 1), *_narrow(key, value, past_mean(key[:, :, : workload.past]))]
    q, k, v = (x8.double() * scale.double() for x8, scale in narrow)  # each of its input's shape
    return q, k, v


Reader: TypeAlias = Callable[[Int8Cache, Tensor], Tensor]
"""The cache, and new queries (batch, heads, seq, head_dim) that see it -> (batch, heads, seq, value_dim)."""


def implementations() -> Sequence[Implementation]:
    """What computes a step: the C++ kernel on a CPU that has what it needs, else torch."""

    def unsupported(workload: Workload) -> str | None:
        return kernels.unsupported(workload, "decode_int8.cpp")

    def native(workload: Workload) -> Decoding:
        decode = kernels.int8_decoder(compiler.load("decode_int8.cpp", workload.dtype).decode_int8, workload)

        def read(cache: Int8Cache, query: Tensor) -> Tensor:
            integers, scales = cache.integers, cache.scales
            return decode(quantize(query.float(), 1), (integers.key, scales.key), (integers.value, scales.value))

        return _decoding(read, f"{kernels.described('float32')} in float32")

    def plain(workload: Workload) -> Decoding:
        return _decoding(partial(in_torch, workload), "plain torch")

    return (
        Implementation("native", _no_call, unsupported, decoding=native),  # what it holds is little
        Implementation("torch", _no_call, workspace_bytes=_torch_bytes, decoding=plain, emulated=True),  # as float32
    )


def _decoding(read: Reader, how: str) -> Decoding:
    """A step quantizes its own tokens alone."""

    def step(state: Int8Cache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Int8Cache]:
        state = state.append(key, value)
        return read(state, query), state

    return Decoding(Int8Cache.of, step, f"{how}, over an int8 cache of keys and values")


def _no_call(workload: Workload) -> Attention:
    raise AttnbenchError("an int8 cache is decoded from step by step")


def _torch_bytes(workload: Workload) -> int:
    w = workload
    wide = min(KEYS, w.kv_seq) * w.batch * w.kv_heads * max(w.head_dim, w.value_dim)
    return 4 * (3 * w.batch * w.heads * w.seq * w.kv_seq + wide)


def in_torch(workload: Workload, cache: Int8Cache, query: Tensor) -> Tensor:
    """A `Reader` in plain torch. Integers are multiplied as float32, which holds their sums exactly."""
    w, length, (key_scale, value_scale) = workload, cache.integers.length, (cache.scales.keys, cache.scales.values)
    q8, q_scale = quantize(query.reshape(w.batch, w.kv_heads, w.group * w.seq, w.head_dim).float(), 1)
    q = q8.float()  # (batch, kv_heads, group * seq, head_dim)
    scores = query.new_empty(*q.shape[:3], length, dtype=torch.float32)  # (batch, kv_heads, group * seq, length)
    for part in parts(length, KEYS):
        scores[..., part] = q @ cache.integers.key[:, :, part].float().mT  # (batch, kv_heads, group * seq, keys)
    scores *= (q_scale * w.scale) * key_scale.mT  # (.., group * seq, 1), (.., 1, length)
    if w.is_causal and w.seq > 1:
        scores.view(w.batch, w.kv_heads, w.group, w.seq, -1).masked_fill_(hidden(w), -torch.inf)
    weights = torch.softmax(scores, -1) * value_scale.mT  # as scores
    out = query.new_zeros(*q.shape[:3], w.value_dim, dtype=torch.float32)  # (batch, kv_heads, group * seq, value_dim)
    for part in parts(length, KEYS):
        out += weights[..., part] @ cache.integers.value[:, :, part].float()  # (batch, kv_heads, .., value_dim)
    return out.to(query.dtype).view(w.batch, w.heads, w.seq, w.value_dim)
