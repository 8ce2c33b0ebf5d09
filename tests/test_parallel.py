"""Attention across processes: whoever holds what, it is attention in float64, and each process sends what is predicted."""

from __future__ import annotations

import math
import re
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from attnbench import Workload
from attnbench.devices import sockets
from attnbench.parallel import Scheme, refusal
from attnbench.registry import SCHEMES, find, instances, load_scheme
from attnbench.sweep.group import Group
from attnbench.theory import parallel as theory
from attnbench.workers.about_parallel import CallTogether, SchemeInstance
from attnbench.workers.server import Forkserver

ROOT = Path(__file__).parents[1]
BUILT_IN = ("ring", "ring:order=contiguous", "all-gather", "ulysses", "torch-ring",
            "torch-ring:rotate=allgather")  # fmt: skip
FRAME = 1024  # bytes of frames that gloo sends with a message from one rank to another, at most


@cache
def scheme(spec: str) -> SchemeInstance:
    name, *given = spec.split(":")
    target = find(kind=SCHEMES)[name].target
    options = dict(each.split("=") for each in given)
    (values,) = instances(load_scheme(target), options, every=False)
    return SchemeInstance(spec, target, values, [], [])


def made(spec: str) -> Scheme:
    found = scheme(spec)
    return load_scheme(found.target)(**found.options)


def workload(**sizes: int | str) -> Workload:
    seq = int(sizes.pop("seq", 48))
    shape = {"heads": 4, "kv_heads": 4, "head_dim": 16, "value_dim": 16, "mask": "causal"}
    return Workload(**({"seq": seq, "kv_seq": seq} | shape | sizes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Forkserver, Path]]:
    folder = tmp_path_factory.mktemp("meetings")
    (written,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/parallel.md").read_text(), re.M | re.S)
    (folder / "scheme_of_the_page.py").write_text(written)
    sys.path.insert(0, str(folder))
    try:
        with Forkserver(1) as running:
            running.preload(load_scheme(find(kind=SCHEMES)["torch-ring"].target).preloads)
            yield running, folder
    finally:
        sys.path.remove(str(folder))


PROBLEMS = (
    {"phase": "train"},
    {"phase": "train", "mask": "full", "kv_heads": 2, "batch": 2},
    {"dtype": "bfloat16", "kv_heads": 1},
)
MESSAGES = {"ring": 12, "all-gather": 16, "ulysses": 16, "torch-ring": 16}  # of a rank to each other one, at most


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_parts_together_are_attention_and_each_sends_what_is_predicted(
    world: int, server: tuple[Forkserver, Path]
) -> None:
    group = Group(world, 60)
    group.start(*server)
    try:
        for spec in BUILT_IN:
            for number, sizes in enumerate(PROBLEMS if world > 1 else PROBLEMS[:1]):
                w = workload(**sizes)
                joined = group.join(scheme(spec), w, number)
                said = f"{spec} {sizes}: {group.reason}"
                assert joined is not None, said
                assert joined[0].wrong is None, said
                columns = joined[0].columns
                close = 1e-6 if w.dtype == "float32" else 4e-3
                errors = [v for name, v in columns.items() if name.endswith("_rel_l2")]
                assert len(errors) == (5 if w.trains else 2)
                assert all(isinstance(error, float) and error < close for error in errors), f"{said} {columns}"
                predicted = theory.sent_bytes(made(spec).formula, w, world)
                for each in joined:
                    beyond = each.columns["sent_bytes"] - predicted  # type: ignore[operator]
                    most = FRAME * MESSAGES[spec.partition(":")[0]] * (world - 1)
                    assert 0 <= beyond <= most, f"{said} {each.columns}"
        own = SchemeInstance("gathered", "scheme_of_the_page:Gathered", {}, [], [])
        joined = group.join(own, w := workload(kv_heads=2), 1)
        assert joined is not None, group.reason
        assert joined[0].wrong is None
        from scheme_of_the_page import Gathered

        predicted = Gathered().sent_bytes(w, world)
        assert 0 <= joined[0].columns["sent_bytes"] - predicted <= 8 * FRAME  # type: ignore[operator]
        called = group.call(CallTogether(2, 1, 7, check=True))
        assert called is not None
        assert called[0].wrong is None
        assert all(each.seconds > 0 for each in called)
        assert group.call(CallTogether(1, 0, 8, check=False)) is not None
    finally:
        group.end()


def test_memory_of_a_process_falls_with_their_number_but_where_all_keys_are_gathered(
    server: tuple[Forkserver, Path],
) -> None:
    w, peaks = workload(seq=4096, head_dim=64, value_dim=64), dict[tuple[str, int], float]()
    for spec, world in (("ring", 2), ("ring", 4), ("ulysses", 4), ("all-gather", 4)):
        group = Group(world, 60)
        group.start(*server)  # what a process has freed before would count as its own
        try:
            joined = group.join(scheme(spec), w, 1)
        finally:
            group.end()
        assert joined is not None, group.reason
        peaks[spec, world] = max(float(each.columns["peak_bytes"] or math.nan) for each in joined)
        if spec != "all-gather":
            assert peaks[spec, world] == pytest.approx(theory.peak_bytes(spec, w, world), rel=0.2)
    assert peaks["ring", 4] < 0.75 * peaks["ring", 2]
    assert peaks["all-gather", 4] > 1.25 * peaks["ring", 4]


# spec, workload, processes, and what is said of it; "" where it can
REFUSALS = (
    ("ring", {"seq": 48}, 4, ""),
    ("ring", {"value_dim": 8}, 2, "as wide as keys"),
    ("ulysses", {"value_dim": 8}, 2, ""),
    ("ring", {"seq": 44}, 4, "44 tokens do not split evenly among 4 processes, 2 runs for each"),
    ("ring", {"seq": 44, "mask": "full"}, 4, ""),
    ("ring:order=contiguous", {"seq": 44}, 4, ""),
    ("ring:order=contiguous", {"seq": 45}, 4, "45 tokens do not split evenly among 4 processes"),
    ("ulysses", {"heads": 6, "kv_heads": 6}, 4, "6 heads do not split evenly among 4"),
    ("ulysses", {"heads": 12, "kv_heads": 3}, 4, "3 kv heads"),
    ("ulysses", {"heads": 8, "kv_heads": 2}, 4, ""),
    ("sdpa", {}, 2, "in one process"),
    ("sdpa", {"phase": "train"}, 1, ""),
    ("torch-ring", {"seq": 44}, 4, "44 tokens do not split evenly among 4 processes, 2 runs for each"),
)


@pytest.mark.parametrize(("spec", "sizes", "world", "says"), REFUSALS)
def test_what_can_not_be_shared_says_so(spec: str, sizes: dict[str, int | str], world: int, says: str) -> None:
    reason = refusal(made(spec), workload(**sizes), world)
    assert (says in (reason or "")) if says else reason is None


def test_a_scheme_without_a_backward_pass_or_a_device_is_refused() -> None:
    class Only(Scheme):
        trains = False
        devices = ("cuda",)

    assert refusal(Only(), workload(phase="train"), 2) == "it has no backward pass"
    assert refusal(Only(), workload(), 2) == "it does not run on cpu"


# spec, what rank 1 of 2 holds of 8 tokens
ORDERS = (
    ("ring", [2, 3, 4, 5]),
    ("all-gather", [2, 3, 4, 5]),
    ("ring:order=contiguous", [4, 5, 6, 7]),
    ("ulysses", [4, 5, 6, 7]),
)


@pytest.mark.parametrize(("spec", "held"), ORDERS)
def test_who_holds_which_tokens(spec: str, held: list[int]) -> None:
    w, whole = workload(seq=8), torch.arange(8.0).view(1, 1, 8, 1).expand(2, 3, 8, 5)
    parts = [made(spec).shard(whole, w, rank, 2) for rank in range(2)]
    assert parts[1][0, 0, :, 0].tolist() == held
    assert torch.equal(made(spec).unshard(parts, w), whole)


def test_zigzag_order_gives_each_rank_as_many_pairs() -> None:
    from attnbench_plugins.parallel.order import Ordered

    w, world = workload(seq=48), 4
    for spec, even in (("ring", True), ("ring:order=contiguous", False)):
        ring = made(spec)
        assert isinstance(ring, Ordered)
        pairs = []
        for rank in range(world):
            met = [ring.meeting(w, rank, source, 12) for source in range(world)]
            sizes = [(m.queries.stop - m.queries.start) * (m.keys.stop - m.keys.start) for m in met if m]
            pairs.append(sum(sizes))
        assert (len(set(pairs)) == 1) == even


def test_sockets_tell_what_was_sent() -> None:
    before = sockets.sent_bytes()
    if before is None:
        pytest.skip("this system does not tell what a socket has sent")
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as one:
        other, _ = listening.accept()
        with other:
            one.sendall(bytes(100_000))
            other.recv(100_000, socket.MSG_WAITALL)
            other.sendall(bytes(23))
            one.recv(23, socket.MSG_WAITALL)
            after = sockets.sent_bytes()
    assert after == before + 100_023
