"""Three types of model, and what each output position may see: `python docs/lecture/model_types.py`.

"AI stands for" goes through one of attnbench's blocks of each type, with softmax attention in float64. The
encoder-decoder has its own tokens besides, "artificial intelligence", and reads the encoder block's output as memory.
Words become vectors that a hash of their letters draws; there are no positions, and nothing is trained. One input word
after the other is exchanged for a different one: an x says that the output at that position (column) changed with the
word (row), a . that it is the same to the last bit.

Look for: a full square (encoder), a triangle (decoder-only), and a full square over a triangle (encoder-decoder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from attnbench.judge.reference import exact
from attnbench.plugin import Call
from attnbench.task.transformer import Block
from attnbench.theory.costs import attentions
from attnbench.workload import Workload

HEADS, HEAD_DIM = 4, 16
INPUT, OWN = ("AI", "stands", "for"), ("artificial", "intelligence")

ENCODER = """Every position sees every word, later ones too. So it can label a text or a word of it, but can't be
trained to predict the next word: it has seen it."""
DECODER_ONLY = """A position sees itself and earlier words. So each can be trained to predict the next one, and what was
computed for it stays true when words are added. The last one has seen all and says what comes after "for"."""
ENCODER_DECODER = """A position of the decoder sees the whole input, through cross-attention, and of the decoder's own
words those up to itself. So it reads one text and writes another."""


def embed(words: Sequence[str]) -> Tensor:
    """(1, words, width), float64: each word the vector that its letters draw."""
    drawn = []
    for word in words:
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(word.encode()).digest()[:4]))
        drawn.append(torch.randn(HEADS * HEAD_DIM, generator=generator, dtype=torch.float64))
    return torch.stack(drawn)[None]


def block(kind: str, seq: int, kv_seq: int) -> Block:
    """One block with exact attention in float64, inside as outside."""
    w = Workload(
        seq=seq, kv_seq=kv_seq, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, value_dim=HEAD_DIM, scope="block",
        block=kind, norm="pre",
    )  # fmt: skip

    def attention(inside: Workload) -> Call:
        return lambda q, k, v: exact(inside, q, k, v, torch.arange(inside.seq))

    return Block(w, {name: attention(inside) for name, inside in attentions(w).items()}).double()


def seen(model: Callable[[Sequence[str]], Tensor], words: Sequence[str]) -> list[list[bool]]:
    """Of each input word, which output positions change with it."""
    before, table = model(words), []
    for i in range(len(words)):
        after = model([*words[:i], "another", *words[i + 1 :]])
        table.append((before != after).any(-1)[0].tolist())
    return table


def show(title: str, meaning: str, table: list[list[bool]], words: Sequence[str], outputs: Sequence[str]) -> None:
    print(f"\n{title}\n{'':14}" + "".join(f"{name:>14}" for name in outputs) + "   <- output at")
    for word, row in zip(words, table, strict=True):
        print(f"{word:14}" + "".join(f"{'x' if changed else '.':>14}" for changed in row))
    print(meaning)


@torch.no_grad()
def main() -> None:
    n, m = len(INPUT), len(OWN)
    encoder, alone, decoder = block("encoder", n, n), block("decoder-only", n, n), block("decoder", m, n)
    show("encoder-only", ENCODER, seen(lambda words: encoder(embed(words)), INPUT), INPUT, INPUT)
    show("decoder-only", DECODER_ONLY, seen(lambda words: alone(embed(words)), INPUT), INPUT, INPUT)
    both = seen(lambda words: decoder(embed(words[n:]), encoder(embed(words[:n]))), (*INPUT, *OWN))
    show("encoder-decoder", ENCODER_DECODER, both, (*INPUT, *OWN), OWN)


if __name__ == "__main__":
    main()
