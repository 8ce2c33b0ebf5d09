"""Takes queries, keys and values out of a model's layer while it reads the shipped text. For a worker: it loads torch.

What is taken is what the layer's attention gets: queries and keys behind RoPE, before heads are repeated. Layers behind
the last one asked for are not computed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from attnbench import activations, home
from attnbench.activations import Activations, Source
from attnbench.errors import AttnbenchError, refusals
from attnbench.models import known, loading, text
from attnbench.task import captured

_NAME = "attnbench-capture"  # among transformers' attentions
_TOKENS, _LEAST, _MOST = 8192, 4, 32  # of all windows together; how many windows at least, and at most


class _Taken(Exception):
    """All that is wanted of a window is there."""


def capture(model: str, layers: Sequence[int], window: int) -> None:
    """Makes the files that `task.captured` reads, where they are not there yet, or were made of other texts or weights.

    layers: of the model, all in one pass. window: tokens of each window of text.

    Raises:
        AttnbenchError: the model is not installed or is another, no text is long enough, or a file can't be written.
    """
    source, folder = activations.SOURCES[model], home.activations()
    paths = {layer: captured.path(Activations(source, layer), window) for layer in layers}
    made_of = _made_of(model)
    with refusals(f"write {folder}", "set XDG_CACHE_HOME to where there is room"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{model}.lock"):
            missing = [layer for layer, path in paths.items() if _says(path) != made_of]
            for layer, tensors in _taken(source, missing, window).items() if missing else ():
                _save(tensors, paths[layer], made_of)


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


def _taken(source: Source, layers: Sequence[int], window: int) -> dict[int, dict[str, Tensor]]:
    """Of each layer and window, in float32: query (windows, heads, window, head_dim), key and value of kv_heads."""
    loaded = loading.load(source.model)
    here = (loaded.layers, loaded.heads, loaded.kv_heads, loaded.head_dim, loaded.longest, not loaded.encoder)
    meant = (source.layers, source.heads, source.kv_heads, source.head_dim, source.longest, source.causal)
    if here != meant:
        raise AttnbenchError(f"{source.model} as installed has other sizes than attnbench knows: {here}, not {meant}")
    count = min(max(_LEAST, _TOKENS // window), _MOST)
    windows = text.windows(loaded.tokenizer, text.documents(), window)[:count]
    each = [_of_window(loaded.model.base_model, layers, shown.ids) for shown in windows]
    return {
        layer: {name: torch.cat([taken[layer][i] for taken in each]) for i, name in enumerate(captured.NAMES)}
        for layer in layers
    }


def _of_window(model: Any, layers: Sequence[int], ids: Tensor) -> dict[int, tuple[Tensor, ...]]:
    """ids (1, window) -> of each layer query, key and value, (1, heads, window, head_dim)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    taken: dict[int, tuple[Tensor, ...]] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        if module.layer_idx in layers:
            taken[module.layer_idx] = tuple(x.detach().float().clone() for x in (query, key, value))
            if len(taken) == len(layers):
                raise _Taken
        return sdpa_attention_forward(module, query, key, value, *others, **named)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    with torch.no_grad(), suppress(_Taken):
        model(input_ids=ids, use_cache=False)
    return taken
