"""attnbench's own variants pass `attnbench check`; the version of the contract, and what a plugin's own tests get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from attnbench import registry
from attnbench.advice.conforms import Trials, conform, instances
from attnbench.errors import AttnbenchError, Failed
from attnbench.judge.cases import CASES, OPTIONAL, chosen, listed, parse
from attnbench.plugin import API_VERSION, Plugin
from attnbench.registry import DEPRECATED, find, requested
from attnbench.workers.server import Forkserver

pytest_plugins = ("pytester",)
BUILT_IN = [name for name, found in find().items() if found.distribution == "attnbench"]
CORE = ("said", "no-batch", "transposed", "slice", "expanded", "hidden", "twice", "steps")


@pytest.fixture(scope="module")
def server() -> Iterator[Forkserver]:
    with Forkserver(1) as server:
        yield server


def trials(server: Forkserver, name: str) -> Trials:
    (made,) = instances(server, requested(name))
    return made


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_variant_is_well(server: Forkserver, name: str) -> None:
    """The core of each group, in float32."""
    cases = [case for case in chosen(CORE, "cpu") if case.workload.dtype == "float32"]
    with trials(server, name) as asked:
        outcomes = list(conform(asked, cases))
    assert [f"{o.case.spec}: {o.reason}" for o in outcomes if o.failed] == []
    assert sum(outcome.status == "ok" for outcome in outcomes) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_variant_is_well_in_every_case(server: Forkserver, name: str) -> None:
    """Studies, which are slow and many, in float32 alone, and in the dtypes of those that are drawn."""
    study = registry.load(find()[name].target).study
    cases = [case for case in listed("cpu") if not study or case.workload.dtype == "float32"]
    with trials(server, name) as asked:
        outcomes = list(conform(asked, cases, lambda: asked.drawn("cpu", 1, 20)))
    assert [f"{o.case.spec}: {o.reason}" for o in outcomes if o.failed] == []


@pytest.mark.slow
def test_a_compiled_block_is_well(server: Forkserver) -> None:
    with trials(server, "naive") as asked:
        outcome = asked.attempt(parse("compiled-decoder-only"))
    assert (outcome.status, outcome.reason) == ("ok", "")


def test_a_spec_is_the_case_that_it_is_of() -> None:
    for case in listed("cpu", optional=OPTIONAL):
        assert parse(case.spec) == case
        assert chosen([case.spec], "cpu") == [case]
        assert chosen([case.spec], "cuda", 3) == [case.on(device="cuda", threads=3)]


def test_any_field_of_a_case_may_be_another() -> None:
    case = parse("grouped:seq=1000:kv_seq=2000:dtype=float16:lay=slice:values=huge:lengths=9,5:batch=2")
    assert replace(case, workload=CASES["grouped"].workload) == replace(CASES["grouped"], lay="slice", values="huge")
    assert (case.workload.seq, case.workload.dtype, case.workload.lengths) == (1000, "float16", "9,5")


def test_groups_names_and_patterns_are_all_cases_of_theirs() -> None:
    each = {text: len(chosen([text], "cpu")) for text in ("shapes", "odd", "gradient*", "compile")}
    assert each["odd"] == 4  # two dtypes, two masks
    assert each["shapes"] > 60
    assert each["gradient*"] == len([case for case in listed("cpu") if case.name.startswith("gradient")])
    assert each["compile"] == 3
    assert not [case for case in listed("cpu") if case.group in OPTIONAL]


def of(api: Any) -> type[Plugin]:
    return type("Other", (Plugin,), {"api": api, "__module__": __name__})


@pytest.mark.parametrize(
    ("api", "says"),
    [
        ("", None),
        (API_VERSION, None),
        ("2.0", "a newer attnbench"),
        ("1.99", "a newer attnbench"),
        ("0.9", "an older attnbench, or a newer plugin"),
        ("1", "where a version of the plugin contract should be"),
        (1.0, "where a version of the plugin contract should be"),
    ],
)
def test_a_plugin_for_another_version_of_the_contract_is_left_out(
    api: object, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "Other", of(api))
    if says is None:
        assert registry.load(f"{__name__}:Other").api == api
        return
    with pytest.raises(Failed) as caught:
        registry.load(f"{__name__}:Other")
    assert (caught.value.status, says in caught.value.reason) == ("unsupported", True)


def test_a_later_minor_version_takes_plugins_of_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "API_VERSION", "1.7")
    monkeypatch.setitem(globals(), "Other", of("1.6"))
    assert registry.load(f"{__name__}:Other").api == "1.6"


def test_what_goes_with_the_next_major_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPRECATED, "workspace_bytes", "say workspace")
    own = type("Own", (Plugin,), {"workspace_bytes": lambda self, workload: 0, "__module__": "mine"})
    assert registry.deprecated(own) == ["workspace_bytes goes with the next major version: say workspace"]
    assert registry.deprecated(of("1.0")) == []


TESTS = """
from attnbench.conformance import Conformance
from mine import right, square

class TestRight(Conformance):
    plugin = right
    cases = ("grouped:dtype=float32:mask=full", "gradient:dtype=float32:mask=full")

class TestSquare(Conformance):
    plugin = square
    cases = ("one", "drawn")
    examples = 5

class TestBuiltIn(Conformance):
    plugin = "retention"
    cases = ("odd:dtype=float32:mask=full",)
"""
MINE = """
from torch.nn.functional import scaled_dot_product_attention

def right(query, key, value):
    return scaled_dot_product_attention(query, key, value, enable_gqa=True)

def square(query, key, value):
    assert query.shape[1] == key.shape[1], "as many heads"
    return right(query, key, value)
"""


def test_a_plugin_s_own_tests_get_a_test_for_each_case(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_it=TESTS, mine=MINE)
    done = pytester.runpytest_subprocess("-q", "-rA", "-p", "no:cacheprovider", "-W", "error")
    done.assert_outcomes(passed=6, failed=1, skipped=3)
    done.stdout.fnmatch_lines(["*AssertionError: as many heads*", "*SKIPPED*recurrence runs forward*"])


def test_what_another_process_can_not_import_is_one_line() -> None:
    with pytest.raises(AttnbenchError, match="give a function of a module"):
        requested(lambda query, key, value: value)
