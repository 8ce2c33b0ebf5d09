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
from attnbench.plugin import Attention, Decoding, Implementation, visible
from attnbench.workload import Workload

from ..native import attention as kernels
from ..native import compiler
from ..pieces import parts
from .quantization import quantize

KEYS = 4096  # keys widened at a time


class Int8Cache(NamedTuple):
    """int8 (batch, kv_heads, capacity, dim) of keys and values, their float32 scales (.., capacity, 1), and the mean.

    mean: float32 (batch, kv_heads, 1, head_dim). length: how many tokens are there.
    """

    key: Tensor
    key_scale: Tensor
    value: Tensor
    value_scale: Tensor
    mean: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int) -> Int8Cache:
        """A cache with these tokens in it, and room for `capacity` in all."""
        shape = (*key.shape[:2], capacity)
        made = [
            key.new_empty(*shape, n, dtype=dtype)
            for x in (key, value)
            for n, dtype in ((x.shape[-1], torch.int8), (1, torch.float32))
        ]
        return cls(made[0], made[1], made[2], made[3], past_mean(key), 0).append(key, value)

    def append(self, key: Tensor, value: Tensor) -> Int8Cache:
        """With these tokens quantized behind what is there, in place.

        Raises:
            AttnbenchError: there is no room for them.
        """
        end = self.length + key.shape[2]
        if end > self.key.shape[2]:
            raise AttnbenchError(f"a cache of {self.key.shape[2]} tokens has no room for {end}")
        new = slice(self.length, end)
        for x, to, scale in (
            (key.float() - self.mean, self.key, self.key_scale),
            (value.float(), self.value, self.value_scale),
        ):
            to[:, :, new], scale[:, :, new] = quantize(x, 1)
        return self._replace(length=end)


def past_mean(key: Tensor) -> Tensor:
    """K's mean over tokens (batch, kv_heads, 1, head_dim) in float32; 0 where there is none yet."""
    return key.sum(2, keepdim=True, dtype=torch.float32) / max(1, key.shape[2])


def operands(workload: Workload, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the cache makes of query, key and value, in float64: the definition of what a step computes."""
    smooth = key.float() - past_mean(key[:, :, : workload.past])  # (batch, kv_heads, kv_seq, head_dim)
    narrow = (quantize(x, 1) for x in (query.float(), smooth, value.float()))
    q, k, v = (x8.double() * scale.double() for x8, scale in narrow)  # each of its input's shape
    return q, k, v


Reader: TypeAlias = Callable[[Int8Cache, Tensor], Tensor]
"""The cache, and new queries (batch, heads, seq, head_dim) that see it -> (batch, heads, seq, value_dim)."""


def implementations() -> Sequence[Implementation]:
    """What computes a step: the C++ kernel for bfloat16 on a CPU that has what it needs, else torch."""

    def unsupported(workload: Workload) -> str | None:
        return kernels.unsupported(workload, "decode_int8.cpp")

    def native(workload: Workload) -> Decoding:
        decode = kernels.int8_decoder(compiler.load("decode_int8.cpp").decode_int8, workload)

        def read(cache: Int8Cache, query: Tensor) -> Tensor:
            key, value = (cache.key, cache.key_scale), (cache.value, cache.value_scale)
            return decode(quantize(query.float(), 1), key, value)

        return _decoding(read, "C++ AVX512-VNNI")

    def plain(workload: Workload) -> Decoding:
        return _decoding(partial(in_torch, workload), "plain torch")

    return (
        Implementation("avx512", _no_call, unsupported, decoding=native),  # what it holds is little
        Implementation("torch", _no_call, workspace_bytes=_torch_bytes, decoding=plain),
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
    w = workload
    q8, q_scale = quantize(query.reshape(w.batch, w.kv_heads, w.group * w.seq, w.head_dim).float(), 1)
    q, rows = q8.float(), torch.arange(w.seq, device=query.device)  # (batch, kv_heads, group * seq, head_dim), (seq,)
    scores = query.new_empty(*q.shape[:3], cache.length, dtype=torch.float32)  # (batch, kv_heads, group * seq, length)
    for part in parts(cache.length, KEYS):
        scores[..., part] = q @ cache.key[:, :, part].float().mT  # (batch, kv_heads, group * seq, keys)
    scores *= (q_scale * w.scale) * cache.key_scale[:, :, : cache.length].mT
    if w.is_causal and w.seq > 1:
        hidden = visible(w, rows[:, None], torch.arange(cache.length, device=query.device)).logical_not_()
        scores.view(w.batch, w.kv_heads, w.group, w.seq, -1).masked_fill_(hidden, -torch.inf)  # hidden: (seq, length)
    weights = torch.softmax(scores, -1) * cache.value_scale[:, :, : cache.length].mT  # as scores
    out = query.new_zeros(*q.shape[:3], w.value_dim, dtype=torch.float32)  # (batch, kv_heads, group * seq, value_dim)
    for part in parts(cache.length, KEYS):
        out += weights[..., part] @ cache.value[:, :, part].float()
    return out.to(query.dtype).view(w.batch, w.heads, w.seq, w.value_dim)
