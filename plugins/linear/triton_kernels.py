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

`triton_states` cuts a call and makes the states, `triton_forward` and `triton_backward` read them. All import triton,
so import them only where it is there. With TRITON_INTERPRET=1 set before, it runs on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnbench.workload import Workload

from ..autograd import differentiable
from .triton_backward import backward
from .triton_forward import forward
from .triton_states import PROGRAMS, Problem


def attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, programs: int = PROGRAMS, product: Any = None
) -> Tensor:
    """Linear attention (batch, heads, seq, value_dim) that torch can differentiate, once; see `Problem`."""
    problem = Problem(query, value, is_causal, programs, product)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        # The states are kept: a few for each head, and making them anew reads all keys and values once more.
        return differentiable(partial(forward, problem), partial(backward, problem))(query, key, value)
    return forward(problem, query, key, value)[0]


def workspace_bytes(workload: Workload) -> int | None:
    """The states that segments begin with, up to as many as keep a GPU busy, and 1 / n of each row."""
    w, p = workload, Problem.of(workload)
    if w.phase == "train":
        return None
    slots = p.sums + 1 if p.sums else 0
    return 4 * (w.batch * w.kv_heads * slots * p.size + w.batch * w.heads * w.seq)


def flops(workload: Workload) -> int:
    """Multiplications and additions of a forward pass's products; the normaliser is one more value."""
    w, p = workload, Problem.of(workload)
    rows, state = w.batch * w.heads * w.seq, 2 * w.head_dim * (w.value_dim + 1)
    summed = p.common + max(0, (p.segments - 1) * p.segment)  # keys of a head that go through sum_kernel
    total = state * (rows + w.batch * w.kv_heads * summed)
    if w.is_causal:  # every head moves its state on, and each tile of values has scores of its own
        total += rows * (state + 2 * p.tiles.chunk * (w.head_dim * (p.value_padded // p.tile_v) + w.value_dim + 1))
    return total


def described(workload: Workload) -> str:
    p = Problem.of(workload)
    return f"chunks of {p.tiles.chunk} in segments of {p.rows_segment}"
