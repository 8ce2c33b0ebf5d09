"""The GPU kernels of int8 attention, in Triton: quantize Q and K, then flash attention with an int8 QK^T.

SageAttention (Zhang 2024, arXiv 2410.02367), algorithm 1, on FlashAttention-2's loop (Dao 2023, algorithm 1).
Imports triton, so import this module only where it is there. With TRITON_INTERPRET=1 set before, it runs on a CPU.

What a score costs beside the products is what bounds this loop on an H100: a multiprocessor starts 128 operations a
clock but 16 exp2, and 4096 int8 products. So the scale of Q stays out of the scores, only tiles that need it mask V and
the scores, and dims are compile-time constants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnbench.workload import Workload

from ..triton_kit import padded

LOG2_E = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is the instruction that a GPU has
BLOCK = 128  # rows to a program that quantizes; int8 rows are padded to a multiple of it, so that no tile reads past

# Adding and subtracting 1.5 * 2^23 leaves a float32 without a fraction: it rounds to the nearest, ties to even.
ROUNDER = tl.constexpr(12582912.0)


class Tiles(NamedTuple):
    """One program of `attention_kernel`."""

    block_m: int  # query rows
    block_n: int  # keys to a step
    warps: int
    stages: int  # of loads under way
    registers: int | None = None  # to a thread at most, where that lets one more program onto a multiprocessor


# By widest padded dim; the first is the default. Chosen by what they compile to for sm_90: no loop spills, and ptxas
# serializes no wgmma. Four warps need no barrier between warp groups, and two such programs to a multiprocessor overlap
# one's softmax with the other's products. At 128 that takes programs of 64 query rows, which read K and V twice as
# often, so the longest step is the default there.
CANDIDATES = {
    64: (
        Tiles(128, 64, 4, 3), Tiles(128, 64, 8, 3, 128), Tiles(128, 128, 8, 3),
        Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 3),
    ),
    128: (
        Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3),
        Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 2),
    ),
    256: (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 8, 2)),
}  # fmt: skip
FLOAT32 = (Tiles(64, 32, 8, 2), Tiles(64, 32, 4, 2))  # its P V is not on tensor cores ("ieee")


@triton.jit  # type: ignore[untyped-decorator]
def quantize_rows(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, out_ptr, scale_ptr,
    stride_b, stride_h, stride_l, stride_d,
    head,  # of batch * heads
    heads, length,
    padded,  # rows to a head of out and scale
    dim: tl.constexpr, HAS_MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one head: scale = peak / 127, int8 = round((x - mean) / scale); 0 outside x. Equations 2 and 5."""
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
    scale = tl.div_rn(tl.maximum(peak, 1e-30), 127.0)  # (BLOCK,), to the last bit torch's
    # On a GPU "/" is off by up to two of the last bits, so what lies halfway may round to the other side than torch's.
    # To be exact would nearly double this kernel's operations.
    integers = (x / scale[:, None] + ROUNDER) - ROUNDER  # (BLOCK, DIM)
    tl.store(out_ptr + (head * padded + row[:, None]) * DIM + col[None, :], integers.to(tl.int8))
    tl.store(scale_ptr + head * padded + row, scale)


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # (batch, heads, seq, dim), any float dtype and strides
    k_ptr,  # (batch, kv_heads, kv_seq, dim), likewise
    mean_ptr,  # float32 (batch * kv_heads, dim), subtracted from K
    q8_ptr,  # int8 (batch * heads, q_padded, DIM)
    k8_ptr,  # int8 (batch * kv_heads, k_padded, DIM)
    q_scale_ptr,  # float32 (batch * heads, q_padded)
    k_scale_ptr,  # float32 (batch * kv_heads, k_padded)
    q_stride_b, q_stride_h, q_stride_l, q_stride_d,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d,
    q_heads,  # batch * heads
    heads, kv_heads, seq, kv_seq, q_padded, k_padded,
    dim: tl.constexpr,
    ROWS: tl.constexpr,  # rows that share a scale; divides BLOCK
    BLOCK: tl.constexpr,  # rows to a program
    DIM: tl.constexpr,  # power of 2, at least dim
):  # fmt: skip
    """Q and K in one launch: the heads of Q come first along axis 1, then those of K."""
    head = tl.program_id(1).to(tl.int64)
    if head < q_heads:
        if tl.program_id(0) * BLOCK < q_padded:
            quantize_rows(
                q_ptr, mean_ptr, q8_ptr, q_scale_ptr, q_stride_b, q_stride_h, q_stride_l, q_stride_d, head, heads,
                seq, q_padded, dim, False, ROWS, BLOCK, DIM,
            )  # fmt: skip
    elif tl.program_id(0) * BLOCK < k_padded:
        quantize_rows(
            k_ptr, mean_ptr, k8_ptr, k_scale_ptr, k_stride_b, k_stride_h, k_stride_l, k_stride_d, head - q_heads,
            kv_heads, kv_seq, k_padded, dim, True, ROWS, BLOCK, DIM,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def attend_keys(  # type: ignore[no-untyped-def]
    acc,  # float32 (BLOCK_M, VALUE_DIM), output so far, times total
    total,  # float32 (BLOCK_M,), sum of exp2((score - top) * q_scale) so far
    top,  # float32 (BLOCK_M,), largest score so far
    q,  # int8 (BLOCK_M, DIM)
    q_scale,  # float32 (BLOCK_M,)
    position,  # (BLOCK_M,), the last key that each query sees in a causal mask
    k_ptr,  # int8 (k_padded, DIM) of this head
    k_scale_ptr,  # float32 (k_padded,)
    v_ptr,  # (kv_seq, value_dim)
    v_stride_l, v_stride_d,
    start, end, kv_seq,
    value_dim: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys start .. end - 1, BLOCK_N at a time.

    Scores are without q_scale, which is positive, so their order is the same: it joins the subtraction of the maximum
    in one fused multiply-add. The scale of K is a vector even where rows share it: with one number for a tile, which
    could join q_scale too, ptxas converts to float32 in the product's own registers and serializes the wgmma (C7515).
    """
    d = tl.arange(0, DIM)
    dv = tl.arange(0, VALUE_DIM)
    for first in range(start, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + key[None, :] * DIM + d[:, None])  # (DIM, BLOCK_N)
        k_scale = tl.load(k_scale_ptr + key)  # (BLOCK_N,)
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * k_scale[None, :]  # (BLOCK_M, BLOCK_N)
        v_inside = dv[None, :] < value_dim
        if MASKED:
            v_inside = v_inside & (key[:, None] < kv_seq)
            seen = key[None, :] < kv_seq
            if IS_CAUSAL:
                seen = seen & (key[None, :] <= position[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(tl.fma(scores, q_scale[:, None], -(new_top * q_scale)[:, None]))  # (BLOCK_M, BLOCK_N)
        shrink = tl.exp2((top - new_top) * q_scale)  # 1 where the maximum stays
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + key[:, None] * v_stride_l + dv[None, :] * v_stride_d, mask=v_inside, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # int8 (batch * heads, q_padded, DIM)
    q_scale_ptr,  # float32 (batch * heads, q_padded)
    k_ptr,  # int8 (batch * kv_heads, k_padded, DIM)
    k_scale_ptr,  # float32 (batch * kv_heads, k_padded)
    v_ptr,  # (batch, kv_heads, kv_seq, value_dim), any strides
    out_ptr,  # (batch * heads, seq, value_dim)
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    scale,  # of the scores, times LOG2_E; positive
    heads, kv_heads, seq, kv_seq, q_padded, k_padded,
    value_dim: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head's output."""
    head = tl.program_id(1).to(tl.int64)  # of batch * heads
    kv_head = head // heads * kv_heads + head % heads // (heads // kv_heads)  # of batch * kv_heads
    # The last rows first: under a causal mask they take longest, and short programs fill the end of a launch. Rows run
    # fastest, heads slowest, so that programs at work together read the K and V of few heads, which stay in L2.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    q = tl.load(q_ptr + (head * q_padded + row[:, None]) * DIM + tl.arange(0, DIM)[None, :])
    q_scale = tl.load(q_scale_ptr + head * q_padded + row) * scale
    position = row + (kv_seq - seq)
    k_ptr += kv_head * k_padded * DIM
    k_scale_ptr += kv_head * k_padded
    v_ptr += kv_head // kv_heads * v_stride_b + kv_head % kv_heads * v_stride_h

    # Keys before `whole` are seen by every row and need no mask; from there to `end` some are hidden.
    end = kv_seq
    whole = kv_seq // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        first_position = first_row + (kv_seq - seq)
        end = tl.minimum(kv_seq, first_position + BLOCK_M)
        whole = tl.minimum(kv_seq, first_position + 1) // BLOCK_N * BLOCK_N
    acc = tl.zeros((BLOCK_M, VALUE_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    acc, total, top = attend_keys(
        acc, total, top, q, q_scale, position, k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d,
        0, whole, kv_seq, value_dim, False, IS_CAUSAL, BLOCK_N, DIM, VALUE_DIM,
    )  # fmt: skip
    acc, total, top = attend_keys(
        acc, total, top, q, q_scale, position, k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d,
        whole, end, kv_seq, value_dim, True, IS_CAUSAL, BLOCK_N, DIM, VALUE_DIM,
    )  # fmt: skip
    dv = tl.arange(0, VALUE_DIM)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_inside = (row[:, None] < seq) & (dv[None, :] < value_dim)
    tl.store(out_ptr + (head * seq + row[:, None]) * value_dim + dv[None, :], out, mask=out_inside)


Quantized = tuple[Tensor, Tensor]
"""int8 (batch, heads, padded length, padded dim) and float32 scales (batch, heads, padded length)."""


def quantize(query: Tensor, key: Tensor, rows: int) -> tuple[Quantized, Quantized]:
    """Query (batch, heads, seq, dim), and key (batch, kv_heads, kv_seq, dim) less its mean over tokens, in 8 bits."""
    mean = key.mean(dim=2, keepdim=True, dtype=torch.float32)  # (batch, kv_heads, 1, dim)
    (q8, q_scale), (k8, k_scale) = room(query), room(key)
    batch, heads, seq, dim = query.shape
    _, kv_heads, kv_seq, _ = key.shape
    blocks = max(q8.shape[2], k8.shape[2]) // BLOCK
    quantize_kernel[(blocks, batch * (heads + kv_heads))](
        query, key, mean, q8, k8, q_scale, k_scale, *query.stride(), *key.stride(), batch * heads, heads, kv_heads,
        seq, kv_seq, q8.shape[2], k8.shape[2], dim=dim, ROWS=rows, BLOCK=BLOCK, DIM=q8.shape[3], num_warps=8,
    )  # fmt: skip
    return (q8, q_scale), (k8, k_scale)


def workspace_bytes(workload: Workload) -> int:
    """Q and K in 8 bits with their scales, and K's mean."""
    w = workload
    dim = padded(w.head_dim, 32)
    rows = sum(heads * triton.cdiv(n, BLOCK) * BLOCK for heads, n in ((w.heads, w.seq), (w.kv_heads, w.kv_seq)))
    return int(w.batch * (rows * (dim + 4) + w.kv_heads * w.head_dim * 4))


def room(x: Tensor) -> Quantized:
    """For what `quantize_kernel` makes of x (batch, heads, length, dim)."""
    dim = padded(x.shape[3], 32)
    shape = (*x.shape[:2], triton.cdiv(x.shape[2], BLOCK) * BLOCK)
    integers = torch.empty(*shape, dim, dtype=torch.int8, device=x.device)  # (batch, heads, padded length, padded dim)
    return integers, torch.empty(shape, dtype=torch.float32, device=x.device)


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, rows: int, tiles: Tiles | None = None
) -> Tensor:
    """int8 attention of query (batch, heads, seq, head_dim) over key and value, as `Int8` defines it.

    scale: of the scores, positive; rows: how many share a quantization scale, a power of 2 up to 128; tiles: one of
    `candidates`, the first unless given.
    """
    batch, heads, seq, dim = query.shape
    _, kv_heads, kv_seq, value_dim = value.shape
    (q8, q_scale), (k8, k_scale) = quantize(query, key, rows)
    out = query.new_empty(batch, heads, seq, value_dim)
    dim, value_wide = padded_dims(dim, value_dim)
    tiles = tiles or candidates(dim, value_wide, value.dtype == torch.float32)[0]
    attention_kernel[(triton.cdiv(seq, tiles.block_m), batch * heads)](
        q8, q_scale, k8, k_scale, value, out, *value.stride(), scale * LOG2_E, heads, kv_heads, seq, kv_seq,
        q8.shape[2], k8.shape[2], value_dim=value_dim, IS_CAUSAL=is_causal, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, DIM=dim, VALUE_DIM=value_wide, num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )  # fmt: skip
    return out


def padded_dims(dim: int, value_dim: int) -> tuple[int, int]:
    return padded(dim, 32), padded(value_dim)


def candidates(dim: int, value_dim: int, is_float32: bool) -> tuple[Tiles, ...]:
    """Tiles worth trying for these padded dims, the default first."""
    return FLOAT32 if is_float32 else CANDIDATES[max(64, dim, value_dim)]
