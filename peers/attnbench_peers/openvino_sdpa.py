"""OpenVINO's ScaledDotProductAttention on a CPU, compiled for the workload's shapes.

In bfloat16 where the inputs are and the CPU multiplies it, else in float32: what OpenVINO makes of float16 is bfloat16,
but with AMX or AVX512-FP16.
"""

from __future__ import annotations

from typing import Any

import openvino
import openvino.opset13 as operators
import torch
from attnbench_plugins.pieces import hidden
from torch import Tensor

from attnbench.plugin import Attention, Plugin, expand_kv
from attnbench.workload import Workload

TYPES = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}


class OpenVino(Plugin):
    """The operator as OpenVINO's compiler takes it apart and joins it. Tensors are shared with torch, not copied.

    Grouped queries without a mask are rows of their key head; under a mask keys and values are repeated.
    """

    devices = ("cpu",)
    phases = ("forward", "decode")

    def build(self, workload: Workload) -> Attention:
        w, kind = workload, TYPES[workload.dtype]
        masked = w.is_causal and w.seq > 1
        rows = w.group if not masked else 1  # query heads that are one head's rows
        request = _compiled(w, rows).create_infer_request()

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if masked:
                key, value = expand_kv(key, w.heads), expand_kv(value, w.heads)
            q = query.contiguous().view(w.batch, w.heads // rows, rows * w.seq, w.head_dim)
            tensors = [q, key.contiguous(), value.contiguous()]  # until the answer is there, theirs is the memory
            for i, x in enumerate(tensors):
                request.set_input_tensor(i, _shared(x, kind))
            out = query.new_empty(w.batch, w.heads, w.seq, w.value_dim)
            request.set_output_tensor(0, _shared(out.view(*q.shape[:3], w.value_dim), kind))
            request.infer()
            return out

        version = openvino.__version__.partition("-")[0]
        return Attention(attend, f"openvino {version} ScaledDotProductAttention, {_precision(w)}")


def _precision(w: Workload) -> str:
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bf16" if w.dtype == "bfloat16" and "BF16" in has else "f32"


def _compiled(w: Workload, rows: int) -> Any:
    """The model of one operator, for this many threads. rows: query heads folded into one."""
    kind = TYPES[w.dtype]
    heads = w.heads // rows
    shapes = [(heads, rows * w.seq, w.head_dim), (heads, w.kv_seq, w.head_dim), (heads, w.kv_seq, w.value_dim)]
    inputs = [operators.parameter([w.batch, *shape], kind) for shape in shapes]
    mask, square = [], w.is_causal and w.seq > 1 and not w.offset
    if w.is_causal and w.seq > 1 and w.offset:  # its own causal mask is aligned top-left
        added = torch.zeros(w.seq, w.kv_seq, dtype=getattr(torch, w.dtype)).masked_fill_(hidden(w), -torch.inf)
        mask = [operators.constant(_shared(added, kind), shared_memory=False)]
    node = operators.scaled_dot_product_attention(*inputs, *mask, causal=square)
    settings = {
        "INFERENCE_NUM_THREADS": w.threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": _precision(w),
    }
    return openvino.Core().compile_model(openvino.Model([node], inputs), "CPU", settings)


def _shared(x: Tensor, kind: openvino.Type) -> openvino.Tensor:
    """OpenVINO's tensor over the memory of x, which is contiguous."""
    array = (x.view(torch.int16) if x.itemsize == 2 else x).numpy()
    return openvino.Tensor(array, openvino.Shape(list(x.shape)), kind)
