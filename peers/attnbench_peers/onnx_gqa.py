"""onnxruntime's com.microsoft.GroupQueryAttention on a CPU: over a cache that it adds to in place, of 8 or 4 bits too.

It computes in float16 or float32; bfloat16 is widened, and kept so in a cache. The scales of a narrow cache are inputs
of the operator, one for each channel: here those that the past asks for, so that a later token may be cut off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from attnbench.plugin import Attention, Cache, Decoding, Option, Plugin, Softmax
from attnbench.workload import Workload

from .onnx_runtime import session

LEVELS = {"int8": 127, "int4": 7}
ONNX = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
}


class OnnxRuntimeGqa(Plugin):
    """GroupQueryAttention; each query brings a key. What a cache of int8 or int4 holds is what it defines."""

    family = "quantized"
    devices = ("cpu",)
    phases = ("forward", "decode")
    honours = ("scale", "window", "softcap")
    options: ClassVar[Mapping[str, Option]] = {
        "cache": Option("wide", "of keys and values: wide as the operator's inputs, or narrow", ("wide", *LEVELS))
    }
    cache: str

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if w.head_dim % 8 or w.value_dim != w.head_dim:
            return "GroupQueryAttention has head dims that are multiples of 8, for values too"
        if w.decodes and not w.is_causal:
            return "GroupQueryAttention adds a key for each query"
        if w.offset < 0:
            return "GroupQueryAttention has a key for each query"
        if w.batch > 1 and w.seq > 1 and w.offset:
            return "GroupQueryAttention adds several tokens to a past for a batch of 1 alone"
        if self.cache != "wide" and not (w.decodes and w.past):
            return "a narrow cache takes its scales from a past: phase decode has one"
        return None

    def definition(self, workload: Workload) -> Softmax:
        if self.cache == "wide":
            return Softmax()
        w = workload

        def operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            k, v = (x.double() * s.double() for x, s in (self._narrow(x, w.past) for x in (key, value)))
            return query, k, v

        return Softmax(operands=operands)

    def build(self, workload: Workload) -> Attention:
        run = _Operator(workload, self.cache)
        past = workload.offset  # keys that no query brings

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = Cache.of(run.wide(key[:, :, :past]), run.wide(value[:, :, :past]), key.shape[2])
            return run(cache, {}, query, key[:, :, past:], value[:, :, past:])

        return Attention(attend, _named(run.dtype, self.cache))

    def decoding(self, workload: Workload) -> Decoding:
        run = _Operator(workload, self.cache)

        def start(key: Tensor, value: Tensor, capacity: int) -> tuple[Cache, dict[str, Tensor]]:
            if self.cache == "wide":
                return Cache.of(run.wide(key), run.wide(value), capacity), {}
            (k, k_scale), (v, v_scale) = (self._narrow(x, x.shape[2]) for x in (key, value))
            if self.cache == "int4":
                k, v = _pairs(k), _pairs(v)
            return Cache.of(k, v, capacity), {"k_scale": k_scale, "v_scale": v_scale}

        def step(state: tuple[Cache, dict[str, Tensor]], query: Tensor, key: Tensor, value: Tensor) -> Any:
            cache, scales = state
            out = run(cache, scales, query, key, value)
            return out, (cache._replace(length=cache.length + key.shape[2]), scales)

        return Decoding(start, step, _named(run.dtype, self.cache))

    def _narrow(self, x: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Integers as x in int8, and the scales (1, kv_heads, 1, dim) that the first `past` tokens ask for."""
        levels = LEVELS[self.cache]
        scale = x[:, :, :past].float().abs().amax((0, 2), keepdim=True).clamp(min=1e-30) / levels
        return (x.float() * (1 / scale)).round_().clamp_(-levels - 1, levels).to(torch.int8), scale


def _named(dtype: torch.dtype, cache: str) -> str:
    kept = f"{cache} cache" if cache in LEVELS else "its cache too"
    return f"onnxruntime {onnxruntime.__version__} GroupQueryAttention, {str(dtype).removeprefix('torch.')}, {kept}"


def _pairs(x: Tensor) -> Tensor:
    """int8 (..., dim) from -8 to 7 as uint8 (..., dim / 2): two numbers to a byte, each plus 8, the first one low."""
    raised = (x + 8).to(torch.uint8)
    return raised[..., ::2] | (raised[..., 1::2] << 4)


class _Operator:
    """A session of one operator, which adds new tokens to a cache and attends over all."""

    def __init__(self, w: Workload, cache: str) -> None:
        self.dtype = torch.float16 if w.dtype == "float16" else torch.float32
        self._workload = w
        kept = {"wide": self.dtype, "int8": torch.int8, "int4": torch.uint8}[cache]
        self._session = session(_model(w, self.dtype, kept), w.threads)

    def wide(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def __call__(self, cache: Cache, scales: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w, length = self._workload, cache.length + key.shape[2]
        tokens = zip(("query", "key", "value"), (query, key, value), strict=True)
        inputs = {name: self.wide(x).transpose(1, 2).flatten(2).contiguous() for name, x in tokens}
        inputs |= {"past_key": cache.key, "past_value": cache.value} | scales
        inputs["seqlens_k"] = torch.full((w.batch,), length - 1, dtype=torch.int32)
        inputs["total_sequence_length"] = torch.tensor(length, dtype=torch.int32)
        out = torch.empty_like(inputs["query"])  # (batch, seq, heads * head_dim)
        bound = self._session.io_binding()
        for name, x in inputs.items():
            bound.bind_input(name, "cpu", 0, ONNX[x.dtype], x.shape, x.data_ptr())
        for name, x in (("out", out), ("present_key", cache.key), ("present_value", cache.value)):
            bound.bind_output(name, "cpu", 0, ONNX[x.dtype], x.shape, x.data_ptr())
        self._session.run_with_iobinding(bound)
        return out.unflatten(2, (w.heads, -1)).transpose(1, 2).to(query.dtype)


def _model(w: Workload, dtype: torch.dtype, kept: torch.dtype) -> bytes:
    """The graph of one node. Lengths are left open: they are those of the tensors."""
    wide, narrow = ONNX[dtype], ONNX[kept]
    inputs = dict.fromkeys(("query", "key", "value"), (wide, 3))
    inputs |= dict.fromkeys(("past_key", "past_value"), (narrow, 4))
    inputs |= {"seqlens_k": (TensorProto.INT32, 1), "total_sequence_length": (TensorProto.INT32, 0)}
    names, attributes = list(inputs), {"num_heads": w.heads, "kv_num_heads": w.kv_heads, "scale": w.scale}
    if not w.is_causal:
        attributes["causal"] = 0
    attributes |= {"softcap": w.softcap} if w.softcap else {}
    attributes |= {"local_window_size": w.masked.window} if "window" in w.beyond else {}
    if kept != dtype:
        names += [*[""] * 5, "k_scale", "v_scale"]  # after inputs that there are none of
        inputs |= dict.fromkeys(("k_scale", "v_scale"), (TensorProto.FLOAT, 4))
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        attributes["kv_cache_bit_width"] = 8 if kept == torch.int8 else 4
    outputs = {"out": (wide, 3), "present_key": (narrow, 4), "present_value": (narrow, 4)}
    node = helper.make_node("GroupQueryAttention", names, [*outputs], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "attention", _infos(inputs), _infos(outputs))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString()


def _infos(tensors: Mapping[str, tuple[int, int]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in tensors.items()]
