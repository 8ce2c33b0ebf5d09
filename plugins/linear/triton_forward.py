"""Linear attention's forward pass in Triton: rows read the state before them, and causally each other."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_states import Problem, begin, load, once, phi, place, store


@triton.jit  # type: ignore[untyped-decorator]
def meet(  # type: ignore[no-untyped-def]
    acc,  # float32 (TILE_V, CHUNK), what the rows x read, so far
    norm,  # float32 (CHUNK,), their n so far
    state,  # float32 (TILE_V, DIM)
    z,  # float32 (DIM,)
    x,  # (CHUNK, DIM), features
    y_at, w_at, inverse_at,
    y_stride_l, y_stride_d, w_stride_l, w_stride_d,
    row, rows, d, dv,
    REVERSE: tl.constexpr,
    LATE: tl.constexpr,  # read the state here, behind the scores, where fewer registers are in use
    dim: tl.constexpr, value_dim: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's rows x read its rows y, of one head, causally; then these join the state."""
    y = load(y_at, y_stride_l, y_stride_d, row, rows, d, dim, DIM)
    w = load(w_at, w_stride_l, w_stride_d, row, rows, dv, value_dim, VALUE_DIM)
    f = phi(y, d, dim, DIM)  # (CHUNK, DIM)
    if REVERSE:
        f *= tl.load(inverse_at, mask=row < rows, other=0.0)[:, None]
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
    return acc, norm, state, z


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads, length, dim): rows, queries or keys
    y_ptr,  # (batch, heads / SHARE * GROUP, length, dim): the others, keys or queries
    w_ptr,  # (batch, heads / SHARE * GROUP, length, value_dim): values, or the gradient of the output
    inverse_ptr,  # float32 1 / n, (batch * heads, length), written; read where REVERSE, of y's heads
    state_ptr,  # as in sum_kernel
    out_ptr,  # (batch, heads, length, value_dim)
    x_stride_b, x_stride_h, x_stride_l, x_stride_d,
    y_stride_b, y_stride_h, y_stride_l, y_stride_d,
    w_stride_b, w_stride_h, w_stride_l, w_stride_d,
    out_stride_b, out_stride_h, out_stride_l,
    row_stride, heads, length, segment, slots, first_slot, slot_step,
    REVERSE: tl.constexpr,  # dv = f(k) R, over later rows; else out = f(q) S / n, over earlier ones
    CAUSAL: tl.constexpr,  # the rows of a segment see each other; else they see what the state holds
    HAS_STATE: tl.constexpr,  # else it is 0
    SHARE: tl.constexpr, GROUP: tl.constexpr, dim: tl.constexpr, value_dim: tl.constexpr,
    CHUNK: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, TILE_V: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment's rows, TILE_V columns of them."""
    head, batch, own, others, kv_head, start, end = place(heads, length, segment, SHARE)
    d = tl.arange(0, DIM)
    dv = tl.program_id(1) * TILE_V + tl.arange(0, TILE_V)
    row = tl.arange(0, CHUNK)
    x_ptr += batch * x_stride_b + own * x_stride_h
    y_ptr += batch * y_stride_b + kv_head * GROUP * y_stride_h
    w_ptr += batch * w_stride_b + kv_head * GROUP * w_stride_h
    out_ptr += batch * out_stride_b + own * out_stride_h
    slot = others * slots + first_slot + slot_step * tl.program_id(0)
    state, z = begin(state_ptr, slot, dv[:, None] * DIM + d[None, :], d, HAS_STATE, DIM, VALUE_DIM)
    LATE: tl.constexpr = CAUSAL and GROUP == 1  # unless several heads add to the state before
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
                inverse_at = inverse_ptr + (others * GROUP + g) * row_stride + first + row
                acc, norm, state, z = meet(
                    acc, norm, state, z, x, y_at, w_at, inverse_at, y_stride_l, y_stride_d, w_stride_l, w_stride_d,
                    row, rows, d, dv, REVERSE, LATE, dim, value_dim, DIM, VALUE_DIM, PRODUCT, PRECISION,
                )  # fmt: skip
        if not REVERSE:
            inverse = 1.0 / norm
            acc = acc * inverse[None, :]
            if tl.program_id(1) == 0:
                tl.store(inverse_ptr + head * row_stride + first + row, inverse, mask=row < rows)
        store(out_ptr + first * out_stride_l, out_stride_l, row, rows, dv, value_dim, tl.trans(acc))


def read(
    p: Problem, how: dict[str, Any], x: Tensor, y: Tensor, w: Tensor, inverse: Tensor, states: Tensor, out: Tensor
) -> None:
    """Launches `read_kernel`; how: of `Problem.queries` or `Problem.keys`."""
    read_kernel[p.grid(how["heads"], how["length"], how["segment"], p.value_padded // p.tile_v)](
        x, y, w, inverse, states, out, *x.stride(), *y.stride(), *w.stride(), *out.stride()[:3], TILE_V=p.tile_v, **how
    )


def forward(p: Problem, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, 1 / n of each row, float32 (batch, heads, seq), and the states (batch * kv_heads, slots, SIZE)."""
    states = p.key_states(key, value)
    out = query.new_empty(p.batch, p.heads, p.seq, value.shape[-1])
    inverse = query.new_empty(p.batch, p.heads, p.seq, dtype=torch.float32)
    read(p, p.queries(states), query, key[:, :, p.own], value[:, :, p.own], inverse, states, out)
    return out, inverse, states
