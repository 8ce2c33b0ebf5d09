"""Loads a model and its tokenizer offline. For a worker: it loads torch and transformers.

Weights in a GGUF are taken to float32 and kept so in the user's cache: it takes 20 to 50 seconds, and each variant is
tried in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from attnbench import home
from attnbench.errors import AttnbenchError
from attnbench.models.known import Known, find

if TYPE_CHECKING:
    import torch

_SHARD = "400MB"  # a worker may write no file over 1 GiB


@dataclass(frozen=True)
class Loaded:
    """A model that is ready: `model` in evaluation mode on the CPU, `tokenizer` as transformers has them."""

    model: Any
    tokenizer: Any
    known: Known
    encoder: bool

    @property
    def config(self) -> Any:
        """Of the text model, where it is a part of a larger one."""
        return self.model.config.get_text_config()

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def longest(self) -> int:
        """Tokens that it was made for at most."""
        return int(self.config.max_position_embeddings)


def load(name: str, dtype: torch.dtype | None = None) -> Loaded:
    """The model of this name or at this path (see `known.find`), in this dtype; None: float32.

    It attends by "sdpa"; `model.set_attn_implementation(name)` changes that.

    Raises:
        AttnbenchError: it is unknown, not installed, or transformers can't load it.
    """
    import torch

    known = find(name)
    paths = known.paths()
    os.environ["HF_HUB_OFFLINE"] = "1"  # read as transformers is imported
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = paths[0] if paths[0].is_dir() else _dequantized(known, paths)
    try:
        config = AutoConfig.from_pretrained(folder)
        encoder = _encodes(config) if known.encoder is None else known.encoder
        kind = AutoModel if encoder else AutoModelForCausalLM
        model = kind.from_pretrained(folder, dtype=dtype or torch.float32, attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise AttnbenchError(f"transformers can't load {known.name}: {_first_line(error)}") from None
    return Loaded(model.eval(), tokenizer, known, encoder)


def _encodes(config: Any) -> bool:
    names = config.architectures or []
    return not any("CausalLM" in name or "LMHead" in name for name in names)


def _dequantized(known: Known, paths: list[Path]) -> Path:
    """A folder with what is in a GGUF, its weights in float32: made at the first time, and found at every further one.

    Raises:
        AttnbenchError: transformers can't read it, or the folder can't be written.
    """
    digest = hashlib.sha256(metadata.version("transformers").encode())  # what reads a GGUF differs with its version
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = home.cache() / "models" / f"{known.name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _dequantize(paths, folder)
    except OSError as error:
        raise AttnbenchError(
            f"can't keep the weights of {known.name} in {folder.parent}: {error.strerror or _first_line(error)}; "
            "set XDG_CACHE_HOME to where there is room"
        ) from None
    return folder


def _dequantize(paths: list[Path], folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        whole = paths[0]
        if len(paths) > 1:
            whole = made / "whole.gguf"
            with whole.open("wb") as out:
                for path in paths:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, out)
        try:
            tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
            model = AutoModelForCausalLM.from_pretrained(
                whole.parent,
                gguf_file=whole.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        except (ValueError, KeyError, ImportError) as error:
            raise AttnbenchError(f"transformers can't read {whole.name}: {_first_line(error)}") from None
        model.hf_quantizer = None  # its weights are plain from here on
        model.save_pretrained(made / "model", max_shard_size=_SHARD)
        tokenizer.save_pretrained(made / "model")
        (made / "model").rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
