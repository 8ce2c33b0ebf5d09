"""Needle in a haystack: is a fact that stands somewhere in a long text still found at its end?

After G. Kamradt, "Needle in a Haystack - Pressure Testing LLMs" (2023), without a judge: the text ends as the fact
began, and it counts as found where the likeliest next tokens, one by one, are the rest of the fact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnbench.models.text import around

if TYPE_CHECKING:
    from torch import Tensor

_QUESTION = "\n\nThe secret number of the clock tower is"
_FACT = " The secret number of the clock tower is{answer}."
_ANSWERS = (" 4817", " 9362", " 7205", " 1594", " 6028")
_BEGIN = 50  # characters of a word that ends a sentence are looked at in this many tokens


@dataclass(frozen=True)
class Needle:
    """depth: where the fact stands, 0 at the beginning of the text and 1 at its end.

    ids: (1, seq) int64, which end with the answer. answer: how many of its tokens.
    """

    depth: float
    ids: Tensor
    answer: int


def needles(tokenizer: Any, texts: Sequence[str], seq: int, depths: Sequence[float]) -> list[Needle]:
    """One for each depth, each in another document and with another number.

    Where no document is long enough for seq tokens, there are fewer.
    """
    import torch

    before, _ = around(tokenizer)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    found = []
    for number, depth in enumerate(depths):
        answer = tokens(_ANSWERS[number % len(_ANSWERS)])
        fact = tokens(_FACT.format(answer=_ANSWERS[number % len(_ANSWERS)]))
        question = tokens(_QUESTION)
        room = seq - len(before) - len(fact) - len(question) - len(answer)
        filler = tokens(texts[number % len(texts)])[: max(0, room)]
        if room < _BEGIN or len(filler) < room:
            continue
        ends = [i + 1 for i, token in enumerate(filler) if tokenizer.decode([token]).endswith(".")] or [room]
        at = min(ends, key=lambda end, depth=depth: abs(end - depth * room))  # type: ignore[misc]
        ids = [*before, *filler[:at], *fact, *filler[at:], *question, *answer]
        found.append(Needle(depth, torch.tensor([ids]), len(answer)))
    return found
