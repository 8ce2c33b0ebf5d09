"""The grammar of sizes, the workload's rules, and what a sweep expands to."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench import AttnbenchError, Sweep, Workload
from attnbench.devices.machine import usable_cores
from attnbench.sizes import parse_bytes, parse_precision, parse_sizes
from attnbench.workload import BLOCKS, DTYPES, INPUTS, MASKS, NORMS, Mask


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512", (512,)),
        ("512..16384", (512, 1024, 2048, 4096, 8192, 16384)),
        ("3..24", (3, 6, 12, 24)),
        ("512..512", (512,)),
        ("512..2048+512", (512, 1024, 1536, 2048)),
        ("5..5+3", (5,)),
        ("1..10000+1", tuple(range(1, 10001))),
        ("512,1000,4096", (512, 1000, 4096)),
        ("4096, 512", (4096, 512)),
        ("1..4,3,4..6+1", (1, 2, 4, 3, 5, 6)),
        ("007", (7,)),
        ("999999999999", (999_999_999_999,)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("512..3000", "doubling from 512 does not hit 3000; nearest are 2048 and 4096"),
        ("512..600", "doubling from 512 does not hit 600; nearest are 512 and 1024"),
        ("512..2000+512", "steps of 512 from 512 does not hit 2000; nearest are 1536 and 2048"),
        ("512..600+512", "steps of 512 from 512 does not hit 600; nearest are 512 and 1024"),
        ("4096..512", "runs backwards; write 512..4096"),
        ("0", "between 1 and"),
        ("0..8", "between 1 and"),
        ("1..8+0", "between 1 and"),
        ("1000000000000", "between 1 and"),
        ("1..999999999+1", "over 10000 values"),
        ("", "'' is no size"),
        ("512,", "'' is no size"),
        ("-512", "'-512' is no size"),
        ("512...1024", "'512...1024' is no size"),
        ("5e2", "'5e2' is no size"),
        ("512.0", "'512.0' is no size"),
        ("1..2..4", "'1..2..4' is no size"),
        ("٥١٢", "is no size"),
        ("²", "is no size"),
        ("512\n..1024", r"'512\n..1024' is no size"),
    ],
)
def test_sizes_that_are_none(text: str, said: str) -> None:
    with pytest.raises(AttnbenchError) as caught:
        parse_sizes(text, "kv_seq")
    message = str(caught.value)
    assert message.startswith("--kv-seq ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * 2**30),
        ("16GB", 16 * 10**9),
        ("512M", 512 * 10**6),
        ("512Mi", 512 * 2**20),
        ("1000000", 1_000_000),
        ("1.5 kib", 1536),
        (" 2TiB ", 2 * 2**40),
        ("7B", 7),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "1PiB", "0", "0.0001", "1e9", "nan", "inf", "16Gi B", "1,5G", "iB"]
)
def test_bytes_that_are_none(text: str) -> None:
    with pytest.raises(AttnbenchError, match=r"^--memory .* is no amount of memory; write 16GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "value"), [("2%", 0.02), ("0.02", 0.02), (".5%", 0.005), (" 10 % ", 0.1), ("99.9%", 0.999)]
)
def test_precision(text: str, value: float) -> None:
    assert parse_precision(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "%", ".", "0", "0%", "100%", "1", "2", "-2%", "nan", "inf", "1e-2", "2%%"])
def test_precisions_that_are_none(text: str) -> None:
    with pytest.raises(AttnbenchError, match=r"^--precision .* is no share; write 2%"):
        parse_precision(text)


@pytest.mark.parametrize("parse", [parse_sizes, parse_bytes, parse_precision])
@given(text=st.one_of(st.text(), st.text(alphabet="0123456789.,+- %KMGTiBb\n"), st.from_regex(r"\d+\.\.\d+(\+\d+)?")))
def test_any_text_is_a_value_or_a_line(parse: Callable[[str], Any], text: str) -> None:
    try:
        value = parse(text)
    except AttnbenchError as error:
        message = str(error)
    else:
        assert min(value if isinstance(value, tuple) else (value,)) > 0
        return
    assert len(message.splitlines()) == 1


@given(start=st.integers(1, 5000), doublings=st.integers(0, 12), off=st.integers(1, 4999))
def test_doubling_hits_its_end_or_names_both_neighbours(start: int, doublings: int, off: int) -> None:
    end = start << doublings
    assert parse_sizes(f"{start}..{end}") == tuple(start << i for i in range(doublings + 1))
    if off < end:
        with pytest.raises(AttnbenchError, match=rf"nearest are {end} and {2 * end}$"):
            parse_sizes(f"{start}..{end + off}")


@given(start=st.integers(1, 5000), step=st.integers(1, 600), steps=st.integers(0, 60), off=st.integers(1, 599))
def test_steps_hit_their_end_or_name_both_neighbours(start: int, step: int, steps: int, off: int) -> None:
    end = start + step * steps
    assert parse_sizes(f"{start}..{end}+{step}") == tuple(range(start, end + 1, step))
    if off < step:
        with pytest.raises(AttnbenchError, match=rf"nearest are {end} and {end + step}$"):
            parse_sizes(f"{start}..{end + off}+{step}")


SQUARE = {"seq": 8, "kv_seq": 8}
BLOCK = {"scope": "block", "block": "encoder", "norm": "pre"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seq": 0}, "--seq must be at least 1, not 0"),
        ({"kv_heads": -1}, "--kv-heads must be at least 1, not -1"),
        ({"threads": 0}, "--threads must be at least 1, not 0"),
        ({"heads": 8, "kv_heads": 3}, "--heads must be a multiple of --kv-heads: 8 heads cannot share 3 kv heads"),
        ({"heads": 2, "kv_heads": 4}, "--heads must be a multiple of --kv-heads"),
        ({"dtype": "float64"}, "--dtype must be one of float32, bfloat16, float16, not 'float64'"),
        ({"device": "tpu"}, "--device must be one of cpu, cuda, not 'tpu'"),
        ({"mask": "padded"}, "--mask must be one of full, causal, window:N, tree:2x3, not 'padded'"),
        ({"inputs": "ones"}, "--inputs must be one of normal, outlier or MODEL:LAYER, such as smollm2:3, not 'ones'"),
        ({"block": "encoder"}, "--block"),
        ({"norm": "pre"}, "--norm"),
        ({"style": "bert"}, "--style"),
        (BLOCK | {"style": "gpt"}, "--style must be one of"),
        (BLOCK | {"block": ""}, "--block must be one of encoder, decoder, decoder-only, not ''"),
        (BLOCK | {"norm": "rms"}, "--norm must be one of pre, post, not 'rms'"),
        (BLOCK | {"kv_seq": 16}, "--block encoder is self-attention: --kv-seq must equal --seq (16 is not 8)"),
        (BLOCK | {"block": "decoder-only", "mask": "causal", "kv_seq": 16}, "--block decoder-only is self-attention"),
        ({"mask": "causal", "kv_seq": 7}, "a causal mask needs --kv-seq >= --seq"),
        ({"mask": "window:4", "kv_seq": 7}, "a causal mask needs --kv-seq >= --seq"),
        *(
            ({"mask": text}, "tree:2x3, not")
            for text in ("window", "window:0", "window:-1", "window:x", "window:²", "")
        ),
        (BLOCK | {"block": "decoder", "mask": "window:4"}, "--block decoder has masks of its own"),
        ({"softmax_scale": -0.1}, "--scale must be above 0, not -0.1"),
        ({"softcap": float("nan")}, "--softcap must be above 0, not nan"),
        ({"bias": "rotary"}, "--bias must be one of"),
        ({"bias": "alibi", "mask": "tree:0,0", "seq": 3, "phase": "decode"}, "which a tree's order does not tell"),
        ({"sinks": True, "phase": "train"}, "sinks are for attention alone, phase forward"),
    ],
)
def test_what_is_no_workload(values: dict[str, Any], said: str) -> None:
    with pytest.raises(AttnbenchError) as caught:
        Workload(**(SQUARE | values))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_follows_from_a_workload() -> None:
    w = Workload(seq=3, kv_seq=10, heads=8, kv_heads=2, head_dim=16, dtype="bfloat16", mask="causal")
    assert (w.offset, w.is_causal, w.group, w.scale, w.width, w.itemsize) == (7, True, 4, 0.25, 128, 2)


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({}, "attention 1x8x8x64 float32 full"),
        ({"kv_heads": 2, "kv_seq": 9, "value_dim": 32}, "attention 1x8/2x8->9x64/32 float32 full"),
        ({"inputs": "outlier", "mask": "causal"}, "attention 1x8x8x64 float32 causal outlier inputs"),
        (BLOCK, "encoder block (pre-norm) 1x8x8x64 float32 full"),
        (BLOCK | {"style": "bert"}, "bert encoder block (pre-norm) 1x8x8x64 float32 full"),
        (
            {"mask": "window:3", "softmax_scale": 0.3, "softcap": 50.0, "bias": "alibi", "sinks": True},
            "attention 1x8x8x64 float32 window:3 scale 0.3 softcap 50 alibi bias sinks",
        ),
    ],
)
def test_label(values: dict[str, Any], label: str) -> None:
    assert Workload(**(SQUARE | values)).label() == label


@given(
    seq=st.integers(1, 12),
    past=st.integers(0, 12),
    window=st.integers(0, 30),
    causal=st.booleans(),
)
def test_a_mask_counts_what_it_shows(seq: int, past: int, window: int, causal: bool) -> None:
    mask = Mask(causal or window > 0, window)
    seen = [[mask.visible(i, j, past) for j in range(seq + past)] for i in range(seq)]
    assert mask.pairs(seq, seq + past) == sum(map(sum, seen))
    for i, row in enumerate(seen):
        at = i + past  # the query's own position
        shown = range(max(0, at + 1 - window) if window else 0, at + 1 if mask.causal else seq + past)
        assert [j for j, is_seen in enumerate(row) if is_seen] == list(shown)
    assert Mask.parse(str(mask)) == mask


@pytest.mark.parametrize(
    ("values", "beyond"),
    [
        ({}, ()),
        ({"softmax_scale": 0.125, "mask": "window:8"}, ()),
        ({"softmax_scale": 0.1, "mask": "window:7"}, ("scale", "window")),
        ({"softcap": 30.0, "sinks": True}, ("softcap", "sinks")),
        ({"bias": "relative"}, ("relative-bias",)),
    ],
)
def test_what_is_beyond_plain_attention(values: dict[str, Any], beyond: tuple[str, ...]) -> None:
    w = Workload(**(SQUARE | values))
    assert w.beyond == beyond
    assert w.scale == values.get("softmax_scale", 0.125)
    old = {
        name: value for name, value in w.as_dict().items() if name not in ("softmax_scale", "softcap", "bias", "sinks")
    }
    assert Workload.from_dict(old) == w.replace(softmax_scale=0.0, softcap=0.0, bias="", sinks=False)


def test_defaults_are_causal_attention_at_every_length_and_the_decoder_only_block_up_to_4096() -> None:
    found = Sweep(seq=parse_sizes("512..16384")).workloads()
    assert [(w.scope, w.seq) for w in found] == [
        *((scope, seq) for seq in (512, 1024, 2048, 4096) for scope in ("attention", "block")),
        ("attention", 8192),
        ("attention", 16384),
    ]
    for w in found:
        assert (w.batch, w.heads, w.kv_heads, w.head_dim, w.value_dim) == (1, 8, 8, 64, 64)
        assert (w.kv_seq, w.dtype, w.mask, w.device) == (w.seq, "float32", "causal", "cpu")
        assert (w.block, w.norm) == (("decoder-only", "pre") if w.scope == "block" else ("", ""))


@pytest.mark.parametrize(
    ("sweep", "cells"),
    [
        ({}, [("attention", "", "causal"), ("block", "decoder-only", "causal")]),
        ({"mask": ("full",)}, [("attention", "", "full"), ("block", "encoder", "full")]),
        ({"block": "encoder"}, [("attention", "", "full"), ("block", "encoder", "full")]),
        ({"scope": "attention"}, [("attention", "", "causal")]),
        ({"scope": "block"}, [("block", "decoder-only", "causal")]),
        ({"scope": "all"}, [("attention", "", "causal"), ("block", "decoder-only", "causal")]),
        ({"mask": ("window:64",)}, [("attention", "", "window:64"), ("block", "decoder-only", "window:64")]),
        ({"scope": "block", "mask": ("window:64",)}, [("block", "decoder-only", "window:64")]),
        (
            {"scope": "block", "mask": ("full", "causal")},
            [("block", "encoder", "full"), ("block", "encoder", "causal")],
        ),
        # A decoder brings its own masks: whatever --mask says it is one workload.
        ({"scope": "block", "block": "decoder", "mask": ("full", "causal")}, [("block", "decoder", "causal")]),
        ({"scope": "block", "block": "decoder-only"}, [("block", "decoder-only", "causal")]),
        (
            {"block": "decoder-only", "mask": ("full", "causal")},
            [("attention", "", "full"), ("attention", "", "causal"), ("block", "decoder-only", "causal")],
        ),
        # Without a scope, what fits no self-attention block is measured alone; asked for, it is an error (below).
        ({"kv_seq": (16,)}, [("attention", "", "causal")]),
        ({"kv_seq": (4,)}, [("attention", "", "full")]),  # a causal mask would leave queries without keys
        ({"kv_seq": (16,), "block": "decoder"}, [("attention", "", "causal"), ("block", "decoder", "causal")]),
        ({"kv_seq": (4,), "block": "decoder", "scope": "block"}, [("block", "decoder", "causal")]),
    ],
)
def test_cells_of_a_sweep(sweep: dict[str, Any], cells: list[tuple[str, str, str]]) -> None:
    found = [(w.scope, w.block, w.mask) for w in Sweep(**({"seq": (8,)} | sweep)).workloads()]
    assert found == cells


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"kv_seq": (16,), "scope": "all"}, "--kv-seq must equal --seq"),
        ({"kv_seq": (16,), "scope": "block", "block": "decoder-only"}, "--kv-seq must equal --seq"),
        ({"kv_heads": (3,)}, "--heads must be a multiple of --kv-heads"),
        ({"mask": ("causal",), "kv_seq": (4,)}, "a causal mask needs --kv-seq >= --seq"),
        ({"scope": "blocks"}, "--scope must be one of attention, block, all, not 'blocks'"),
        ({"scope": "block", "block": "gpt"}, "--block must be one of"),
    ],
)
def test_what_is_no_sweep(sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(AttnbenchError, match=said):
        Sweep(**({"seq": (8,)} | sweep)).workloads()


def some(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(values, min_size=1, max_size=3).map(tuple)


SIZES = some(st.sampled_from([1, 2, 4, 5, 8, 4096, 8192]))
SWEEPS = st.builds(
    Sweep,
    seq=SIZES,
    kv_seq=st.none() | SIZES,
    batch=some(st.sampled_from([1, 2])),
    heads=some(st.sampled_from([2, 4])),
    kv_heads=st.none() | some(st.sampled_from([1, 2])),
    head_dim=some(st.sampled_from([8, 16])),
    value_dim=st.none() | some(st.sampled_from([8, 24])),
    dtype=some(st.sampled_from(list(DTYPES))),
    mask=some(st.sampled_from(MASKS)),
    scope=st.sampled_from([None, "attention", "block", "all"]),
    block=st.sampled_from(BLOCKS),
    norm=st.sampled_from(NORMS),
    inputs=st.sampled_from(INPUTS),
    seed=st.integers(-3, 3),
)


@settings(deadline=None)
@given(sweep=SWEEPS)
def test_no_two_workloads_of_a_sweep_are_equal(sweep: Sweep) -> None:
    try:
        found = sweep.workloads()
    except AttnbenchError:
        return
    assert found
    assert len(set(found)) == len(found)
    assert len({json.dumps(w.as_dict(), sort_keys=True) for w in found}) == len(found)
    work = [w.batch * w.heads * w.seq * w.kv_seq for w in found]
    assert work == sorted(work)
    for w in found:
        assert Workload.from_dict(json.loads(json.dumps(w.as_dict() | {"latency_s": 0.1}))) == w
        assert (w.seq in sweep.seq, w.kv_seq in (sweep.kv_seq or (w.seq,))) == (True, True)
        assert w.kv_heads in (sweep.kv_heads or (w.heads,))
        assert w.value_dim in (sweep.value_dim or (w.head_dim,))
        assert w.block != "decoder-only" or w.is_causal


def test_usable_cores_is_the_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import attnbench.devices.machine as w"
    code += "; print(w.usable_cores())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "1\n"
    assert usable_cores() >= 1


@pytest.mark.parametrize("module", ["attnbench", "attnbench.workload", "attnbench.plugin"])
def test_a_sweep_is_planned_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'matplotlib', 'pandas'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "lengths"),
    [
        ({}, [(1, n) for n in (512, 1024, 2048, 4096, 8192, 16384)]),
        ({"seq": (64, 128)}, [(1, 64), (1, 128)]),
        ({"kv_seq": (64, 128)}, [(1, 64), (1, 128)]),
        ({"seq": (4,), "kv_seq": (64,)}, [(4, 64)]),
    ],
)
def test_decoding_adds_one_token_unless_both_lengths_are_given(given: dict, lengths: list) -> None:
    found = Sweep(phase=("decode",), scope="attention", **given).workloads()
    assert [(w.seq, w.kv_seq) for w in found] == lengths
    assert {w.mask for w in found} == {"causal"}


def test_phases_together_take_the_same_lengths() -> None:
    found = Sweep(phase=("forward", "decode", "train"), scope="all", seq=(64,), layers=(1, 2)).workloads()
    assert [(w.phase, w.scope, w.block, w.mask, w.seq, w.kv_seq, w.layers) for w in found] == [
        ("forward", "attention", "", "causal", 64, 64, 1),
        ("forward", "block", "decoder-only", "causal", 64, 64, 1),
        ("forward", "block", "decoder-only", "causal", 64, 64, 2),
        ("decode", "attention", "", "causal", 1, 64, 1),
        ("decode", "block", "decoder-only", "causal", 1, 64, 1),
        ("decode", "block", "decoder-only", "causal", 1, 64, 2),
        ("train", "attention", "", "causal", 64, 64, 1),
        ("train", "block", "decoder-only", "causal", 64, 64, 1),
        ("train", "block", "decoder-only", "causal", 64, 64, 2),
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"phase": ("decode",), "scope": "block", "block": "encoder"}, "--block encoder sees all tokens at once"),
        ({"phase": ("decode",), "seq": (8,), "kv_seq": (4,)}, "a causal mask needs --kv-seq >= --seq"),
        ({"phase": ("sleep",)}, "--phase must be one of forward, decode, train"),
        ({"layers": (0,), "scope": "block"}, "--layers must be at least 1"),
    ],
)
def test_a_phase_that_makes_no_sense_is_one_line(wrong: dict, message: str) -> None:
    with pytest.raises(AttnbenchError, match=message):
        Sweep(**({"seq": (8,)} | wrong)).workloads()


def test_tokens_are_shared_out_to_batches() -> None:
    found = Sweep(seq=(512, 2048), tokens=4096, scope="attention").workloads()
    assert sorted((w.seq, w.batch) for w in found) == [(512, 8), (2048, 2)]
    with pytest.raises(AttnbenchError, match="--tokens 4000 is no multiple of the length 512"):
        Sweep(seq=(512,), tokens=4000).workloads()
    with pytest.raises(AttnbenchError, match="drop --batch"):
        Sweep(seq=(512,), tokens=4096, batch=(2,)).workloads()
