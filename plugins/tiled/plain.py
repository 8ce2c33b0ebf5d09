"""Tiled attention in plain torch: a strip of query rows at a time over all keys that they see."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

from attnbench.workload import Workload

from ..pieces import biased_part, by_distance, cap_, hidden_part, is_cut, parts, strips

LOG2_E = 1 / math.log(2)


class Strips:
    """Head by head, each thread with heads of its own: threads that share a strip would wait for each other.

    For training, `forward` tells the log-sum-exp of each row, with which `backward` makes P anew: FlashAttention-2 (Dao
    2023), algorithm 2, over strips of rows and blocks of keys. P = exp(S - lse), delta = rowsum(dO * O), dV += P^T dO,
    dP = dO V^T, dS = P * (dP - delta), dQ += dS K * scale, dK += dS^T Q * scale.
    """

    def __init__(self, workload: Workload, rows: int, keys: int) -> None:
        self.workload, self.rows, self.keys = workload, rows, keys
        self.strips = list(strips(workload, rows))
        self.bias = by_distance(workload)  # (heads, seq + kv_seq - 1)
        self.is_cut = is_cut(workload)
        self.future = torch.ones(rows, rows, dtype=torch.bool).triu(1)  # True where the key lies after the query

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        w = self.workload
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        bias = None if self.bias is None else self.bias.to(query.dtype)  # as scores are here: nothing is converted

        def work(heads: list[tuple[int, int]]) -> None:
            buffer = query.new_empty(self.rows * w.kv_seq)
            for b, h in heads:
                k, v = key[b, h // w.group], value[b, h // w.group]  # (kv_seq, head_dim), (kv_seq, value_dim)
                for strip, seen in self.strips:
                    n, keys = strip.stop - strip.start, seen.stop - seen.start
                    s = buffer[: n * keys].view(n, keys)  # (rows, keys seen)
                    torch.mm(query[b, h, strip] * w.scale, k[seen].T, out=s)
                    cap_(s, w.softcap)
                    if bias is not None:
                        s.add_(biased_part(bias[h], w, strip, seen))
                    if self.is_cut:
                        s.masked_fill_(hidden_part(w, strip, seen), -torch.inf)
                    elif w.is_causal:
                        s[:, strip.start + w.offset :].masked_fill_(self.future[:n, :n], -torch.inf)
                    if sinks is None:
                        torch.softmax(s, dim=-1, out=s)
                    else:  # what the sink takes: the weights sum up to less
                        kept = torch.sigmoid(s.float().logsumexp(-1, keepdim=True) - sinks[h].float())  # (rows, 1)
                        torch.softmax(s, dim=-1, out=s).mul_(kept)
                    torch.mm(s, v[seen], out=out[b, h, strip])

        _share(work, w.batch, w.heads)
        return out

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        w = self.workload
        out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
        lse = query.new_empty(w.batch, w.heads, w.seq, dtype=torch.float32)

        def work(heads: list[tuple[int, int]]) -> None:
            room = _Room(self.rows * w.kv_seq, query.dtype)
            for b, h in heads:
                k, v = key[b, h // w.group], value[b, h // w.group]  # (kv_seq, head_dim), (kv_seq, value_dim)
                for strip, seen in self.strips:
                    s = self.scores(query[b, h, strip], k[seen], h, strip, seen, room)  # (rows, keys seen)
                    s.mul_(w.scale)
                    top = s.amax(-1)  # (rows,)
                    p = torch.softmax(s, -1, out=s)  # (rows, keys seen)
                    lse[b, h, strip] = top - p.amax(-1).log()  # (rows,)
                    torch.mm(room.narrow(p), v[seen], out=out[b, h, strip])

        _share(work, w.batch, w.heads)
        return out, lse

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, out_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = self.workload
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))

        def work(kv_heads: list[tuple[int, int]]) -> None:
            room = _Room(self.rows * min(self.keys, w.kv_seq), query.dtype)
            for b, h in kv_heads:
                sums = torch.zeros(w.kv_seq, w.head_dim), torch.zeros(w.kv_seq, w.value_dim)  # float32
                for query_head, (strip, seen) in product(range(h * w.group, (h + 1) * w.group), self.strips):
                    q, up = query[b, query_head, strip], out_gradient[b, query_head, strip]  # (rows, dim)
                    delta = (up.float() * out[b, query_head, strip]).sum(-1, keepdim=True)  # (rows, 1)
                    shift = lse[b, query_head, strip, None] * -LOG2_E  # (rows, 1)
                    q_sum = torch.zeros(q.shape)  # (rows, head_dim), float32
                    for part in (p for p in parts(seen.stop, self.keys) if p.stop > seen.start):
                        k = key[b, h, part]  # (keys, head_dim)
                        s = self.scores(q, k, query_head, strip, part, room)  # (rows, keys)
                        p = torch.add(shift, s, alpha=w.scale * LOG2_E, out=s).exp2_()  # four times as fast as exp
                        sums[1][part] += room.narrow(p).T @ up  # (keys, value_dim)
                        ds = room.narrow(room.product(1, up, value[b, h, part]).sub_(delta).mul_(p))  # (rows, keys)
                        q_sum += ds @ k  # (rows, head_dim)
                        sums[0][part] += ds.T @ q  # (keys, head_dim)
                    dq[b, query_head, strip] = q_sum.mul_(w.scale)
                dk[b, h], dv[b, h] = sums[0].mul_(w.scale), sums[1]

        _share(work, w.batch, w.kv_heads)
        return dq, dk, dv

    def scores(self, q: Tensor, k: Tensor, head: int, rows: slice, keys: slice, room: _Room) -> Tensor:
        """Scores before their scale in float32, of some rows with some keys; -inf where a row does not see a key."""
        w = self.workload
        s = room.product(0, q, k)  # (rows, keys)
        if self.bias is not None:
            s.add_(biased_part(self.bias[head], w, rows, keys), alpha=1 / w.scale)
        if self.is_cut:
            s.masked_fill_(hidden_part(w, rows, keys), -torch.inf)
        elif w.is_causal and keys.stop > rows.start + w.offset + 1:
            last = torch.arange(rows.start, rows.stop)[:, None] + w.offset  # (rows, 1), the last key that each sees
            s.masked_fill_(torch.arange(keys.start, keys.stop) > last, -torch.inf)
        return s


def _share(work: Callable[[list[tuple[int, int]]], None], batch: int, heads: int) -> None:
    """All (batch entry, head) to threads that torch's are divided among, each of which works through its own."""
    tasks, available = list(product(range(batch), range(heads))), torch.get_num_threads()
    threads = min(available, len(tasks))
    if threads == 1:
        work(tasks)
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(available // threads,)) as pool:
        list(pool.map(work, (tasks[i::threads] for i in range(threads))))


class _Room:
    """What a thread works in: two matrices of a strip in float32, and for narrower inputs one in their dtype."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.wide = torch.empty(2, size)
        self.low = None if dtype == torch.float32 else torch.empty(size, dtype=dtype)

    def product(self, which: int, a: Tensor, b: Tensor) -> Tensor:
        """a b^T in float32, in one of the two matrices."""
        shape = len(a), len(b)
        wide = self.wide[which, : len(a) * len(b)].view(shape)  # (rows, keys)
        if self.low is None:
            return torch.mm(a, b.T, out=wide)
        # torch rounds it to bfloat16: a score of 3 is off by up to 1/128, and so is its exponential. What rounding lost
        # is the same product once more, less what it was rounded to.
        low = self.low[: len(a) * len(b)].view(shape)  # (rows, keys)
        wide.copy_(torch.mm(a, b.T, out=low))
        return wide.add_(torch.addmm(low, a, b.T, beta=-1, out=low))

    def narrow(self, x: Tensor) -> Tensor:
        """x in the inputs' dtype, until the next product."""
        return x if self.low is None else self.low[: x.numel()].view(x.shape).copy_(x)
