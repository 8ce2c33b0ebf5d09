"""What our Triton kernels compile to, for a GPU that need not be there: registers, spills, instructions of their loops.

python benchmarks/compiled.py [--capability 90]

For bfloat16, head dims of 64 and 128: every tile of int8's attention kernel, with the instructions of its loop without
a mask over the scores that they make, and the kernels of linear attention. Spills are bytes a thread that ptxas keeps
in memory. With sageattention installed, its kernel too. Tools are those that triton brings along.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import triton
import triton.language as tl
from attnbench_plugins.int8 import triton_kernels as int8_triton
from attnbench_plugins.linear.triton_backward import slope_kernel
from attnbench_plugins.linear.triton_forward import read_kernel
from attnbench_plugins.linear.triton_states import sum_kernel, tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163, 90: 227}  # KiB that a block of threads may hold, by compute capability
REGISTERS, SHORTEST = 65536, 20  # of a multiprocessor; instructions of a loop that does some work
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {"sum_kernel": sum_kernel, "read_kernel": read_kernel, "slope_kernel": slope_kernel}
LINEAR = (
    ("sum_kernel", {"WEIGHTED": False}),
    ("sum_kernel", {"WEIGHTED": True}),
    ("read_kernel", {"REVERSE": False}),
    ("read_kernel", {"REVERSE": True}),
    ("slope_kernel", {"REVERSE": False}),
    ("slope_kernel", {"REVERSE": True}),
)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)")


def compiled(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
    aligned: Collection[str] = (),
    registers: int | None = None,
) -> Any:
    """A kernel as a launch would compile it. Other arguments are int32.

    aligned: arguments that are multiples of 16, as strides and addresses mostly are; what is loaded through shared
        memory, and so how much of that is used, depends on it.
    """
    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def int8_kernel(dtype: str, dim: int, tiles: int8_triton.Tiles, capability: int = 90, is_causal: bool = True) -> Any:
    """int8's attention kernel for inputs of a dtype ("bf16", "fp16", "fp32") and dim, head_dim and value_dim alike."""
    types = {"q_ptr": "*i8", "k_ptr": "*i8", "v_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "scale": "fp32"}
    types |= {"q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32"}
    constants = {"IS_CAUSAL": is_causal, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "DIM": dim}
    constants |= {"VALUE_DIM": dim, "value_dim": dim, "v_stride_d": 1}
    kernel = int8_triton.attention_kernel
    aligned = _aligned(kernel, constants, ("q_padded", "k_padded"))
    return compiled(kernel, capability, types, constants, tiles.warps, tiles.stages, aligned, tiles.registers)


def linear_kernel(name: str, how: dict[str, bool], dtype: str, dim: int, capability: int = 90) -> Any:
    """One of linear's kernels, causal, each head with its own keys. how: of `LINEAR`."""
    kernel, tile = KERNELS[name], tiles(dim, dim, TORCH[dtype])
    columns = min(dim, tile.columns)
    constants = {"CAUSAL": True, "HAS_STATE": True, "SHARE": 1, "GROUP": 1, "TILE_D": columns, "TILE_V": columns}
    constants |= {"dim": dim, "value_dim": dim, "DIM": dim, "VALUE_DIM": dim, "CHUNK": tile.chunk}
    constants |= {"PRODUCT": tl.bfloat16 if dtype == "bf16" else tl.float32}
    constants |= {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    constants |= how | {arg: 1 for arg in kernel.arg_names if arg.endswith("stride_d")}
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    types = {arg: f"*{dtype}" for arg in kernel.arg_names if arg.endswith("_ptr")}
    types |= {arg: "*fp32" for arg in ("state_ptr", "inverse_ptr", "c_ptr") if arg in kernel.arg_names}
    return compiled(kernel, capability, types, constants, tile.warps, tile.stages, _aligned(kernel, constants))


def _aligned(kernel: Any, constants: dict[str, Any], more: Collection[str] = ()) -> list[str]:
    return [
        arg
        for arg in kernel.arg_names
        if arg not in constants and (arg.endswith("_ptr") or "stride" in arg or arg in more)
    ]


def fits(binary: Any, capability: int) -> bool:
    """Whether a block of threads finds the shared memory that it needs."""
    return int(binary.metadata.shared) <= SHARED[capability] * 1024


class Code(NamedTuple):
    """What ptxas made of a kernel. loops: instructions of each innermost one."""

    registers: int
    spilled: int
    programs: int
    loops: list[int]


def code(binary: Any, warps: int, capability: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _said("cuobjdump", "-res-usage", file.name)
        loops = [n for n in _loops(_said("nvdisasm", "-c", file.name)) if n >= SHORTEST]
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    together = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return Code(registers, stack, min(together, SHARED[capability] * 1024 // (binary.metadata.shared + 1024)), loops)


def _said(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _loops(listing: str) -> Iterator[int]:
    """Instructions of each loop that has no other inside: from a label to the branch back to it."""
    lines = listing.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_x_\d+):", line))}
    jumps = [
        (labels.get(f[1], i), i) for i, line in enumerate(lines) if (f := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line))
    ]
    spans = [(start, end) for start, end in jumps if start < end]
    for start, end in spans:
        if not any(start <= a and b <= end for a, b in spans if (a, b) != (start, end)):
            yield sum(INSTRUCTION.search(line) is not None for line in lines[start : end + 1])


def sage_kernel(dim: int, is_causal: bool) -> tuple[Any, int, int]:
    """sageattention 1.0.6's attention kernel for V in float16, its warps, and the scores of a step."""
    from importlib import import_module

    module = import_module(f"sageattention.attn_qk_int8_per_block{'_causal' * is_causal}")
    types = {"Q": "*i8", "K": "*i8", "V": "*fp16", "Out": "*bf16", "Q_scale": "*fp32", "K_scale": "*fp32"}
    constants = {"H": 16, "num_kv_groups": 1, "HEAD_DIM": dim, "BLOCK_M": 128, "BLOCK_N": 64}
    constants |= {"STAGE": 3 if is_causal else 1}
    warps, stages = (4, 3) if dim == 64 else (8, 4)  # as its own launch chooses
    kernel = module._attn_fwd
    aligned = [arg for arg in kernel.arg_names if arg in types or arg.startswith("stride")]
    return compiled(kernel, 90, types, constants, warps, stages, aligned), warps, 128 * 64


@click.command()
@click.option("--capability", type=click.Choice([str(n) for n in SHARED]), default="90", show_default=True)
def main(capability: str) -> None:
    """Compile the kernels and print what they take."""
    cap = int(capability)
    click.echo(f"triton {triton.__version__}, compute capability {cap / 10}, bfloat16")
    click.echo(f"{'':54} {'registers':>9} {'spilled':>8} {'together':>9}  instructions a score")
    for dim in (64, 128):
        for tile in int8_triton.candidates(dim, dim, is_float32=False):
            for mask in ("full", "causal"):
                binary = int8_kernel("bf16", dim, tile, cap, mask == "causal")
                scores = tile.block_m * tile.block_n
                _show(f"int8, {dim}, {mask}, {tuple(tile)}", code(binary, tile.warps, cap), scores, tile.warps)
        if cap == 90 and find_spec("sageattention"):
            for mask in ("full", "causal"):
                with suppress(ImportError):
                    binary, warps, scores = sage_kernel(dim, mask == "causal")
                    _show(f"sageattention, {dim}, {mask}", code(binary, warps, cap), scores, warps)
        for name, how in LINEAR:
            binary = linear_kernel(name, how, "bf16", dim, cap)
            warps = tiles(dim, dim, torch.bfloat16).warps
            _show(f"linear, {dim}, {name}, {', '.join(f'{k}={v}' for k, v in how.items())}", code(binary, warps, cap))


def _show(what: str, found: Code, scores: int = 0, warps: int = 0) -> None:
    each = [f"{n * 32 * warps / scores:.1f}" for n in found.loops] if scores else []
    click.echo(f"{what:54} {found.registers:9} {found.spilled:8} {found.programs:9}  {', '.join(each)}")


if __name__ == "__main__":
    sys.exit(main())
