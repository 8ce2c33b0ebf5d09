"""Which keys a query sees: the grammar of `--mask`, and what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnbench.errors import AttnbenchError

MASKS = ("full", "causal")  # and window:N


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, bottom-right aligned: the last query stands at the last key.

    causal: those up to its own position alone. window: of those no more than the last so many, its own included, as
    `sliding_window` of Mistral 7B (Jiang 2023, arXiv 2310.06825) and Gemma 2 (arXiv 2408.00118); 0 for all of them.
    """

    causal: bool = False
    window: int = 0

    @classmethod
    def parse(cls, text: str) -> Mask:
        """The mask that "full", "causal" or "window:512" spells.

        Raises:
            AttnbenchError: it spells none.
        """
        name, colon, keys = text.partition(":")
        if text in MASKS:
            return cls(causal=text == "causal")
        if name == "window" and colon and keys.isascii() and keys.isdigit() and len(keys) <= 12 and int(keys):
            return cls(causal=True, window=int(keys))
        raise AttnbenchError(f"--mask must be one of {', '.join(MASKS)}, window:N, not {text!r}")

    def __str__(self) -> str:
        return f"window:{self.window}" if self.window else "causal" if self.causal else "full"

    def visible(self, row: Any, key: Any, offset: int) -> Any:
        """Whether the query at `row` sees the key at `key`: integers, or tensors that broadcast to a bool tensor.

        offset: kv_seq - seq, the position of the first query.
        """
        if not self.causal:
            return (row >= 0) & (key >= 0)
        seen = key <= row + offset
        return seen & (key > row + offset - self.window) if self.window else seen

    def pairs(self, seq: int, kv_seq: int) -> int:
        """(query, key) pairs that are seen, of seq * kv_seq."""
        if not self.causal:
            return seq * kv_seq
        offset, window = kv_seq - seq, self.window or kv_seq
        # The queries see offset + 1 .. kv_seq keys, less what each has beyond the window.
        return _triangle(kv_seq) - _triangle(offset) - _triangle(kv_seq - window) + _triangle(offset - window)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0
