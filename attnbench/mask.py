"""Which keys a query sees: the grammar of `--mask`, and what it means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attnbench.errors import AttnbenchError

MASKS = ("full", "causal")  # and window:N, tree:2x3 and tree:0,0,1
_FULL_TREE, _MOST_NODES = re.compile(r"(\d{1,4})x(\d{1,4})", re.ASCII), 1024


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, bottom-right aligned: the last query stands at the last key.

    causal: those up to its own position alone. window: of those no more than the last so many, its own included, as
    `sliding_window` of Mistral 7B (Jiang 2023, arXiv 2310.06825) and Gemma 2 (arXiv 2408.00118); 0 for all of them.
    tree: of drafts that a step verifies, each of which sees the past, its ancestors and itself (SpecInfer: Miao 2024,
        arXiv 2305.09781; Medusa: Cai 2024, arXiv 2401.10774). "2x3": each has 2 children, on 3 levels; or the parents
        of all but the first, "0,0,1"; "" for none.
    """

    causal: bool = False
    window: int = 0
    tree: str = ""

    @classmethod
    def parse(cls, text: str) -> Mask:
        """The mask that "full", "causal", "window:512" or "tree:2x3" spells.

        Raises:
            AttnbenchError: it spells none.
        """
        name, colon, keys = text.partition(":")
        if text in MASKS:
            return cls(causal=text == "causal")
        if name == "window" and colon and keys.isascii() and keys.isdigit() and len(keys) <= 12 and int(keys):
            return cls(causal=True, window=int(keys))
        if name == "tree" and colon:
            parents(keys)
            return cls(causal=True, tree=keys)
        raise AttnbenchError(f"--mask must be one of {', '.join(MASKS)}, window:N, tree:2x3, not {text!r}")

    def __str__(self) -> str:
        if self.tree:
            return f"tree:{self.tree}"
        return f"window:{self.window}" if self.window else "causal" if self.causal else "full"

    @property
    def nodes(self) -> int:
        """Of the tree; 0 without one."""
        return len(parents(self.tree)) + 1 if self.tree else 0

    @property
    def branches(self) -> bool:
        """Whether it has a tree that is no chain, in which each query sees all before it."""
        return self.tree != "" and parents(self.tree) != tuple(range(self.nodes - 1))

    def visible(self, row: Any, key: Any, offset: int) -> Any:
        """Whether the query at `row` sees the key at `key`: integers, or tensors that broadcast to a bool tensor.

        offset: kv_seq - seq, the position of the first query.
        """
        if not self.causal:
            return (row >= 0) & (key >= 0)
        if self.branches:
            return (key < offset) | self._is_ancestor(row, key - offset)
        seen = key <= row + offset
        return seen & (key > row + offset - self.window) if self.window else seen

    def pairs(self, seq: int, kv_seq: int) -> int:
        """(query, key) pairs that are seen, of seq * kv_seq."""
        if not self.causal:
            return seq * kv_seq
        if self.branches:
            return seq * (kv_seq - seq) + sum(map(sum, _ancestors(self.tree)))
        offset, window = kv_seq - seq, self.window or kv_seq
        # The queries see offset + 1 .. kv_seq keys, less what each has beyond the window.
        return _triangle(kv_seq) - _triangle(offset) - _triangle(kv_seq - window) + _triangle(offset - window)

    def _is_ancestor(self, row: Any, node: Any) -> Any:
        """Whether the node is the row's own or above it; below 0 it is none."""
        table = _ancestors(self.tree)
        if isinstance(row, int):
            return node >= 0 and table[row][node]
        return (node >= 0) & (row.new_tensor(table)[row, node.clamp(0)] > 0)


@lru_cache
def parents(tree: str) -> tuple[int, ...]:
    """Of each node of a tree but its root, which is the first; a parent stands before its children.

    Raises:
        AttnbenchError: it spells no tree.
    """
    if full := _FULL_TREE.fullmatch(tree):
        width, levels = int(full[1]), int(full[2])
        nodes = sum(width**level for level in range(min(levels, _MOST_NODES + 1)))
        if width and levels and nodes <= _MOST_NODES:
            return tuple((node - 1) // width for node in range(1, nodes))
    elif all(each.isascii() and each.isdigit() and len(each) < 5 for each in tree.split(",")):
        given = tuple(int(each) for each in tree.split(","))
        if len(given) < _MOST_NODES and all(parent <= i for i, parent in enumerate(given)):
            return given
    raise AttnbenchError(
        f"--mask tree:{tree}: write 2x3 (each node has 2 children, on 3 levels) or each node's parent but the root's, "
        f"such as 0,0,1, with the parent before it; up to {_MOST_NODES} nodes"
    )


@lru_cache
def _ancestors(tree: str) -> tuple[tuple[bool, ...], ...]:
    """For each node, which nodes it sees."""
    rows: list[list[bool]] = []
    for node, parent in enumerate((-1, *parents(tree))):
        rows.append([*rows[parent]] if node else [False] * (len(parents(tree)) + 1))
        rows[node][node] = True
    return tuple(map(tuple, rows))


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
