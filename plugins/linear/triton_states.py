"""What linear attention's Triton kernels share: how a call is cut into segments, and the states these begin with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnbench.workload import Workload

from ..triton_kit import padded

PROGRAMS = 264  # to be had at once: two for each of the 132 multiprocessors of an H100
SEGMENT = 64  # tokens that a segment is a multiple of

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2_E), and exp2 is the instruction that a GPU has


@triton.jit
def once(x):  # type: ignore[no-untyped-def]
    """x itself, which the compiler then moves to each layout that it is wanted in: else it computes it for each."""
    return tl.max(tl.reshape(x, (x.shape[0], 1, x.shape[1])), axis=1).to(x.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def load(ptr, stride_l, stride_d, row, rows, col, cols: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row, col) of a matrix of rows x cols padded to WIDTH columns; 0 outside it."""
    inside = row[:, None] < rows
    if cols < WIDTH:
        inside = inside & (col[None, :] < cols)
    return tl.load(ptr + row[:, None] * stride_l + col[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def phi(x, col, cols: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """elu(x) + 1 in float32 (equation 7), 0 in padded columns; its derivative is min(phi(x), 1).

    In rows past the end it is not 0, but what it is multiplied with there is, or a causal mask hides it.
    """
    x = x.to(tl.float32)
    f = tl.exp2(tl.minimum(x, 0.0) * LOG2_E) + tl.maximum(x, 0.0)
    return tl.where(col[None, :] < cols, f, 0.0) if cols < WIDTH else f


@triton.jit
def store(out_ptr, stride_l, row, rows, col, cols, x):  # type: ignore[no-untyped-def]
    """x (row, col) to a matrix of rows x cols, where it is inside."""
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    at = out_ptr + row[:, None] * stride_l + col[None, :]
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def place(heads, length, segment, SHARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's head of batch * heads, batch entry and head there; key/value head of all and there; start, end."""
    head = tl.program_id(2).to(tl.int64)
    batch, own = head // heads, head % heads
    start = tl.program_id(0).to(tl.int64) * segment
    end = tl.minimum(start + segment, length)
    return head, batch, own, batch * (heads // SHARE) + own // SHARE, own // SHARE, start, end


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads * GROUP, length, dim): keys, or queries
    y_ptr,  # (batch, heads * GROUP, length, value_dim): values, or the gradient of the output
    inverse_ptr,  # float32 (batch * heads * GROUP, length), 1 / n
    c_ptr,  # float32 (batch * heads * GROUP, length)
    state_ptr,  # float32 (batch * heads, slots, SIZE): (VALUE_DIM, DIM), and (DIM,) behind it
    x_stride_b, x_stride_h, x_stride_l, x_stride_d,
    y_stride_b, y_stride_h, y_stride_l, y_stride_d,
    row_stride,  # of inverse and c: from head to head
    heads, length, segment, slots, first_slot,
    slot_step,  # from a segment's slot to that of the next one
    WEIGHTED: tl.constexpr,  # the sums R and r over queries, else S and z over keys
    GROUP: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_D: tl.constexpr, TILE_V: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment's sum of y f(x)^T, and of f(x): a TILE_V x TILE_D tile of it."""
    head = tl.program_id(2).to(tl.int64)  # of batch * heads
    start = tl.program_id(0).to(tl.int64) * segment
    end = tl.minimum(start + segment, length)
    tile_v = tl.program_id(1) % (VALUE_DIM // TILE_V)
    d = tl.program_id(1) // (VALUE_DIM // TILE_V) * TILE_D + tl.arange(0, TILE_D)
    dv = tile_v * TILE_V + tl.arange(0, TILE_V)
    row = tl.arange(0, CHUNK)
    x_ptr += head // heads * x_stride_b + head % heads * GROUP * x_stride_h
    y_ptr += head // heads * y_stride_b + head % heads * GROUP * y_stride_h
    state = tl.zeros((TILE_V, TILE_D), tl.float32)
    z = tl.zeros((TILE_D,), tl.float32)
    for first in range(start, end, CHUNK):
        rows = end - first
        for g in range(GROUP):
            x_at = x_ptr + g * x_stride_h + first * x_stride_l
            y_at = y_ptr + g * y_stride_h + first * y_stride_l
            x = load(x_at, x_stride_l, x_stride_d, row, rows, d, dim, DIM)
            y = load(y_at, y_stride_l, y_stride_d, row, rows, dv, value_dim, VALUE_DIM)  # (CHUNK, TILE_V)
            f = phi(x, d, dim, DIM)  # (CHUNK, TILE_D)
            if WEIGHTED:
                at = (head * GROUP + g) * row_stride + first + row
                f *= tl.load(inverse_ptr + at, mask=row < rows, other=0.0)[:, None]
                z += tl.sum(f * tl.load(c_ptr + at, mask=row < rows, other=0.0)[:, None], axis=0)
            else:
                z += tl.sum(tl.where(row[:, None] < rows, f, 0.0), axis=0)
            state = tl.dot(tl.trans(y.to(PRODUCT)), f.to(PRODUCT), state, input_precision=PRECISION)
    state_ptr += (head * slots + first_slot + slot_step * tl.program_id(0)) * (DIM * VALUE_DIM + DIM)
    tl.store(state_ptr + dv[:, None] * DIM + d[None, :], state)
    if tile_v == 0:
        tl.store(state_ptr + DIM * VALUE_DIM + d, z)


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(state_ptr, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 (batch * heads, slots, SIZE): a slot becomes the sum of those before; what the last one held is lost."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state_ptr += tl.program_id(1).to(tl.int64) * slots * SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(slots - 1):
        own = tl.load(state_ptr + at, mask=at < SIZE, other=0.0)
        tl.store(state_ptr + at, total, mask=at < SIZE)
        total += own
        state_ptr += SIZE
    tl.store(state_ptr + at, total, mask=at < SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def begin(state_ptr, slot, at, d, HAS_STATE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a segment begins with, of its slot: S or R at the offsets `at`, and z or r at `d`; 0 without any."""
    state = tl.zeros(at.shape, tl.float32)
    z = tl.zeros(d.shape, tl.float32)
    if HAS_STATE:
        state_ptr += slot * (DIM * VALUE_DIM + DIM)
        state = tl.load(state_ptr + at)
        z = tl.load(state_ptr + DIM * VALUE_DIM + d)
    return state, z


class Tiles(NamedTuple):
    """Tokens to a chunk, columns to a tile at most (of the state and of what is put out), warps, pipeline stages."""

    chunk: int
    columns: int
    warps: int
    stages: int


def tiles(dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    """For padded dims."""
    # The largest tiles that ptxas hardly spills for (sm_90, causal, one head to a group): in bfloat16 nothing for a dim
    # of 64, up to 96 bytes a thread for 128, most of which half the columns would spare, for twice the scores.
    widest = max(dim, value_dim)
    if dtype == torch.bfloat16:
        return Tiles(64, 128, 4 if widest <= 64 else 8, 2) if widest <= 128 else Tiles(32, 64, 8, 2)
    if dtype == torch.float16:
        return Tiles(32, 64, 4 if widest <= 64 else 8, 2 if widest <= 128 else 1)
    return Tiles(16, 64, 4 if widest <= 64 else 8, 2 if widest <= 128 else 1)


class Problem:
    """Shapes and tiles of one call: query (batch, heads, seq, head_dim), value (batch, kv_heads, kv_seq, value_dim).

    programs: how many are wanted at once; sequences are cut into segments to have them.
    product: what the products' operands are rounded to; None for bfloat16 as it is, and float32 otherwise, as sums over
        many keys may leave float16's range.
    """

    def __init__(self, query: Tensor, value: Tensor, is_causal: bool, programs: int, product: Any = None) -> None:
        self.batch, self.heads, self.seq, dim = query.shape
        _, self.kv_heads, self.kv_seq, value_dim = value.shape
        self.group = self.heads // self.kv_heads
        self.is_causal = is_causal
        self.common = self.kv_seq - self.seq if is_causal else self.kv_seq  # keys that every query sees
        self.own = slice(self.common, None)  # those on the diagonal
        self.padded, self.value_padded = padded(dim), padded(value_dim)
        self.tiles = tiles(self.padded, self.value_padded, query.dtype)
        self.tile_d, self.tile_v = (min(self.tiles.columns, n) for n in (self.padded, self.value_padded))
        self.constants = {
            "dim": dim, "value_dim": value_dim, "DIM": self.padded, "VALUE_DIM": self.value_padded,
            "CHUNK": self.tiles.chunk, "num_warps": self.tiles.warps, "num_stages": self.tiles.stages,
            "PRODUCT": product or (tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32),
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # tf32 has float16's digits
        }  # fmt: skip
        self.size = self.padded * (self.value_padded + 1)  # of a state S with z, or R with r
        # In a causal mask rows and the keys that they share are cut alike: there is a state for each segment.
        self.segment = segment(self.seq if is_causal else self.kv_seq, self.batch * self.kv_heads, programs)
        self.rows_segment = self.segment if is_causal else segment(self.seq, self.batch * self.heads, programs)
        self.segments = triton.cdiv(self.seq, self.segment) if is_causal else 0  # that see themselves
        self.before = triton.cdiv(self.common, self.segment)  # segments of keys that every query sees
        self.sums = self.before + self.segments - is_causal  # nobody comes behind the last segment

    @classmethod
    def of(cls, workload: Workload) -> Problem:
        w = workload
        query, _, value = (torch.empty(shape, dtype=getattr(torch, w.dtype), device="meta") for shape in w.shapes)
        return cls(query, value, w.is_causal, PROGRAMS)

    def states(self, like: Tensor, sums: int) -> Tensor:
        """Room for states, (batch * kv_heads, slots, SIZE) in float32: what so many sums add up to, from 0 on."""
        slots = sums + 1 if sums else 0  # nothing is summed where a state would be 0
        return like.new_empty(self.batch * self.kv_heads, slots, self.size, dtype=torch.float32)

    def queries(self, states: Tensor) -> dict[str, Any]:
        """Arguments of a kernel whose rows are queries, over the keys before them."""
        sizes = self._sizes(states, self.heads, self.seq, self.rows_segment, self.before, int(self.is_causal))
        return sizes | {"REVERSE": False, "CAUSAL": self.is_causal, "SHARE": self.group, "GROUP": 1}

    def keys(self, states: Tensor, length: int, is_causal: bool, slot: int) -> dict[str, Any]:
        """Arguments of one whose rows are keys, over the queries behind them, or all that the slot's state holds."""
        sizes = self._sizes(states, self.kv_heads, length, self.segment, slot, -int(is_causal))
        return sizes | {"REVERSE": True, "CAUSAL": is_causal, "SHARE": 1, "GROUP": self.group}

    def _sizes(self, states: Tensor, heads: int, length: int, segment: int, slot: int, step: int) -> dict[str, Any]:
        slots = states.shape[1]
        sizes = {"row_stride": self.seq, "heads": heads, "length": length, "segment": segment, "slots": slots}
        return sizes | {"first_slot": slot, "slot_step": step, "HAS_STATE": slots > 0} | self.constants

    def grid(self, heads: int, length: int, segment: int, tiles: int) -> tuple[int, int, int]:
        return triton.cdiv(length, segment), tiles, self.batch * heads

    def sum(
        self, x: Tensor, y: Tensor, weights: tuple[Tensor, Tensor] | None, size: int, into: Tensor, slot: int, step: int
    ) -> None:
        """The sums of segments of `size` rows to the slots `slot`, `slot` + `step`, ..."""
        length, (inverse, c) = x.shape[2], weights or (into, into)
        if not length:
            return
        tiles = self.padded // self.tile_d * (self.value_padded // self.tile_v)
        sum_kernel[self.grid(self.kv_heads, length, size, tiles)](
            x, y, inverse, c, into, *x.stride(), *y.stride(), self.seq, self.kv_heads, length, size, into.shape[1],
            slot, step, WEIGHTED=weights is not None, GROUP=x.shape[1] // self.kv_heads, TILE_D=self.tile_d,
            TILE_V=self.tile_v, **self.constants,
        )  # fmt: skip

    def scan(self, states: Tensor) -> None:
        bh, slots, size = states.shape
        block = 256
        scan_kernel[(triton.cdiv(size, block), bh)](states, slots, SIZE=size, BLOCK=block, num_warps=4)

    def key_states(self, key: Tensor, value: Tensor) -> Tensor:
        """S and z before each segment of rows, in the slots from `before` on, (batch * kv_heads, slots, SIZE)."""
        states = self.states(key, self.sums)
        if self.sums:
            common = slice(0, self.common)
            self.sum(key[:, :, common], value[:, :, common], None, self.segment, states, 0, 1)
            own = slice(self.common, self.common + (self.segments - 1) * self.segment)
            if self.is_causal:
                self.sum(key[:, :, own], value[:, :, own], None, self.segment, states, self.before, 1)
            self.scan(states)
        return states

    def query_states(self, query: Tensor, up: Tensor, inverse: Tensor, c: Tensor) -> Tensor:
        """R and r of the rows behind segment s in slot `segments` - 1 - s, and with common keys of all in the last."""
        # No key on the diagonal needs the first segment: without others, it is left out.
        rows = slice(0 if self.common else self.segment, None)
        query, up, inverse, c = (x[:, :, rows] for x in (query, up, inverse, c))
        count = triton.cdiv(query.shape[2], self.rows_segment)
        states = self.states(query, count)
        if count:
            self.sum(query, up, (inverse, c), self.rows_segment, states, count - 1, -1)
            self.scan(states)
        return states


def segment(length: int, heads: int, programs: int) -> int:
    """Tokens to a segment, for about as many programs over all heads."""
    most = triton.cdiv(length, SEGMENT)
    return triton.cdiv(most, min(most, max(1, programs // heads))) * SEGMENT
