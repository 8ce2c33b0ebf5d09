"""Block-sparse attention: its patterns against their plain definitions, and both implementations against the mask."""

from __future__ import annotations

from itertools import product
from math import ceil

import pytest
import torch
from attnbench_plugins.block_sparse import BlockSparse, flex_attention, patterns
from attnbench_plugins.block_sparse.patterns import PATTERNS, Pattern
from test_task import judged
from torch import Tensor

from attnbench.judge.reference import expected
from attnbench.workload import Workload

SHAPES = [(1, 1), (17, 17), (100, 257), (257, 257), (300, 1700), (1000, 1000)]
MASKS = ("full", "causal")

needs_compiler = pytest.mark.skipif(
    flex_attention.flex_unsupported(Workload(seq=1, kv_seq=1), 128) is not None,
    reason="flex_attention can't compile here",
)


def make(w: Workload) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value of a workload, from its seed."""
    torch.manual_seed(w.seed)
    dtype, kv = getattr(torch, w.dtype), (w.batch, w.kv_heads, w.kv_seq)
    shapes = (w.batch, w.heads, w.seq, w.head_dim), (*kv, w.head_dim), (*kv, w.value_dim)
    query, key, value = (torch.randn(shape, device=w.device).to(dtype) for shape in shapes)
    return query, key, value


def rel_l2(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


def error(plugin: BlockSparse, w: Workload, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Against softmax over exactly the keys that the pattern allows."""
    with torch.no_grad():
        out = plugin.build(w).call(*inputs)
    assert out.shape == (w.batch, w.heads, w.seq, w.value_dim)
    assert out.dtype == inputs[0].dtype
    return rel_l2(out, expected(plugin.definition(w), w, *inputs, torch.arange(w.seq)))


def dense(mask: Pattern) -> Tensor:
    """bool (seq, kv_seq): the whole mask."""
    return mask.allowed(torch.arange(mask.seq)[:, None], torch.arange(mask.kv_seq))


# The patterns


@pytest.mark.parametrize(("window", "block"), [(1, 16), (40, 16), (64, 16), (256, 128), (5000, 128), (70, 33)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_blocks_are_those_that_the_mask_touches(name: str, is_causal: bool, window: int, block: int) -> None:
    for seq, kv_seq in SHAPES:
        mask = patterns.pattern(name, seq, kv_seq, is_causal, window, block)
        some, every = mask.blocks()
        seen = dense(mask)
        tiles = [
            (row, key, seen[row * block : (row + 1) * block, key * block : (key + 1) * block])
            for row, key in product(range(ceil(seq / block)), range(ceil(kv_seq / block)))
        ]
        assert some.shape == every.shape == (ceil(seq / block), ceil(kv_seq / block))
        assert all(bool(some[row, key]) == bool(tile.any()) for row, key, tile in tiles)
        assert all(bool(every[row, key]) == bool(tile.all()) for row, key, tile in tiles)
        assert mask.pairs() == sum(tile.numel() for _, _, tile in tiles if tile.any())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("seq", "kv_seq"), SHAPES)
def test_a_query_sees_its_window_and_a_causal_one_nothing_ahead(
    name: str, is_causal: bool, seq: int, kv_seq: int
) -> None:
    seen = dense(patterns.pattern(name, seq, kv_seq, is_causal, 40, 16))
    position, key = torch.arange(seq)[:, None] + kv_seq - seq, torch.arange(kv_seq)
    behind = position - key
    window = (behind >= 0) & (behind < 40) if is_causal else behind.abs() < 40
    assert bool(seen[window].all())
    assert bool((behind == 0).any(1).all())  # the window holds the query itself
    if is_causal:
        assert not bool(seen[behind < 0].any())
    if name == "window":
        assert torch.equal(seen, window)


def test_bigbird_has_global_and_random_blocks_that_stay_the_same() -> None:
    def make_pattern() -> Pattern:
        patterns.pattern.cache_clear()
        return patterns.pattern("bigbird", 1024, 1024, False, 32, 32)

    far = make_pattern().far
    assert far is not None
    assert bool(far[: patterns.GLOBAL_BLOCKS].all())
    assert bool(far[:, : patterns.GLOBAL_BLOCKS].all())
    drawn = far[patterns.GLOBAL_BLOCKS :, patterns.GLOBAL_BLOCKS :].sum(1)
    assert int(drawn.max()) == patterns.RANDOM_BLOCKS
    assert float(drawn.float().mean()) > patterns.RANDOM_BLOCKS / 2
    again = make_pattern().far
    assert again is not None
    assert torch.equal(far, again)


def test_strided_costs_the_square_root() -> None:
    """Child 2019: O(l sqrt(l)) pairs, so four times the length halves the share of pairs beyond the window."""

    def share(length: int) -> float:
        far = patterns.pattern("strided", length, length, False, 1, 32).far
        assert far is not None
        return float(far.float().mean())

    assert share(8192) == pytest.approx(1 / 16, rel=0.05)
    assert share(8192) / share(32768) == pytest.approx(2, rel=0.05)


# What computes them

CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"heads": 6, "kv_heads": 2, "batch": 2}, id="gqa"),
    pytest.param({"heads": 4, "kv_heads": 1}, id="mqa"),
    pytest.param({"head_dim": 40, "value_dim": 24}, id="value-dim"),
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({"dtype": "float16"}, id="float16"),
]
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", PATTERNS)
def test_gather_is_softmax_over_the_mask(name: str, mask: str, shape: tuple[int, int]) -> None:
    w = Workload(seq=shape[0], kv_seq=shape[1], mask=mask, heads=2, kv_heads=2, head_dim=16, value_dim=16)
    plugin = BlockSparse(pattern=name, window=40, block=32, impl="gather")
    assert error(plugin, w, make(w)) < TOLERANCE["float32"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CASES)
def test_gather_takes_every_kind_of_input(case: dict[str, object], mask: str) -> None:
    w = Workload(seq=257, kv_seq=300, mask=mask, heads=2, kv_heads=2).replace(**case)
    plugin = BlockSparse(pattern="bigbird", window=40, block=32, impl="gather")
    assert error(plugin, w, make(w)) < TOLERANCE[w.dtype]


@needs_compiler
def test_flex_is_softmax_over_the_mask_and_compiles_once_for_all_masks_and_lengths() -> None:
    from torch._dynamo.utils import counters

    def compilations() -> int:
        return int(counters["stats"]["unique_graphs"])

    before = compilations()
    for (name, mask), length in product(product(PATTERNS, MASKS), (257, 600, 1000)):
        w = Workload(seq=length, kv_seq=length, mask=mask)
        assert error(BlockSparse(pattern=name, window=200, impl="flex"), w, make(w)) < TOLERANCE["float32"]
    assert compilations() <= before + 1


@needs_compiler
def test_flex_takes_bfloat16_and_a_cache_of_keys() -> None:
    w = Workload(seq=300, kv_seq=1700, mask="causal", dtype="bfloat16", heads=8, kv_heads=2)
    assert error(BlockSparse(pattern="strided", impl="flex"), w, make(w)) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_gets_the_blocks_and_the_mask_of_the_pattern(name: str, mask: str, static: bool) -> None:
    for seq, kv_seq in SHAPES:
        wanted = patterns.pattern(name, seq, kv_seq, mask == "causal", 40, 16)
        some, every = wanted.blocks()
        blocks = flex_attention.block_mask(wanted, static)
        counts, whole = blocks.kv_num_blocks[0, 0], blocks.full_kv_num_blocks[0, 0]
        assert torch.equal(counts + whole, some.sum(1))
        assert torch.equal(whole, every.sum(1))
        rows, keys = torch.arange(seq)[:, None], torch.arange(kv_seq)
        seen = torch.zeros(seq, kv_seq, dtype=torch.bool)
        for row in range(len(some)):
            inside = rows // 16 == row
            for key in blocks.kv_indices[0, 0, row, : counts[row]].tolist():
                seen |= inside & (keys // 16 == key) & blocks.mask_mod(0, 0, rows, keys)
            for key in blocks.full_kv_indices[0, 0, row, : whole[row]].tolist():
                seen |= inside & (keys // 16 == key)
        assert torch.equal(seen, dense(wanted))


def test_a_window_hides_the_first_block_from_some_rows() -> None:
    """Why flex_attention must not be told ROWS_GUARANTEED_SAFE: each row must see something in its first tile for it."""
    for is_causal in (False, True):
        mask = patterns.pattern("window", 4096, 4096, is_causal, 1024, 128)
        blocks = flex_attention.block_mask(mask, static=True)
        rows = torch.arange(4096)[:, None]
        first = blocks.kv_indices[0, 0, :, 0][rows // 128] * 128 + torch.arange(128)  # (rows, 128)
        partial = (blocks.kv_num_blocks[0, 0] > 0)[rows[:, 0] // 128]
        assert not bool(mask.allowed(rows, first).any(1)[partial].all())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mask", MASKS)
def test_flex_compiled_for_one_shape_is_softmax_over_the_mask(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: static shapes and constants for the band."""
    compiled, blocks = flex_attention._compiled, flex_attention.block_mask
    monkeypatch.setattr(flex_attention, "_compiled", lambda threads, _static: compiled(threads, True))
    monkeypatch.setattr(flex_attention, "block_mask", lambda pattern, _static: blocks(pattern, True))
    for name, length in product(PATTERNS, (257, 512)):
        w = Workload(seq=length, kv_seq=length, mask=mask, heads=4, kv_heads=2)
        plugin, inputs = BlockSparse(pattern=name, window=200, impl="flex"), make(w)
        call = flex_attention.flex(w, plugin._pattern(w))
        with torch.no_grad():
            wanted = expected(plugin.definition(w), w, *inputs, torch.arange(length))
            assert rel_l2(call(*inputs), wanted) < TOLERANCE["float32"]


# A compilation each, of some seconds. Shapes differ by what the compiler takes for constant, inputs by how it packs and
# indexes them: each shape with the plainest inputs and with the most involved, each kind of input alone with one.
FLEX_SHAPES = [(1, 1), (17, 17), (1, 300), (100, 257), (257, 257)]
INVOLVED = pytest.param(
    {"heads": 6, "kv_heads": 2, "batch": 2, "head_dim": 40, "value_dim": 24, "dtype": "bfloat16"}, id="involved"
)
FLEX_CASES = [
    *product((CASES[0], INVOLVED), FLEX_SHAPES),
    *product(CASES[1:], [(257, 257)]),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("case", "shape"),
    [pytest.param(*case.values, shape, id=f"{case.id}-{shape[0]}-{shape[1]}") for case, shape in FLEX_CASES],
)
def test_flex_takes_every_kind_of_input(case: dict[str, object], shape: tuple[int, int]) -> None:
    for mask in MASKS:
        w = Workload(seq=shape[0], kv_seq=shape[1], mask=mask).replace(**case)
        assert error(BlockSparse(pattern="bigbird", window=40, impl="flex"), w, make(w)) < TOLERANCE[w.dtype]


@pytest.mark.slow
@needs_compiler
def test_flex_takes_other_strides_and_another_number_of_threads() -> None:
    w = Workload(seq=600, kv_seq=600, mask="causal")
    plugin = BlockSparse(impl="flex")
    call = plugin.build(w).call
    query, key, value = make(w)
    wanted = expected(plugin.definition(w), w, query, key, value, torch.arange(w.seq))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 4, threads):
            torch.set_num_threads(count)
            with torch.no_grad():
                assert rel_l2(call(*strided), wanted) < TOLERANCE["float32"]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", ["gather", pytest.param("flex", marks=needs_compiler)])
def test_a_call_leaves_its_inputs_and_earlier_outputs_alone(impl: str) -> None:
    w = Workload(seq=257, kv_seq=257, mask="causal")
    call = BlockSparse(impl=impl).build(w).call
    inputs = make(w)
    kept = [x.clone() for x in inputs]
    with torch.no_grad():
        first = call(*inputs)
        copy = first.clone()
        call(*(x * 2 for x in inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))
    assert torch.equal(first, copy)


# What it says of itself


def test_density_counts_whole_blocks() -> None:
    # 8 blocks on the diagonal and 7 before it, of 64.
    w = Workload(seq=1024, kv_seq=1024, mask="causal")
    plugin = BlockSparse(window=128, impl="gather")
    assert plugin.build(w).density == 15 / 64
    assert plugin.flops(w) == 2 * 8 * 15 * 128 * 128 * (64 + 64)
    everything = BlockSparse(window=1024, impl="gather").build(w.replace(mask="full"))
    assert everything.density == 1


@pytest.mark.parametrize("name", PATTERNS)
def test_density_falls_with_length(name: str) -> None:
    plugin = BlockSparse(pattern=name, impl="gather")
    pairs = [plugin._pattern(Workload(seq=n, kv_seq=n)).pairs() / n**2 for n in (2048, 8192, 32768)]
    assert pairs[0] > pairs[1] > pairs[2] > 0


def test_auto_gathers_where_there_is_no_kernel_and_says_why() -> None:
    w = Workload(seq=100, kv_seq=100, head_dim=300, value_dim=300)
    built = BlockSparse().build(w)
    assert built.implementation == "plain torch, block gather (the C++ kernel holds head and value dims up to 256)"
    assert error(BlockSparse(), w, make(w)) < TOLERANCE["float32"]


def test_without_a_compiler_flex_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    w = Workload(seq=100, kv_seq=100)
    assert BlockSparse(impl="flex").supports(w)
    assert BlockSparse().supports(w) is None


@needs_compiler
def test_a_compiler_that_fails_is_never_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    w = Workload(seq=200, kv_seq=200, head_dim=48, value_dim=48)
    # By its own patch: what monkeypatch puts back is hidden afterwards.
    with inductor.patch({"cpp.cxx": ("false",), "fx_graph_cache": False}):
        with pytest.raises(Exception, match=r"\S"):
            BlockSparse(impl="flex").build(w)
        every = BlockSparse.implementations
        monkeypatch.setattr(  # as on CUDA
            BlockSparse, "implementations", lambda *of: sorted(every(*of), key=lambda each: each.name != "flex")
        )
        built = BlockSparse().build(w)
        assert "block gather (flex_attention failed to compile" in built.implementation


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        ({}, (200, 100), "kv_seq >= seq"),
        ({"window": 0}, (100, 100), "at least 1"),
        ({"block": -1}, (100, 100), "at least 1"),
    ],
)
def test_what_cannot_be_computed_is_refused(options: dict[str, int], shape: tuple[int, int], words: str) -> None:
    reason = BlockSparse(**options).supports(Workload(seq=shape[0], kv_seq=shape[1]))
    assert reason is not None
    assert words in reason


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flex", "gather"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "window")) for n in PATTERNS])
def test_on_a_gpu(name: str, mask: str, impl: str) -> None:
    # A compilation each: fewer rows than a tile, lengths that are no multiple of a block, and lengths that are.
    for seq, kv_seq, dtype in ((100, 257, "bfloat16"), (1000, 1000, "float16"), (512, 1024, "bfloat16")):
        w = Workload(seq=seq, kv_seq=kv_seq, mask=mask, device="cuda", dtype=dtype, heads=8, kv_heads=2)
        assert error(BlockSparse(pattern=name, impl=impl), w, make(w)) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow])])
@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("name", PATTERNS)
def test_attnbench_finds_it_right_forward_and_backward(name: str, phase: str, device: str) -> None:
    """As a worker judges it: errors against the definition, gradients included."""
    impl, dtype = ("flex", "bfloat16") if device == "cuda" else ("gather", "float32")
    plugin = BlockSparse(pattern=name, window=200, impl=impl)
    for seq, mask, kv in ((257, "full", 4), (257, "causal", 2), (512, "full", 2), (512, "causal", 4)):
        w = Workload(
            seq=seq, kv_seq=seq, mask=mask, heads=4, kv_heads=kv, phase=phase, device=device, dtype=dtype, threads=1
        )
        facts = judged(plugin, w)
        assert "failed" not in facts, facts
        assert facts["implementation_rel_l2"] <= facts["tolerance"]
