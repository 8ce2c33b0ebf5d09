"""How Triton kernels are tested without a GPU: run by its interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from attnbench.workload import Workload

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import compiled as kernels


def slow(*values: Any) -> list[Any]:
    """Parameters that a quick look at a GPU leaves out: compiling takes seconds for each."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


DIMS = [64, 128, *slow(33, 256)]
DTYPES = ["bfloat16", *slow("float16", "float32")]


def problems(dim: int, dtype: str, mask: str, **more: Any) -> Iterator[Workload]:
    """Grouped heads; one query, lengths that are no multiple of a tile, and lengths that are."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": dim, "value_dim": dim, "dtype": dtype, "mask": mask}
    for seq, kv_seq in ((1, 300), (257, 1000), (1024, 1024)):
        yield Workload(**shape | more, seq=seq, kv_seq=kv_seq)


def interpreted(script: str, cases: Sequence[Sequence[Any]]) -> Any:
    """What the script prints as JSON of these cases with Triton interpreted: chosen before it is imported, for good."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, json.dumps(cases)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def marked(cases: Sequence[Sequence[Any]], core: Collection[Sequence[Any]]) -> list[Any]:
    """Parameters for all cases, those that are not core as slow."""
    marks = {True: [], False: [pytest.mark.slow]}
    return [pytest.param(case, id="-".join(map(str, case)), marks=marks[case in core]) for case in cases]


def selected(session: pytest.Session, path: str) -> list[Any]:
    """The cases of a file's tests that this session runs."""
    mine = (item for item in session.items if str(item.path) == path and hasattr(item, "callspec"))
    return list(dict.fromkeys(item.callspec.params["case"] for item in mine if "case" in item.callspec.params))


def products(binary: Any, capability: int) -> set[str]:
    """The tensor-core instructions of a compiled kernel, which must find the shared memory that it needs."""
    assert kernels.fits(binary, capability)
    return {word for word in binary.asm["ptx"].split() if word.startswith(("mma.sync", "wgmma.mma_async"))}
