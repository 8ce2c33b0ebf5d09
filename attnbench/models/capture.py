"""Takes queries, keys and values out of a model's layer while it reads the shipped text. For a worker: it loads torch.

What is taken is what the layer's attention gets: queries and keys behind RoPE, before heads are repeated. Later layers
are not computed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from attnbench import activations
from attnbench.errors import AttnbenchError, refusals
from attnbench.models import known, loading, text
from attnbench.task import captured

_NAME = "attnbench-capture"  # among transformers' attentions
_TOKENS, _LEAST, _MOST = 8192, 4, 32  # of all windows together; how many windows at least, and at most


class _Taken(Exception):
    """All that is wanted of this window is there."""


def capture(inputs: str, window: int) -> None:
    """Makes the file that `task.captured` reads, where it is not there yet, or was made of other texts or weights.

    inputs: a layer, such as "smollm2:3". window: tokens of each window of text.

    Raises:
        AttnbenchError: the model is not installed or is another, no text is long enough, or the file can't be written.
    """
    found = activations.named(inputs, ())
    path, made_of = captured.path(found, window), _made_of(found.source.model)
    with refusals(f"write {path.parent}", "set XDG_CACHE_HOME to where there is room"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if _says(path) != made_of:
                _save(_taken(found, window), path, made_of)


def _made_of(model: str) -> dict[str, str]:
    """What a file depends on: the texts, the weights and who computes, all in one dtype."""
    digest = hashlib.sha256("\0".join(text.documents()).encode()).hexdigest()
    packages = {name: metadata.version(name) for name in ("transformers", *known.find(model).packages)}
    return {"text": digest, "dtype": "float32"} | packages


def _says(path: Path) -> dict[str, str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            said: dict[str, str] = file.metadata()
            return said
    except (OSError, SafetensorError):
        return None


def _save(tensors: dict[str, Tensor], path: Path, made_of: dict[str, str]) -> None:
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, name, metadata=made_of)
        os.replace(name, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def _taken(found: activations.Activations, window: int) -> dict[str, Tensor]:
    """Of each window, in float32: query (windows, heads, window, head_dim), key and value (windows, kv_heads, ..)."""
    source = found.source
    loaded = loading.load(source.model)
    here = (loaded.layers, loaded.heads, loaded.kv_heads, loaded.head_dim, loaded.longest, not loaded.encoder)
    meant = (source.layers, source.heads, source.kv_heads, source.head_dim, source.longest, source.causal)
    if here != meant:
        raise AttnbenchError(f"{source.model} as installed has other sizes than attnbench knows: {here}, not {meant}")
    count = min(max(_LEAST, _TOKENS // window), _MOST)
    windows = text.windows(loaded.tokenizer, text.documents(), window)[:count]
    torch.set_grad_enabled(False)
    each = [_of_window(loaded.model.base_model, found.layer, shown.ids) for shown in windows]
    return {
        name: torch.cat(parts).contiguous()
        for name, parts in zip(("query", "key", "value"), zip(*each, strict=True), strict=True)
    }


def _of_window(model: Any, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids (1, window) -> query, key and value, (1, heads, window, head_dim)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    taken: list[Tensor] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        if module.layer_idx == layer:
            taken.extend(x.detach().float().clone() for x in (query, key, value))
            raise _Taken
        return sdpa_attention_forward(module, query, key, value, *others, **named)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    with suppress(_Taken):
        model(input_ids=ids, use_cache=False)
    query, key, value = taken
    return query, key, value
