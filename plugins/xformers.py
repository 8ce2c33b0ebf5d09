"""Memory-efficient attention: xformers' operator on CUDA, and on a CPU the algorithm it grew from.

Source: Rabe and Staats 2021, "Self-attention Does Not Need O(n^2) Memory" (arXiv 2112.05682), sections 2 and 3.
xformers has no CPU operator and takes seconds to import, so a CPU runs that algorithm in plain torch, without
importing xformers; the implementation on record always says which of the two ran.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnbench.plugin import Attention, Call, Option, Plugin
from attnbench.workload import Workload

from .pieces import hidden_part, parts, strips

LOG2_E = 1 / math.log(2)
_LOWEST = -1e30  # of scores; finite, so that a tile of which a row sees nothing leaves its sums as they are
TILE_SCORES = 1 << 19  # scores a thread works on at a time: 2 MiB of float32, about a core's L2 cache


class Xformers(Plugin):
    """Exact attention in memory of O(l): softmax over chunks of keys, with a running maximum and sum.

    The chunk options act on the CPU only; xformers' CUDA kernels choose their own.
    """

    honours = ("scale", "window")
    options: ClassVar[Mapping[str, Option]] = {
        "query_chunk": Option(256, "CPU: query rows of a tile"),
        "key_chunk": Option(512, "CPU: keys of a tile"),
    }
    query_chunk: int
    key_chunk: int

    def supports(self, workload: Workload) -> str | None:
        if self.query_chunk < 1 or self.key_chunk < 1:
            return "query_chunk and key_chunk must be at least 1"
        if workload.device == "cpu":
            return None
        if workload.masked.window:
            return "on CUDA it is asked for no window"
        try:
            _cuda_operator(workload)
        except (ImportError, OSError) as error:
            return f"xformers can't be imported: {error}"
        except (NotImplementedError, ValueError) as error:  # xformers' own list of operators and their refusals
            return " ".join(str(error).split())
        return None

    def workspace_bytes(self, workload: Workload) -> int | None:
        """CPU: one tile of scores with its running output; O(l) only through the chunk of queries. else unknown."""
        if workload.device != "cpu" or workload.phase == "train":
            return None
        return _Tiles(workload, self.query_chunk, self.key_chunk).bytes()

    def emulated(self, workload: Workload) -> bool:
        return workload.device == "cpu"

    def build(self, workload: Workload) -> Attention:
        if workload.device == "cpu":
            tiles = _Tiles(workload, self.query_chunk, self.key_chunk)
            how = f"plain torch Rabe-Staats, chunks {tiles.rows} x {tiles.keys}"
            if workload.phase != "train":
                return Attention(tiles, f"{how} (xformers has no CPU operator)")
            return Attention(tiles.checkpointed, f"{how}, checkpointed (xformers has no CPU operator)")
        operator, bias = _cuda_operator(workload)
        return Attention(_cuda_attention(workload, operator, bias), f"xformers {version('xformers')} {operator.NAME}")


class _Tiles:
    """Rabe and Staats' attention on a CPU: query (batch, heads, seq, head_dim), and so on as in the contract.

    For each chunk of queries, over the chunks of keys with scores S = Q K^T * scale: m' = max(m, rowmax S),
    P = exp(S - m'), a = exp(m - m'), s' = a s + rowsum P, o' = a o + P V; at the end o / s. Powers are of 2, with
    log2(e) inside the scale, because torch's exp2 is the faster one. The heads of a key/value head's group are rows
    of one matrix, so K and V are never expanded, and as many key/value heads go together as the tile has room for.

    Training, a chunk of queries keeps nothing of its tiles and is computed once more when its gradient is: section 3's
    checkpoints, around all chunks of keys that it sees.
    """

    def __init__(self, workload: Workload, query_chunk: int, key_chunk: int) -> None:
        w = self.workload = workload
        self.rows = min(query_chunk, w.seq)
        self.keys = min(key_chunk, w.kv_seq)
        self.low = w.itemsize < 4
        width = w.kv_seq if w.phase == "train" else self.keys  # of the tiles that are held at once
        self.together = max(1, min(w.kv_heads, w.threads * TILE_SCORES // (w.group * self.rows * width)))

    def bytes(self) -> int:
        """The tile in float32 (and in the narrow dtype), the output of its rows beside that of the rows before (and
        P V, narrow and widened), the queries' copy where a group has several heads, seven statistics a row, and a
        causal tile's mask."""
        w = self.workload
        rows = self.together * w.group * self.rows
        tile = rows * self.keys * (4 + w.itemsize if self.low else 4)
        out = rows * w.value_dim * (4 + 4 + (w.itemsize + 4 if self.low else 0))
        queries = rows * w.head_dim * w.itemsize if w.group > 1 else 0
        mask = self.rows * self.keys if w.is_causal else 0
        return tile + out + queries + 7 * 4 * rows + mask

    def chunks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Chunks of query rows, each with those chunks of keys that any of its rows sees any of."""
        for rows, seen in strips(self.workload, self.rows):
            yield rows, [part for part in parts(seen.stop, self.keys) if part.stop > seen.start]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = self.workload
        out = torch.empty(w.batch, w.kv_heads, w.group, w.seq, w.value_dim, dtype=query.dtype)
        grouped = query.view(w.batch, w.kv_heads, w.group, w.seq, w.head_dim)
        size = self.together * w.group * self.rows * self.keys
        scores = torch.empty(size)  # a tile in float32
        products = torch.empty(size, dtype=query.dtype) if self.low else scores  # and in the inputs' dtype
        for b, heads in product(range(w.batch), parts(w.kv_heads, self.together)):
            for rows, columns in self.chunks():
                q = grouped[b, heads, :, rows].flatten(1, 2)  # (together, group * rows, head_dim)
                o = self.attend(q, key[b, heads], value[b, heads], rows, columns, scores, products)
                place = out[b, heads, :, rows]  # (together, group, rows, value_dim)
                place.copy_(o.view(place.shape))
        return out.flatten(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rows: slice, columns: list[slice], scores: Tensor, products: Tensor
    ) -> Tensor:
        """One chunk of queries (n, group * rows, head_dim) over all its keys: (n, group * rows, value_dim) float32."""
        scale = self.workload.scale * LOG2_E
        n, length, _ = q.shape
        top = torch.full((n, length, 1), _LOWEST)  # running maximum of Q K^T
        total = torch.zeros(n, length, 1)  # running sum of exponentials
        o = torch.zeros(n, length, v.shape[-1])  # (n, group * rows, value_dim)
        for part in columns:
            shape = (n, length, part.stop - part.start)
            s, p = (buffer[: math.prod(shape)].view(shape) for buffer in (scores, products))  # (n, group * rows, keys)
            torch.bmm(q, k[:, part].mT, out=p)  # in the inputs' dtype: narrow matrix products are the fast ones
            self.hide(p, rows, part)
            old, top = top, torch.maximum(top, p.amax(-1, keepdim=True))  # (n, group * rows, 1)
            if self.low:
                s.copy_(p)
            torch.add(top * -scale, s, alpha=scale, out=s).exp2_()
            keep = torch.exp2((old - top) * scale)  # 0 for the first chunk
            total.mul_(keep).add_(s.sum(-1, keepdim=True))
            if self.low:
                o.mul_(keep).add_(torch.bmm(p.copy_(s), v[:, part]))
            else:
                torch.baddbmm(o.mul_(keep), s, v[:, part], out=o)
        return o.div_(total)

    def checkpointed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `__call__`, for torch to differentiate: nothing is written in place."""
        w = self.workload
        grouped = query.unflatten(1, (w.kv_heads, w.group))  # (batch, kv_heads, group, seq, head_dim)
        out = []  # (together, group, rows, value_dim) each
        for b, heads in product(range(w.batch), parts(w.kv_heads, self.together)):
            strip = []
            for rows, columns in self.chunks():
                q = grouped[b, heads, :, rows].flatten(1, 2)  # (together, group * rows, head_dim)
                operands = q, key[b, heads], value[b, heads], rows, columns
                o = checkpoint(self.chunk, *operands, use_reentrant=False, preserve_rng_state=False)
                strip.append(o.unflatten(1, (w.group, -1)))  # (together, group, rows, value_dim)
            out.append(torch.cat(strip, 2))  # (together, group, seq, value_dim)
        return torch.cat(out).view(w.batch, w.heads, w.seq, w.value_dim)

    def chunk(self, q: Tensor, k: Tensor, v: Tensor, rows: slice, columns: list[slice]) -> Tensor:
        """`attend` in q's dtype. The maxima cancel: they count as constants."""
        scale = self.workload.scale * LOG2_E
        top = torch.full((*q.shape[:2], 1), _LOWEST)  # (n, group * rows, 1)
        total = o = torch.zeros(())  # later as `top`, and (n, group * rows, value_dim)
        for part in columns:
            s = torch.bmm(q, k[:, part].mT)  # (n, group * rows, keys)
            self.hide(s, rows, part)
            old, top = top, torch.maximum(top, s.detach().amax(-1, keepdim=True))  # (n, group * rows, 1)
            p = torch.exp2(torch.add(top * -scale, s, alpha=scale))  # (n, group * rows, keys)
            keep = torch.exp2((old - top) * scale)  # (n, group * rows, 1)
            total = total * keep + p.sum(-1, keepdim=True)  # (n, group * rows, 1)
            o = o * keep + torch.bmm(p.to(q.dtype), v[:, part])  # (n, group * rows, value_dim)
        return (o / total).to(q.dtype)

    def hide(self, p: Tensor, rows: slice, part: slice) -> None:
        """Scores (n, group * rows, keys) that the mask forbids become -inf, where the tile meets an edge of it."""
        w = self.workload
        if w.masked.window or (w.is_causal and part.stop - 1 > rows.start + w.offset):
            p.view(len(p), w.group, -1, p.shape[-1]).masked_fill_(hidden_part(w, rows, part), -torch.inf)


def _cuda_attention(workload: Workload, operator: Any, bias: Any) -> Call:
    """xformers.ops.memory_efficient_attention with the operator found in `build`, so that what is recorded runs."""
    from xformers.ops import memory_efficient_attention

    w = workload

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = _to_xformers(query, key, value, w.kv_heads, w.group)
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=w.scale, op=(operator, None))
        if w.group > 1:
            out = out.flatten(2, 3)  # (batch, seq, heads, value_dim)
        return out.transpose(1, 2)  # (batch, heads, seq, value_dim)

    return attend


def _to_xformers(query: Tensor, key: Tensor, value: Tensor, kv_heads: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views as xformers wants them: (batch, length, heads, dim), or (batch, length, kv_heads, group, dim) if grouped,
    where K and V are broadcast over their group without a copy."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, length, heads, dim)
    if group == 1:
        return q, k, v
    q = q.view(*q.shape[:2], kv_heads, group, q.shape[-1])  # (batch, seq, kv_heads, group, head_dim)
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))  # (batch, kv_seq, kv_heads, group, dim)
    return q, k, v


def _cuda_operator(workload: Workload) -> tuple[Any, Any]:
    """The forward operator that xformers dispatches to, and the attention bias.

    Raises:
        ImportError, OSError: xformers is not there or does not fit this torch.
        NotImplementedError: it has no operator for the workload; the message says why for each.
    """
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    w = workload
    q, k, v = (torch.empty(shape, dtype=getattr(torch, w.dtype), device=w.device) for shape in w.shapes)
    bias = LowerTriangularFromBottomRightMask() if w.is_causal else None
    q, k, v = _to_xformers(q, k, v, w.kv_heads, w.group)
    inputs = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias)
    return fmha.dispatch._dispatch_fw(inputs, needs_gradient=w.phase == "train"), bias
