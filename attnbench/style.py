"""What published models do differently in one and the same transformer block. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ROUND = 64  # to which LLaMA-like models round the inner width of a gated FFN up


@dataclass(frozen=True)
class Style:
    """How the layers of a block compute. The order of norm and layer is the workload's `norm`.

    rope: base of the rotary position embedding (Su 2021, arXiv 2104.09864) that queries and keys of self-attention
        get; None for none.
    rms: norms are RMSNorm (Zhang 2019, arXiv 1910.07467), not LayerNorm. eps: theirs.
    activation: of the FFN: "relu", "gelu" or "silu".
    gated: the FFN has a third matrix, activation(x W_1) * x W_3 (Shazeer 2020, arXiv 2002.05202; with silu SwiGLU).
    biases: of all linear layers.
    d_ff: the FFN's inner width; None for 4 d_m, and where it is gated for two thirds of that, which is as many weights.
    """

    rope: float | None = None
    rms: bool = False
    eps: float = 1e-5
    activation: str = "relu"
    gated: bool = False
    biases: bool = True
    d_ff: int | None = None

    def hidden(self, width: int) -> int:
        """The FFN's inner width where d_m is `width`."""
        if self.d_ff:
            return self.d_ff
        return -(-8 * width // 3 // _ROUND) * _ROUND if self.gated else 4 * width


STYLES: Mapping[str, Style] = {
    "classic": Style(),  # Vaswani 2017, with the eps of torch.nn.TransformerEncoderLayer
    "bert": Style(activation="gelu", eps=1e-12),  # Devlin 2018
    "llama": Style(rope=10_000.0, rms=True, activation="silu", gated=True, biases=False),  # Touvron 2023, section 2.2
}
