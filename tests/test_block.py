"""The block against torch's own layers, and its float64 reference against the block."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_reference import LargestTensor, above_average
from torch import Tensor, nn

from attnbench import AttnbenchError, FeatureMap, Softmax, Workload
from attnbench.judge.reference import expected_block, sample_rows
from attnbench.plugin import Call, Definition, expand_kv, visible
from attnbench.style import STYLES, Style
from attnbench.task.transformer import Block, rotated
from attnbench.theory.costs import attentions


def block_workload(block: str = "encoder", norm: str = "pre", **changes: Any) -> Workload:
    mask = "full" if block == "encoder" else "causal"
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "value_dim": 16, "seq": 33}
    sizes["kv_seq"] = 47 if block == "decoder" else 33
    return Workload(**({"scope": "block", "block": block, "norm": norm, "mask": mask} | sizes | changes))


def mask_of(w: Workload) -> Tensor:
    return visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq))  # (seq, kv_seq)


def sdpa(w: Workload) -> Call:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(w), enable_gqa=True)


def make(
    w: Workload,
    attend: Callable[[Workload], Call] = sdpa,
    weights: dict[str, Tensor] | None = None,
    style: Style = STYLES["classic"],
) -> Block:
    return Block(w, {name: attend(inside) for name, inside in attentions(w).items()}, weights, style=style)


def inputs(w: Workload, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [w.seq, w.kv_seq] if w.block == "decoder" else [w.seq]
    return [torch.randn(w.batch, length, w.width, generator=generator).to(dtype) for length in lengths]


def pair(given: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return given[0], given[1] if len(given) == 2 else None


def shaken(block: Block) -> dict[str, Tensor]:
    """Its weights with noise on all of them: LayerNorms of 1 and 0 would hide one that is left out or swapped."""
    generator = torch.Generator().manual_seed(2)
    return {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in block.state_dict().items()}


def as_torch(weights: dict[str, Tensor], cross: bool) -> dict[str, Tensor]:
    """The same weights under the names of torch's layers, whose three input projections are one matrix."""
    names = {"self_attention": "self_attn"} | ({"cross_attention": "multihead_attn"} if cross else {})
    out = {}
    for i, (ours, theirs) in enumerate(names.items(), start=1):
        for kind in ("weight", "bias"):
            projections = [weights[f"{ours}.layer.{name}.{kind}"] for name in ("W_Q", "W_K", "W_V")]
            out[f"{theirs}.in_proj_{kind}"] = torch.cat(projections)
            out[f"{theirs}.out_proj.{kind}"] = weights[f"{ours}.layer.W_O.{kind}"]
            out[f"norm{i}.{kind}"] = weights[f"{ours}.norm.{kind}"]
    for kind in ("weight", "bias"):
        out[f"linear1.{kind}"] = weights[f"ffn.layer.W_1.{kind}"]
        out[f"linear2.{kind}"] = weights[f"ffn.layer.W_2.{kind}"]
        out[f"norm{len(names) + 1}.{kind}"] = weights[f"ffn.norm.{kind}"]
    return out


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(
    ("block", "mask"), [("encoder", "full"), ("encoder", "causal"), ("decoder-only", "causal"), ("decoder", "causal")]
)
def test_equals_torchs_layer(block: str, mask: str, norm: str) -> None:
    w = block_workload(block, norm, mask=mask)
    weights = shaken(make(w))
    kind = nn.TransformerDecoderLayer if block == "decoder" else nn.TransformerEncoderLayer
    layer = kind(w.width, w.heads, 4 * w.width, dropout=0.0, batch_first=True, norm_first=norm == "pre")
    layer.load_state_dict(as_torch(weights, cross=block == "decoder"))
    hidden = ~mask_of(attentions(w)["self"])
    masks = {"tgt_mask": hidden} if block == "decoder" else {"src_mask": hidden}
    with torch.no_grad():
        ours, theirs = make(w, weights=weights)(*inputs(w)), layer(*inputs(w), **masks)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_grouped_query_equals_repeated_heads(block: str) -> None:
    grouped, full = block_workload(block, kv_heads=2), block_workload(block)
    weights = make(grouped).state_dict()

    def repeat(name: str, weight: Tensor) -> Tensor:
        if ".W_K." not in name and ".W_V." not in name:
            return weight
        return weight.view(2, 16, *weight.shape[1:]).repeat_interleave(2, dim=0).flatten(0, 1)

    repeated = {name: repeat(name, weight) for name, weight in weights.items()}
    with torch.no_grad():
        torch.testing.assert_close(make(grouped)(*inputs(full)), make(full, weights=repeated)(*inputs(full)))


@pytest.mark.parametrize("block", ["encoder", "decoder"])
def test_a_wider_value_equals_one_padded_with_zeros(block: str) -> None:
    narrow, wide = block_workload(block), block_workload(block, value_dim=24)
    weights = make(narrow).state_dict()

    def pad(name: str, weight: Tensor) -> Tensor:
        if ".W_V." in name:
            heads = weight.view(4, 16, *weight.shape[1:])  # (heads, value_dim, ..)
            return torch.cat([heads, heads.new_zeros(4, 8, *heads.shape[2:])], dim=1).flatten(0, 1)
        if name.endswith(".W_O.weight"):
            return F.pad(weight.view(-1, 4, 16), (0, 8), value=7.0).flatten(1)  # met by zeros alone
        return weight

    padded = {name: pad(name, weight) for name, weight in weights.items()}
    with torch.no_grad():
        torch.testing.assert_close(make(wide, weights=padded)(*inputs(narrow)), make(narrow)(*inputs(narrow)))


def int8_like(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One scale for all queries, so that any row's quantization depends on every row."""
    step = query.abs().amax((2, 3), keepdim=True) / 7
    return (query / step).round() * step, key, value


DEFINITIONS: dict[str, Definition] = {
    "softmax": Softmax(),
    "chosen": Softmax(chosen=above_average),
    "window": Softmax(allowed=lambda rows, keys: (rows - keys).abs() < 9),
    "quantized": Softmax(operands=int8_like),
    "linear": FeatureMap(lambda q: F.elu(q) + 1, lambda k: F.elu(k) + 1),
}


def by_definition(definition: Definition) -> Callable[[Workload], Call]:
    """Every row by whole matrices, in the dtype that is given: written apart from attnbench.reference."""

    def build(w: Workload) -> Call:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            mask = mask_of(w)
            if isinstance(definition, FeatureMap):
                scores: Tensor = definition.query(query) @ definition.key(expand_kv(key, w.heads)).mT * mask
                return scores / scores.sum(-1, keepdim=True) @ expand_kv(value, w.heads)
            if definition.operands:
                low = definition.operands(query.float(), key.float(), value.float())
                query, key, value = (t.to(query.dtype) for t in low)
            if definition.chosen:  # of what the variant gets, in float32
                query, key, value = (t.float().to(query.dtype) for t in (query, key, value))
                mask = mask & definition.chosen(query, key, torch.arange(w.seq))
            if definition.allowed:
                mask = mask & definition.allowed(torch.arange(w.seq)[:, None], torch.arange(w.kv_seq))
            scores = query @ expand_kv(key, w.heads).mT / w.head_dim**0.5
            return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ expand_kv(value, w.heads)

        return attend

    return build


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_expected_block_is_the_block_in_float64(block: str, norm: str, definition: str) -> None:
    w = block_workload(block, norm, kv_heads=2, value_dim=24)
    function = DEFINITIONS[definition]
    given = make(w)
    double = {name: weight.double() for name, weight in given.state_dict().items()}
    with torch.no_grad():
        whole = make(w, by_definition(function), double)(*inputs(w, torch.float64))  # (batch, seq, width)
    x, memory = pair(inputs(w))
    for rows in (torch.tensor([0, 5, 31, 32]), torch.arange(w.seq).flip(0)):
        sampled = expected_block(w, dict.fromkeys(attentions(w), function), given, x, memory, rows)
        assert sampled.dtype == torch.float64
        torch.testing.assert_close(sampled, whole[:, rows], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
@pytest.mark.parametrize(("style", "dtype", "bound"), [("llama", "float32", 1e-6), ("llama", "bfloat16", 1.5e-2),
                                                       ("bert", "float32", 1e-6)])  # fmt: skip
def test_expected_block_has_the_blocks_style(style: str, dtype: str, bound: float, block: str) -> None:
    w = block_workload(block, kv_heads=2, dtype=dtype)
    x, memory = pair(inputs(w, getattr(torch, dtype)))
    given, rows = make(w, style=STYLES[style]), torch.tensor([0, 5, 31, 32])
    exact = dict.fromkeys(attentions(w), Softmax())
    with torch.no_grad():
        out = given(*inputs(w, getattr(torch, dtype)))[:, rows]
    expected = expected_block(w, exact, given, x, memory, rows)
    assert float((out - expected).norm() / expected.norm()) <= bound


def test_scores_of_rotated_queries_and_keys_depend_on_their_distance() -> None:
    query, key = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(-1, -1, 9, -1) for _ in range(2))
    scores = rotated(query, 100.0) @ rotated(key, 100.0).mT  # (1, 1, 9, 9)
    for distance in (-8, -3, 0, 5):
        diagonal = scores[0, 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(rotated(query, 100.0, 4)[:, :, :5], rotated(query, 100.0)[:, :, 4:])
    assert float(scores[0, 0, :, 0].std()) > 0.1


@pytest.mark.parametrize("style", ["bert", "llama"])
def test_a_decoding_step_goes_on_where_the_past_ends(style: str) -> None:
    whole = block_workload("decoder-only", kv_heads=2, batch=1)
    step = whole.replace(seq=3, phase="decode")
    seen: list[Tensor] = []

    def keep(inside: Workload) -> Call:
        return lambda q, k, v: (seen.extend((k, v)), sdpa(inside)(q, k, v))[1]

    def go_on(inside: Workload) -> Call:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (torch.cat([old[:, :, :30], new], 2) for old, new in zip(seen, (key, value), strict=True))
            return sdpa(inside)(query, key, value)

        return attend

    (x,) = inputs(whole)
    with torch.no_grad():
        expected = make(whole, keep, style=STYLES[style])(x)[:, 30:]
        torch.testing.assert_close(make(step, go_on, style=STYLES[style])(x[:, 30:]), expected)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_a_right_block_is_close_and_a_wrong_one_is_not(block: str, dtype: str, bound: float) -> None:
    w = block_workload(block, dtype=dtype)
    x, memory = pair(inputs(w, getattr(torch, dtype)))
    rows = sample_rows(w.seq, 0)
    right = make(w)
    expected = expected_block(w, dict.fromkeys(attentions(w), Softmax()), right, x, memory, rows)

    def error(attend: Callable[[Workload], Call]) -> float:
        with torch.no_grad():
            out = make(w, attend)(*inputs(w, getattr(torch, dtype)))[:, rows]
        return float((out - expected).norm() / expected.norm())

    assert error(sdpa) <= bound
    assert error(lambda inside: lambda q, k, v: sdpa(inside)(q, k, v.roll(1, dims=2))) > 5 * bound


@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_weights_come_from_the_seed_alone(block: str) -> None:
    w = block_workload(block)
    before = torch.get_rng_state()
    first = make(w).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, half, other = (make(v).state_dict() for v in (w, w.replace(dtype="bfloat16"), w.replace(seed=1)))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight.bfloat16(), half[name])
        assert torch.equal(weight, other[name]) == (".norm." in name)


def test_a_module_as_attention_adds_no_parameter_to_the_block() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value) * self.gain

    w = block_workload()
    block = Block(w, {"self": Module()})
    assert block.state_dict().keys() == make(w).state_dict().keys()
    rows = torch.arange(4)
    torch.testing.assert_close(
        block(*inputs(w))[:, rows].double(),
        expected_block(w, {"self": Softmax()}, block, inputs(w)[0], None, rows),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_activations_keep_a_sane_scale(block: str, norm: str) -> None:
    w = block_workload(block, norm, heads=8, kv_heads=2, head_dim=32, value_dim=32)
    seen: list[Tensor] = []

    def spy(inside: Workload) -> Call:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            seen.extend((query, key, value))
            return sdpa(inside)(query, key, value)

        return attend

    with torch.no_grad():
        out = make(w, spy)(*inputs(w))
    assert [0.9 < float(t.std()) < 1.1 for t in seen] == [True] * len(seen)
    assert 0.9 < float(out.std()) < 2.0


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("block", ["encoder", "decoder"])
def test_expected_block_holds_no_matrix_of_length_by_length(block: str, definition: str) -> None:
    held = []
    for seq in (4096, 8192):
        if block == "decoder" and definition in ("quantized", "chosen") and seq == 8192:
            continue  # the documented case of O(seq^2) time; its memory is bounded by the chunk
        sizes: dict[str, Any] = {
            "seq": seq,
            "kv_seq": seq,
            "batch": 1,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 8,
            "value_dim": 8,
        }
        w = block_workload(block, **sizes)
        x, memory = pair(inputs(w))
        rows = sample_rows(seq, 0)[:8]
        with LargestTensor() as largest:
            expected_block(w, dict.fromkeys(attentions(w), DEFINITIONS[definition]), make(w), x, memory, rows)
        held.append(largest.elements)
        assert largest.elements <= seq * seq // 4
    assert len(held) == 1 or held[1] == 2 * held[0]


def test_attentions_of_each_block() -> None:
    encoder, causal = block_workload(), block_workload(mask="causal")
    decoder, gpt = block_workload("decoder", kv_heads=2), block_workload("decoder-only", dtype="bfloat16")
    table = {
        (encoder, "self"): ("full", 33, 33),
        (causal, "self"): ("causal", 33, 33),
        (gpt, "self"): ("causal", 33, 33),
        (decoder, "self"): ("causal", 33, 33),
        (decoder, "cross"): ("full", 33, 47),
    }
    found = {(w, n): a for w in (encoder, causal, decoder, gpt) for n, a in attentions(w).items()}
    assert {key: (a.mask, a.seq, a.kv_seq) for key, a in found.items()} == table
    for (w, _), a in found.items():
        assert (a.scope, a.block, a.norm) == ("attention", "", "")
        same = ("batch", "heads", "kv_heads", "head_dim", "value_dim", "dtype", "device", "seed", "threads", "inputs")
        assert all(getattr(a, field) == getattr(w, field) for field in same)


@pytest.mark.parametrize(
    ("block", "names"),
    [("encoder", ["self", "cross"]), ("decoder", ["self"]), ("decoder-only", ["cross"]), ("encoder", [])],
)
def test_wrong_attention_is_refused(block: str, names: list[str]) -> None:
    w = block_workload(block)
    with pytest.raises(AttnbenchError, match=f"needed for {', '.join(attentions(w))}, not for"):
        Block(w, {name: sdpa(w) for name in names})


def test_scope_attention_is_refused() -> None:
    with pytest.raises(AttnbenchError, match="scope block"):
        Block(Workload(seq=8, kv_seq=8), {"self": sdpa(Workload(seq=8, kv_seq=8))})


@pytest.mark.parametrize(("block", "given"), [("encoder", 2), ("decoder-only", 2), ("decoder", 1)])
def test_memory_is_for_decoders_alone(block: str, given: int) -> None:
    w = block_workload(block)
    tensors = list(itertools.islice(itertools.cycle(inputs(w)), given))
    with pytest.raises(AttnbenchError, match="memory"):
        make(w)(*tensors)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
def test_gradients_reach_every_weight(block: str, norm: str) -> None:
    w = block_workload(block, norm, kv_heads=2)
    model = make(w)
    model(*inputs(w)).square().mean().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
