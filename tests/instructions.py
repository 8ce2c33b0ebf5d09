"""The instruction sets that a test tries the C++ kernels on."""

from __future__ import annotations

import pytest
from attnbench_plugins.native import compiler

BEST = ""  # all that the CPU has


def hold_to(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for this one until the test ends, which is skipped where the machine can't execute them."""
    monkeypatch.setenv(compiler.HIDE, isa)
    if reason := compiler.unsupported("float32"):
        pytest.skip(reason)
    if isa.startswith("avx512") and compiler.isa() is not compiler.ISAS[0]:
        pytest.skip("this CPU lacks AVX-512")
    if isa == "avx2_vnni" and "avx_vnni" not in compiler.features():
        pytest.skip("this CPU lacks AVX-VNNI")
