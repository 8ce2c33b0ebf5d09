"""The pytest fixture `attnbench`: that a variant is faster than another, as a test. pytest finds it by its entry point.

    def test_mine(attnbench):
        attnbench("mine").faster_than("sdpa", seq=4096, by=1.2)

It loads nothing heavy until a test claims something: every pytest of this environment starts with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack

import pytest

if TYPE_CHECKING:
    from attnbench.records.schema import Row
    from attnbench.registry import Request
    from attnbench.sweep.settings import Given

BUDGET = 30.0
Variant: TypeAlias = str | Callable[..., Any]
"""A plugin as `--plugins` takes it, or a function (query, key, value) -> out of a module."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "attnbench(name): the plugin whose speed this test is about")


@pytest.fixture(name="attnbench")
def _claims(request: pytest.FixtureRequest) -> Claims:
    """Claims of speed: see `attnbench.testing.Claims`."""
    marker = request.node.get_closest_marker("attnbench")
    return Claims(request, marker.args[0] if marker and marker.args else None)


@dataclass(frozen=True)
class Claims:
    """What a test says of one plugin.

    plugin: which; None for the one that this environment has beside attnbench's own.
    """

    request: pytest.FixtureRequest
    plugin: Variant | None = None

    def __call__(self, plugin: Variant) -> Claims:
        """Claims of this plugin."""
        return Claims(self.request, plugin)

    def faster_than(self, other: Variant, *, by: float = 1.0, **asked: Unpack[Given]) -> None:
        """Fails unless the plugin is certainly so many times as fast as the other: the 95% interval of the speedup.

        Both are measured in turns, in processes of their own, and judged, as `attnbench.run` does; where the interval
        holds both answers the test fails with "can't tell", and a longer `budget` may tell. Each workload must hold.
        Where pytest-benchmark is installed its report shows the longest workload's bursts.

        asked: sizes and so on as `attnbench.run` takes them; attention alone and 30 s are the defaults here.

        Raises:
            AttnbenchError: something asked for is not to be had.
        """
        __tracebackhide__ = True
        rows = _measured(self.plugin, other, asked)
        self._report(rows, by)
        if failed := [text for text in (_unless(row, by) for row in rows) if text]:
            pytest.fail("\n".join(failed), pytrace=False)

    def _report(self, rows: Sequence[Row], by: float) -> None:
        """Tells pytest-benchmark, once a test; where the test times something of its own, beside that alone."""
        if not self.request.config.pluginmanager.hasplugin("benchmark"):
            return
        own = "benchmark" in self.request.fixturenames
        samples = [sample for sample in rows[-1]["samples"] if rows[-1]["status"] == "ok"]
        if not own and samples:
            calls = [seconds / calls for _, _, _, calls, seconds, *_ in samples]
            ticks = iter(
                [tick for at, s in zip(accumulate(calls, initial=0.0), calls, strict=False) for tick in (at, at + s)]
            )
            self.request.node.add_marker(pytest.mark.benchmark(timer=lambda: next(ticks, 0.0)))
            self.request.getfixturevalue("benchmark").pedantic(lambda: None, rounds=len(calls))
        if own or samples:
            told = (
                "plugin",
                "baseline",
                "seq",
                "kv_seq",
                "status",
                "speedup",
                "speedup_low",
                "speedup_high",
                "latency_s",
            )
            info = [{name: row.get(name) for name in told} | {"by": by} for row in rows]
            self.request.getfixturevalue("benchmark").extra_info.setdefault("attnbench", []).extend(info)


def _measured(plugin: Variant | None, other: Variant, asked: Given) -> list[Row]:
    """The plugin's rows, a workload each, whose speedups are over the other."""
    from attnbench.errors import AttnbenchError
    from attnbench.sweep.engine import planned, settings_here
    from attnbench.sweep.session import measure
    from attnbench.sweep.settings import Asked

    given: Given = {"scope": "attention", "budget": BUDGET, "timeout": 120.0, **asked}
    chosen, base = _request(plugin), _request(other)
    with planned(Asked.of(**given), ([chosen], base)) as plan:
        mine = [cell.plugin for cell in plan.cells if cell.plugin != plan.baseline]
        if not mine:
            raise AttnbenchError(f"{plan.baseline} is compared with itself")
        return [row for row in measure(plan.server, settings_here(plan), plan.cells) if row["plugin"] in mine]


def _request(variant: Variant | None) -> Request:
    from attnbench.errors import AttnbenchError
    from attnbench.registry import find, requested

    if variant is None:
        others = [name for name, found in find().items() if found.distribution != "attnbench"]
        if len(others) != 1:
            which = f"there are {', '.join(others)}" if others else "none is installed beside attnbench's own"
            raise AttnbenchError(
                f'whose speed? {which}; write attnbench("NAME").faster_than(...), or @pytest.mark.attnbench("NAME")'
            )
        variant = others[0]
    return requested(variant)


def _unless(row: Row, by: float) -> str | None:
    """What to say where a row does not show that it is so many times as fast; None where it does."""
    from attnbench.analysis.between import half_width
    from attnbench.report import units
    from attnbench.workload import Workload

    where = f"{row['plugin']} at {Workload.from_dict(row).label()}"
    if row["status"] != "ok":
        return f"{where}: {row['status']}: {row['reason']}"
    width, wanted = half_width(row, "speedup", "speedup_low", "speedup_high"), f"{by:g}x as fast as {row['baseline']}"
    if width is None:
        return f"can't tell whether {where} is {wanted}: no interval; give a longer budget"
    ratio = row["speedup"]
    said = f"{units.ratio(ratio, ratio * exp(-width), ratio * exp(width))}"
    if ratio * exp(-width) >= by:
        return None
    if ratio * exp(width) < by:
        return f"{where} is not {wanted}: {said}"
    return f"can't tell whether {where} is {wanted}: {said}; a longer budget may tell"
