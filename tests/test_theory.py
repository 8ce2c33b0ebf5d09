"""Formulas against counts: torch's FLOP counter, real tensors, real parameters and figures that are known."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attnbench import Workload
from attnbench.plugin import Attention, Call, expand_kv, visible
from attnbench.registry import find, load
from attnbench.task.transformer import Block
from attnbench.theory import costs

SHAPES: dict[str, dict[str, Any]] = {
    "square": {"seq": 24, "kv_seq": 24},
    "batched": {"seq": 24, "kv_seq": 24, "batch": 3},
    "grouped": {"seq": 24, "kv_seq": 24, "heads": 8, "kv_heads": 2},
    "wide value": {"seq": 24, "kv_seq": 24, "head_dim": 16, "value_dim": 40},
    "longer keys": {"seq": 10, "kv_seq": 24, "kv_heads": 4},
    "one query": {"seq": 1, "kv_seq": 24},
}
BLOCKS = ["encoder", "decoder", "decoder-only"]


def as_block(block: str, shape: str, **changes: Any) -> Workload:
    sizes = SHAPES[shape]
    if block != "decoder":
        sizes = sizes | {"kv_seq": sizes["seq"]}
    mask = "full" if block == "encoder" else "causal"
    return Workload(**({"scope": "block", "block": block, "norm": "pre", "mask": mask} | sizes | changes))


def naive(w: Workload) -> Call:
    """Multiplies every pair, masked or not, so that a counter sees 2 * batch * heads * seq * kv_seq * (d + dv)."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq))
        scores = query @ expand_kv(key, w.heads).mT * w.scale
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ expand_kv(value, w.heads)

    return attend


def qkv(w: Workload) -> list[Tensor]:
    dtype = getattr(torch, w.dtype)
    return [
        torch.randn(w.batch, w.heads, w.seq, w.head_dim).to(dtype),
        torch.randn(w.batch, w.kv_heads, w.kv_seq, w.head_dim).to(dtype),
        torch.randn(w.batch, w.kv_heads, w.kv_seq, w.value_dim).to(dtype),
    ]


def run_block(w: Workload) -> tuple[Block, list[Tensor], Tensor, int]:
    """The block, its inputs, its output and the operations that torch's counter saw."""
    block = Block(w, {name: naive(inside) for name, inside in costs.attentions(w).items()})
    lengths = [w.seq, w.kv_seq] if w.block == "decoder" else [w.seq]
    given = [torch.randn(w.batch, length, w.width).to(getattr(torch, w.dtype)) for length in lengths]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = block(*given)
    return block, given, out, counter.get_total_flops()


def hidden_flops(w: Workload) -> int:
    """What naive attention multiplies and the mask then hides."""
    return sum(
        2 * a.batch * a.heads * (a.seq * a.kv_seq - costs.visible_pairs(a)) * (a.head_dim + a.value_dim)
        for a in costs.attentions(w).values()
    )


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_flops_are_those_that_torch_counts(shape: str, mask: str) -> None:
    w = Workload(**SHAPES[shape], mask=mask)
    with FlopCounterMode(display=False) as counter:
        naive(w)(*qkv(w))
    assert costs.flops(w) + hidden_flops(w) == counter.get_total_flops()
    if mask == "full":
        pairs = w.batch * w.heads * w.seq * w.kv_seq
        assert costs.flops(w) == 2 * pairs * (w.head_dim + w.value_dim)
        assert hidden_flops(w) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_visible_pairs_are_those_of_the_mask(shape: str) -> None:
    for mask in ("full", "causal"):
        w = Workload(**SHAPES[shape], mask=mask)
        shown = visible(w, torch.arange(w.seq)[:, None], torch.arange(w.kv_seq)).sum()
        assert costs.visible_pairs(w) == int(shown)


def test_causal_is_half_of_a_long_square() -> None:
    full = Workload(seq=16384, kv_seq=16384)
    assert costs.flops(full.replace(mask="causal")) / costs.flops(full) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_block_figures_are_those_of_a_real_block(block: str, shape: str) -> None:
    for dtype in ("float32", "bfloat16"):
        w = as_block(block, shape, dtype=dtype)
        model, given, out, counted = run_block(w)
        assert costs.parameters(w) == sum(p.numel() for p in model.parameters())
        assert costs.flops(w) + hidden_flops(w) == counted
        assert costs.input_bytes(w) == sum(t.nbytes for t in given)
        assert costs.output_bytes(w) == out.nbytes
        weights = sum(p.nbytes for p in model.parameters())
        assert costs.min_bytes(w) == sum(t.nbytes for t in given) + weights + out.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_bytes_are_those_of_real_tensors(shape: str, dtype: str) -> None:
    w = Workload(**SHAPES[shape], dtype=dtype)
    query, key, value = qkv(w)
    out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), enable_gqa=True).to(query.dtype)
    assert costs.input_bytes(w) == query.nbytes + key.nbytes + value.nbytes
    assert costs.output_bytes(w) == out.nbytes
    assert costs.min_bytes(w) == costs.input_bytes(w) + costs.output_bytes(w)
    assert costs.parameters(w) == 0


@pytest.mark.parametrize(
    ("name", "figure", "known"),
    [
        # GPT-2 small has 124,439,808 parameters: embeddings of 50257 + 1024 rows of 768, twelve blocks, a last norm.
        ("GPT-2 small", costs.parameters, (124_439_808 - (50257 + 1024) * 768 - 2 * 768) // 12),
        # The base model's encoder layer: 4 * 512^2 + 2 * 512 * 2048 weights; 4 * 512 + 2048 + 512 biases; two norms.
        ("Transformer base", costs.parameters, 2_097_152 + 1_048_576 + 4_608 + 2_048),
        # At l = 1024 and d = 64: 4 * l^2 * d operations over 4 * l * d elements of 2 bytes is l / 2.
        ("attention", lambda w: costs.flops(w) / costs.min_bytes(w), 512),
    ],
)
def test_known_figures(name: str, figure: object, known: int) -> None:
    workloads = {
        "GPT-2 small": as_block("decoder-only", "square", heads=12, kv_heads=12),
        "Transformer base": as_block("encoder", "square"),
        "attention": Workload(seq=1024, kv_seq=1024, dtype="bfloat16"),
    }
    assert callable(figure)
    assert figure(workloads[name]) == known


def test_parts_of_the_encoder_as_the_lecture_counts_them() -> None:
    w = as_block("encoder", "square", seq=512, kv_seq=512)
    tokens, width, hidden = 512, 512, 2048
    assert costs.flops_by_part(w) == {
        "self projections": 2 * tokens * 4 * width**2,  # 3k projections and the output: O(l d_m d_k)
        "self attention": 2 * 2 * tokens**2 * width,  # 2k products: O(l^2 d)
        "ffn": 2 * 2 * tokens * width * hidden,  # 2 products: O(l d_m d_ff)
    }


@pytest.mark.parametrize("block", BLOCKS)
def test_parts_and_products_add_up(block: str) -> None:
    w = as_block(block, "longer keys")
    assert sum(costs.flops_by_part(w).values()) == sum(p.flops for p in costs.products(w)) == costs.flops(w)
    names = [(p.layer, p.name) for p in costs.products(w)]
    attention = ["W_Q", "W_K", "W_V", "QK^T", "PV", "W_O"]
    layers = ["self", "cross"] if block == "decoder" else ["self"]
    assert names == [(layer, name) for layer in layers for name in attention] + [("ffn", "W_1"), ("ffn", "W_2")]


def saved_by_autograd(w: Workload, attention: str) -> int:
    """Bytes in unique storages that a stack of blocks, or attention alone, keeps beside inputs, parameters and output.

    Masks are left out: a plugin makes them once, when it is built.
    """
    plugin = load(find()[attention].target)()
    parts = costs.attentions(w)
    built = {name: plugin.build(part) for name, part in parts.items()}
    calls = {name: made.call if isinstance(made, Attention) else made for name, made in built.items()}
    blocks = [Block(w.replace(layers=1), calls) for _ in range(w.layers)] if w.scope == "block" else []
    given = qkv(w)
    if blocks:
        lengths = [w.seq, w.kv_seq] if w.block == "decoder" else [w.seq]
        given = [torch.randn(w.batch, length, w.width).to(getattr(torch, w.dtype)) for length in lengths]
    known = [x.requires_grad_() for x in given] + [p for block in blocks for p in block.parameters()]
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = given[0] if blocks else calls["self"](*given)
        for block in blocks:
            out = block(out, *given[1:])
    there = {x.untyped_storage().data_ptr() for x in (*known, out)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept if x.dtype != torch.bool}
    return sum(size for address, size in storages.items() if address not in there)


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
@pytest.mark.parametrize(
    "changes", [{}, {"layers": 4}, {"norm": "post", "layers": 2}, {"dtype": "bfloat16", "batch": 2, "layers": 8}]
)
@pytest.mark.parametrize("shape", ["square", "grouped", "longer keys"])
@pytest.mark.parametrize("block", BLOCKS)
def test_saved_bytes_are_those_that_autograd_keeps(
    block: str, shape: str, changes: dict[str, Any], attention: str
) -> None:
    w = as_block(block, shape, phase="train", **changes)
    assert costs.saved_bytes(w, scores=attention == "naive") == saved_by_autograd(w, attention)


@pytest.mark.parametrize("attention", ["sdpa", "naive"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "wide value"])  # which sdpa does not fuse
def test_attention_alone_saves_its_softmax_or_its_logarithms(shape: str, attention: str) -> None:
    w = Workload(**SHAPES[shape], phase="train")
    assert costs.saved_bytes(w, scores=attention == "naive") == saved_by_autograd(w, attention)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("style", ["bert", "llama"])
def test_a_style_has_its_own_products_parameters_and_saved_bytes(style: str, block: str) -> None:
    w = as_block(block, "grouped", style=style)
    made, _, _, counted = run_block(w)
    assert costs.flops(w) + hidden_flops(w) == counted
    assert costs.parameters(w) == sum(p.numel() for p in made.parameters())
    trained = w.replace(phase="train", layers=2)
    saved, rope = saved_by_autograd(trained, "sdpa"), 0
    if w.styled.rope:  # sines and cosines for query and key
        rope = trained.layers * 2 * 2 * w.seq * w.head_dim * w.itemsize
    assert saved - rope == costs.saved_bytes(trained, scores=False)


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_a_layer_saves_twelve_vectors_for_each_token(layers: int) -> None:
    """As ZeRO counts; the first layer's input is not kept for it, and statistics come on top."""
    w = as_block("encoder", "square", seq=512, kv_seq=512, phase="train", layers=layers)
    assert costs.saved_bytes(w, scores=False) == pytest.approx(4 * 512 * 512 * (12 * layers - 1), rel=0.01)
    assert costs.saved_bytes(w, scores=True) - costs.saved_bytes(w, scores=False) == pytest.approx(
        layers * 4 * 8 * 512 * 512, rel=0.01
    )


def test_theory_loads_no_torch() -> None:
    code = "import sys, attnbench.theory; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("forward", "512 tokens, bfloat16, forward"),
        ("decode", "one new token on 512"),
        ("train", "with the backward pass"),
    ],
)
def test_the_command_counts_each_phase(phase: str, said: str) -> None:
    from click.testing import CliRunner

    from attnbench.commands import main

    for block in ("decoder-only", "decoder"):
        result = CliRunner().invoke(main, ["theory", "--seq", "512", "--phase", phase, "--block", block])
        assert result.exit_code == 0, result.output
        assert said in result.output
