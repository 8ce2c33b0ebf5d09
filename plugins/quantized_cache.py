"""The past in fewer bits: keys and values as integers or narrow floats, with scales, laid out as packed.h reads them.

Keys are smoothed by the mean over the first tokens, those that the cache is made from: tokens that come later find the
mean fixed, as what is kept could not follow it. Subtracting any one vector from all keys leaves softmax as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Decoding, Implementation, Option, built
from attnbench.workload import Workload

from .native import attention as kernels
from .native import compiler
from .pieces import hidden, parts
from .quantization import TINIEST, quantize
from .sdpa import Sdpa

KEYS = 4096  # keys widened at a time in torch
TILE = 16  # tokens, and columns, that lie together, as in packed.h
Kernel = Callable[..., int]
IMPL = Option("auto", "what computes a step", ("auto", "native", "torch"))


@dataclass(frozen=True)
class Format:
    """How numbers are kept: each divided by a scale, which is the peak of its group over `levels`, in bfloat16.

    source, name: what reads and writes it, decode_name and append_name of a source in native/.
    levels: the largest number.
    group: numbers of a row that share a scale; 0: all. bits: of a number.
    query_levels: where queries are quantized too, a row by its peak; 0: they are not.
    code, value: numbers, float32 of up to `levels`, to bytes; and back.
    """

    source: str
    name: str
    levels: float
    code: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    bits: int = 8
    group: int = 0
    query_levels: int = 0

    def narrow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, float32 (.., length, dim), as bytes (.., length, dim), one a number, and scales (.., length, groups)."""
        groups = _groups(x, self.group or x.shape[-1])  # (.., length, groups, group)
        peak = torch.maximum(groups.amax(-1), groups.amin(-1).neg_())  # (.., length, groups)
        scale = (peak.clamp_(min=TINIEST) / self.levels).bfloat16()
        numbers = (groups / scale.float()[..., None]).flatten(-2)[..., : x.shape[-1]]  # (.., length, dim)
        return self.code(numbers), scale

    def widen(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What `narrow` made, as float32 (.., length, dim)."""
        groups = _groups(self.value(codes), self.group or codes.shape[-1])  # (.., length, groups, group)
        return (groups * scale.float()[..., None]).flatten(-2)[..., : codes.shape[-1]]

    def query(self, x: Tensor) -> Tensor:
        """What is made of queries (.., seq, head_dim), in float64."""
        if not self.query_levels:
            return x.double()
        numbers, scale = quantize(x.float(), 1, self.query_levels)  # (.., seq, head_dim), (.., seq, 1)
        return numbers.double() * scale.double()

    def operands(self, workload: Workload, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the cache makes of query, key and value, each of its input's shape: the definition of a step."""
        smooth = key.float() - past_mean(key[:, :, : workload.past] if workload.decodes else key)
        return self.query(query), self.widen(*self.narrow(smooth)), self.widen(*self.narrow(value.float()))


def past_mean(key: Tensor) -> Tensor:
    """K's mean over tokens (batch, kv_heads, 1, head_dim) in float32; 0 where there is none yet."""
    return key.sum(2, keepdim=True, dtype=torch.float32) / max(1, key.shape[2])


def _crossed(x: Tensor, dim: int) -> Tensor:
    """Four tokens, or dims, in the order in which their bytes lie in a lane, 0 2 1 3; and back."""
    return x.unflatten(dim, (2, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _groups(x: Tensor, group: int) -> Tensor:
    """(.., dim) -> (.., groups, group), the last of them padded with zeros."""
    return pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


class PackedCache(NamedTuple):
    """Keys and values of `length` tokens, with room for more.

    key: uint8 (batch, kv_heads, capacity / 16, head_dim / 4, 16 tokens, 4 dims), half as many where two numbers share a
        byte; value: uint8 (batch, kv_heads, capacity / 4, columns, 4 tokens).
    scales: of both, bfloat16 (batch, kv_heads, capacity / 16, groups, 16 tokens).
    mean: of keys, float32 (batch, kv_heads, 1, head_dim).
    """

    key: Tensor
    value: Tensor
    key_scale: Tensor
    value_scale: Tensor
    mean: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int, form: Format, kernel: Kernel | None = None) -> PackedCache:
        """A cache with these tokens in it, and room for `capacity` in all; kernel: as of `append`."""
        tiles, sizes = -(-capacity // TILE), (key.shape[-1], value.shape[-1])
        scales = [
            key.new_zeros(*key.shape[:2], tiles, -(-size // (form.group or size)), TILE, dtype=torch.bfloat16)
            for size in sizes
        ]
        fours, columns = (-(-size // n) * n * form.bits // 8 for size, n in zip(sizes, (8, 2 * TILE), strict=True))
        made = key.new_zeros(*key.shape[:2], tiles, fours // 4, TILE, 4, dtype=torch.uint8)
        values = key.new_zeros(*key.shape[:2], tiles * TILE // 4, columns, 4, dtype=torch.uint8)
        return cls(made, values, scales[0], scales[1], past_mean(key), 0).append(key, value, form, kernel)

    def append(self, key: Tensor, value: Tensor, form: Format, kernel: Kernel | None = None) -> PackedCache:
        """With these tokens behind what is there, written in place.

        kernel: of append.h, for this format and dtype; None: torch writes the same, in many small calls.

        Raises:
            AttnbenchError: there is no room for them.
        """
        end = self.length + key.shape[2]
        if end > self.key.shape[2] * TILE:
            raise AttnbenchError(f"a cache of {self.key.shape[2] * TILE} tokens has no room for {end}")
        if kernel is not None:
            kernels.append(
                kernel, key, value, self.length, self.mean, self.key, self.value, self.key_scale, self.value_scale
            )
            return self._replace(length=end)
        for part in parts(key.shape[2], KEYS):  # what is made on the way is as large as float32
            codes, scale = form.narrow(key[:, :, part].float() - self.mean)
            rows = _fours(codes, form)
            at = self.length + part.start
            _put(self.key.view(torch.int32)[..., 0].mT, at, rows.contiguous().view(torch.int32)[..., 0])
            _put(self.key_scale.mT, at, scale)
            codes, scale = form.narrow(value[:, :, part].float())
            _put(self.value.mT, at, _columns(codes, form))
            _put(self.value_scale.mT, at, scale)
        return self._replace(length=end)

    def widened(self, form: Format, part: slice, head_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Keys less their mean and values of these tokens in float32; part: begins at a multiple of 16."""
        tiles, fours = (slice(part.start // n, -(-part.stop // n)) for n in (TILE, 4))
        size = part.stop - part.start
        key = self.key[:, :, tiles].transpose(3, 4).flatten(2, 3)[:, :, :size]  # (.., size, fours, 4)
        value = _crossed(self.value[:, :, fours].mT, 3).flatten(2, 3)[:, :, :size]  # (.., size, columns)
        scales = [x[:, :, tiles].mT.flatten(2, 3)[:, :, :size] for x in (self.key_scale, self.value_scale)]
        key, value = _crossed(key, 4), value.unflatten(-1, (-1, TILE))
        if form.bits == 4:
            key, value = (torch.stack((x & 15, x >> 4), -2) for x in (key, value))
        key, value = key.flatten(3)[..., :head_dim], value.flatten(3)[..., :value_dim]
        return form.widen(key, scales[0]), form.widen(value, scales[1])


def _fours(codes: Tensor, form: Format) -> Tensor:
    """Keys (.., n, head_dim), a byte a number, as bytes (.., n, fours, 4); of 4 bits two fours in one."""
    fours = _crossed(pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 4)), codes.ndim)
    return fours[..., 0::2, :] | fours[..., 1::2, :] << 4 if form.bits == 4 else fours


def _columns(codes: Tensor, form: Format) -> Tensor:
    """Values (.., n, value_dim), a byte a number, as bytes (.., n, columns): two sixteens in one of 4 bits."""
    wide = pad(codes, (0, -codes.shape[-1] % (2 * TILE)))
    halves = wide.unflatten(-1, (-1, 2, TILE))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2) if form.bits == 4 else wide


def _put(room: Tensor, start: int, rows: Tensor) -> None:
    """Writes tokens (batch, kv_heads, n, ..) into room (batch, kv_heads, tiles, tokens of a tile, ..) from one on."""
    size, done = room.shape[3], 0
    crosses = size == 4
    while done < rows.shape[2]:
        tile, first = divmod(start + done, size)
        if first == 0 and rows.shape[2] - done >= size:
            whole = (rows.shape[2] - done) // size
            tiles = rows[:, :, done : done + whole * size].unflatten(2, (whole, size))
            room[:, :, tile : tile + whole] = _crossed(tiles, 3) if crosses else tiles
            done += whole * size
        else:
            n = min(size - first, rows.shape[2] - done)
            for i in range(n):
                room[:, :, tile, (0, 2, 1, 3)[first + i] if crosses else first + i] = rows[:, :, done + i]
            done += n


Reader = Callable[[PackedCache, Tensor], Tensor]
"""The cache, and new queries (batch, heads, seq, head_dim) that see it -> (batch, heads, seq, value_dim)."""


def implementations(form: Format) -> Sequence[Implementation]:
    """What computes a step: the C++ kernel on a CPU that has what it needs, else torch, which computes the rest."""

    def unsupported(workload: Workload) -> str | None:
        if not workload.decodes:
            return "the C++ kernel reads a cache"
        return kernels.unsupported(workload, form.source)

    def native(workload: Workload) -> Decoding:
        library = compiler.load(form.source, workload.dtype)
        decode = kernels.packed_decoder(getattr(library, f"decode_{form.name}"), workload)

        def read(cache: PackedCache, query: Tensor) -> Tensor:
            return decode(query, cache.key, cache.value, cache.key_scale, cache.value_scale)

        return _decoding(form, read, kernels.described("float32"), getattr(library, f"append_{form.name}"))

    def plain(workload: Workload) -> Decoding:
        return _decoding(form, partial(in_torch, workload, form), "plain torch")

    def whole(workload: Workload) -> Attention:
        if workload.decodes:
            return _no_call(workload)
        exact = built(Sdpa(), workload.replace(dtype="float32"))

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = exact.call(*(x.float() for x in form.operands(workload, query, key, value)))
            return out.to(query.dtype)

        return Attention(call, f"{exact.implementation} of what {form.name} keeps, in float32")

    return (
        Implementation("native", _no_call, unsupported, decoding=native, honours=("scale",)),  # what it holds is little
        Implementation(  # as float32
            "torch", whole, workspace_bytes=_torch_bytes, decoding=plain, emulated=True, honours=("scale",)
        ),
    )


def _decoding(form: Format, read: Reader, how: str, append: Kernel | None = None) -> Decoding:
    """A step quantizes its own tokens alone."""

    def start(key: Tensor, value: Tensor, capacity: int) -> PackedCache:
        return PackedCache.of(key, value, capacity, form, append)

    def step(state: PackedCache, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, PackedCache]:
        state = state.append(key, value, form, append)
        return read(state, query), state

    return Decoding(start, step, f"{how}, over a cache of {form.name}")


def _no_call(workload: Workload) -> Attention:
    raise AttnbenchError("a quantized cache is decoded from step by step")


def _torch_bytes(workload: Workload) -> int | None:
    w = workload
    if not w.decodes:
        return None
    wide = min(KEYS, w.kv_seq) * w.batch * w.kv_heads * (w.head_dim + w.value_dim)
    return 4 * (3 * w.batch * w.heads * w.seq * w.kv_seq + 3 * wide)


def in_torch(workload: Workload, form: Format, cache: PackedCache, query: Tensor) -> Tensor:
    """A `Reader` in plain torch: all is widened to float32, some keys at a time."""
    w, length = workload, cache.length
    q = form.query(query).float().reshape(w.batch, w.kv_heads, w.group * w.seq, w.head_dim)
    scores = q.new_empty(*q.shape[:3], length)  # (batch, kv_heads, group * seq, length)
    for part in parts(length, KEYS):
        key, _ = cache.widened(form, part, w.head_dim, w.value_dim)
        scores[..., part] = q @ key.mT
    scores *= w.scale
    if w.is_causal and w.seq > 1:
        scores.view(w.batch, w.kv_heads, w.group, w.seq, -1).masked_fill_(hidden(w), -torch.inf)
    weights = torch.softmax(scores, -1)  # as scores
    out = q.new_zeros(*q.shape[:3], w.value_dim)  # (batch, kv_heads, group * seq, value_dim)
    for part in parts(length, KEYS):
        _, value = cache.widened(form, part, w.head_dim, w.value_dim)
        out += weights[..., part] @ value
    return out.to(query.dtype).view(w.batch, w.heads, w.seq, w.value_dim)
