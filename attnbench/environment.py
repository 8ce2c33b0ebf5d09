"""Variables of the user's that change which kernels run or what threads they get: kept with a run, and compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# attnbench gives its workers values of its own for these: what they change is the workload's `threads`, or nothing.
_REPLACED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CAPABILITY = "ATEN_CPU_CAPABILITY"
_INSTRUCTIONS = (
    _CAPABILITY,
    "ATTNBENCH_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "GLIBC_TUNABLES",  # malloc's settings too
)
_THREADS = (
    "OMP_THREAD_LIMIT",
    "OMP_DYNAMIC",
    "OMP_MAX_ACTIVE_LEVELS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_HW_SUBSET",
    "MKL_DOMAIN_NUM_THREADS",
)
_ALLOCATORS = (
    "LD_PRELOAD",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "THP_MEM_ALLOC_ENABLE",
)
_GPU = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
)
_COMPILERS = ("TORCH_COMPILE_DISABLE",)
_NAMES = frozenset((*_REPLACED, *_INSTRUCTIONS, *_THREADS, *_ALLOCATORS, *_GPU, *_COMPILERS))
_BEGIN = ("MALLOC_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_")
# Of those, where things are kept, and what attnbench sets itself.
_END, _OURS = ("_DIR", "_HOME"), "TORCHINDUCTOR_COMPILE_THREADS"

ISAS: Mapping[str, Mapping[str, str]] = {
    "auto": {},
    "avx2": {
        "ATTNBENCH_MAX_CPU_ISA": "avx2",
        _CAPABILITY: "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx2_vnni": {
        "ATTNBENCH_MAX_CPU_ISA": "avx2_vnni",
        _CAPABILITY: "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""What `--isa` sets in whatever process computes, before torch is loaded there: it is read then and not again."""

_NEEDS = {"avx2_vnni": "avx_vnni"}  # Linux's name of a feature, where it is another

# What torch picks by itself where the CPU has a feature, the best first.
_OWN_CHOICE = {"avx512f": "AVX512", "avx2": "AVX2"}


def given(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of a process's variables that are kept with a run, by name. One that is set to nothing is not set."""
    return {name: value for name, value in sorted(variables.items()) if value and _is_kept(name)}


def lacks(isa: str, features: Collection[str]) -> str | None:
    """None, or why a CPU with these features can't be held to it."""
    needed = _NEEDS.get(isa, isa)
    if isa == "auto" or needed in features:
        return None
    return f"--isa {isa}: this CPU has no {needed.upper().replace('_', '-')}; use --isa auto"


def holds_cpu(variables: Mapping[str, str]) -> bool:
    """Whether one of them keeps instructions from kernels that the CPU has."""
    limits = ("ATTNBENCH_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", _CAPABILITY)
    return any("avx2" in variables.get(name, "").lower() for name in limits)


def changes(machine: Mapping[str, Any]) -> str:
    """All that makes a run other than one on the same machine with nothing set, in words; empty where nothing does.

    machine: as run.json has it, `environment`, `cpu_capability` and `features` in it; an older run lacks the former.
    """
    return ", ".join([*_held(machine), *(f"{name}={value}" for name, value in _compared(machine).items())])


def words(machine: Mapping[str, Any]) -> str:
    """The same for a line that has little room: variables by name alone."""
    names = " and ".join(_compared(machine))
    return ", ".join([*_held(machine), *([f"{names} set"] if names else [])])


def of_threads(machine: Mapping[str, Any]) -> list[str]:
    """The names of those that change how many threads run, and where."""
    return [name for name in _compared(machine) if name in _THREADS]


def _is_kept(name: str) -> bool:
    return name in _NAMES or (name.startswith(_BEGIN) and not name.endswith(_END) and name != _OURS)


def _variables(machine: Mapping[str, Any]) -> Mapping[str, Any]:
    found = machine.get("environment")
    return found if isinstance(found, Mapping) else {}


def _compared(machine: Mapping[str, Any]) -> dict[str, str]:
    """Without those that do nothing, without the one whose effect torch tells, and those that `_held` has in a word."""
    told = (*_REPLACED, _CAPABILITY, *ISAS[_isa(machine)])
    return {k: str(v) for k, v in sorted(_variables(machine).items()) if k not in told}


def _isa(machine: Mapping[str, Any]) -> str:
    """What all kernels are held to together; "auto" for nothing."""
    return next((isa for isa, held in ISAS.items() if held and held.items() <= _variables(machine).items()), "auto")


def _held(machine: Mapping[str, Any]) -> list[str]:
    """What torch's kernels are made for, where that is not what it would pick for this CPU; or all that compute."""
    if (isa := _isa(machine)) != "auto":
        return [f"all kernels held to {isa.upper().replace('_', ' and AVX-')}"]
    found, features = machine.get("cpu_capability"), machine.get("features") or ()
    own = next((choice for feature, choice in _OWN_CHOICE.items() if feature in features), None)
    if not found or found == own or (own is None and _CAPABILITY not in _variables(machine)):
        return []
    return [f"torch held to {found}"]
