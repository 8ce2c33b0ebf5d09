"""Compiles the C++ beside this file when it is first used, once for each source, dtype, compiler and CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from attnbench.errors import AttnbenchError

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-mtune=native")
TYPES = {"float32": "float", "bfloat16": "bf16", "float16": "f16"}  # of tensors, by their names in C++
TIMEOUT = 300  # seconds
HIDE = "ATTNBENCH_MAX_CPU_ISA"  # hides what is beyond it from us, as ATEN_CPU_CAPABILITY does from torch
# oneDNN's names for what may be left, and how what is hidden then begins.
_HIDDEN: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx512", "avx_", "amx"),
    "avx2_vnni": ("avx512", "amx"),
    "avx512_core": ("avx512_", "avx_", "amx"),
    "avx512_core_bf16": ("avx512_fp16", "amx"),
    "avx512_core_amx": (),
}
AMX = frozenset(("amx_tile", "amx_bf16", "amx_int8"))


@dataclass(frozen=True)
class Isa:
    """Instructions that the kernels are compiled for.

    lanes: float32 values in a register. needs, flag: features of the CPU by Linux's names, and what tells the compiler.
    more: likewise, what is used where the CPU has it; what begins with + is put behind the flag.
    pairs, bytes: those of `more` that multiply bfloat16 as such, and 8 bits with 8.
    """

    name: str
    lanes: int
    needs: tuple[str, ...]
    flag: str
    more: Mapping[str, str]
    pairs: str
    bytes: str

    def flags(self) -> tuple[str, ...]:
        has = features() - (AMX if tiles_refused() else frozenset())
        more = [flag for feature, flag in self.more.items() if feature in has]
        behind = [flag for flag in more if flag.startswith("+")]
        return ("".join((self.flag, *behind)), *(flag for flag in more if flag not in behind))


ISAS = (
    Isa(
        "AVX-512", 16, ("avx512f", "avx512bw", "avx512dq", "avx512vl"), "-march=x86-64-v4",
        {"avx512_bf16": "-mavx512bf16", "avx512_vnni": "-mavx512vnni", "amx_tile": "-mamx-tile",
         "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"},
        "avx512_bf16", "avx512_vnni",
    ),
    Isa("AVX2", 8, ("avx2", "fma", "f16c", "bmi2"), "-march=x86-64-v3", {"avx_vnni": "-mavxvnni"}, "", "avx_vnni"),
    Isa(
        "NEON", 4, ("asimd",), "-march=armv8.2-a", {"asimddp": "+dotprod", "i8mm": "+i8mm", "bf16": "+bf16"},
        "bf16", "i8mm",
    ),
)  # fmt: skip


class CompileError(Exception):
    """What the compiler said, in a line."""


def features() -> frozenset[str]:
    """What this CPU can execute, by Linux's names for it; nothing where Linux does not say.

    Raises:
        AttnbenchError: ATTNBENCH_MAX_CPU_ISA is set to a name that it does not know.
    """
    most = os.environ.get(HIDE, "").lower()
    if most and most not in _HIDDEN:
        raise AttnbenchError(f"{HIDE}={most!r}: the instruction sets to stop at are {', '.join(_HIDDEN)}")
    return frozenset(f for f in _all_features() if not f.startswith(_HIDDEN.get(most, ())))


_ABOUT = ("model", "flags", "CPU part", "Features")


@cache
def _all_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = (line.split(":")[1].split() for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(found, []))


def isa() -> Isa | None:
    """The best of `ISAS` that this CPU has."""
    return next((each for each in ISAS if features().issuperset(each.needs)), None)


def unsupported(dtype: str, *sources: str) -> str | None:
    """None, or why kernels can't run on this machine.

    Those of `sources` are compiled for tensors of this dtype: only the compiler can tell.
    """
    if dtype not in TYPES:
        return f"the C++ kernel is for {', '.join(TYPES)}"
    if isa() is None:
        return f"this CPU lacks {' or '.join(each.name for each in ISAS)}"
    if not shutil.which(_command()[0]):
        return f"no C++ compiler ({_command()[0]})"
    return next(filter(None, (_failure(source, flags(dtype)) for source in sources)), None)


@cache
def _failure(source: str, flags: tuple[str, ...]) -> str | None:
    """None, or why there is no library of this source. What failed once is not tried again in this process."""
    try:
        _load(source, flags)
    except CompileError as error:
        return str(error)
    return None


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products: without, torch's take fifty times as long as those in float32."""
    return not features().isdisjoint(("avx512_bf16", "amx_bf16", "bf16", "svebf16"))


def multiplies_int8() -> bool:
    """Whether this CPU has int8 products: without, torch's take a hundred times as long as those in float32."""
    return not features().isdisjoint(("avx512_vnni", "avx_vnni", "i8mm"))


def multiplies_pairs() -> bool:
    """Whether the kernels multiply bfloat16 as such; else they widen it to float32."""
    using = isa()
    return using is not None and using.pairs in features()


def multiplies_bytes() -> bool:
    """Whether the kernels multiply 8 bits with 8; else 7 with 8, as pairs of products are added in 16 bits."""
    using = isa()
    return using is not None and using.bytes in features()


def has_tiles(of: str) -> bool:
    """Whether the kernels multiply these in AMX's tiles: pairs of "bf16", or bytes, "int8"."""
    using = isa()
    return using is not None and f"-mamx-{of}" in using.flags()


def tiles_refused() -> str | None:
    """None, or why the kernels must do without the tiles that this CPU has."""
    return _permission() if "amx_tile" in features() else None


@cache
def _permission() -> str | None:
    """Asks Linux for AMX's tiles, for all threads of this process; None, or why it got none.

    Nobody has them unasked, as they make what a signal puts on a stack 8 KiB larger (docs.kernel.org, x86/xstate).
    """
    arch_prctl, request, tile_data = map(ctypes.c_long, (158, 0x1023, 18))
    system = ctypes.CDLL(None, use_errno=True)
    return os.strerror(ctypes.get_errno()) if system.syscall(arch_prctl, request, tile_data) else None


def load(source: str, dtype: str) -> ctypes.CDLL:
    """The compiled `source`, a file's name here or a path, as a library for tensors of this dtype on this CPU.

    Raises:
        CompileError: the compiler failed, or what it made can't be loaded.
    """
    return _load(source, flags(dtype))


def flags(dtype: str) -> tuple[str, ...]:
    """For the compiler, on this CPU.

    Raises:
        AttnbenchError: it has none of `ISAS`.
    """
    using = isa()
    if using is None:
        raise AttnbenchError("no instruction set that the kernels are written for")
    return (*FLAGS, *using.flags(), f"-DVALUE={TYPES[dtype]}")


@cache
def _load(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    path = HERE / source
    command = [*_command(), *flags, f"-I{HERE}"]
    target = _cache() / f"{path.stem}-{_key(path, command)}.so"
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            _compile(command, path, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CompileError(str(error)) from None


def _command() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def _key(path: Path, command: list[str]) -> str:
    """What the result depends on: the source and all headers, the flags, the compiler and, through -mtune, the CPU."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(_ABOUT)][:4]
    parts = [shlex.join(command).encode(), version, "\n".join(cpu).encode(), path.read_bytes()]
    parts += [header.read_bytes() for header in sorted(HERE.glob("*.h"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cache() -> Path:
    """The user's cache folder, or a temporary one of this user's where that can't be written."""
    folders = [Path(tempfile.gettempdir()) / f"attnbench-{os.getuid()}"]
    with suppress(RuntimeError):  # nobody's home is known
        folders.insert(0, user_cache_path("attnbench"))
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # Code is loaded from here: a folder that another user made, or may write to, won't do.
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    raise CompileError("no cache folder that can be written; set XDG_CACHE_HOME")


def _compile(command: list[str], path: Path, target: Path) -> None:
    """Compiles into a file beside the target and puts it in place whole."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, "kernel.o")
        # Linked without -fopenmp: OpenMP's calls go to the runtime that torch has loaded, so there is one thread pool.
        link = [flag for flag in command if flag != "-fopenmp"]
        _run([*command, "-c", str(path), "-o", str(made)])
        _run([*link, "-shared", str(made), "-o", str(made.with_suffix(".so"))])
        made.with_suffix(".so").replace(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]}: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(next((line for line in lines if "error" in line.lower()), lines[0]))
