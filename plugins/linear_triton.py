"""The GPU kernels of linear attention with elu features, in Triton, forward and backward.

Katharopoulos et al. 2020, "Transformers are RNNs" (equations 4 to 15), in chunks as in Hua et al. 2022, "Transformer
Quality in Linear Time", section 3.2. A sequence is cut into segments, which run in parallel, and a segment into chunks.
A program goes through its segment's chunks with the state in registers; the states that segments begin with come from
two kernels before: each segment's sum, and a prefix sum over segments. So states are in memory once a segment only.

With f = phi, n_i = f(q_i) . z_i, S_i = sum f(k_j) v_j^T and z_i = sum f(k_j) over the keys j that row i sees:
out_i = f(q_i) S_i / n_i. For the gradient g_i of out_i let c_i = -g_i . out_i. Then
    df(q_i) = (S_i g_i + c_i z_i) / n_i,   df(k_j) = R_j v_j + r_j,   dv_j = f(k_j) R_j,
with R_j = sum f(q_i) g_i^T / n_i and r_j = sum c_i f(q_i) / n_i over the rows i that see key j: sums of the same kind,
from the other end. Each is deterministic: no two programs add to one number.

Imports triton, so import this module only where it is there. With TRITON_INTERPRET=1 set before, it runs on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbench.workload import Workload

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


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads * GROUP, length, dim): keys, or queries
    y_ptr,  # (batch, heads * GROUP, length, value_dim): values, or the gradient of the output
    inverse_ptr,  # float32 (batch * heads * GROUP, length), 1 / n
    c_ptr,  # float32 (batch * heads * GROUP, length)
    state_ptr,  # float32 (batch * heads, slots, SIZE): (VALUE_DIM, DIM), and (DIM,) behind it
    x_stride_b,
    x_stride_h,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_h,
    y_stride_l,
    y_stride_d,
    row_stride,  # of inverse and c: from head to head
    heads,
    length,
    segment,
    slots,
    first_slot,
    slot_step,  # from a segment's slot to that of the next one
    WEIGHTED: tl.constexpr,  # the sums R and r over queries, else S and z over keys
    GROUP: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_V: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
def read_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads, length, dim): rows, queries or keys
    y_ptr,  # (batch, heads / SHARE * GROUP, length, dim): the others, keys or queries
    w_ptr,  # (batch, heads / SHARE * GROUP, length, value_dim): values, or the gradient of the output
    inverse_ptr,  # float32 1 / n, (batch * heads, length), written; read where REVERSE, of y's heads
    state_ptr,  # as in sum_kernel
    out_ptr,  # (batch, heads, length, value_dim)
    x_stride_b,
    x_stride_h,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_h,
    y_stride_l,
    y_stride_d,
    w_stride_b,
    w_stride_h,
    w_stride_l,
    w_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_l,
    row_stride,
    heads,
    length,
    segment,
    slots,
    first_slot,
    slot_step,
    REVERSE: tl.constexpr,  # dv = f(k) R, over later rows; else out = f(q) S / n, over earlier ones
    CAUSAL: tl.constexpr,  # the rows of a segment see each other; else they see what the state holds
    HAS_STATE: tl.constexpr,  # else it is 0
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_V: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment's rows, TILE_V columns of them."""
    head = tl.program_id(2).to(tl.int64)  # of batch * heads
    batch = head // heads
    kv_head = head % heads // SHARE
    start = tl.program_id(0).to(tl.int64) * segment
    end = tl.minimum(start + segment, length)
    d = tl.arange(0, DIM)
    dv = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    row = tl.arange(0, CHUNK)
    x_ptr += batch * x_stride_b + head % heads * x_stride_h
    y_ptr += batch * y_stride_b + kv_head * GROUP * y_stride_h
    w_ptr += batch * w_stride_b + kv_head * GROUP * w_stride_h
    out_ptr += batch * out_stride_b + head % heads * out_stride_h
    state = tl.zeros((TILE_V, DIM), tl.float32)
    z = tl.zeros((DIM,), tl.float32)
    if HAS_STATE:
        slot = first_slot + slot_step * tl.program_id(0)
        state_ptr += ((batch * (heads // SHARE) + kv_head) * slots + slot) * (DIM * VALUE_DIM + DIM)
        state = tl.load(state_ptr + dv[:, None] * DIM + d[None, :])
        z = tl.load(state_ptr + DIM * VALUE_DIM + d)
    # The state is read behind the scores, where fewer registers are in use, unless several heads add to it before.
    LATE: tl.constexpr = CAUSAL and GROUP == 1
    chunks = (end - start + CHUNK - 1) // CHUNK
    for n in range(chunks):
        first = start + (chunks - 1 - n if REVERSE else n) * CHUNK
        rows = end - first
        x = load(x_ptr + first * x_stride_l, x_stride_l, x_stride_d, row, rows, d, dim, DIM)
        x = once(phi(x, d, dim, DIM).to(PRODUCT))  # (CHUNK, DIM)
        norm = tl.sum(x.to(tl.float32) * z[None, :], axis=1)  # (CHUNK,)
        acc = tl.zeros((TILE_V, CHUNK), tl.float32)
        if not LATE:
            acc = tl.dot(state.to(PRODUCT), tl.trans(x), acc, input_precision=PRECISION)
        if CAUSAL:
            for g in range(GROUP):
                y_at = y_ptr + g * y_stride_h + first * y_stride_l
                w_at = w_ptr + g * w_stride_h + first * w_stride_l
                y = load(y_at, y_stride_l, y_stride_d, row, rows, d, dim, DIM)
                w = load(w_at, w_stride_l, w_stride_d, row, rows, dv, value_dim, VALUE_DIM)
                f = phi(y, d, dim, DIM)  # (CHUNK, DIM)
                if REVERSE:
                    at = ((batch * (heads // SHARE) + kv_head) * GROUP + g) * row_stride + first + row
                    f *= tl.load(inverse_ptr + at, mask=row < rows, other=0.0)[:, None]
                y = once(f.to(PRODUCT))
                scores = tl.dot(y, tl.trans(x), input_precision=PRECISION)  # (CHUNK, CHUNK), a column for a row
                if REVERSE:
                    scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
                else:
                    scores = tl.where(row[:, None] <= row[None, :], scores, 0.0)
                    norm += tl.sum(scores, axis=0)
                    z += tl.sum(y.to(tl.float32), axis=0)
                w = tl.trans(w.to(PRODUCT))  # (TILE_V, CHUNK)
                acc = tl.dot(w, scores.to(PRODUCT), acc, input_precision=PRECISION)
                if LATE:
                    acc = tl.dot(state.to(PRODUCT), tl.trans(x), acc, input_precision=PRECISION)
                state = tl.dot(w, y, state, input_precision=PRECISION)
        if not REVERSE:
            inverse = 1.0 / norm
            acc = acc * inverse[None, :]
            if tl.program_id(1) == 0:
                tl.store(inverse_ptr + head * row_stride + first + row, inverse, mask=row < rows)
        inside = (row[:, None] < rows) & (dv[None, :] < value_dim)
        out_at = out_ptr + first * out_stride_l + row[:, None] * out_stride_l + dv[None, :]
        tl.store(out_at, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def slope_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads, length, dim): rows, queries or keys; the gradient is theirs
    y_ptr,  # (batch, heads / SHARE * GROUP, length, dim): the others, keys or queries
    xv_ptr,  # (batch, heads, length, value_dim): the gradient of the output, or values
    yv_ptr,  # (batch, heads / SHARE * GROUP, length, value_dim): values, or the gradient of the output
    o_ptr,  # the output, contiguous; not read where REVERSE
    inverse_ptr,  # float32 1 / n of each query
    c_ptr,  # float32, as inverse; read where REVERSE, else written
    state_ptr,  # as in sum_kernel
    out_ptr,  # (batch, heads, length, dim), the gradient
    x_stride_b,
    x_stride_h,
    x_stride_l,
    x_stride_d,
    y_stride_b,
    y_stride_h,
    y_stride_l,
    y_stride_d,
    xv_stride_b,
    xv_stride_h,
    xv_stride_l,
    xv_stride_d,
    yv_stride_b,
    yv_stride_h,
    yv_stride_l,
    yv_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_l,
    row_stride,
    heads,
    length,
    segment,
    slots,
    first_slot,
    slot_step,
    REVERSE: tl.constexpr,  # df(k) = R v + r, over later rows; else df(q) = S u + c z, over earlier ones
    CAUSAL: tl.constexpr,
    HAS_STATE: tl.constexpr,
    SHARE: tl.constexpr,
    GROUP: tl.constexpr,
    dim: tl.constexpr,
    value_dim: tl.constexpr,
    CHUNK: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One segment's gradient of queries or keys, TILE_D columns of it; the state is held transposed."""
    head = tl.program_id(2).to(tl.int64)  # of batch * heads
    batch = head // heads
    kv_head = head % heads // SHARE
    start = tl.program_id(0).to(tl.int64) * segment
    end = tl.minimum(start + segment, length)
    d = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    dv = tl.arange(0, VALUE_DIM)
    row = tl.arange(0, CHUNK)
    x_ptr += batch * x_stride_b + head % heads * x_stride_h
    y_ptr += batch * y_stride_b + kv_head * GROUP * y_stride_h
    xv_ptr += batch * xv_stride_b + head % heads * xv_stride_h
    yv_ptr += batch * yv_stride_b + kv_head * GROUP * yv_stride_h
    out_ptr += batch * out_stride_b + head % heads * out_stride_h
    state = tl.zeros((TILE_D, VALUE_DIM), tl.float32)
    z = tl.zeros((TILE_D,), tl.float32)
    if HAS_STATE:
        slot = first_slot + slot_step * tl.program_id(0)
        state_ptr += ((batch * (heads // SHARE) + kv_head) * slots + slot) * (DIM * VALUE_DIM + DIM)
        state = tl.load(state_ptr + dv[None, :] * DIM + d[:, None])
        z = tl.load(state_ptr + DIM * VALUE_DIM + d)
    # The state is read behind the scores, where fewer registers are in use, unless several heads add to it before.
    LATE: tl.constexpr = CAUSAL and GROUP == 1
    chunks = (end - start + CHUNK - 1) // CHUNK
    for n in range(chunks):
        first = start + (chunks - 1 - n if REVERSE else n) * CHUNK
        rows = end - first
        xv = load(xv_ptr + first * xv_stride_l, xv_stride_l, xv_stride_d, row, rows, dv, value_dim, VALUE_DIM)
        if not REVERSE:
            at = head * row_stride + first + row
            o = load(o_ptr + (head * length + first) * value_dim, value_dim, 1, row, rows, dv, value_dim, VALUE_DIM)
            own_c = -tl.sum(xv.to(tl.float32) * o.to(tl.float32), axis=1)  # (CHUNK,)
            if tl.program_id(1) == 0:
                tl.store(c_ptr + at, own_c, mask=row < rows)
        xv = xv.to(PRODUCT)  # (CHUNK, VALUE_DIM)
        acc = tl.zeros((TILE_D, CHUNK), tl.float32)
        before = z  # this chunk's own keys or queries have their scores
        if not LATE:
            acc = tl.dot(state.to(PRODUCT), tl.trans(xv), acc, input_precision=PRECISION)
        if CAUSAL:
            for g in range(GROUP):
                y_at = y_ptr + g * y_stride_h + first * y_stride_l
                yv_at = yv_ptr + g * yv_stride_h + first * yv_stride_l
                y = load(y_at, y_stride_l, y_stride_d, row, rows, d, dim, DIM)
                yv = load(yv_at, yv_stride_l, yv_stride_d, row, rows, dv, value_dim, VALUE_DIM)
                f = phi(y, d, dim, DIM)  # (CHUNK, TILE_D)
                yv = yv.to(PRODUCT)  # (CHUNK, VALUE_DIM)
                scores = tl.dot(yv, tl.trans(xv), input_precision=PRECISION)  # (CHUNK, CHUNK), a column for a row
                if REVERSE:
                    at = ((batch * (heads // SHARE) + kv_head) * GROUP + g) * row_stride + first + row
                    f *= tl.load(inverse_ptr + at, mask=row < rows, other=0.0)[:, None]
                    c = tl.load(c_ptr + at, mask=row < rows, other=0.0)  # (CHUNK,)
                    scores = tl.where(row[:, None] >= row[None, :], scores + c[:, None], 0.0)
                else:
                    scores = tl.where(row[:, None] <= row[None, :], scores + own_c[None, :], 0.0)
                y = once(f.to(PRODUCT))  # (CHUNK, TILE_D)
                f = y.to(tl.float32)
                z += tl.sum(f * c[:, None] if REVERSE else f, axis=0)
                y = tl.trans(y)
                acc = tl.dot(y, scores.to(PRODUCT), acc, input_precision=PRECISION)
                if LATE:
                    acc = tl.dot(state.to(PRODUCT), tl.trans(xv), acc, input_precision=PRECISION)
                state = tl.dot(y, yv, state, input_precision=PRECISION)
        x = load(x_ptr + first * x_stride_l, x_stride_l, x_stride_d, row, rows, d, dim, DIM)
        slope = tl.minimum(phi(x, d, dim, DIM), 1.0)  # (CHUNK, TILE_D)
        gradient = tl.trans(acc)
        if REVERSE:
            gradient = (gradient + before[None, :]) * slope
        else:
            inverse = tl.load(inverse_ptr + at, mask=row < rows, other=0.0)
            gradient = (gradient + before[None, :] * own_c[:, None]) * (slope * inverse[:, None])
        inside = (row[:, None] < rows) & (d[None, :] < dim)
        out_at = out_ptr + first * out_stride_l + row[:, None] * out_stride_l + d[None, :]
        tl.store(out_at, gradient.to(out_ptr.dtype.element_ty), mask=inside)


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


class _Problem:
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
        self.padded, self.value_padded = padded_dims(dim, value_dim)
        self.tiles = tiles(self.padded, self.value_padded, query.dtype)
        self.tile_d, self.tile_v = (min(self.tiles.columns, n) for n in (self.padded, self.value_padded))
        self.constants = {
            "dim": dim,
            "value_dim": value_dim,
            "DIM": self.padded,
            "VALUE_DIM": self.value_padded,
            "CHUNK": self.tiles.chunk,
            "PRODUCT": product or (tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float32),
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # tf32 has float16's digits
            "num_warps": self.tiles.warps,
            "num_stages": self.tiles.stages,
        }
        self.size = self.padded * (self.value_padded + 1)  # of a state S with z, or R with r
        # In a causal mask rows and the keys that they share are cut alike: there is a state for each segment.
        self.segment = segment(self.seq if is_causal else self.kv_seq, self.batch * self.kv_heads, programs)
        self.rows_segment = self.segment if is_causal else segment(self.seq, self.batch * self.heads, programs)
        self.segments = triton.cdiv(self.seq, self.segment) if is_causal else 0  # that see themselves
        self.before = triton.cdiv(self.common, self.segment)  # segments of keys that every query sees
        self.sums = self.before + self.segments - is_causal  # nobody comes behind the last segment

    @classmethod
    def of(cls, workload: Workload) -> _Problem:
        w = workload
        query, _, value = (torch.empty(shape, dtype=getattr(torch, w.dtype), device="meta") for shape in w.shapes)
        return cls(query, value, w.is_causal, PROGRAMS)

    def states(self, like: Tensor, sums: int) -> Tensor:
        """Room for states, (batch * kv_heads, slots, SIZE) in float32: what so many sums add up to, from 0 on."""
        slots = sums + 1 if sums else 0  # nothing is summed where a state would be 0
        return like.new_empty(self.batch * self.kv_heads, slots, self.size, dtype=torch.float32)

    def sum(
        self, x: Tensor, y: Tensor, weights: tuple[Tensor, Tensor] | None, size: int, into: Tensor, slot: int, step: int
    ) -> None:
        """The sums of segments of `size` rows to the slots `slot`, `slot` + `step`, ..."""
        length = x.shape[2]
        if not length:
            return
        inverse, c = weights or (into, into)
        grid = (
            triton.cdiv(length, size),
            self.padded // self.tile_d * (self.value_padded // self.tile_v),
            self.batch * self.kv_heads,
        )
        sum_kernel[grid](
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


def padded_dims(dim: int, value_dim: int) -> tuple[int, int]:
    """Powers of 2, and what tensor cores take: at least 16."""
    return max(16, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(value_dim))


def forward(problem: _Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, 1 / n of each row, float32 (batch, heads, seq), and the states (batch * kv_heads, slots, SIZE)."""
    p = problem
    states = p.key_states(key, value)
    out = query.new_empty(p.batch, p.heads, p.seq, value.shape[-1])
    inverse = query.new_empty(p.batch, p.heads, p.seq, dtype=torch.float32)
    own = slice(p.common, None) if p.is_causal else slice(0)
    key, value = key[:, :, own], value[:, :, own]
    grid = (triton.cdiv(p.seq, p.rows_segment), p.value_padded // p.tile_v, p.batch * p.heads)
    read_kernel[grid](
        query, key, value, inverse, states, out, *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3],
        p.seq, p.heads, p.seq, p.rows_segment, states.shape[1], p.before, int(p.is_causal), REVERSE=False,
        CAUSAL=p.is_causal, HAS_STATE=states.shape[1] > 0, SHARE=p.group, GROUP=1, TILE_V=p.tile_v,
        **p.constants,
    )  # fmt: skip
    return out, inverse, states


def backward(
    problem: _Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    inverse: Tensor,
    states: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; up: of out; inverse and states: as `forward` gives them."""
    p = problem
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    c = torch.empty_like(inverse)  # (batch, heads, seq)
    own = slice(p.common, None) if p.is_causal else slice(0)
    grid = (triton.cdiv(p.seq, p.rows_segment), p.padded // p.tile_d, p.batch * p.heads)
    others = key[:, :, own], value[:, :, own]
    slope_kernel[grid](
        query, others[0], up, others[1], out, inverse, c, states, dq, *query.stride(), *others[0].stride(),
        *up.stride(), *others[1].stride(), *dq.stride()[:3], p.seq, p.heads, p.seq, p.rows_segment, states.shape[1],
        p.before, int(p.is_causal), REVERSE=False, CAUSAL=p.is_causal, HAS_STATE=states.shape[1] > 0, SHARE=p.group,
        GROUP=1, TILE_D=p.tile_d, **p.constants,
    )  # fmt: skip
    states = p.query_states(query, up, inverse, c)
    # Keys that every query sees read the sum over all rows; those on the diagonal the sum over the rows behind.
    parts = (slice(0, p.common), False, states.shape[1] - 1), (slice(p.common, None), True, p.segments - 1)
    for part, is_causal, slot in parts:
        k, v, dk_part, dv_part = (x[:, :, part] for x in (key, value, dk, dv))
        length = k.shape[2]
        if not length:
            continue
        segments, slots = triton.cdiv(length, p.segment), states.shape[1]
        sizes = p.seq, p.kv_heads, length, p.segment, slots, slot, -int(is_causal)
        how = {"REVERSE": True, "CAUSAL": is_causal, "HAS_STATE": slots > 0, "SHARE": 1, "GROUP": p.group} | p.constants
        slope_kernel[(segments, p.padded // p.tile_d, p.batch * p.kv_heads)](
            k, query, v, up, out, inverse, c, states, dk_part, *k.stride(), *query.stride(), *v.stride(), *up.stride(),
            *dk_part.stride()[:3], *sizes, TILE_D=p.tile_d, **how,
        )  # fmt: skip
        read_kernel[(segments, p.value_padded // p.tile_v, p.batch * p.kv_heads)](
            k, query, up, inverse, states, dv_part, *k.stride(), *query.stride(), *up.stride(), *dv_part.stride()[:3],
            *sizes, TILE_V=p.tile_v, **how,
        )  # fmt: skip
    return dq, dk, dv


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, inverse, states = forward(problem, query, key, value)
        # The states are kept: a few for each head, and making them anew reads all keys and values once more.
        ctx.save_for_backward(query, key, value, out, inverse, states)
        ctx.problem = problem
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, inverse, states = ctx.saved_tensors
        return None, *backward(ctx.problem, query, key, value, out, inverse, states, up)


def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, programs: int = PROGRAMS, product: Any = None
) -> Tensor:
    """Linear attention (batch, heads, seq, value_dim) that torch can differentiate, once; see `_Problem`."""
    problem = _Problem(query, value, is_causal, programs, product)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        out: Tensor = _Differentiable.apply(problem, query, key, value)
        return out
    return forward(problem, query, key, value)[0]


def workspace_bytes(workload: Workload) -> int:
    """The states that segments begin with, and 1 / n of each row; of a forward pass."""
    w, p = workload, _Problem.of(workload)
    slots = p.sums + 1 if p.sums else 0
    return 4 * (w.batch * w.kv_heads * slots * p.size + w.batch * w.heads * w.seq)


def flops(workload: Workload) -> int:
    """Multiplications and additions of a forward pass's products; the normaliser is one more value."""
    w, p = workload, _Problem.of(workload)
    rows, state = w.batch * w.heads * w.seq, 2 * w.head_dim * (w.value_dim + 1)
    summed = p.common + max(0, (p.segments - 1) * p.segment)  # keys of a head that go through sum_kernel
    total = state * (rows + w.batch * w.kv_heads * summed)
    if w.is_causal:  # every head moves its state on, and each tile of values has scores of its own
        total += rows * (state + 2 * p.tiles.chunk * (w.head_dim * (p.value_padded // p.tile_v) + w.value_dim + 1))
    return total


def described(workload: Workload) -> str:
    p = _Problem.of(workload)
    return f"chunks of {p.tiles.chunk} in segments of {p.rows_segment}"
