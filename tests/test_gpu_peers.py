"""Peers on a GPU, as far as they can be tried without one: what they refuse, what they ask of the libraries, and how
tensors go in and come out. What is not installed is skipped; their kernels have not been run (docs/gpu.md)."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from test_peers import PEERS, PROJECT, peer
from torch import Tensor

from attnbench import peers
from attnbench.judge.conformance import check
from attnbench.plugin import Plugin, built
from attnbench.workload import Workload

SHAPE: dict[str, Any] = {"seq": 64, "kv_seq": 64, "heads": 4, "kv_heads": 2, "dtype": "bfloat16", "device": "cuda"}
DIMS_80 = {"head_dim": 80, "value_dim": 80}
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {  # what a workload has that the peer does not, and its words
    "flash-attn-2": [({"dtype": "float32"}, "float16 and bfloat16"), ({"value_dim": 32}, "one dim")],
    "flash-attn-3": [({"head_dim": 264, "value_dim": 264}, "up to 256"), ({"value_dim": 32}, "one dim")],
    "flash-attn-4": [({"dtype": "float32"}, "float16 and bfloat16"), ({"head_dim": 20}, "multiples of 8")],
    "hf-kernels": [({"dtype": "float32"}, "float16 and bfloat16"), ({"head_dim": 20, "value_dim": 20}, "of 8")],
    "cudnn": [({"dtype": "float32"}, "float16 and bfloat16"), ({"value_dim": 32}, "192 and 128"),
              ({"head_dim": 20, "value_dim": 20}, "multiples of 8")],
    "flashinfer": [({"dtype": "float32"}, "float16 and bfloat16"), (DIMS_80, "64, 128, 256")],
    "sageattention-2": [({"head_dim": 136, "value_dim": 136}, "up to 128"), ({"mask": "causal", "kv_seq": 70}, "causal")],
    "natten": [({"device": "cpu", "kv_seq": 70}, "as many queries"), ({"device": "cpu", "phase": "train"}, "backward"),
               ({"device": "cpu", "mask": "window:1"}, "2 keys")],
}  # fmt: skip
ASKED = [{}, {"mask": "causal"}, {"mask": "window:9"}, {"softcap": 2.0, "softmax_scale": 0.3, "mask": "causal"}]


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PEERS)


def module(name: str) -> Any:
    return importlib.import_module(f"attnbench_peers.{name}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_peer_cannot_do_is_said_in_a_line_without_a_gpu(name: str) -> None:
    plugin = peer(name)()
    for change, words in REFUSED[name]:
        said = str(plugin.supports(Workload(**SHAPE | change)))
        assert words in said, change
        assert "\n" not in said


@pytest.mark.gpu
@pytest.mark.parametrize("name", REFUSED)
def test_on_a_gpu_a_peer_computes_what_it_defines(name: str) -> None:
    plugin, statuses = peer(name)(), []
    for shape in (
        {"seq": 300, "kv_seq": 300, "batch": 2},
        {"seq": 300, "kv_seq": 300, "mask": "causal"},
        {"seq": 65, "kv_seq": 300, "mask": "causal"},
        {"seq": 300, "kv_seq": 300, "batch": 3, "mask": "causal", "lengths": "300,1,77"},
        {"seq": 300, "kv_seq": 300, "mask": "window:64", "softmax_scale": 0.2},
        {"seq": 300, "kv_seq": 300, "mask": "causal", "softcap": 20.0},
        {"seq": 300, "kv_seq": 300, "mask": "causal", "sinks": True},
        {"seq": 1, "kv_seq": 500, "batch": 2, "mask": "causal", "phase": "decode"},
        {"seq": 5, "kv_seq": 500, "mask": "window:64", "phase": "decode"},
        {"seq": 1, "kv_seq": 500, "phase": "decode"},
        {"seq": 300, "kv_seq": 300, "mask": "causal", "phase": "train"},
    ):
        for dtype in ("bfloat16", "float16"):
            w = Workload(**SHAPE | shape | {"dtype": dtype})
            found = check(plugin, w, strided=True)
            assert found.status in ("ok", "unsupported"), (w, found.reason)
            statuses.append(found.status)
    assert statuses.count("ok") >= 4


# Tokens in a row


def test_tokens_of_a_ragged_batch_are_packed_and_laid_back() -> None:
    w = Workload(seq=7, kv_seq=7, batch=3, heads=2, kv_heads=2, head_dim=4, lengths="5,7,1")
    queries, keys = module("layout").tokens_of(w)
    x = torch.randn(3, 2, 7, 4, requires_grad=True)
    packed = keys.pack(x)
    assert queries.starts.tolist() == [0, 5, 12, 13]
    assert torch.equal(packed, torch.cat([x[i, :, :n].transpose(0, 1) for i, n in enumerate((5, 7, 1))]))
    back = queries.unpack(packed)
    seen = torch.arange(7) < torch.tensor([5, 7, 1])[:, None]
    assert torch.equal(back, x * seen[:, None, :, None])
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, seen[:, None, :, None].expand_as(x).float())


def test_new_queries_of_a_ragged_batch_are_as_many_for_each_entry() -> None:
    w = Workload(seq=2, kv_seq=7, batch=2, lengths="5,7", mask="causal")
    queries, keys = module("layout").tokens_of(w)
    assert (queries.starts.tolist(), queries.longest) == ([0, 2, 4], 2)
    assert (keys.starts.tolist(), keys.longest) == ([0, 5, 12], 7)


# FlashAttention: plain torch with the arguments that its docstrings give stands in for its kernels.


def plain(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, window_size: Any, softcap: float,
          seen: int | None = None) -> Tensor:  # fmt: skip
    """One entry, (length, heads, dim): query i sees the keys j from i + shift - left to i + shift + right."""
    n, left, right = len(k) if seen is None else seen, *window_size
    k, v = (x[:n].repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * softmax_scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    apart = torch.arange(n) - torch.arange(len(q))[:, None] - (n - len(q))  # j - i - shift
    right = 0 if causal else right
    hidden = (apart < -left if left >= 0 else apart < -n) | (apart > right if right >= 0 else apart > n)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(q.dtype)


class Plain:
    """As a module of FlashAttention: batches of `plain`."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, window_size: Any = (-1, -1), **told: Any) -> Tensor:
        return torch.stack([plain(*each, window_size=window_size, **told) for each in zip(q, k, v, strict=True)])

    @staticmethod
    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, window_size: Any = (-1, -1), **told: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        ends = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        parts = zip(*map(pairwise, ends), strict=True)
        out = [plain(q[a:b], k[c:d], v[c:d], window_size=window_size, **told) for (a, b), (c, d) in parts]
        assert max(map(len, out)) == max_seqlen_q
        return torch.cat(out), None

    @staticmethod
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
        cache_seqlens: int = 0, window_size: Any = (-1, -1), **told: Any,
    ) -> Tensor:  # fmt: skip
        if k is not None and v is not None:
            new = slice(cache_seqlens, cache_seqlens + k.shape[1])
            k_cache[:, new], v_cache[:, new] = k, v
            cache_seqlens = new.stop
        parts = zip(q, k_cache, v_cache, strict=True)
        return torch.stack([plain(*each, window_size=window_size, seen=cache_seqlens, **told) for each in parts])


@pytest.fixture
def flash() -> Plugin:
    shared = module("flash")

    class Flash(shared.FlashAttention):  # type: ignore[misc, name-defined]
        devices = ("cpu",)

        def functions(self) -> Any:
            return shared.Functions.of(Plain, "plain")

    return Flash()


@pytest.mark.parametrize("asked", ASKED)
def test_flash_attention_is_asked_for_what_the_workload_is(flash: Plugin, asked: dict[str, Any]) -> None:
    for shape in (
        {"seq": 20, "kv_seq": 33, "batch": 2},
        {"seq": 33, "kv_seq": 33, "batch": 3, "lengths": "33,1,20"},
        {"seq": 1, "kv_seq": 33, "batch": 2, "phase": "decode"},
        {"seq": 3, "kv_seq": 33, "phase": "decode"},
        {"seq": 20, "kv_seq": 20, "phase": "train"},
    ):
        w = Workload(**shape, **asked, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype="bfloat16")
        found = check(flash, w, strided=True)
        assert (found.status, found.reason) == ("ok", ""), w
        if w.decodes or w.lengths:
            assert ("kvcache" if w.decodes else "varlen") in found.implementation


# What the libraries are asked, held against their own signatures


def flash_functions() -> Iterator[tuple[str, str, str]]:
    for package, file in (
        ("flash-attn", "flash_attn/flash_attn_interface.py"),
        ("flash-attn-3", "flash_attn_interface.py"),
        ("flash-attn-4", "flash_attn/cute/interface.py"),
    ):
        for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
            if (package, name) != ("flash-attn-4", "flash_attn_with_kvcache"):
                yield package, file, name


@pytest.mark.parametrize(("package", "file", "name"), [*flash_functions()])
def test_flash_attention_knows_the_arguments_that_it_is_given(package: str, file: str, name: str) -> None:
    """Read, not imported: that wants CUDA."""
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    found = next(x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef) and x.name == name)
    known = [x.arg for x in found.args.args]
    own = getattr(Plain, name)
    given = set(inspect.signature(own).parameters) - {"told"} | set(module("flash").arguments(Workload(**SHAPE), own))
    assert given <= set(known)
    assert known[:3] == [*inspect.signature(own).parameters][:3]


@pytest.mark.parametrize("asked", [{}, {"mask": "causal"}, {"mask": "window:9"}, {"sinks": True}, {"phase": "train"}])
def test_cudnn_describes_a_graph_that_it_takes(asked: dict[str, Any]) -> None:
    peer("cudnn")
    cudnn, own = importlib.import_module("cudnn"), module("cudnn_graph")
    w = Workload(**SHAPE | {"kv_seq": 100} | asked)
    rows = [(shape, torch.empty(shape, device="meta").stride()) for shape in w.shapes]
    graph, ends = own.forward_graph(w, *rows)
    graph.validate()
    assert [tuple(x.dim) for x in ends[:3]] == list(w.shapes)
    assert tuple(ends[3 + w.sinks].dim) == (1, 4, 64, 64)
    operations = [("sdpa", {*own.arguments(w), "generate_stats", *(["sink_token"] if w.sinks else [])})]
    if w.trains:
        assert tuple(ends[4].dim) == (1, 4, 64, 1)
        out, stats = ((shape, torch.empty(shape, device="meta").stride()) for shape in ((1, 4, 64, 64), (1, 4, 64, 1)))
        graph, ends = own.backward_graph(w, *rows, out, out, stats)
        graph.validate()
        assert [tuple(x.dim) for x in ends[-3:]] == list(w.shapes)
        operations.append(("sdpa_backward", {*own.arguments(w), *own.BACKWARD}))
    for name, given in operations:
        signature = getattr(cudnn._pybind_module.backend_graph, name).__doc__
        assert all(f"{each}:" in signature for each in given), given


@pytest.mark.parametrize("asked", ASKED)
def test_flashinfer_knows_the_arguments_that_it_is_given(asked: dict[str, Any]) -> None:
    peer("flashinfer")
    library, own = importlib.import_module("flashinfer"), module("flash_infer")
    w = Workload(**SHAPE | asked)
    told, sizes, one = own.arguments(w), own._sizes(w), torch.zeros(1)
    plans = {
        "BatchPrefillWithRaggedKVCacheWrapper": ((one, one, *sizes), {"causal": w.is_causal}),
        "BatchPrefillWithPagedKVCacheWrapper": ((one, one, one, one, *sizes, 16), {"causal": w.is_causal}),
        "BatchDecodeWithPagedKVCacheWrapper": ((one, one, one, *sizes, 16), {}),
    }
    for name, (first, more) in plans.items():
        wrapper = getattr(library, name)
        plan = getattr(wrapper, "_plan_impl", wrapper.plan)  # decoding's takes anything and hands it on
        bound = inspect.signature(plan).bind(None, *first, **told, **more).arguments
        assert (bound["num_qo_heads"], bound["num_kv_heads"]) == (4, 2)
        assert bound.get("page_size", 16) == 16
        assert bound["window_left"] == (8 if w.masked.window else -1)
        inspect.signature(wrapper).bind(one, "NHD", **({"use_tensor_cores": True} if "Decode" in name else {}))
    inspect.signature(library.append_paged_kv_cache).bind(*[one] * 8, kv_layout="NHD")


def test_each_sequence_of_flashinfer_has_pages_of_its_own() -> None:
    peer("flashinfer")
    w = Workload(seq=1, kv_seq=20, batch=3, phase="decode", mask="causal")
    table = module("flash_infer")._Table(w, 8, 20, 4)
    assert (table.starts.tolist(), table.filled.tolist()) == ([0, 3, 6, 9], [4, 4, 4])
    assert len(set(table.pages.tolist())) == 9
    longer = module("flash_infer")._Table(w, 8, 32, 4)  # what was written stays where it is
    assert torch.equal(longer.pages.view(3, 4)[:, :3], table.pages.view(3, 3))
    assert longer.filled.tolist() == [8, 8, 8]


@pytest.mark.parametrize("mask", ["full", "causal", "window:4"])
@pytest.mark.parametrize("keys", [5, 6])
def test_a_neighbourhood_is_that_of_natten(mask: str, keys: int) -> None:
    """NATTEN itself computes it, by flex_attention on a CPU."""
    plugin = peer("natten")(keys=keys)
    w = Workload(seq=21, kv_seq=21, heads=4, kv_heads=2, head_dim=16, value_dim=16, mask=mask, softmax_scale=0.3)
    found = check(plugin, w, strided=True)
    assert (found.status, found.reason) == ("ok", "")
    assert plugin.emulated(w)
    place = torch.arange(21)
    allowed = plugin.definition(w).allowed(place[:, None], place) & w.masked.visible(place[:, None], place, 0)
    assert int(allowed.sum()) == round(built(plugin, w).density * 21**2)
    if mask == "full":
        assert set(allowed.sum(1).tolist()) == {keys}
        assert (place[:, None] - place).abs()[allowed].max() == keys - 1  # a query at the end sees those to one side


def test_rows_that_a_thread_multiplies_share_a_scale() -> None:
    """By hand: lane t of a warp has rows t, t + 8, .. of Q, and of K the pairs of rows 2 t, 2 t + 1 in each eight."""
    own, x = module("lanes"), torch.randn(1, 1, 70, 64)
    for narrow, rows in (
        (own.queries(x), [3, 11, 19, 27]), (own.queries(x), [67]),
        (own.keys(x), [r for at in range(0, 64, 8) for r in (at + 2, at + 3)]), (own.keys(x), [64, 65]),
    ):  # fmt: skip
        steps = narrow[0, 0, rows] / (x[0, 0, rows].abs().max() / 127 + 1e-7)
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert steps.abs().max().round() == 127
        assert (narrow - x)[0, 0, rows].abs().max() <= 0.51 * x[0, 0, rows].abs().max() / 127


def test_a_kernel_that_the_hub_does_not_give_is_named_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = peer("hf-kernels")(repo="kernels-community/flash-attn2", version=2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = str(plugin.supports(Workload(**SHAPE)))
    assert said.startswith("kernels-community/flash-attn2 is not to be had: ")
    assert "\n" not in said


def test_the_gpu_extra_is_what_need_not_be_compiled() -> None:
    brought = {extra for need in PROJECT["optional-dependencies"]["gpu"] for extra in Requirement(need).extras}
    for known in (peers.PEERS[name] for name in REFUSED):
        assert (known.extra in brought) == (not known.compiled and not known.by_hand), known
        assert ("--no-build-isolation" in known.missing) == (known.compiled and not known.version)
