"""How Triton kernels are tested without a GPU: run by its interpreter, and compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from typing import Any


def interpreted(script: str) -> Any:
    """What the script prints as JSON with Triton interpreted: that is chosen before triton is imported, for good."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def compiled(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    aligned: Collection[str] = (),
) -> str:
    """PTX of a kernel as a launch would compile it; needs triton's compiler, and no GPU. Other arguments are int32.

    aligned: arguments that are multiples of 16, as strides and addresses mostly are; what is loaded through shared
        memory, and so how much of that is used, depends on it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    binary = compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    assert binary.metadata.shared <= {80: 163, 90: 227}[capability] * 1024  # what a block of threads may hold
    return str(binary.asm["ptx"])
