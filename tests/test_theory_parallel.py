"""Attention across devices by formula, against messages, elements and pairs counted one by one."""

import itertools
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from attnbench import AttnbenchError, Workload
from attnbench.theory import costs, parallel
from attnbench.theory.parallel import Device
from attnbench.theory.schemes import SCHEMES

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"kv_heads": 2, "dtype": "bfloat16"},
    "one kv head, wide values": {"kv_heads": 1, "value_dim": 5, "batch": 3},
}
WORLDS = (1, 2, 4, 8)
SHARED = tuple(name for name in SCHEMES if name != "whole")
H100 = Device(989e12, 3.35e12, 450e9)


def made(shape: str, mask: str = "causal", phase: str = "forward", seq: int = 32, **changes: Any) -> Workload:
    sizes: dict[str, Any] = {"seq": seq, "kv_seq": seq, "heads": 8, "kv_heads": 8, "head_dim": 4, "value_dim": 4}
    return Workload(**(sizes | {"mask": mask, "phase": phase} | SHAPES[shape] | changes))


def chunk_of(world: int, chunks: int, chunk: int) -> int:
    """Whose chunk it is: of as many as devices its own, of twice as many in zig-zag order."""
    return chunk if chunks == world else min(chunk, chunks - 1 - chunk)


def ring_by_messages(w: Workload, world: int, from_owner: bool = False) -> list[int]:
    """Bytes that each device sends when blocks go round until each has been everywhere, and sums come home."""
    sent = [0] * world
    block = w.batch * w.kv_heads * (w.kv_seq // world) * (w.head_dim + w.value_dim)
    for _ in range(2 if w.trains else 1):  # keys and values, forward and once more backward
        seen = [{device} for device in range(world)]
        at = list(range(world))  # whose block a device has in hand
        while any(len(each) < world for each in seen):
            for device in range(world):
                sent[device] += block * w.itemsize
            at = [at[device - 1] for device in range(world)]
            for device in range(world):
                seen[device].add(at[device])
    if w.trains and world > 1:
        for owner in range(world):
            way = [*range(owner, owner + world)] if from_owner else [*range(owner + 1, owner + world)]
            for holder in way:  # each adds to the sum and hands it on, the last one to the owner
                sent[holder % world] += block * 4
    return sent


def ulysses_by_elements(w: Workload, world: int) -> list[int]:
    """Bytes that leave each device when (head, token) goes from who has the token to who has the head."""
    sent = [0] * world
    kv_heads = max(w.kv_heads, world)  # repeated
    into = ((w.heads, w.head_dim), (kv_heads, w.head_dim), (kv_heads, w.value_dim))
    for heads, dim, is_output in (*((*each, False) for each in into), (w.heads, w.value_dim, True)):
        for head, token in itertools.product(range(heads), range(w.seq)):
            by_token, by_head = token * world // w.seq, head * world // heads
            if by_token != by_head:
                sent[by_head if is_output else by_token] += w.batch * dim * w.itemsize
    return [each * (2 if w.trains else 1) for each in sent]


def all_gather_by_messages(w: Workload, world: int) -> list[int]:
    """Each piece goes round, forward and backward; then each device sends its gradients of all others' pieces."""
    piece = w.batch * w.kv_heads * (w.kv_seq // world) * (w.head_dim + w.value_dim)
    sent = []
    for device in range(world):
        hops = sum(1 for owner in range(world) if (owner - 1) % world != device)
        sent.append(piece * w.itemsize * hops)
        if w.trains:
            sent[device] += piece * w.itemsize * hops + sum(piece * 4 for owner in range(world) if owner != device)
    return sent


def all_reduce_by_messages(w: Workload, world: int) -> list[int]:
    """A ring all-reduce of (batch, seq, width): world - 1 pieces to sum, and as many to hand on."""
    piece = w.batch * w.seq * w.width * w.itemsize // world
    each = sum(piece for _ in ("sum", "hand on") for _ in range(world - 1))
    return [each * (2 if w.trains else 1)] * world


COUNTED: dict[str, Callable[[Workload, int], list[int]]] = {
    "ring": ring_by_messages,
    "ring-contiguous": ring_by_messages,
    "torch-ring": partial(ring_by_messages, from_owner=True),
    "ulysses": ulysses_by_elements,
    "tensor-parallel": all_reduce_by_messages,
    "all-gather": all_gather_by_messages,
}


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SHARED)
def test_bytes_sent_are_those_counted_one_by_one(scheme: str, shape: str, mask: str, phase: str) -> None:
    for world in WORLDS:
        w = made(shape, mask, phase)
        assert [parallel.sent_bytes(scheme, w, world)] * world == COUNTED[scheme](w, world), world


@pytest.mark.parametrize("scheme", SHARED)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_operations_are_of_the_device_with_most_pairs(scheme: str, mask: str) -> None:
    for world in WORLDS:
        w = made("grouped", mask, "train")
        chunks = 2 * world if scheme in ("ring", "torch-ring", "all-gather") else world
        pairs = [0] * world
        for row, key in itertools.product(range(w.seq), range(w.kv_seq)):
            if mask == "full" or key <= row:
                pairs[chunk_of(world, chunks, row * chunks // w.seq)] += w.heads
        most = max(pairs) if not SCHEMES[scheme].by_heads else sum(pairs) // world
        assert parallel.flops(scheme, w, world) == 3 * 2 * most * (w.head_dim + w.value_dim), world


@pytest.mark.parametrize("phase", ["forward", "train"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("scheme", SHARED)
def test_the_bound_is_where_bisection_finds_it(scheme: str, mask: str, phase: str) -> None:
    for world, device in itertools.product((2, 8), (H100, Device(989e12, 3.35e12, 5e9), Device(1e14, 1e12, 9e11))):
        w = made("grouped", mask, phase, heads=32, kv_heads=8, head_dim=128, value_dim=128)

        def computes_longer(pieces: int, world: int = world, device: Device = device, w: Workload = w) -> bool:
            length = 2 * world * pieces
            found = parallel.steps(scheme, w.replace(seq=length, kv_seq=length), world)
            return all(device.link_s(step) <= device.compute_s(step) for step in found if step.flops)

        first = bisect_left(range(1, 10**8), True, key=computes_longer) + 1
        bound = parallel.link_bound_below(scheme, w, world, device)
        assert 2 * world * (first - 1) <= bound <= 2 * world * first or (first == 1 and bound <= 2 * world), world


@pytest.mark.parametrize(("mask", "times"), [("causal", 1.0), ("full", 0.5)])
@pytest.mark.parametrize(
    ("scheme", "world", "tokens"),
    [
        ("ring", 64, 64 * 8 / 32),  # N K/H
        ("ulysses", 4, 3 / 4 * (1 + 8 / 32)),  # (N - 1)/N (1 + max(K, N)/H)
        ("ulysses", 32, 31 / 32 * 2),
        ("tensor-parallel", 32, 31),  # N - 1
        ("all-gather", 64, 63 * 8 / 32),  # (N - 1) K/H
    ],
)
def test_the_bound_is_as_docs_theory_devices_has_it(
    scheme: str, world: int, tokens: float, mask: str, times: float
) -> None:
    w = made("grouped", mask, heads=32, kv_heads=8, head_dim=128, value_dim=128, seq=131072)
    per_number = w.itemsize * H100.flops_per_s / H100.link_bytes_per_s
    assert parallel.link_bound_below(scheme, w, world, H100) == pytest.approx(times * tokens * per_number, rel=1e-3)


def test_nothing_is_sent_by_one_device_and_a_fast_link_binds_nothing() -> None:
    w = made("plain", seq=4096)
    for scheme in SHARED:
        assert parallel.sent_bytes(scheme, w, 1) == parallel.link_bound_below(scheme, w, 1, H100) == 0
        assert parallel.flops(scheme, w, 1) == costs.flops(w)
        assert parallel.link_bound_below(scheme, w, 4, Device(1e14, 1e12, 1e15)) == 0


@pytest.mark.parametrize("phase", ["forward", "train"])
def test_memory_falls_as_devices_join_but_what_is_whole_stays(phase: str) -> None:
    w = made("grouped", phase=phase, seq=4096, kv_heads=8)
    for scheme in SHARED:
        few, many = (parallel.peak_bytes(scheme, w, world) for world in (4, 8))
        keys = w.batch * w.kv_heads * w.kv_seq * (w.head_dim + w.value_dim)
        rows = w.batch * w.seq * w.width * w.itemsize
        whole = {
            "all-gather": keys * (2 * 4 if w.trains else w.itemsize),
            "tensor-parallel": rows * (2 if w.trains else 1),
        }.get(scheme, 0)
        assert many - whole == (few - whole) / 2


def test_time_is_the_longer_where_they_overlap_and_the_sum_where_not() -> None:
    w = made("grouped", "full", seq=1024, heads=32, kv_heads=8, head_dim=128, value_dim=128)
    slow = Device(989e12, 3.35e12, 1e9)
    world = 4
    compute, link = (find("ring", w, world, slow) for find in (parallel.compute_s, parallel.link_s))
    # All but the last step wait for the link; that has nothing to send.
    assert parallel.time_s("ring", w, world, slow) == pytest.approx(link + compute / world)
    compute, link = (find("ulysses", w, world, slow) for find in (parallel.compute_s, parallel.link_s))
    assert parallel.time_s("ulysses", w, world, slow) == pytest.approx(link + compute)


@pytest.mark.parametrize(
    ("scheme", "world", "changes", "why"),
    [
        ("ulysses", 3, {}, "3 devices can't share 8 heads"),
        ("tensor-parallel", 16, {}, "16 devices can't share 8 heads"),
        ("ulysses", 4, {"heads": 12, "kv_heads": 6}, "6 kv heads and 4 devices are no multiples of each other"),
        ("ring", 4, {"seq": 36, "kv_seq": 36}, "36 tokens can't be cut in 8 equal chunks"),
        ("ring", 2, {"seq": 16}, "not 16 and 32"),
        ("ring", 2, {"mask": "window:8"}, "attention alone is shared out"),
        ("ring", 2, {"phase": "decode", "seq": 1}, "attention alone is shared out"),
        ("ring", 0, {}, "by 1 device or more, not 0"),
        ("whole", 2, {}, "whole is for 1 device, not 2"),
        ("rung", 2, {}, "no scheme 'rung'; there is: ring, "),
    ],
)
def test_what_cannot_be_is_said(scheme: str, world: int, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(AttnbenchError, match=why):
        parallel.sent_bytes(scheme, made("plain").replace(**changes), world)
