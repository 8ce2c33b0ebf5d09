"""The latent of a token, and the matrices that make keys and values of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from attnbench.workload import Workload

from ..native import attention as kernels


@dataclass(frozen=True)
class Latent:
    """Sizes, in numbers a token: of a row, which is c and behind it the key's part that carries the position.

    groups: kv heads' worth in c. content, rope: of a query and a key, the dims that come from c and the others.
    """

    workload: Workload
    groups: int
    content: int
    rope: int

    @classmethod
    def of(cls, workload: Workload, groups: int = 0, rope: int = 0) -> Latent:
        """groups, rope: 0 as the options say."""
        groups = groups or (1 if workload.kv_heads % 2 else 2)
        rope = rope or workload.head_dim // 6 * 2
        return cls(workload, groups, workload.head_dim - rope, rope)

    @property
    def dim(self) -> int:
        """d_c."""
        return self.groups * (self.content + self.workload.value_dim)

    @property
    def row(self) -> int:
        return self.dim + self.rope

    def rows(self, key: Tensor, value: Tensor) -> Tensor:
        """(c, k_R) of each token: (batch, 1, length, d_c + rope), in the inputs' dtype."""
        k, v = (self._sums(x) for x in (key, value))  # (batch, groups, length, head_dim), (.., value_dim)
        content, position = k.split((self.content, self.rope), -1)  # (batch, groups, length, ..) each
        each = key.shape[1] // self.groups
        c = torch.cat([content, v], -1) * each**-0.5  # (batch, groups, length, content + value_dim)
        c = c.transpose(1, 2).flatten(2).unsqueeze(1)  # (batch, 1, length, d_c)
        shared = position.sum(1, keepdim=True) * key.shape[1] ** -0.5  # (batch, 1, length, rope)
        return torch.cat([c, shared], -1).to(key.dtype)

    def _sums(self, x: Tensor) -> Tensor:
        """Of the kv heads of each group, in float32 or as wide as x is: (batch, groups, length, dim)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # sum's own dtype= takes several times as long
        return wide.unflatten(1, (self.groups, -1)).sum(2)

    def rows_bytes(self) -> int:
        """Of the rows, and most that is held while they are made."""
        w = self.workload
        tokens = w.batch * w.kv_seq
        copied = w.kv_heads * max(w.head_dim, w.value_dim) if w.itemsize < 4 else 0
        return tokens * (w.itemsize * self.row + 4 * copied + 4 * self.groups * 2 * (w.head_dim + w.value_dim))

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK (heads, content, d_c) and W_UV (heads, value_dim, d_c), rounded to the workload's dtype, in another."""
        w = self.workload
        generator = torch.Generator().manual_seed(w.seed)
        made = (torch.randn(w.heads, n, self.dim, generator=generator) for n in (self.content, w.value_dim))
        up_key, up_value = (x.mul_(self.dim**-0.5).to(w.device, getattr(torch, w.dtype)).to(dtype) for x in made)
        return up_key, up_value

    def expand(self, rows: Tensor, up_key: Tensor, up_value: Tensor) -> tuple[Tensor, Tensor]:
        """K (batch, heads, length, head_dim) and V (.., value_dim) of rows (batch, 1, length, d_c + rope), alike.

        The products are taken in the matrices' dtype.
        """
        c, position = rows.split((self.dim, self.rope), -1)
        c = c.to(up_key.dtype)  # (batch, 1, length, d_c)
        content, value = (_for_heads(c, up).to(rows.dtype) for up in (up_key, up_value))  # (batch, heads, length, ..)
        key = torch.cat([content, position.expand(*content.shape[:3], -1)], -1)  # (batch, heads, length, head_dim)
        return key, value

    def up_flops(self, tokens: int) -> int:
        """Of both matrices for so many rows of all heads: what they make of a latent, or of a query and an output."""
        w = self.workload
        return 2 * w.batch * w.heads * tokens * self.dim * (self.content + w.value_dim)

    def pairs(self) -> int:
        """(query, key) pairs that are seen, of all heads and batch entries."""
        w = self.workload
        return w.batch * w.heads * w.masked.pairs(w.seq, w.kv_seq)


def _for_heads(c: Tensor, up: Tensor) -> Tensor:
    """c (batch, 1, length, d_c) times each head's matrix of up (heads, n, d_c), as one product: a view."""
    made = linear(c.squeeze(1), up.flatten(0, 1))  # (batch, length, heads * n)
    return made.unflatten(-1, up.shape[:2]).transpose(1, 2)  # (batch, heads, length, n)


def product_dtype(workload: Workload) -> torch.dtype:
    """In what torch should multiply: on a CPU float32 where it has no products of the workload's dtype."""
    own: torch.dtype = getattr(torch, workload.dtype)
    return kernels.product_dtype(workload.dtype) if workload.device == "cpu" else own
