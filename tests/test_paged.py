"""Pages: what is read through a table is what lies in order."""

from __future__ import annotations

import pytest
import torch
from attnbench_plugins.paged import Paged, Pages
from attnbench_plugins.tiled import Tiled

from attnbench.errors import AttnbenchError
from attnbench.registry import find, select
from attnbench.workload import Workload


@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("seq", [1, 3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_over_pages_is_the_step_over_a_cache(page: int, seq: int, dtype: str, isa: str) -> None:
    w = Workload(
        seq=seq, kv_seq=300, heads=6, kv_heads=2, batch=3, head_dim=33, value_dim=17, dtype=dtype, mask="causal",
        phase="decode",
    )  # fmt: skip
    query, key, value = (torch.randn(shape).to(getattr(torch, dtype)) for shape in w.shapes)
    outs = []
    for plugin in (Paged(page=page), Tiled(impl="native")):
        decoding, past = plugin.decoding(w), (key[:, :, : w.past], value[:, :, : w.past])
        state = decoding.start(*past, capacity=w.kv_seq)
        outs.append(decoding.step(state, query, key[:, :, w.past :], value[:, :, w.past :])[0])
    assert float((outs[0] - outs[1]).norm() / outs[1].norm()) < (4e-3 if dtype == "bfloat16" else 1e-6)


def test_pages_lie_in_no_order_and_are_shared_by_nobody() -> None:
    key, value = torch.randn(3, 2, 70, 8), torch.randn(3, 2, 70, 4)
    pages = Pages.of(key, value, [100] * 3, 16, seed=0).append(key, value, [70] * 3)
    assert pages.table.shape == (3, 7)
    assert sorted(pages.table.flatten().tolist()) == list(range(21))
    assert pages.table.flatten().tolist() != list(range(21))
    held = pages.key[pages.table[1].long()].transpose(0, 1).flatten(1, 2)  # (kv_heads, pages * page, head_dim)
    assert torch.equal(held[:, :70], key[1])
    with pytest.raises(AttnbenchError, match="7 pages of 16 tokens have no room for 113"):
        pages.append(torch.randn(3, 2, 43, 8), torch.randn(3, 2, 43, 4), [43] * 3)


def test_each_sequence_owns_the_pages_that_it_needs_and_no_other() -> None:
    key, value = torch.randn(3, 2, 40, 8), torch.randn(3, 2, 40, 4)
    pages = Pages.of(key, value, [40, 5, 17], 16, seed=3).append(key, value, [38, 4, 16])
    assert pages.key.shape[0] == 3 + 1 + 2
    pages = pages.append(key[:, :, 38:], value[:, :, 38:], [2, 1, 1])
    assert pages.lengths == (40, 5, 17)
    held = pages.value[pages.table[2, :2].long()].transpose(0, 1).flatten(1, 2)  # (kv_heads, 2 * page, value_dim)
    assert torch.equal(held[:, :17], torch.cat([value[2, :, :16], value[2, :, 38:39]], 1))
    with pytest.raises(AttnbenchError, match="1 pages of 16 tokens have no room for 17"):
        pages.append(key, value, [0, 12, 0])


def test_a_plugin_of_all_is_not_asked_for_by_its_name() -> None:
    found = find()
    assert not next(request for request in select("all", found) if request.found.name == "paged").named
    for text in ("paged", "all,paged", "paged,all"):
        (request,) = (request for request in select(text, found) if request.found.name == "paged")
        assert request.named
