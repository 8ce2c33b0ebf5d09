"""The KV caches on plain tensors: what they keep, in how many bytes, and what they give back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from attnbench_plugins.caches import bits, turboquant
from torch import Tensor

from attnbench import AttnbenchError, Workload
from attnbench.cache import KVCache, State, Step, kept_bytes
from attnbench.registry import CACHES, create_cache, find, load_cache

ROOT = Path(__file__).parents[1]
HEADS, DIM, VALUE_DIM = 3, 64, 32


def tokens(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return (torch.randn(2, HEADS, n, DIM, generator=drawn), torch.randn(2, HEADS, n, VALUE_DIM, generator=drawn))


def filled(cache: KVCache, key: Tensor, value: Tensor, chunk: int) -> State:
    state = cache.start(key[:, :, :0], value[:, :, :0])
    for i in range(0, key.shape[2], chunk):
        state = cache.append(state, key[:, :, i : i + chunk], value[:, :, i : i + chunk])
        if cache.weighs:
            kept = cache.read(state).key.shape[2]
            weights = torch.rand(2, HEADS, kept, generator=torch.Generator().manual_seed(i))
        else:
            weights = None
        state = cache.settle(state, weights)
    return state


# spec, relative error of keys and of values on normal inputs, bytes of 100 tokens of a head, counted by hand
FORMATS = (
    ("exact", 0, 0, 100 * 4 * (64 + 32)),
    ("bf16", 2e-3, 2e-3, 100 * 2 * (64 + 32)),
    ("fp8", 3e-2, 3e-2, 100 * (64 + 2 + 32 + 2)),
    ("fp8:format=e5m2", 6e-2, 6e-2, 100 * (64 + 2 + 32 + 2)),
    # Scales of 8 bits for 16 or 32 numbers, and of NVFP4 a float32 for a head's keys, and one for its values.
    ("fp4", 0.11, 0.11, 100 * (32 + 4 + 16 + 2) + 4 + 4),
    ("fp4:format=mxfp4", 0.13, 0.13, 100 * (32 + 2 + 16 + 1)),
    ("int8", 7e-3, 7e-3, 100 * (64 + 2 + 32 + 2)),
    ("int8:group=32", 7e-3, 7e-3, 100 * (64 + 2 * 2 + 32 + 2)),
    ("int8:smooth=true", 7e-3, 7e-3, 100 * (64 + 2 + 32 + 2) + 4 * 64),  # and the mean in float32
    ("int4", 0.12, 0.11, 100 * (32 + 2 + 16 + 2)),
    ("int4:rotate=true", 0.12, 0.11, 100 * (32 + 2 + 16 + 2)),
    ("int4:group=16", 0.09, 0.09, 100 * (32 + 4 * 2 + 16 + 2 * 2)),
    ("int4:values=false", 0.12, 2e-3, 100 * (32 + 2 + 2 * 32)),
    ("int4:keys=false", 2e-3, 0.11, 100 * (2 * 64 + 16 + 2)),
    # 64 keys as 2 groups of 32 tokens a channel with scale and lowest; 36 wait. 36 values in groups of a token; 64 wait.
    ("kivi:bits=2:residual=64", 0.32, 0.3, 64 * 2 * (8 + 4) + 36 * 128 + 36 * (8 + 4) + 64 * 64),
    ("kivi:bits=4:residual=32", 0.08, 0.07, 64 * 3 * (16 + 4) + 4 * 128 + 68 * (16 + 4) + 32 * 64),
    ("turboquant:bits=2", 0.35, 0.35, 100 * (16 + 2 + 8 + 2)),
    ("turboquant:bits=3", 0.19, 0.19, 100 * (24 + 2 + 12 + 2)),
    ("turboquant:bits=4", 0.1, 0.1, 100 * (32 + 2 + 16 + 2)),
    ("window:size=100", 2e-3, 2e-3, 100 * 2 * (64 + 32)),
    ("h2o:size=100:recent=50", 2e-3, 2e-3, 100 * (2 * (64 + 32) + 4 + 4)),  # with positions and sums of weights
)


@pytest.mark.parametrize(("spec", "key_error", "value_error", "size"), FORMATS, ids=[row[0] for row in FORMATS])
def test_what_is_kept(spec: str, key_error: float, value_error: float, size: int) -> None:
    """Error and bytes, and both the same whether tokens come in one go, one by one, or in chunks."""
    cache, (key, value) = create_cache(spec), tokens(100)
    state = filled(cache, key, value, 100)
    found = cache.read(state)
    for got, given, most in ((found.key, key, key_error), (found.value, value, value_error)):
        error = float((got.float() - given).norm() / given.norm())
        assert most / 2 <= error <= most
    assert kept_bytes(state) == 2 * HEADS * size
    for chunk in (1, 7):
        other = filled(cache, key, value, chunk)
        assert torch.equal(cache.read(other).key, found.key)
        assert torch.equal(cache.read(other).value, found.value)
        assert kept_bytes(other) == kept_bytes(state)


def test_every_cache_is_in_the_table() -> None:
    found = find(kind=CACHES)
    assert {spec.split(":")[0] for spec, *_ in FORMATS} == set(found)
    assert all(issubclass(load_cache(each.target), KVCache) for each in found.values())


@pytest.mark.parametrize("n", range(1, 9))
def test_codes_are_packed_without_loss(n: int) -> None:
    codes = torch.randint(0, 2**n, (2, 0 if n == 5 else 3, 21), dtype=torch.uint8)
    packed = bits.pack(codes, n)
    assert packed.shape == (*codes.shape[:-1], 3 * n)  # three eights
    assert torch.equal(bits.unpack(packed, n, 21), codes)


def test_the_levels_are_those_that_max_printed() -> None:
    """Max 1960, table I: of 4 and 8 levels."""
    assert turboquant.normal_levels(2)[2:] == pytest.approx([0.4528, 1.510], abs=5e-4)
    assert turboquant.normal_levels(3)[4:] == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=5e-4)


def test_a_rotation_helps_where_one_channel_is_large() -> None:
    key, value = tokens(40)
    key[..., 5] *= 30
    errors = {}
    for spec in ("int4", "int4:rotate=true"):
        cache = create_cache(spec)
        off = cache.read(filled(cache, key, value, 8)).key - key
        errors[spec] = float(off[..., :5].norm() / key[..., :5].norm())
    assert errors["int4:rotate=true"] < errors["int4"] / 1.5


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_window_keeps_the_first_tokens_and_the_last(chunk: int) -> None:
    cache, (key, value) = create_cache("window:size=10:sinks=3"), tokens(50)
    found = cache.read(filled(cache, key, value, chunk))
    kept = [0, 1, 2, *range(43, 50)]
    assert found.positions is not None
    assert found.positions.tolist() == kept
    assert torch.equal(found.key, key[:, :, kept].bfloat16())
    assert torch.equal(found.value, value[:, :, kept].bfloat16())
    rows = torch.arange(50)
    seen = cache.sees(rows[:, None], rows)
    assert seen is not None
    for row in (5, 20, 49):  # what it had kept by then, token by token
        assert (seen[row] & (rows <= row)).nonzero()[:, 0].tolist() == sorted(
            {0, 1, 2, *range(max(0, row - 6), row + 1)}
        )


def test_h2o_keeps_what_was_attended_to() -> None:
    cache, (key, value) = create_cache("h2o:size=6:recent=2"), tokens(20)
    state = cache.append(cache.start(key[:, :, :0], value[:, :, :0]), key[:, :, :12], value[:, :, :12])
    weights = torch.rand(2, HEADS, 12) / 10
    weights[..., (1, 4)] = 1.0
    weights[0, 0, 7] = weights[1, 2, 0] = 2.0
    state = cache.settle(state, weights)
    state = cache.append(state, key[:, :, 12:15], value[:, :, 12:15])
    weights = torch.zeros(2, HEADS, 9)
    weights[:, :, 8] = 5  # the last: it stays anyway
    weights[:, :, 6] = 3  # token 12
    found = cache.read(cache.settle(state, weights))
    assert found.positions is not None
    for batch, head, heavy in ((0, 0, {1, 4, 7, 12}), (1, 2, {0, 1, 4, 12}), (0, 1, {1, 4, 12})):
        positions = found.positions[batch, head].tolist()
        assert positions == sorted(positions)
        assert heavy < {*positions}
        assert positions[-2:] == [13, 14]
        assert torch.equal(found.key[batch, head], key[batch, head, positions].bfloat16())


def test_the_example_of_the_docs_is_a_cache() -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "models.md").read_text(), re.M | re.S)
    (example,) = (each for each in examples if "KVCache" in each)
    room: dict[str, type[KVCache]] = {}
    exec(example, room)
    cache, (key, value) = room["Half"](), tokens(20)
    state = filled(cache, key, value, 7)
    assert torch.equal(cache.read(state).key, key.half())
    assert kept_bytes(state) == key.numel() * 2 + value.numel() * 2


STEPS = (
    ("bf16", 500, None),
    ("window:size=64", 64, None),
    ("window:size=1000", 500, None),
    ("int4:rotate=true", None, "no kernel rotates"),
    ("int4:group=32", None, "64 numbers"),
    ("int8:keys=false", None, "one side"),
    ("fp4", None, "no kernel reads this form"),
    ("kivi", None, "no kernel reads this form"),
    ("h2o", None, "weights"),
)


@pytest.mark.parametrize(("spec", "length", "reason"), STEPS, ids=[row[0] for row in STEPS])
def test_what_decodes_from_it(spec: str, length: int | None, reason: str | None) -> None:
    w = Workload(seq=1, kv_seq=500, heads=9, kv_heads=3, mask="causal", phase="decode")
    found = create_cache(spec).step(w)
    if reason:
        assert isinstance(found, str)
        assert reason in found
    else:
        assert isinstance(found, Step)
        assert found.workload.kv_seq == length
        assert not found.plugin.emulated(found.workload)


REFUSED = (
    ("int9", "no cache is called 'int9'; did you mean int8"),
    ("int8:gruop=3", "no option 'gruop'; did you mean group"),
    ("int8:group", "is no option"),
    ("kivi:bits=5", "expected one of 2, 3, 4, 8"),
    ("kivi:group=48", "must be a multiple"),
    ("window:size=4", "less than size"),
    ("h2o:recent=300", "to size=256"),
    ("int8,int4", "must name one cache"),
)


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(AttnbenchError, match=message) as caught:
        create_cache(spec)
    assert "\n" not in str(caught.value)
