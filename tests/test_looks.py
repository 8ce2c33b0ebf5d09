"""What looks at calls in passing: values that are not met twice, rows of any burst, and that the judge is what it was."""

from __future__ import annotations

import pytest
import torch
from attnbench_plugins.int8 import Int8
from attnbench_plugins.linear import Linear
from attnbench_plugins.naive import Naive
from torch import library

from attnbench.judge import deviation, form, values
from attnbench.plugin import Plugin
from attnbench.task import inputs
from attnbench.task.call import Task
from attnbench.task.inputs import Pools
from attnbench.workload import Workload

SMALL = Workload(seq=64, kv_seq=64, heads=4, kv_heads=2, head_dim=32, value_dim=32, threads=1)


def pools() -> Pools:
    made = Pools(SMALL)
    made.draw(1)
    return made


def test_no_call_of_a_long_burst_is_given_what_another_was() -> None:
    places = [tuple(x.data_ptr() for x in given) for given in pools().views(3000, 5)]
    assert len(places) == len(set(places)) == 3000


def test_the_same_number_gives_the_same_places() -> None:
    made = pools()
    one, other, third = ([x.data_ptr() for given in made.views(300, n) for x in given] for n in (5, 5, 6))
    assert one == other
    assert one != third


def test_new_values_do_not_hide_what_a_call_wrote() -> None:
    made = pools()
    (given,) = made.views(1, 5)
    made.alter(2)
    assert not made.are_changed()
    assert not made.are_changed(7)
    given[2].zero_()
    made.alter(3)
    assert made.are_changed()
    assert made.are_changed(7)


@pytest.mark.parametrize("phase", ["forward", "train", "decode"])
@pytest.mark.parametrize("kind", [Naive, Linear, Int8])
def test_a_glance_sees_a_call_that_was_left_out(kind: type[Plugin], phase: str) -> None:
    workload = SMALL.replace(phase=phase, mask="causal", seq=1 if phase == "decode" else 64)
    plugin = kind()
    if phase not in plugin.phases or plugin.supports(workload) is not None:
        pytest.skip("not for this phase")
    task = Task(plugin, workload)
    one, other = inputs.empty(workload), inputs.empty(workload)
    inputs.fill(one, workload, 1)
    inputs.fill(other, workload, 2)
    raw = task.call(*one)
    assert [values.glance(task, plugin.family, one, raw, draw) for draw in range(8)] == [None] * 8
    if kind is Int8 and phase == "decode":
        return  # not looked at in passing
    assert all("a row is off" in (values.glance(task, plugin.family, other, raw, draw) or "") for draw in range(8))


def test_code_that_was_swapped_shows() -> None:
    functions, code = form.Functions(), deviation.verdict.__code__
    assert functions.replaced() is None
    try:
        deviation.verdict.__code__ = (lambda error, allowed: None).__code__
        assert functions.replaced() == "replaces attnbench.judge.deviation.verdict"
    finally:
        deviation.verdict.__code__ = code
    assert functions.replaced() is None


def test_a_constant_that_was_changed_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = form.Functions()
    monkeypatch.setitem(deviation._TOLERANCE["float32"], "exact", 1.0)
    assert functions.replaced() == "changes attnbench.judge.deviation._TOLERANCE"


def test_an_operator_of_torch_that_was_overridden_shows() -> None:
    functions = form.Functions()
    overrides = library.Library("aten", "IMPL")
    try:
        overrides.impl("_softmax", lambda x, dim, half: x * 0.0, "CPU")
        assert functions.replaced() == "replaces aten::_softmax"
    finally:
        overrides._destroy()
    assert functions.replaced() is None


def test_a_mode_that_was_left_on_shows() -> None:
    before = form.global_state()
    with torch.overrides.TorchFunctionMode():
        assert form.disturbed(before) == "changes global state: modes of torch was 0, now 1"
    assert form.disturbed(before) is None
