"""Attention in float64 on a sample of query rows: what every error is measured against.

Only the sampled rows are computed, over all keys, so no l x l matrix is ever held. A recurrence goes through all
tokens one by one, as it is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnbench.plugin import Call, Definition, FeatureMap, Formula, Maps, Recurrence, Softmax, visible
from attnbench.task.transformer import Block
from attnbench.theory.costs import attentions
from attnbench.workload import Workload

Reference: TypeAlias = "Callable[[Definition, Workload, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]], Tensor]"


def expected_block(
    workload: Workload,
    definitions: Mapping[str, Definition],
    block: Block,
    x: Tensor,
    memory: Tensor | None,
    rows: Tensor,
    past: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
) -> Tensor:
    """Rows of the block's output in float64: its own weights around the functions that a plugin says it computes.

    Keys and values are projected at every position, in O(seq); attention is computed at `rows` alone, so memory is
    O(seq) too. One case costs O(seq^2) time: a decoder's cross-attention with `operands` or `chosen`, which look at
    all queries, or by a `Formula`, which may do so too, and those are what self-attention puts out.

    Args:
        definitions: the function of each problem of `attentions(workload)`; `Softmax()` for exact attention.
        x: (batch, seq, width), any dtype. memory: (batch, kv_seq, width), or None where the block takes none.
        rows: int64 (n,), the positions to compute.
        past: decoding, for each problem the key, value and gates of the tokens before.

    Returns:
        (batch, n, width), float64.
    """
    inside = attentions(workload)
    every, rows = torch.arange(workload.seq, device=x.device), rows.to(x.device)
    whole = "cross" in inside and is_of_all(definitions["cross"])  # cross-attention must see every query
    first = every if whole else rows  # the positions at which self-attention is computed
    calls = {"self": _reference(inside["self"], definitions["self"], first, expected, past.get("self", ()))}
    if "cross" in inside:
        compute = expected if whole else expected_at
        calls["cross"] = _reference(inside["cross"], definitions["cross"], rows, compute, past.get("cross", ()))
    weights = {name: weight.double() for name, weight in block.state_dict().items()}
    twin = Block(workload, calls, weights, block.gates, block.style)
    with torch.no_grad():
        x = twin.self_attention(x.double(), rows=first)  # (batch, len(first), width)
        if twin.cross_attention is not None:
            memory = x[:, :0] if memory is None else memory.double()
            x = twin.cross_attention(x, memory, rows=rows if whole else None)  # (batch, n, width)
        out: Tensor = twin.ffn(x)
    return out


def _reference(
    workload: Workload, definition: Definition, rows: Tensor, compute: Reference, past: Sequence[Tensor]
) -> Call:
    dtype = getattr(torch, workload.dtype)

    def attend(query: Tensor, *tokens: Tensor) -> Tensor:
        if is_of_all(definition):  # it is defined on what the variant gets, which is in the workload's dtype
            query, tokens = query.to(dtype), tuple(x.to(dtype) for x in tokens)
        if past:
            tokens = tuple(torch.cat([old.to(new.dtype), new], 2) for old, new in zip(past, tokens, strict=True))
        key, value, *gates = tokens
        return compute(definition, workload, query, key, value, rows, gates)  # (batch, heads, n, value_dim)

    return attend


def is_of_all(definition: Definition) -> bool:
    """Whether it is told by what the variant gets as a whole: it rounds that, chooses by it, or mixes all queries."""
    if isinstance(definition, Softmax):
        return (definition.operands or definition.chosen) is not None
    return isinstance(definition, Formula)


_SMALL_STATES = 1 << 17  # elements of all states
_SEGMENT = 128  # tokens of a recurrence whose states are held at a time while it is differentiated
_CHUNK_ELEMENTS = 1 << 22  # scores held at a time: 32 MiB of float64


EVERY_ROW = 1024  # up to which all rows of an output are looked at
EVERY_IN_BLOCK = 512  # the same of a block: each is projected, and goes through its FFN
_DRAWN = 164  # rows at random: 156 all miss an eighth of the rows once in 10^9 times, (7 / 8)^156, and some are known


def sample_rows(seq: int, seed: int, drawn: int = _DRAWN, every: int = EVERY_ROW) -> Tensor:
    """Sorted int64 indices of query rows out of `seq`: all of them up to `every`, else `drawn` at random and some more.

    Those are the first and last rows, and rows on both sides of block boundaries (multiples of 16 to 1024 at the
    beginning, in the middle and at the end), where tiled kernels go wrong.
    """
    if seq <= every:
        return torch.arange(seq)
    rows = {0, 1, seq - 2, seq - 1}
    for block in (16, 64, 128, 256, 1024):
        for boundary in {block, seq // 2 // block * block, (seq - 1) // block * block}:
            rows |= {boundary - 1, boundary}
    rows |= set(Random(seed).sample(range(seq), min(drawn, seq)))
    return torch.tensor(sorted(row for row in rows if 0 <= row < seq))


def expected(
    definition: Definition,
    workload: Workload,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    gates: Sequence[Tensor] = (),
) -> Tensor:
    """Rows of the output of `definition`, in float64.

    Args:
        query: (batch, heads, seq, head_dim), any dtype; `key`, `value` as in `Workload`.
        rows: int64 (n,), the query rows to compute.
        gates: (batch, kv_heads, kv_seq, n) each, as `Plugin.gates` says, or a workload's sinks, (heads,).

    Returns:
        (batch, heads, n, value_dim), float64.
    """
    rows = rows.to(query.device)
    if isinstance(definition, Formula):
        q, k, v = (x.double() for x in (query, key, value))
        grouped = q.reshape(*k.shape[:2], -1, *q.shape[2:])  # (batch, kv_heads, group, seq, head_dim)
        each = [[definition.call(grouped[b, h], k[b, h], v[b, h]) for h in range(k.shape[1])] for b in range(len(k))]
        return torch.stack([torch.cat(heads) for heads in each])[:, :, rows]  # (batch, heads, n, value_dim)
    if isinstance(definition, Softmax) and definition.operands is not None:
        query, key, value = definition.operands(query, key, value)
    return expected_at(definition, workload, query[:, :, rows], key, value, rows, gates, query)


def expected_at(
    definition: Definition,
    workload: Workload,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    gates: Sequence[Tensor] = (),
    every: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """As `expected`, with a query that holds `rows` alone: (batch, heads, n, head_dim).

    A definition's `operands` are left out: they need every query, as blocks of queries share a scale.

    every: (batch, heads, seq, head_dim), all queries, by which a definition that has `chosen` chooses.
    first: of the workload's key/value heads the first one that is here; there may be fewer, and batch entries too.
    """
    rows = rows.to(query.device)
    if isinstance(definition, Recurrence):
        return _recurrence(definition, query, key, value, rows + workload.offset, gates)
    keys = torch.arange(key.shape[2], device=key.device)
    chosen = definition.chosen if isinstance(definition, Softmax) else None
    batch, heads, _, _ = query.shape
    group = heads // key.shape[1]
    bias = workload.biased
    out = query.new_empty((batch, heads, len(rows), value.shape[-1]), dtype=torch.float64)
    step = max(1, _CHUNK_ELEMENTS // (group * len(keys)))
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        mask = visible(workload, rows[part, None], keys)  # (n, kv_seq)
        if isinstance(definition, Softmax) and definition.allowed is not None:
            mask = mask & definition.allowed(rows[part, None], keys)
        for b in range(batch):
            for h in range(key.shape[1]):
                shared = slice(h * group, (h + 1) * group)  # the query heads of this key/value head
                q, k, v = query[b, shared, part].double(), key[b, h].double(), value[b, h].double()
                sinks = gates[-1][shared].double() if workload.sinks else None  # (group,)
                seen = mask  # (n, kv_seq), or with a choice (group, n, kv_seq)
                if chosen is not None:
                    assert every is not None
                    own = every[b : b + 1, shared].detach(), key[b : b + 1, h : h + 1].detach()
                    seen = mask & chosen(*own, rows[part])[0]
                of_all = slice((first + h) * group, (first + h + 1) * group)
                added = bias(keys - rows[part, None] - workload.offset, of_all) if bias else None  # (group, n, kv_seq)
                weights = _weights(definition, workload, q, k, seen, added, sinks)  # (group, n, kv_seq)
                out[b, shared, part] = weights @ v  # (group, n, value_dim)
    return out


def _weights(
    definition: Definition,
    workload: Workload,
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    added: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    if isinstance(definition, FeatureMap):
        scores = (definition.query(q) @ definition.key(k).T).masked_fill_(~mask, 0.0)  # (group, n, kv_seq)
        return scores / scores.sum(-1, keepdim=True)
    if isinstance(definition, Maps):
        maps = (
            weight * _weights(Softmax(), workload, made(q), made(k), mask, added, sinks)
            for made, weight in definition.parts
        )
        return sum(maps, torch.zeros((), dtype=q.dtype, device=q.device))  # (group, n, kv_seq)
    scores = (q @ k.T).mul_(workload.scale)  # (group, n, kv_seq)
    if workload.softcap:
        scores = torch.tanh(scores / workload.softcap) * workload.softcap
    if added is not None:
        scores = scores + added
    scores = scores.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:2], 1)], -1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[0]]  # (group, n, kv_seq)
    made = definition.weights if isinstance(definition, Softmax) else None
    return made(weights) if made else weights


def _recurrence(
    definition: Recurrence, query: Tensor, key: Tensor, value: Tensor, at: Tensor, gates: Sequence[Tensor]
) -> Tensor:
    """Token by token; query (batch, heads, n, head_dim) reads the state behind the tokens `at`, in ascending order."""
    batch, kv_heads, length, _ = key.shape
    q = definition.query(query.double())
    q = q.view(batch, kv_heads, -1, *q.shape[2:])  # (batch, kv_heads, group, n, head_dim)
    tokens = [definition.key(key.double()), value.double(), *(gate.double() for gate in gates)]
    state = tokens[0].new_zeros(batch, kv_heads, key.shape[-1], value.shape[-1])
    reads = {token: row for row, token in enumerate(at.tolist())}

    def several(state: Tensor, start: int, *tokens: Tensor) -> tuple[Tensor, ...]:
        """The state behind these tokens, which begin with number `start`, and what is read on the way."""
        out = []
        for t in range(tokens[0].shape[2]):
            state = definition.update(state, *(x[:, :, t] for x in tokens))
            if start + t in reads:
                out.append(q[:, :, :, reads[start + t]] @ state)  # (batch, kv_heads, group, value_dim)
        return state, *out

    out: list[Tensor] = []
    with _alone(state.numel() <= _SMALL_STATES):
        for start in range(0, length, _SEGMENT):
            part = [x[:, :, start : start + _SEGMENT] for x in tokens]
            if torch.is_grad_enabled():  # a state for each token is too much to keep; one a segment is not (Chen 2016)
                state, *read = checkpoint(several, state, start, *part, use_reentrant=False)
            else:
                state, *read = several(state, start, *part)
            out += read
    return torch.stack(out, 3).flatten(1, 2)


@contextmanager
def _alone(small: bool) -> Iterator[None]:
    """In one thread, where tensors are so small that to wake another, for each, takes longer than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gradients(
    definition: Definition,
    workload: Workload,
    tensors: Sequence[Tensor],
    out_gradient: Tensor,
    batch: int,
    head: int,
) -> list[Tensor]:
    """Gradients of sum(out * out_gradient) by query, key, value and gates, of one key/value head, in float64.

    They come from differentiating `expected` itself, some rows at a time: the sums over queries that make dK and dV
    need every row, so this costs O(seq * kv_seq) time and is meant for one head. A definition's `operands` that round
    are left out; those that are `smooth` may mix heads, so that all are computed.

    Args:
        tensors: query, key, value and gates, of all batch entries and heads.
        out_gradient: (batch, heads, seq, value_dim).
        batch, head: which key/value head; its query heads are those of its group.

    Returns:
        (1, group, seq, head_dim) for query, (1, 1, kv_seq, ..) for the others, in the order of `tensors`.
    """
    group = slice(head * workload.group, (head + 1) * workload.group)
    if isinstance(definition, Recurrence):  # may hold constants of all heads
        leaves = [x[batch : batch + 1].detach().double().requires_grad_() for x in tensors]
        with torch.enable_grad():
            query, key, value, *gates = leaves
            whole = expected(definition, workload, query, key, value, torch.arange(workload.seq), gates)
            up = out_gradient[batch : batch + 1, group].double()
            found = torch.autograd.grad(whole[:, group], leaves, up, allow_unused=True, materialize_grads=True)
        return [x[:, group if i == 0 else slice(head, head + 1)] for i, x in enumerate(found)]
    if isinstance(definition, Softmax) and definition.operands is not None and definition.smooth:
        leaves = [x[batch : batch + 1].detach().double().requires_grad_() for x in tensors]
        with torch.enable_grad():
            made = definition.operands(leaves[0], leaves[1], leaves[2])
            cut = [x.detach().requires_grad_() for x in made]
            up, one = out_gradient[batch : batch + 1].double(), workload.replace(batch=1, lengths="")
            _backward(definition, one, cut, up)
            found = torch.autograd.grad(made, leaves, [x.grad for x in cut], allow_unused=True, materialize_grads=True)
        return [x[:, group if i == 0 else slice(head, head + 1)] for i, x in enumerate(found)]
    own = [x[batch : batch + 1, group if i == 0 else slice(head, head + 1)] for i, x in enumerate(tensors)]
    leaves = [x.detach().double().requires_grad_() for x in own]
    _backward(definition, workload, leaves, out_gradient[batch : batch + 1, group].double(), head)
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def _backward(definition: Definition, workload: Workload, leaves: Sequence[Tensor], up: Tensor, first: int = 0) -> None:
    """Adds to the leaves' gradients those of sum(out * up), some rows at a time: query, key, value and gates.

    first: see `expected_at`.
    """
    query, key, value, *gates = leaves
    if isinstance(definition, Formula):
        with torch.enable_grad():
            rows = torch.arange(workload.seq, device=query.device)
            torch.autograd.backward(expected(definition, workload, query, key, value, rows), up)
        return
    step = max(1, _CHUNK_ELEMENTS // (query.shape[1] * workload.kv_seq))
    with torch.enable_grad():
        for i in range(0, workload.seq, step):
            rows = torch.arange(i, min(i + step, workload.seq), device=query.device)
            out = expected_at(definition, workload, query[:, :, rows], key, value, rows, gates, query, first)
            torch.autograd.backward(out, up[:, :, rows])


def exact(
    workload: Workload, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, gates: Sequence[Tensor] = ()
) -> Tensor:
    """Rows of exact softmax attention in float64: what the approximation error is measured against."""
    return expected(Softmax(), workload, query, key, value, rows, gates)
