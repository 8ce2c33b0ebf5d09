"""Linear attention's backward pass in Triton: the gradients of queries and keys; values' are read as the output is."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_forward import read
from .triton_states import Problem, begin, load, once, phi, place, store


@triton.jit  # type: ignore[untyped-decorator]
def meet_back(  # type: ignore[no-untyped-def]
    acc,  # float32 (TILE_D, CHUNK), what the rows x read, so far
    state,  # float32 (TILE_D, VALUE_DIM)
    z,  # float32 (TILE_D,)
    own_c,  # float32 (CHUNK,), c of the rows x; not read where REVERSE
    xv,  # (CHUNK, VALUE_DIM)
    y_at, yv_at, inverse_at, c_at,
    y_stride_l, y_stride_d, yv_stride_l, yv_stride_d,
    row, rows, d, dv,
    REVERSE: tl.constexpr,
    LATE: tl.constexpr,  # read the state here, behind the scores, where fewer registers are in use
    dim: tl.constexpr, value_dim: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's rows x read its rows y, of one head, causally; then these join the state."""
    y = load(y_at, y_stride_l, y_stride_d, row, rows, d, dim, DIM)
    yv = load(yv_at, yv_stride_l, yv_stride_d, row, rows, dv, value_dim, VALUE_DIM)
    f = phi(y, d, dim, DIM)  # (CHUNK, TILE_D)
    yv = yv.to(PRODUCT)  # (CHUNK, VALUE_DIM)
    scores = tl.dot(yv, tl.trans(xv), input_precision=PRECISION)  # (CHUNK, CHUNK), a column for a row
    if REVERSE:
        f *= tl.load(inverse_at, mask=row < rows, other=0.0)[:, None]
        c = tl.load(c_at, mask=row < rows, other=0.0)  # (CHUNK,)
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
    return acc, state, z


@triton.jit  # type: ignore[untyped-decorator]
def make_c(xv, o_at, c_at, row, rows, dv, value_dim: tl.constexpr, VALUE_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """c = -g . out of a chunk's queries, (CHUNK,), which the first tile of columns stores."""
    o = load(o_at, value_dim, 1, row, rows, dv, value_dim, VALUE_DIM)
    c = -tl.sum(xv.to(tl.float32) * o.to(tl.float32), axis=1)
    if tl.program_id(1) == 0:
        tl.store(c_at, c, mask=row < rows)
    return c


@triton.jit  # type: ignore[untyped-decorator]
def gradient(acc, before, own_c, x, inverse_at, row, rows, REVERSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A chunk's gradient (CHUNK, TILE_D) of what the rows x read, and of z or r before them; x: their features."""
    slope = tl.minimum(x, 1.0)  # (CHUNK, TILE_D)
    if REVERSE:
        out = (tl.trans(acc) + before[None, :]) * slope
    else:
        inverse = tl.load(inverse_at, mask=row < rows, other=0.0)
        out = (tl.trans(acc) + before[None, :] * own_c[:, None]) * (slope * inverse[:, None])
    return out


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
    x_stride_b, x_stride_h, x_stride_l, x_stride_d,
    y_stride_b, y_stride_h, y_stride_l, y_stride_d,
    xv_stride_b, xv_stride_h, xv_stride_l, xv_stride_d,
    yv_stride_b, yv_stride_h, yv_stride_l, yv_stride_d,
    out_stride_b, out_stride_h, out_stride_l,
    row_stride, heads, length, segment, slots, first_slot, slot_step,
    REVERSE: tl.constexpr,  # df(k) = R v + r, over later rows; else df(q) = S u + c z, over earlier ones
    CAUSAL: tl.constexpr, HAS_STATE: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr,
    dim: tl.constexpr, value_dim: tl.constexpr, CHUNK: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    TILE_D: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment's gradient of queries or keys, TILE_D columns of it; the state is held transposed."""
    head, batch, own, others, kv_head, start, end = place(heads, length, segment, SHARE)
    d = tl.program_id(1) * TILE_D + tl.arange(0, TILE_D)
    dv, row = tl.arange(0, VALUE_DIM), tl.arange(0, CHUNK)
    x_ptr += batch * x_stride_b + own * x_stride_h
    y_ptr += batch * y_stride_b + kv_head * GROUP * y_stride_h
    xv_ptr += batch * xv_stride_b + own * xv_stride_h
    yv_ptr += batch * yv_stride_b + kv_head * GROUP * yv_stride_h
    out_ptr += batch * out_stride_b + own * out_stride_h
    slot = others * slots + first_slot + slot_step * tl.program_id(0)
    state, z = begin(state_ptr, slot, dv[None, :] * DIM + d[:, None], d, HAS_STATE, DIM, VALUE_DIM)
    LATE: tl.constexpr = CAUSAL and GROUP == 1  # unless several heads add to the state before
    chunks = (end - start + CHUNK - 1) // CHUNK
    for n in range(chunks):
        first = start + (chunks - 1 - n if REVERSE else n) * CHUNK
        rows = end - first
        own_at = head * row_stride + first + row
        xv = load(xv_ptr + first * xv_stride_l, xv_stride_l, xv_stride_d, row, rows, dv, value_dim, VALUE_DIM)
        own_c = tl.zeros((CHUNK,), tl.float32)  # of queries
        if not REVERSE:
            o_at = o_ptr + (head * length + first) * value_dim
            own_c = make_c(xv, o_at, c_ptr + own_at, row, rows, dv, value_dim, VALUE_DIM)
        xv = xv.to(PRODUCT)  # (CHUNK, VALUE_DIM)
        acc = tl.zeros((TILE_D, CHUNK), tl.float32)
        before = z  # this chunk's own keys or queries have their scores
        if not LATE:
            acc = tl.dot(state.to(PRODUCT), tl.trans(xv), acc, input_precision=PRECISION)
        if CAUSAL:
            for g in range(GROUP):
                at = (others * GROUP + g) * row_stride + first + row
                acc, state, z = meet_back(
                    acc, state, z, own_c, xv, y_ptr + g * y_stride_h + first * y_stride_l,
                    yv_ptr + g * yv_stride_h + first * yv_stride_l, inverse_ptr + at, c_ptr + at,
                    y_stride_l, y_stride_d, yv_stride_l, yv_stride_d, row, rows, d, dv,
                    REVERSE, LATE, dim, value_dim, DIM, VALUE_DIM, PRODUCT, PRECISION,
                )  # fmt: skip
        x = phi(load(x_ptr + first * x_stride_l, x_stride_l, x_stride_d, row, rows, d, dim, DIM), d, dim, DIM)
        out = gradient(acc, before, own_c, x, inverse_ptr + own_at, row, rows, REVERSE)
        store(out_ptr + first * out_stride_l, out_stride_l, row, rows, d, dim, out)


def slope(
    p: Problem, how: dict[str, Any], x: Tensor, y: Tensor, xv: Tensor, yv: Tensor, kept: tuple[Tensor, ...], out: Tensor
) -> None:
    """Launches `slope_kernel`; how: as in `read`; kept: o, inverse, c and states."""
    strides = *x.stride(), *y.stride(), *xv.stride(), *yv.stride(), *out.stride()[:3]
    slope_kernel[p.grid(how["heads"], how["length"], how["segment"], p.padded // p.tile_d)](
        x, y, xv, yv, *kept, out, *strides, TILE_D=p.tile_d, **how
    )


def backward(
    p: Problem, query: Tensor, key: Tensor, value: Tensor, out: Tensor, inverse: Tensor, states: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value; up: of out; inverse and states: as `forward` gives them."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    c = torch.empty_like(inverse)  # (batch, heads, seq)
    own_key, own_value = key[:, :, p.own], value[:, :, p.own]
    slope(p, p.queries(states), query, own_key, up, own_value, (out, inverse, c, states), dq)
    states = p.query_states(query, up, inverse, c)
    # Keys that every query sees read the sum over all rows; those on the diagonal the sum over the rows behind.
    for part, is_causal, slot in ((slice(p.common), False, states.shape[1] - 1), (p.own, True, p.segments - 1)):
        k, v, dk_part, dv_part = (x[:, :, part] for x in (key, value, dk, dv))
        if k.shape[2]:
            how = p.keys(states, k.shape[2], is_causal, slot)
            slope(p, how, k, query, v, up, (out, inverse, c, states), dk_part)
            read(p, how, k, query, up, inverse, states, dv_part)
    return dq, dk, dv
