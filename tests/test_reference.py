"""The float64 reference against torch's own attention, and the rows that it is computed at."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from attnbench import FeatureMap, Softmax, Workload
from attnbench.judge import reference
from attnbench.judge.reference import exact, expected, expected_at, sample_rows
from attnbench.plugin import Definition, expand_kv, visible

SHAPES = {
    "square": {"seq": 20, "kv_seq": 20},
    "batched": {"seq": 20, "kv_seq": 20, "batch": 3, "heads": 2, "kv_heads": 2},
    "grouped": {"seq": 20, "kv_seq": 20, "kv_heads": 2},
    "one kv head": {"seq": 20, "kv_seq": 31, "kv_heads": 1},
    "longer keys": {"seq": 20, "kv_seq": 50},
    "one query": {"seq": 1, "kv_seq": 50},
    "wide value": {"seq": 20, "kv_seq": 20, "value_dim": 24},
    "narrow value": {"seq": 20, "kv_seq": 20, "value_dim": 3, "kv_heads": 4},
}


def workload(shape: str, **changes: Any) -> Workload:
    return Workload(**({"head_dim": 16, "value_dim": 16} | SHAPES[shape] | changes))


def qkv(w: Workload) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(w.heads, w.seq, w.head_dim), (w.kv_heads, w.kv_seq, w.head_dim), (w.kv_heads, w.kv_seq, w.value_dim)]
    query, key, value = (torch.randn(w.batch, *shape, generator=generator) for shape in shapes)
    dtype = getattr(torch, w.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def math_attention(w: Workload, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)


def whole_mask(w: Workload) -> Tensor:
    # Written apart from plugin.visible: True on and below the diagonal that ends in the last key.
    square = torch.ones(w.seq, w.kv_seq, dtype=torch.bool)
    return square.tril(w.kv_seq - w.seq) if w.is_causal else square


def row_sets(w: Workload) -> list[Tensor]:
    return [torch.arange(w.seq), torch.tensor([w.seq - 1, 0]), sample_rows(w.seq, 0, drawn=5, every=9)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_torchs_attention_in_float64(shape: str, mask: str, dtype: str) -> None:
    w = workload(shape, mask=mask, dtype=dtype)
    query, key, value = qkv(w)
    whole = math_attention(w, query, key, value, whole_mask(w))
    for rows in row_sets(w):
        out = exact(w, query, key, value, rows)
        assert out.dtype == torch.float64
        assert out.shape == (w.batch, w.heads, len(rows), w.value_dim)
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(expected_at(Softmax(), w, query[:, :, rows], key, value, rows), out)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_allowed_keys_are_cut_from_the_workloads_mask(shape: str, mask: str) -> None:
    w = workload(shape, mask=mask)
    query, key, value = qkv(w)

    def allowed(rows: Tensor, keys: Tensor) -> Tensor:  # a band at the diagonal's end, and the first key
        return ((rows + w.offset - keys).abs() < 4) | (keys == 0)

    both = whole_mask(w) & allowed(torch.arange(w.seq)[:, None], torch.arange(w.kv_seq))
    whole = math_attention(w, query, key, value, both)
    for rows in row_sets(w):
        out = expected(Softmax(allowed=allowed), w, query, key, value, rows)
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-12, atol=1e-13)
    if w.seq > 1:
        assert not torch.allclose(whole, math_attention(w, query, key, value, whole_mask(w)), rtol=1e-2)


def test_operands_get_every_query_and_what_they_return_is_taken_as_it_is() -> None:
    w = workload("grouped", dtype="bfloat16")
    query, key, value = qkv(w)
    seen: list[Tensor] = []

    def operands(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.extend((q, k, v))
        step = q.abs().amax((2, 3), keepdim=True).double() / 7
        return (q / step).round() * step, k.double() - k.double().mean(2, keepdim=True), v

    low = operands(query, key, value)
    seen.clear()
    rows = torch.tensor([3, 17])
    out = expected(Softmax(operands=operands), w, query, key, value, rows)
    assert all(got is given for got, given in zip(seen, (query, key, value), strict=True))
    torch.testing.assert_close(out, math_attention(w, *low, whole_mask(w))[:, :, rows], rtol=1e-12, atol=1e-13)


def above_average(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Keys whose score is above a head's mean score, for which it must see every query: (batch, heads, n, kv_seq)."""
    q, k = query.double(), expand_kv(key, query.shape[1]).double()
    mean = q.mean(2, keepdim=True) @ k.mean(2, keepdim=True).mT  # (batch, heads, 1, 1)
    chosen: Tensor = (q[:, :, rows] @ k.mT).float() > mean.float()
    chosen[..., 0] = True  # so that every row sees one
    return chosen


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", ["batched", "grouped", "longer keys"])
def test_chosen_keys_hang_on_values_and_are_cut_from_the_workloads_mask(shape: str, mask: str) -> None:
    w = workload(shape, mask=mask, dtype="bfloat16")
    query, key, value = qkv(w)
    both = whole_mask(w) & above_average(query, key, torch.arange(w.seq))  # (batch, heads, seq, kv_seq)
    whole = math_attention(w, query, key, value, both)
    for rows in row_sets(w):
        out = expected(Softmax(chosen=above_average), w, query, key, value, rows)
        torch.testing.assert_close(out, whole[:, :, rows], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(whole, math_attention(w, query, key, value, whole_mask(w)), rtol=1e-2)
    # Gradients go through the chosen keys, and not through the choice.
    leaves = [x.double().requires_grad_() for x in (query, key, value)]
    up = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    own = torch.autograd.grad(math_attention(w, *leaves, both), leaves, up)
    found = reference.gradients(Softmax(chosen=above_average), w, [query, key, value], up, 0, w.kv_heads - 1)
    for i, (gradient, of_head) in enumerate(zip(own, found, strict=True)):
        last = slice(-w.group, None) if i == 0 else slice(-1, None)
        torch.testing.assert_close(of_head, gradient[:1, last], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_feature_map_weighs_by_phi(shape: str, mask: str) -> None:
    w = workload(shape, mask=mask)
    query, key, value = qkv(w)
    project = torch.randn(w.head_dim, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def phi_query(x: Tensor) -> Tensor:
        return torch.exp(x @ project / 8)  # (.., 40): the number of features is the map's own

    def phi_key(x: Tensor) -> Tensor:
        return torch.exp(-(x @ project) / 8) + 1

    # By the definition: one (row, key) pair after the other, sums in Python's order.
    q, k, v = query.double(), expand_kv(key, w.heads).double(), expand_kv(value, w.heads).double()
    mask_all = whole_mask(w)
    for rows in row_sets(w):
        out = expected(FeatureMap(phi_query, phi_key), w, query, key, value, rows)
        for n, row in itertools.islice(enumerate(rows.tolist()), 6):
            phi = phi_query(q[:, :, row])  # (batch, heads, features)
            top, bottom = torch.zeros_like(v[:, :, 0]), torch.zeros_like(v[:, :, 0, :1])
            for j in torch.nonzero(mask_all[row]).flatten().tolist():
                weight = (phi * phi_key(k[:, :, j])).sum(-1, keepdim=True)  # (batch, heads, 1)
                top, bottom = top + weight * v[:, :, j], bottom + weight
            torch.testing.assert_close(out[:, :, n], top / bottom, rtol=1e-11, atol=1e-12)


DEFINITIONS: dict[str, Definition] = {
    "softmax": Softmax(),
    "window": Softmax(allowed=lambda rows, keys: (rows - keys).abs() < 7),
    "chosen": Softmax(chosen=above_average),
    "linear": FeatureMap(lambda q: F.elu(q) + 1, lambda k: F.elu(k) + 1),
}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("chunk", [1, 170, 1000])
def test_chunks_make_no_difference(chunk: int, definition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = workload("grouped", mask="causal", batch=2)
    rows = torch.arange(w.seq)
    whole = expected(DEFINITIONS[definition], w, *qkv(w), rows)
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk)  # 1 row, 2 rows, all rows at a time
    torch.testing.assert_close(expected(DEFINITIONS[definition], w, *qkv(w), rows), whole, rtol=1e-13, atol=1e-14)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that any operation inside gives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_memory_is_linear_in_length(definition: str) -> None:
    held = []
    for seq in (4096, 8192, 16384):
        w = Workload(seq=seq, kv_seq=seq, heads=2, kv_heads=1, head_dim=8, value_dim=8, mask="causal")
        tensors, rows = qkv(w), sample_rows(seq, 0)[:100]
        with LargestTensor() as largest:
            expected(DEFINITIONS[definition], w, *tensors, rows)
        held.append(largest.elements)
    assert held == [held[0], 2 * held[0], 4 * held[0]]
    assert held[0] == 2 * 100 * 4096  # the scores of the sampled rows, for the two heads that share a key


def test_scores_of_many_rows_are_held_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", 1 << 16)
    w = Workload(seq=2048, kv_seq=2048, heads=1, kv_heads=1, head_dim=8, value_dim=8)
    tensors = qkv(w)
    with LargestTensor() as largest:
        exact(w, *tensors, torch.arange(w.seq))
    assert largest.elements == 1 << 16


@pytest.mark.parametrize("seq", [1, 2, 47, 48, 49, 50, 511, 512, 513, 1000, 1024, 4096, 5000, 16384, 131072])
def test_sampled_rows(seq: int) -> None:
    rows = sample_rows(seq, 0).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == seq if seq <= 1024 else 164 <= len(rows) <= 198
    assert (rows[0], rows[-1]) == (0, seq - 1)
    assert {0, 1, seq - 2, seq - 1} & set(range(seq)) <= set(rows)
    for block in (16, 64, 128, 256, 1024):
        for first in (block, seq // 2 // block * block, (seq - 1) // block * block):  # a block's first row
            assert {first - 1, first} & set(range(seq)) <= set(rows)


def test_a_wrong_eighth_of_the_rows_is_not_missed() -> None:
    """By what is drawn alone, wherever the eighth lies: rows at its edges may be known to a plugin."""
    known = set(sample_rows(16384, 0).tolist()) & set(sample_rows(16384, 1).tolist())
    drawn = [len(set(sample_rows(16384, seed).tolist()) - known) for seed in range(20)]
    assert (7 / 8) ** min(drawn) < 1e-9


def test_a_seed_draws_the_rest() -> None:
    before = torch.get_rng_state()
    assert torch.equal(sample_rows(4096, 5), sample_rows(4096, 5))
    assert not torch.equal(sample_rows(4096, 5), sample_rows(4096, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_come_in_the_order_asked() -> None:
    w = workload("longer keys", mask="causal")
    rows = torch.tensor([7, 2, 19, 2])
    out = exact(w, *qkv(w), rows)
    torch.testing.assert_close(out, exact(w, *qkv(w), torch.arange(w.seq))[:, :, rows])
    assert torch.equal(visible(w, rows[:, None], torch.arange(w.kv_seq)), whole_mask(w)[rows])
