"""The GPU kernels of int8 attention, in Triton: quantize Q and K, then flash attention with an int8 QK^T.

SageAttention (Zhang 2024, arXiv 2410.02367), algorithm 1, on FlashAttention-2's loop (Dao 2023, algorithm 1).
Imports triton, so import this module only where it is there. With TRITON_INTERPRET=1 set before, it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is the instruction that a GPU has

# Adding and subtracting 1.5 * 2^23 leaves a float32 without a fraction: it rounds to the nearest, ties to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (batch, heads, length, dim), any float dtype and strides
    mean_ptr,  # float32 (batch * heads, dim), subtracted first where HAS_MEAN
    out_ptr,  # int8 (batch * heads, length, dim)
    scale_ptr,  # float32 (batch * heads, length)
    stride_b,
    stride_h,
    stride_l,
    stride_d,
    heads,
    length,
    dim,
    HAS_MEAN: tl.constexpr,
    ROWS: tl.constexpr,  # rows that share a scale; divides BLOCK
    BLOCK: tl.constexpr,  # rows to a program
    DIM: tl.constexpr,  # power of 2, at least dim
):
    """scale = peak / 127, int8 = round((x - mean) / scale); equations 2 and 5."""
    head = tl.program_id(1).to(tl.int64)  # of batch * heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, DIM)
    inside = (row[:, None] < length) & (col[None, :] < dim)
    source = x_ptr + head // heads * stride_b + head % heads * stride_h
    x = tl.load(source + row[:, None] * stride_l + col[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + head * dim + col, mask=col < dim, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)  # rows past the end must not raise the peak
    peak = tl.max(tl.abs(x), axis=1)  # (BLOCK,)
    if ROWS > 1:
        blocks = tl.reshape(peak, (BLOCK // ROWS, ROWS))
        peak = tl.reshape(tl.broadcast_to(tl.max(blocks, axis=1)[:, None], (BLOCK // ROWS, ROWS)), (BLOCK,))
    scale = tl.maximum(peak, 1e-30) / 127.0
    integers = (x / scale[:, None] + ROUNDER) - ROUNDER
    tl.store(out_ptr + (head * length + row[:, None]) * dim + col[None, :], integers.to(tl.int8), mask=inside)
    tl.store(scale_ptr + head * length + row, scale, mask=row < length)


@triton.jit  # type: ignore[untyped-decorator]
def attend_keys(  # type: ignore[no-untyped-def]
    acc,  # float32 (BLOCK_M, VALUE_DIM), output so far, times total
    total,  # float32 (BLOCK_M,), sum of exp2(score - top) so far
    top,  # float32 (BLOCK_M,), largest score so far
    q,  # int8 (BLOCK_M, DIM)
    q_scale,  # float32 (BLOCK_M,)
    position,  # (BLOCK_M,), the last key that each query sees in a causal mask
    k_ptr,  # int8 (kv_seq, dim) of this head
    k_scale_ptr,  # float32 (kv_seq,)
    v_ptr,  # (kv_seq, value_dim)
    v_stride_l,
    v_stride_d,
    start,
    end,
    kv_seq,
    dim,
    value_dim,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """Online softmax over keys start .. end - 1, BLOCK_N at a time."""
    d = tl.arange(0, DIM)
    dv = tl.arange(0, VALUE_DIM)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + key[None, :] * dim + d[:, None], mask=(key[None, :] < kv_seq) & (d[:, None] < dim), other=0)
        k_scale = tl.load(k_scale_ptr + key, mask=key < kv_seq, other=0.0)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale[:, None] * k_scale[None, :])
        if MASKED:
            seen = key[None, :] < kv_seq
            if IS_CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_top[:, None])  # (BLOCK_M, BLOCK_N)
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        v_inside = (key[:, None] < kv_seq) & (dv[None, :] < value_dim)
        v = tl.load(v_ptr + key[:, None] * v_stride_l + dv[None, :] * v_stride_d, mask=v_inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # int8 (batch * heads, seq, dim)
    q_scale_ptr,  # float32 (batch * heads, seq)
    k_ptr,  # int8 (batch * kv_heads, kv_seq, dim)
    k_scale_ptr,  # float32 (batch * kv_heads, kv_seq)
    v_ptr,  # (batch, kv_heads, kv_seq, value_dim), any strides
    out_ptr,  # (batch * heads, seq, value_dim)
    v_stride_b,
    v_stride_h,
    v_stride_l,
    v_stride_d,
    scale,  # of the scores, times LOG2_E
    heads,
    kv_heads,
    seq,
    kv_seq,
    dim,
    value_dim,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    """BLOCK_M rows of one head's output."""
    head = tl.program_id(1).to(tl.int64)  # of batch * heads
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)  # of batch * kv_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    q_inside = (row[:, None] < seq) & (d[None, :] < dim)
    q = tl.load(q_ptr + (head * seq + row[:, None]) * dim + d[None, :], mask=q_inside, other=0)
    q_scale = tl.load(q_scale_ptr + head * seq + row, mask=row < seq, other=0.0) * scale
    position = row + (kv_seq - seq)
    k_ptr += kv_head * kv_seq * dim
    k_scale_ptr += kv_head * kv_seq
    v_ptr += kv_head // kv_heads * v_stride_b + kv_head % kv_heads * v_stride_h

    # Keys before `whole` are seen by every row and need no mask; from there to `end` some are hidden.
    end = kv_seq
    whole = kv_seq // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        first_position = tl.program_id(0) * BLOCK_M + (kv_seq - seq)
        end = tl.minimum(kv_seq, first_position + BLOCK_M)
        whole = tl.minimum(kv_seq, first_position + 1) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, VALUE_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, top = attend_keys(
        acc, total, top, q, q_scale, position, k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d,
        0, whole, kv_seq, dim, value_dim, False, IS_CAUSAL, BLOCK_N, DIM, VALUE_DIM,
    )  # fmt: skip
    acc, total, top = attend_keys(
        acc, total, top, q, q_scale, position, k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d,
        whole, end, kv_seq, dim, value_dim, True, IS_CAUSAL, BLOCK_N, DIM, VALUE_DIM,
    )  # fmt: skip
    dv = tl.arange(0, VALUE_DIM)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_inside = (row[:, None] < seq) & (dv[None, :] < value_dim)
    tl.store(out_ptr + (head * seq + row[:, None]) * value_dim + dv[None, :], out, mask=out_inside)


def quantize(x: Tensor, rows: int, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 (batch, heads, length, dim) and float32 scales (batch, heads, length) of x - mean.

    x: (batch, heads, length, dim); mean: float32 (batch, heads, 1, dim), or None for no mean.
    """
    batch, heads, length, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = 128
    quantize_kernel[(triton.cdiv(length, block), batch * heads)](
        x, x if mean is None else mean, out, scale, *x.stride(), heads, length, dim,
        HAS_MEAN=mean is not None, ROWS=rows, BLOCK=block, DIM=triton.next_power_of_2(dim),
    )  # fmt: skip
    return out, scale


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, rows: int) -> Tensor:
    """int8 attention of query (batch, heads, seq, head_dim) over key and value, as `Int8` defines it.

    scale: of the scores; rows: how many share a quantization scale, a power of 2 up to 128.
    """
    batch, heads, seq, dim = query.shape
    _, kv_heads, kv_seq, value_dim = value.shape
    q8, q_scale = quantize(query, rows, None)
    k8, k_scale = quantize(key, rows, key.mean(dim=2, keepdim=True, dtype=torch.float32))
    out = query.new_empty(batch, heads, seq, value_dim)
    padded, value_padded = padded_dims(dim, value_dim)
    block_m, block_n, warps, stages = tiles(padded, value_padded, value.dtype == torch.float32)
    attention_kernel[(triton.cdiv(seq, block_m), batch * heads)](
        q8, q_scale, k8, k_scale, value, out, *value.stride(), scale * LOG2_E, heads, kv_heads, seq, kv_seq, dim,
        value_dim, IS_CAUSAL=is_causal, BLOCK_M=block_m, BLOCK_N=block_n, DIM=padded, VALUE_DIM=value_padded,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def padded_dims(dim: int, value_dim: int) -> tuple[int, int]:
    """Powers of 2; tensor cores take int8 products over at least 32 elements, and others of at least 16."""
    return max(32, triton.next_power_of_2(dim)), max(16, triton.next_power_of_2(value_dim))


def tiles(dim: int, value_dim: int, is_float32: bool) -> tuple[int, int, int, int]:
    """Query rows, keys, warps and pipeline stages to a program: what registers and shared memory hold."""
    widest = max(dim, value_dim)
    warps = 8 if widest > 64 else 4
    return (64, 32, warps, 2) if is_float32 or widest > 128 else (128, 64, warps, 3)
