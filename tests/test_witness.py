"""The second opinion: it makes the same values as a worker, and knows a right output from a wrong one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnbench.registry import find, load
from attnbench.sweep.settings import Asked
from attnbench.task.call import Task, outputs
from attnbench.task.inputs import Pools
from attnbench.workers.about_witness import Given
from attnbench.workers.witness import Witness, as_bytes
from attnbench.workload import Workload

NUMBER = 123456789


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(threads)


def shown(w: Workload) -> list[Tensor]:
    """What the second call of a worker is given."""
    pools = Pools(w)
    pools.draw(NUMBER)
    (tensors,) = pools.views(1, NUMBER)
    pools.alter(NUMBER + 1)
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("seq", [60, 1500])
def test_a_right_output_is_close_and_a_wrong_one_is_not(seq: int, mask: str, dtype: str) -> None:
    w = Workload(seq=seq, kv_seq=seq, heads=2, kv_heads=1, head_dim=32, value_dim=16, mask=mask, dtype=dtype)
    out = F.scaled_dot_product_attention(*shown(w), is_causal=w.is_causal, enable_gqa=True)
    witness, given = Witness(), Given((NUMBER, NUMBER + 1), True, NUMBER)
    bound = 1e-6 if dtype == "float32" else 1e-2
    error, _, problem = witness.judge(w, given, 1, as_bytes(out))
    assert error.rel_l2 < bound
    assert problem is None
    assert witness.judge(w, given, 2, as_bytes(out.mT.contiguous().mT))[0].rel_l2 < bound  # as it lies in memory
    for other in (
        Given((NUMBER,), True, NUMBER),
        Given((NUMBER, NUMBER + 1), True, 7),
        Given((NUMBER, NUMBER + 1), False, NUMBER),
    ):
        error, _, problem = witness.judge(w, other, 1, as_bytes(out))
        assert error.rel_l2 > 0.1
        assert "over the tolerance" in (problem or "")
    out[:, :, seq // 8 : seq // 4] = 0
    assert witness.judge(w, given, 1, as_bytes(out))[0].rel_l2 > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", ["encoder", "decoder", "decoder-only"])
@pytest.mark.parametrize("seq", [60, 700])
def test_it_knows_a_right_block_from_one_with_wrong_rows_or_weights(seq: int, block: str, dtype: str) -> None:
    mask = "full" if block == "encoder" else "causal"
    w = Workload(
        seq=seq,
        kv_seq=seq,
        heads=2,
        kv_heads=2,
        head_dim=32,
        scope="block",
        block=block,
        norm="pre",
        mask=mask,
        dtype=dtype,
    )
    task = Task(load(find()["sdpa"].target)(), w)
    out = task.call(*shown(w))
    witness, given = Witness(), Given((NUMBER, NUMBER + 1), True, NUMBER)
    error, _, problem = witness.judge(w, given, 1, as_bytes(out))
    assert problem is None
    assert error.rel_l2 < (1e-6 if dtype == "float32" else 1e-2)
    assert "over the tolerance" in (witness.judge(w, Given((NUMBER,), True, NUMBER), 1, as_bytes(out))[2] or "")
    cut = out.clone()
    cut[:, seq // 8 : seq // 4] = 0
    assert "over the tolerance" in (witness.judge(w, given, 1, as_bytes(cut))[2] or "")
    with torch.no_grad():
        next(task.stack.parameters()).mul_(1.5)  # type: ignore[union-attr]
    assert "over the tolerance" in (witness.judge(w, given, 1, as_bytes(task.call(*shown(w))))[2] or "")


def made(**fields: Any) -> Workload:
    """A small workload of scope attention, or with a block of that block."""
    block = {"scope": "block", "norm": "pre", "kv_heads": 4} if "block" in fields else {"kv_heads": 2}
    return Workload(**{"heads": 4, "head_dim": 16, "value_dim": 16, "mask": "causal", "kv_seq": 70} | block | fields)


BATCH = Asked.of(batch_spec="q6k_2q1s40", heads="4", kv_heads="2", head_dim="16", dtype="float32", device="cpu").sweep
KINDS = {
    "decode": made(seq=2, phase="decode"),
    "decode, ragged": made(seq=2, phase="decode", lengths="70,9,40", batch=3),
    "a server's batch": BATCH.workloads()[0],
    "ragged": made(seq=70, lengths="70,9,40", batch=3),
    "train": made(seq=70, phase="train"),
    "sinks": made(seq=70, sinks=True),
    "decode in a block": made(seq=1, phase="decode", block="decoder-only"),
    "decode in a decoder": made(seq=1, phase="decode", block="decoder"),
    "train a block": made(seq=70, phase="train", block="decoder-only"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_phase_it_knows_a_right_output(kind: str) -> None:
    w = KINDS[kind]
    task = Task(load(find()["naive"].target)(), w)
    found = [x.clone() for x in outputs(task.call(*shown(w)))]
    told = found if w.scope == "attention" else found[:1]
    witness, given = Witness(), Given((NUMBER, NUMBER + 1), True, NUMBER)
    error, columns, problem = witness.judge(w, given, 1, as_bytes(*told))
    assert problem is None
    assert error.rel_l2 < 1e-6
    assert len(columns) == (3 if w.trains and w.scope == "attention" else 0)
    assert witness.judge(w, given, 1, as_bytes(found[0])) == (error, {}, None)  # without gradients
    for i, changed in enumerate(told):
        changed[-1, ..., 0, :] += 0.1
        assert "off by" in (message := witness.judge(w, given, 1, as_bytes(*told))[2] or "") or "over" in message, i
        changed[-1, ..., 0, :] -= 0.1
    assert "over the tolerance" in (witness.judge(w, Given((NUMBER,), True, NUMBER), 1, as_bytes(*told))[2] or "")


@pytest.mark.parametrize("calls", [1, 2, 130, 20_000])
def test_however_many_calls_a_burst_has_the_first_is_given_the_same(calls: int) -> None:
    """The one that is checked gets what the first has: so the witness knows it, and draws it once for all variants."""
    w = Workload(seq=8, kv_seq=8, heads=1, kv_heads=1, head_dim=8, value_dim=8)
    pools = Pools(w)
    pools.draw(1)
    pools.alter(2)
    out = F.scaled_dot_product_attention(*pools.views(calls, 3)[0])
    assert Witness().judge(w, Given((1, 2), True, 3), 5, as_bytes(out))[2] is None


def test_views_are_apart_and_altered_without_a_trace() -> None:
    w = Workload(seq=64, kv_seq=64, heads=1, kv_heads=1)
    pools = Pools(w)
    pools.draw(1)
    views = pools.views(50, 2)
    assert len({tuple(x.data_ptr() for x in given) for given in views}) == 50
    assert all(x.is_contiguous() and x.data_ptr() % 64 == 0 for given in views for x in given)
    assert len({float(given[0][0, 0, 0, 0]) for given in views}) > 40
    versions, before = [x._version for x in views[0]], [x.clone() for x in views[0]]
    pools.alter(3)
    assert [x._version for x in views[0]] == versions
    for now, was in zip(views[0], before, strict=True):
        assert 0.05 < float((now != was).float().mean()) < 0.25
        assert abs(float(now.std()) - 1) < 0.1
    assert not pools.are_changed()
    views[7][1][0, 0, 5, 5] += 1
    assert pools.are_changed()
    assert all(torch.equal(*pair) for pair in zip(*(p.views(3, 9)[2] for p in (pools, pools)), strict=True))
