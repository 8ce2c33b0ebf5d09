"""onnxruntime's com.microsoft.MultiHeadAttention on a CPU, as an attnbench plugin.

torchao's quantized attention is not here: its wheels for Linux declare torchao::qscaled_dot_product and bring no CPU
kernel for it (tried with 0.18.0).
"""

from __future__ import annotations

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload


class OnnxRuntime(Plugin):
    """MultiHeadAttention of onnxruntime, in float32, the only dtype that it has on a CPU: other inputs are widened."""

    devices = ("cpu",)
    phases = ("forward",)
    honours = ("scale",)

    def supports(self, workload: Workload) -> str | None:
        w = workload
        if w.group > 1:
            return "MultiHeadAttention has no grouped queries"
        return "its causal mask is aligned top-left" if w.is_causal and w.offset else None

    def build(self, workload: Workload) -> Attention:
        w = workload
        operator = session(_model(w), w.threads)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # (batch, heads, length, dim) -> (batch, length, heads * dim)
            rows = {n: x.float().transpose(1, 2).flatten(2).contiguous() for n, x in
                    (("query", query), ("key", key), ("value", value))}  # fmt: skip
            (out,) = operator.run(None, {n: x.numpy() for n, x in rows.items()})
            return torch.from_numpy(out).unflatten(2, (w.heads, -1)).transpose(1, 2).to(query.dtype)

        return Attention(attend, f"onnxruntime {onnxruntime.__version__} MultiHeadAttention, float32")


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """Of a model on this CPU, with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _model(w: Workload) -> bytes:
    lengths = {"query": (w.seq, w.head_dim), "key": (w.kv_seq, w.head_dim), "value": (w.kv_seq, w.value_dim)}
    node = helper.make_node(
        "MultiHeadAttention", ["query", "key", "value"], ["out"], domain="com.microsoft", num_heads=w.heads,
        scale=w.scale, unidirectional=int(w.is_causal),
    )  # fmt: skip
    inputs = [_info(name, w.batch, length, w.heads * dim) for name, (length, dim) in lengths.items()]
    graph = helper.make_graph([node], "attention", inputs, [_info("out", w.batch, w.seq, w.heads * w.value_dim)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString()


def _info(name: str, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
