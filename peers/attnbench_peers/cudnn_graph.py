"""cuDNN's attention as a graph of its own, through the package nvidia-cudnn-frontend.

`sdpa:backend=cudnn` is the same engine as torch calls it: what torch's interface has no word for, a causal mask aligned
bottom-right and a window, is there a mask (seq, kv_seq) in memory. Here it is a band of the diagonal, and sinks are an
input. Graph, sdpa and sdpa_backward: docs/operations/Attention.md and python/pygraph/sdpa.cpp of 1.32. libcudnn is the
one that came with torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import cudnn
import torch
from attnbench_plugins.autograd import differentiable
from torch import Tensor

from attnbench.errors import Failed
from attnbench.plugin import Attention, Plugin
from attnbench.workload import Workload

from .layout import older_than

TYPES = {"float16": cudnn.data_type.HALF, "bfloat16": cudnn.data_type.BFLOAT16}
FLOAT = cudnn.data_type.FLOAT
GRAPHS = 4  # that are kept, each for shapes and strides
SINKS = 91300  # version of cuDNN: 9.13.0
BACKWARD = ("q", "k", "v", "o", "dO", "stats")  # inputs of sdpa_backward
Layout: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Of a tensor: its shape, and its strides."""


class CudnnGraph(Plugin):
    """A graph of one operation, compiled for the layout that the tensors come in: cache views are not copied."""

    devices = ("cuda",)
    honours = ("scale", "window", "sinks")

    def supports(self, workload: Workload) -> str | None:
        w, dims = workload, (workload.head_dim, workload.value_dim)
        if w.dtype not in TYPES:
            return "cuDNN attends in float16 and bfloat16"
        if any(dim % 8 or dim > 256 for dim in dims):
            return "cuDNN has head dims that are multiples of 8, up to 256"
        if w.value_dim != w.head_dim and dims != (192, 128):
            return "cuDNN has one dim for queries, keys and values, or 192 and 128"
        if older_than(8):
            return "cuDNN's attention is for GPUs of compute capability 8.0 and later"
        return "sinks came with cuDNN 9.13" if w.sinks and cudnn.backend_version() < SINKS else None

    def build(self, workload: Workload) -> Attention:
        own = _Graphs(workload)
        call = differentiable(own.forward, own.backward) if workload.trains else own
        how = f"cuDNN {cudnn.backend_version_string()} sdpa graph (nvidia-cudnn-frontend {cudnn.__version__})"
        return Attention(call, how)


def arguments(w: Workload) -> dict[str, Any]:
    """What the operation is told of a workload by name, forward and backward.

    The left bound hides the keys at and before a query's place less that many: a window of n is n. A single query sees
    all keys without a mask.
    """
    told: dict[str, Any] = {"attn_scale": w.scale, "compute_data_type": FLOAT}
    if w.is_causal and (w.seq > 1 or w.masked.window):
        told |= {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
        if w.masked.window:
            told["diagonal_band_left_bound"] = w.masked.window
    return told


def forward_graph(w: Workload, *layouts: Layout, handle: Any = None) -> tuple[Any, list[Any]]:
    """Of tensors that lie so, query, key and value: a graph to be compiled, and its inputs and outputs.

    They are these three, the workload's sinks, the output, and where it trains each row's log-sum-exp.
    """
    graph = _empty_graph(w, handle)
    inputs = [graph.tensor(name=n, dim=dim, stride=s) for n, (dim, s) in zip("qkv", layouts, strict=True)]
    more = {}
    if w.sinks:
        inputs.append(graph.tensor(name="sinks", dim=(1, w.heads, 1, 1), stride=(w.heads, 1, 1, 1), data_type=FLOAT))
        more["sink_token"] = inputs[-1]
    out, stats = graph.sdpa(*inputs[:3], name="sdpa", generate_stats=w.trains, **arguments(w), **more)
    (*rows, _), (*_, dim) = layouts[0][0], layouts[2][0]
    outputs = [_output(out, (*rows, dim))]
    if w.trains:
        outputs.append(_output(stats, (*rows, 1)).set_data_type(FLOAT))
    return graph, inputs + outputs


def backward_graph(w: Workload, *layouts: Layout, handle: Any = None) -> tuple[Any, list[Any]]:
    """As `forward_graph`, of `BACKWARD`: those, and the gradients of query, key and value."""
    graph = _empty_graph(w, handle)
    types = {"stats": FLOAT}
    inputs = [
        graph.tensor(name=n, dim=dim, stride=s, data_type=types.get(n, TYPES[w.dtype]))
        for n, (dim, s) in zip(BACKWARD, layouts, strict=True)
    ]
    found = graph.sdpa_backward(**dict(zip(BACKWARD, inputs, strict=True)), name="sdpa_backward", **arguments(w))
    return graph, inputs + [_output(x, shape) for x, (shape, _) in zip(found, layouts[:3], strict=True)]


def _empty_graph(w: Workload, handle: Any) -> Any:
    kinds = {"io_data_type": TYPES[w.dtype], "intermediate_data_type": FLOAT, "compute_data_type": FLOAT}
    return cudnn.pygraph(**kinds, handle=handle)


def _output(x: Any, shape: tuple[int, ...]) -> Any:
    return x.set_output(True).set_dim(shape).set_stride(torch.empty(shape, device="meta").stride())


class _Graphs:
    """A workload's graphs, by the layouts of tensors; the one for dense tensors is compiled at once."""

    def __init__(self, w: Workload) -> None:
        self._workload, handle = w, cudnn.create_handle()
        self._forward = lru_cache(GRAPHS)(
            lambda *layouts: _Compiled(*forward_graph(w, *layouts, handle=handle), handle)
        )
        self._backward = lru_cache(GRAPHS)(
            lambda *layouts: _Compiled(*backward_graph(w, *layouts, handle=handle), handle)
        )
        self._forward(*(_layout(torch.empty(shape, device="meta")) for shape in w.shapes))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        return self._run_forward(query, key, value, *sinks)[0]

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, stats = self._run_forward(query, key, value)
        return out, stats

    def backward(
        self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = [*even(query, key, value), out, *even(up), stats]
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        self._backward(*map(_layout, given))([*given, dq, dk, dv])
        return dq, dk, dv

    def _run_forward(self, *inputs: Tensor) -> list[Tensor]:
        w = self._workload
        query, key, value = even(*inputs[:3])
        given = [query, key, value, *(x.float().view(1, w.heads, 1, 1) for x in inputs[3:])]
        found = [query.new_empty(*query.shape[:3], value.shape[3])]
        if w.trains:
            found.append(query.new_empty(*query.shape[:3], 1, dtype=torch.float32))
        self._forward(*map(_layout, given[:3]))(given + found)
        return found


class _Compiled:
    """A graph with its plan and its workspace, for the tensors that are its inputs and outputs, in order.

    Raises:
        Failed: as unsupported, where cuDNN has no engine for it on this GPU.
    """

    def __init__(self, graph: Any, names: list[Any], handle: Any) -> None:
        self._graph, self._handle, self._names = graph, handle, names
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except cudnn.cudnnGraphNotSupportedError as error:
            raise Failed("unsupported", f"cuDNN has no plan: {' '.join(str(error).split())}") from None
        self._workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")

    def __call__(self, tensors: list[Tensor]) -> None:
        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        self._graph.execute(dict(zip(self._names, tensors, strict=True)), self._workspace, handle=self._handle)


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), x.stride()


def even(*tensors: Tensor) -> list[Tensor]:
    """As they are where rows are dense and begin at multiples of 16 bytes, as the kernels read them; else copied."""
    return [x if _is_even(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]


def _is_even(x: Tensor) -> bool:
    steps = x.stride()[:-1]
    return x.stride(-1) == 1 and all(s and s % 8 == 0 for s in steps) and x.data_ptr() % 16 == 0
