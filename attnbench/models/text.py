"""Text that models are judged on: documents, and the windows of tokens they are cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbench.errors import AttnbenchError, refusals

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Tokens that follow each other in one document.

    document: its number. ids: (1, seq) int64, those that the tokenizer puts around a text among them.
    """

    document: int
    ids: Tensor


def documents(paths: Sequence[Path] = ()) -> list[str]:
    """The text of each of these files; without any the shipped ones: twelve stories, see texts/SOURCE.md.

    Raises:
        AttnbenchError: a file can't be read, is empty, or is not UTF-8.
    """
    if not paths:
        shipped = resources.files("attnbench.models") / "texts"
        names = sorted(entry.name for entry in shipped.iterdir() if entry.name.endswith(".txt"))
        return [(shipped / name).read_text(encoding="utf-8") for name in names]
    return [_read(path) for path in paths]


def _read(path: Path) -> str:
    with refusals(f"read {path}", "give --text a file of text"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AttnbenchError(f"--text {path} is not UTF-8 (byte {error.start})") from None
    if not text.strip():
        raise AttnbenchError(f"--text {path} has no text in it")
    return text


def windows(tokenizer: Any, texts: Sequence[str], seq: int) -> list[Window]:
    """All windows of seq tokens that don't overlap, one of each document in turn, so that a few show many documents.

    Where the tokenizer puts a token before a text or behind it (Gemma's <bos>, BERT's [CLS] and [SEP]), each window
    has it. What a document has left at its end is not used.

    Raises:
        AttnbenchError: no document is long enough.
    """
    import torch

    before, after = around(tokenizer)
    taken, longest = seq - len(before) - len(after), 0
    each: list[list[Window]] = []
    for number, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        longest = max(longest, len(tokens))
        starts = range(0, len(tokens) - taken + 1, taken) if taken > 0 else ()
        each.append([Window(number, torch.tensor([before + tokens[i : i + taken] + after])) for i in starts])
    if not any(each):
        raise AttnbenchError(
            f"no document has {seq} tokens of this model: the longest has {longest + seq - taken}; a shorter --seq, or "
            "a longer --text"
        )
    return [window for row in zip_longest(*each) for window in row if window is not None]


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that it puts before a text, and those behind."""
    text = "word"
    whole = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]
