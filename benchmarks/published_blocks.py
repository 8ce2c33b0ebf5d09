"""How far attnbench's blocks with a published model's weights are from transformers' own outputs, in float32.

python benchmarks/published_blocks.py            # minilm's 6 encoder layers, smollm2's 30 decoder layers
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnbench.models import blocks, loading, text

_TOKENS = 512


def main() -> None:
    torch.set_grad_enabled(False)
    for name in ("minilm", "smollm2"):
        loaded = loading.load(name)
        ids = text.windows(loaded.tokenizer, text.documents(), _TOKENS)[0].ids  # (1, tokens)
        ours, theirs = blocks.last_hidden_state(loaded.model, ids), loaded.model.base_model(ids).last_hidden_state
        said = f"hidden states {off(ours, theirs):.1e}"
        if not loaded.encoder:
            said += f", logits {off(loaded.model.lm_head(ours), loaded.model.lm_head(theirs)):.1e}"
        print(f"{name}: {loaded.layers} layers, {_TOKENS} tokens, relative L2 of {said}")


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    main()
