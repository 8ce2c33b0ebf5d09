"""Multi-head latent attention: against the paper's equations token by token, what it keeps, and which form is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnbench_plugins.mla import Mla, absorbed
from attnbench_plugins.mla.latent import Latent
from attnbench_plugins.native import compiler
from torch import Tensor

from attnbench.judge.conformance import check
from attnbench.judge.reference import expected
from attnbench.plugin import Cache
from attnbench.workload import Workload

DEEPSEEK = {"heads": 16, "kv_heads": 16, "head_dim": 192, "value_dim": 128}


def tiny(**changes: Any) -> Workload:
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 6, "value_dim": 3, "batch": 2}
    return Workload(**({"seq": 3, "kv_seq": 5, "mask": "causal"} | sizes | changes))


def by_the_paper(w: Workload, latent: Latent, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Equations 9 to 19 with a sum over two kv heads each for W_DKV x, one number after the other."""
    content, each = w.head_dim - 2, w.kv_heads // 2
    up_key, up_value = latent.weights(torch.float64)
    out = torch.zeros(w.batch, w.heads, w.seq, w.value_dim, dtype=torch.float64)
    for b in range(w.batch):
        c, position = [], []
        for j in range(w.kv_seq):
            heads = [torch.cat([key[b, h, j, :content], value[b, h, j]]).double() for h in range(w.kv_heads)]
            c.append(torch.cat([sum(heads[g * each : (g + 1) * each]) / each**0.5 for g in range(2)]))
            position.append(sum(key[b, h, j, content:].double() for h in range(w.kv_heads)) / w.kv_heads**0.5)
        for h in range(w.heads):
            keys = [torch.cat([up_key[h] @ c[j], position[j]]) for j in range(w.kv_seq)]
            for i in range(w.seq):
                seen = range(i + w.offset + 1)
                weights = [float(torch.exp(w.scale * (query[b, h, i].double() @ keys[j]))) for j in seen]
                mixed = sum(weight * (up_value[h] @ c[j]) for weight, j in zip(weights, seen, strict=True))
                out[b, h, i] = mixed / sum(weights)
    return out


@pytest.mark.parametrize("impl", ["absorbed", "expanded"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_both_forms_are_the_paper_s(impl: str, scale: float) -> None:
    w = tiny(softmax_scale=scale)
    plugin = Mla(impl=impl, latent=2, rope=2)
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in w.shapes]
    should = by_the_paper(w, Latent.of(w, 2, 2), *tensors)
    defined = expected(plugin.definition(w), w, *tensors, torch.arange(w.seq))
    torch.testing.assert_close(defined, should, rtol=1e-6, atol=1e-6)  # c is rounded once to float32
    torch.testing.assert_close(plugin.build(w).call(*tensors).double(), should, rtol=1e-5, atol=1e-5)


def test_matrices_keep_the_variance_and_differ_by_head_and_seed() -> None:
    w = Workload(seq=2, kv_seq=2, **DEEPSEEK)
    latent = Latent.of(w)
    assert (latent.dim, latent.rope, latent.content) == (512, 64, 128)  # as DeepSeek-V2's
    up_key, up_value = latent.weights(torch.float32)
    assert (up_key.shape, up_value.shape) == ((16, 128, 512), (16, 128, 512))
    assert float(up_key.std() * 512**0.5) == pytest.approx(1, abs=0.01)
    assert not torch.equal(up_key[0], up_key[1])
    assert not torch.equal(Latent.of(w.replace(seed=1)).weights(torch.float32)[0], up_key)


def test_absorbed_is_the_same_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    w = tiny(seq=5, mask="window:3")
    torch.manual_seed(0)
    tensors, plugin = [torch.randn(shape) for shape in w.shapes], Mla(impl="absorbed")
    should = expected(plugin.definition(w), w, *tensors, torch.arange(w.seq))
    monkeypatch.setattr(compiler, "unsupported", lambda *sources: "no compiler")
    monkeypatch.setattr(absorbed, "SCORES", 2 * 8 * 5 * 2)  # strips of two queries
    built = plugin.build(w)
    assert built.implementation == "absorbed; plain torch, strips of 2 queries"
    torch.testing.assert_close(built.call(*tensors).double(), should, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["absorbed", "expanded"])
def test_gradients_at_the_paper_s_sizes(impl: str) -> None:
    w = Workload(seq=40, kv_seq=40, mask="causal", phase="train", **(DEEPSEEK | {"heads": 4, "kv_heads": 4}))
    found = check(f"mla:impl={impl}", w)
    assert (found.status, found.reason) == ("ok", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["absorbed", "expanded"])
def test_a_step_at_the_paper_s_sizes(impl: str, dtype: str) -> None:
    w = Workload(seq=1, kv_seq=150, mask="causal", phase="decode", dtype=dtype, **DEEPSEEK)
    found = check(f"mla:impl={impl}", w)
    assert (found.status, found.reason) == ("ok", "")
    key, value = (torch.zeros(1, 16, w.past, n, dtype=getattr(torch, dtype)) for n in (192, 128))
    state = Mla(impl=impl).decoding(w).start(key, value, capacity=w.kv_seq)
    assert isinstance(state, Cache)
    numbers = state.key[:, :, 0].numel() + state.value[:, :, 0].numel()
    assert numbers == (512 + 64 if impl == "absorbed" else 16 * (192 + 128))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seq": 1, "kv_seq": 1000, "phase": "decode"}, "absorbed"),
        ({"seq": 1000, "kv_seq": 1000}, "expanded (absorbed takes"),
        ({"seq": 512, "kv_seq": 600, "phase": "decode"}, "expanded (absorbed takes"),
        ({"seq": 20, "kv_seq": 1000}, "absorbed"),  # to expand 1000 tokens costs more than 20 queries spare
    ],
)
def test_auto_takes_the_form_of_fewer_operations_and_of_fewer_bytes(changes: dict[str, Any], says: str) -> None:
    w = Workload(mask="causal", **(DEEPSEEK | changes))
    chosen, reason = Mla().chosen(w)
    assert chosen is not None
    assert f"{chosen.name} ({reason})".startswith(says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"latent": 3}, "latent=3 kv heads' worth are no whole part of 4 kv heads"),
        ({"rope": 6}, "rope less than head_dim, 6"),
        ({"latent": -1}, "must not be negative"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], says: str) -> None:
    assert says in (Mla(**options).supports(tiny()) or "")
