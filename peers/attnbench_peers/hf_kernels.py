"""FlashAttention as the Hugging Face Hub has it compiled, for many versions of torch and CUDA: the package kernels.

get_kernel (kernels/utils.py, 0.17) loads what was fetched before, and fetches the rest: it needs the network once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any, ClassVar

from kernels import get_kernel

from attnbench.plugin import Option
from attnbench.workload import Workload

from .flash import FlashAttention, Functions


class HubFlash(FlashAttention):
    """The functions of FlashAttention 2, or with another repo 3, as the Hub's repository offers them."""

    options: ClassVar[Mapping[str, Option]] = {
        "repo": Option("kernels-community/flash-attn2", "a repository of the Hub with flash_attn_func and its kin"),
        "version": Option(2, "of the repository's interface"),
    }
    repo: str
    version: int

    def supports(self, workload: Workload) -> str | None:
        if reason := super().supports(workload):
            return reason
        module, why = _fetched(self.repo, self.version)
        if module is None:
            return f"{self.repo} is not to be had: {why}"
        lacks = [name for name in ("flash_attn_func", "flash_attn_varlen_func") if not hasattr(module, name)]
        return f"{self.repo} has no {' and no '.join(lacks)}" if lacks else None

    def functions(self) -> Functions:
        module, _ = _fetched(self.repo, self.version)
        release = f"{self.repo} v{self.version} (kernels {metadata.version('kernels')})"
        return Functions.of(module, release)


@cache
def _fetched(repo: str, version: int) -> tuple[Any, str]:
    """The module with the functions; or None, and why in a line: what keeps it from loading is the Hub's or its own."""
    try:
        module = get_kernel(repo, version=version)
        return module if hasattr(module, "flash_attn_func") else getattr(module, "flash_attn_interface", module), ""
    except Exception as error:
        return None, next(iter(str(error).strip().splitlines()), type(error).__name__)
