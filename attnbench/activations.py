"""Models whose queries, keys and values may stand for drawn inputs: `--inputs smollm2:LAYER`. Loads no torch.

What a layer's attention gets is captured once from a model that reads the shipped text (`models.capture`), queries and
keys behind RoPE, and kept in the user's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnbench.errors import AttnbenchError

SETS = 3  # of inputs that are held at a time, so that calls that follow each other see others
NEW_TOKENS = 128  # that decoding takes its new ones from
_SHORTEST = 512


@dataclass(frozen=True)
class Source:
    """The attention of one model. longest: tokens that it was made for. causal: later tokens change no earlier ones."""

    model: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int
    causal: bool


SOURCES: Mapping[str, Source] = {
    source.model: source
    for source in (
        Source("smollm2", 30, 9, 3, 64, 8192, causal=True),
        Source("minilm", 6, 12, 12, 32, 512, causal=False),
    )
}


@dataclass(frozen=True)
class Activations:
    """Of which layer, from 0 on, of which model."""

    source: Source
    layer: int

    def __str__(self) -> str:
        return f"{self.source.model}:{self.layer}"

    def file(self, window: int) -> str:
        """The name of what is kept of windows of so many tokens."""
        return f"{self.source.model}-{self.layer}-{window}.safetensors"

    def check(self, *sizes: int) -> None:
        """sizes: heads, kv_heads, head_dim and value_dim of what shall get them.

        Raises:
            AttnbenchError: they are not the model's.
        """
        source = self.source
        if sizes != (source.heads, source.kv_heads, source.head_dim, source.head_dim):
            raise AttnbenchError(
                f"--inputs {self} are of {source.heads} heads, {source.kv_heads} kv heads and head dim "
                f"{source.head_dim}; leave --heads, --kv-heads, --head-dim, --value-dim and --preset to them"
            )

    def window(self, tokens: int, decodes: bool) -> int:
        """Tokens of the windows of text that so many are taken from, as many as the model was made for at most.

        A causal model's windows serve all that are shorter, and decoding has new tokens to choose among; what another
        model says of a token depends on all of them.
        """
        if not self.source.causal:
            return min(tokens, self.source.longest)
        more = -(-(tokens + NEW_TOKENS) // NEW_TOKENS) * NEW_TOKENS
        return min(more if decodes else max(1 << (tokens - 1).bit_length(), _SHORTEST), self.source.longest)


def named(inputs: str, others: Sequence[str]) -> Activations:
    """What `--inputs` means by MODEL:LAYER. others: what else it may be.

    Raises:
        AttnbenchError: there is no such model or layer.
    """
    model, colon, layer = inputs.partition(":")
    if not colon:
        raise AttnbenchError(
            f"--inputs must be one of {', '.join(others)} or MODEL:LAYER, such as smollm2:3, not {inputs!r}"
        )
    if model not in SOURCES:
        raise AttnbenchError(
            f"--inputs {inputs!r}: layers are captured from {' or '.join(SOURCES)}, not from {model!r}"
        )
    source = SOURCES[model]
    if not (layer.isascii() and layer.isdigit() and int(layer[:9]) < source.layers):
        raise AttnbenchError(f"--inputs {inputs!r}: {model} has the layers 0 to {source.layers - 1}")
    return Activations(source, int(layer))
