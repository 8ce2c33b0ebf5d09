"""How Triton kernels are tested without a GPU: run by its interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compiled as kernels


def slow(*values: Any) -> list[Any]:
    """Parameters that a quick look at a GPU leaves out: compiling takes seconds for each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def interpreted(script: str) -> Any:
    """What the script prints as JSON with Triton interpreted: that is chosen before triton is imported, for good."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def products(binary: Any, capability: int) -> set[str]:
    """The tensor-core instructions of a compiled kernel, which must find the shared memory that it needs."""
    assert kernels.fits(binary, capability)
    return {word for word in binary.asm["ptx"].split() if word.startswith(("mma.sync", "wgmma.mma_async"))}
