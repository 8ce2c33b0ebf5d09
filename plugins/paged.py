"""Exact attention over a cache in pages, as servers keep it (Kwon 2023, "PagedAttention", arXiv 2309.06180).

A server does not know how long a sequence will get. It hands out pages of some tokens from one pool, wherever one is
free, and a table says for each sequence which pages are its own, in order: nothing is reserved, nothing is copied. What
that costs is a look into the table on the way to each key, in the kernels where rows of keys and values are found:
`Rows` in native/attention.h. All else is `tiled`'s, so the two show the price of pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Decoding, Option, Plugin
from attnbench.workload import Workload

from .native import attention as kernels
from .tiled import Tiled
from .tiled.drafts import Drafts


class Pages(NamedTuple):
    """Keys (pages, kv_heads, page, head_dim) and values (.., value_dim), of which each sequence has its `lengths`.

    table: int32 (batch, pages of the longest sequence), which are its own, in order. owned: how many.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    owned: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacities: Sequence[int], page: int, seed: int) -> Pages:
        """A pool without tokens, with room for so many of each sequence; the order of pages is drawn from `seed`.

        key, value: (batch, kv_heads, any length, dim), as the tokens will be.
        """
        counts = [-(-capacity // page) for capacity in capacities]
        pools = [x.new_zeros(sum(counts), x.shape[1], page, x.shape[3]) for x in (key, value)]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).int()
        table = torch.nn.utils.rnn.pad_sequence(list(order.split(counts)), batch_first=True)  # (batch, most pages)
        return cls(pools[0], pools[1], table, tuple(counts), (0,) * len(counts))

    def append(self, key: Tensor, value: Tensor, counts: Sequence[int]) -> Pages:
        """With the first so many tokens of each sequence behind what is there, written in place.

        Raises:
            AttnbenchError: there is no room for them.
        """
        page, start = self.key.shape[2], 0
        ends = tuple(at + count for at, count in zip(self.lengths, counts, strict=True))
        for owned, end in zip(self.owned, ends, strict=True):
            if end > owned * page:
                raise AttnbenchError(f"{owned} pages of {page} tokens have no room for {end}")
        for count, alike in groupby(counts):  # neighbours that get as many are written together
            own = slice(start, start := start + len(list(alike)))
            at = torch.tensor(self.lengths[own])[:, None] + torch.arange(count)  # (sequences, new)
            pages = self.table[own].gather(1, at // page)  # (sequences, new), the page of each token
            self.key[pages, :, at % page] = key[own, :, :count].transpose(1, 2)  # (sequences, new, kv_heads, head_dim)
            self.value[pages, :, at % page] = value[own, :, :count].transpose(1, 2)  # (.., kv_heads, value_dim)
        return self._replace(lengths=ends)


class Paged(Plugin):
    """Exact attention that reads keys and values through a table of pages, on a CPU: `tiled`, but for that."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    phases: ClassVar[tuple[str, ...]] = ("decode", "forward")
    honours = (*kernels.HONOURS, "tree")
    options: ClassVar[Mapping[str, Option]] = {"page": Option(16, "tokens in a page", (16, 32, 64, 128))}
    page: int

    def supports(self, workload: Workload) -> str | None:
        return Tiled(impl="native").supports(workload)

    def workspace_bytes(self, workload: Workload) -> int | None:
        w, held = workload, Tiled(impl="native").workspace_bytes(workload)
        length = -(-w.kv_seq // self.page) * self.page
        pages = 0 if w.decodes else w.batch * w.kv_heads * length * (w.head_dim + w.value_dim) * w.itemsize
        return None if held is None else held + pages

    def ragged(self, workload: Workload) -> bool:
        return Tiled(impl="native").ragged(workload)

    def build(self, workload: Workload) -> Attention:
        """As a server's first pass over a prompt: all tokens are put into pages, and read from there."""
        made = self.decoding(workload)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            empty = made.start(key[:, :, :0], value[:, :, :0], capacity=workload.kv_seq)
            return made.step(empty, query, key, value)[0]

        return Attention(call, made.implementation)

    def decoding(self, workload: Workload) -> Decoding:
        w = workload
        entries = w.entries() if w.lengths else [w] * w.batch
        past, new = [entry.past for entry in entries], [entry.new for entry in entries]
        attend, pieces = self._over_pages(w)

        def start(key: Tensor, value: Tensor, capacity: int) -> Pages:
            capacities = [entry.kv_seq + capacity - w.kv_seq for entry in entries]
            return Pages.of(key, value, capacities, self.page, w.seed).append(key, value, past)

        def step(state: Pages, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Pages]:
            state = state.append(key, value, new)
            return attend(state, query, key, value), state

        how = ", ".join(filter(None, (kernels.described(w.dtype), pieces)))
        return Decoding(start, step, f"{how}, pages of {self.page} tokens in random order")

    def _over_pages(self, workload: Workload) -> tuple[Callable[[Pages, Tensor, Tensor, Tensor], Tensor], str]:
        """Attention of queries to all in the pages, where new keys and values are already, and in what pieces."""
        w, tiled = workload, Tiled(impl="native")
        if w.lengths:
            together, pieces = tiled.over_entries(w)
            return lambda pages, query, key, value: together(query, pages.key, pages.value, pages.table), pieces
        if w.masked.branches:
            drafts = Drafts(w)
            on_past = kernels.paged(*tiled.kernel(drafts.past)) if drafts.past else None

            def attend(pages: Pages, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                past = on_past(query, pages.key, pages.value, pages.table) if on_past else ()
                return drafts(query, key, value, past)

            return attend, f"plain torch on {w.seq} drafts"
        call = kernels.paged(*tiled.kernel(w))
        return lambda pages, query, key, value: call(query, pages.key, pages.value, pages.table)[0], ""
