"""Compiles the C++ beside this file when it is first used, once for each source, compiler and set of flags."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from attnbench.errors import AttnbenchError

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mtune=native")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni")
TIMEOUT = 300  # seconds
HIDE = "ATTNBENCH_MAX_CPU_ISA"  # set to avx2 it hides AVX-512 from us, as ATEN_CPU_CAPABILITY does from torch


class CompileError(Exception):
    """What the compiler said, in a line."""


@cache
def features() -> frozenset[str]:
    """What this CPU can execute, by Linux's names for it; nothing where Linux does not say.

    Raises:
        AttnbenchError: ATTNBENCH_MAX_CPU_ISA is set to something else than avx2.
    """
    most = os.environ.get(HIDE, "").lower()
    if most not in ("", "avx2"):
        raise AttnbenchError(f"{HIDE}={most!r}: the one instruction set to stop at is avx2")
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return frozenset(f for f in flags if not (most and f.startswith(("avx512", "avx_", "amx"))))


def unsupported(*sources: str) -> str | None:
    """None, or why kernels can't run on this machine. Those of `sources` are compiled: only the compiler can tell."""
    if missing := [name for name in NEEDED if name not in features()]:
        hidden = f" ({HIDE} hides it)" if os.environ.get(HIDE) else ""
        return f"this CPU lacks {', '.join(missing)}{hidden}"
    if not shutil.which(_command()[0]):
        return f"no C++ compiler ({_command()[0]})"
    return next(filter(None, map(_failure, sources)), None)


@cache
def _failure(source: str) -> str | None:
    """None, or why there is no library of this source. What failed once is not tried again in this process."""
    try:
        load(source)
    except CompileError as error:
        return str(error)
    return None


def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 products: without, torch's take fifty times as long as those in float32."""
    return not features().isdisjoint(("avx512_bf16", "amx_bf16"))


def multiplies_int8() -> bool:
    """Whether this CPU has int8 products: without, torch's take a hundred times as long as those in float32."""
    return not features().isdisjoint(("avx512_vnni", "avx_vnni"))


@cache
def load(source: str, *extra: str) -> ctypes.CDLL:
    """The compiled `source`, a file's name here or a path, as a library. extra: further flags.

    Raises:
        CompileError: the compiler failed, or what it made can't be loaded.
    """
    path = HERE / source
    command = [*_command(), *FLAGS, f"-I{HERE}", *extra]
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
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "flags"))][:3]
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
        raise CompileError(next((line for line in lines if "error" in line), lines[0]))
