"""Exact attention over a cache in pages, as servers keep it (Kwon 2023, "PagedAttention", arXiv 2309.06180).

A server does not know how long a sequence will get. It hands out pages of some tokens from one pool, wherever one is
free, and a table says for each sequence which pages are its own, in order: nothing is reserved, nothing is copied. What
that costs is a look into the table on the way to each key, in the kernels where rows of keys and values are found:
`Rows` in native/attention.h. All else is `tiled`'s, so the two show the price of pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Decoding, Option, Plugin
from attnbench.workload import Workload

from .native import attention as kernels
from .tiled import Tiled


class Pages(NamedTuple):
    """Keys (pages, kv_heads, page, head_dim) and values (.., value_dim), of which each sequence has `length` tokens.

    table: int32 (batch, pages of a sequence), which are its own.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    length: int

    @classmethod
    def of(cls, key: Tensor, value: Tensor, capacity: int, page: int, seed: int) -> Pages:
        """A pool with these in it, and room for `capacity` tokens of each; the order of pages is drawn from `seed`."""
        batch, each = key.shape[0], -(-capacity // page)
        pools = [x.new_zeros(batch * each, x.shape[1], page, x.shape[3]) for x in (key, value)]
        order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(seed))
        return cls(pools[0], pools[1], order.int().view(batch, each), 0).append(key, value)

    def append(self, key: Tensor, value: Tensor) -> Pages:
        """With these tokens behind what is there, written in place.

        Raises:
            AttnbenchError: there is no room for them.
        """
        page, end = self.key.shape[2], self.length + key.shape[2]
        if end > self.table.shape[1] * page:
            raise AttnbenchError(f"{self.table.shape[1]} pages of {page} tokens have no room for {end}")
        at = torch.arange(self.length, end)  # (new,)
        own = self.table[:, at // page]  # (batch, new), the page of each token
        self.key[own, :, at % page] = key.transpose(1, 2)  # (batch, new, kv_heads, head_dim)
        self.value[own, :, at % page] = value.transpose(1, 2)  # (batch, new, kv_heads, value_dim)
        return self._replace(length=end)


class Paged(Plugin):
    """Exact attention that reads keys and values through a table of pages, on a CPU: `tiled`, but for that."""

    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    phases: ClassVar[tuple[str, ...]] = ("decode", "forward")
    honours = kernels.HONOURS
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
        if workload.lengths:
            call, _ = Tiled(impl="native").over_entries(workload)
        else:
            kernel, plan, keys = Tiled(impl="native").kernel(workload)
            call = kernels.paged(kernel, workload, plan, keys)

        def start(key: Tensor, value: Tensor, capacity: int) -> Pages:
            return Pages.of(key, value, capacity, self.page, workload.seed)

        def step(state: Pages, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Pages]:
            state = state.append(key, value)
            return call(query, state.key, state.value, state.table), state

        how = f"{kernels.described(workload.dtype)}, pages of {self.page} tokens in random order"
        return Decoding(start, step, how)
