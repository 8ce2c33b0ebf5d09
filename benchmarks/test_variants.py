"""The registry's variants under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

For people who live in pytest. Unlike `attnbench run`, this loads the plugins into the process that measures, one
after the other, so drift of the machine falls on some of them and not on others: good for watching one variant from
commit to commit, not for saying which of two is faster.
"""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from attnbench import AttnbenchError
from attnbench.devices.machine import usable_cores
from attnbench.judge import deviation, reference
from attnbench.plugin import Attention, Call, Plugin, Value
from attnbench.registry import Request, canonical, find, instances, load, select
from attnbench.sizes import parse_sizes
from attnbench.task import inputs
from attnbench.workload import Workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each set of options of each plugin asked for, and each length."""
    config = metafunc.config
    try:
        requests = select(config.getoption("--attnbench-plugins"), find())
        variants = [param for request in requests for param in _variants(request)]
        lengths = parse_sizes(config.getoption("--attnbench-seq"), "attnbench-seq")
    except AttnbenchError as error:
        raise pytest.UsageError(str(error)) from None
    metafunc.parametrize("variant", variants)
    metafunc.parametrize("seq", lengths)


def _variants(request: Request) -> Iterator[object]:
    found = request.found
    try:
        if found.problem:
            raise ImportError(found.problem)
        kind = load(found.target)
    except Exception as problem:  # one that can't be loaded is a test that fails, not the end of them all
        yield pytest.param(problem, id=found.name)
        return
    for values in instances(kind, dict(request.options), request.every):
        yield pytest.param((kind, values), id=canonical(found.name, values))


def test_variant(
    variant: tuple[type[Plugin], dict[str, Value]] | Exception,
    seq: int,
    benchmark: BenchmarkFixture,
    pytestconfig: pytest.Config,
) -> None:
    if isinstance(variant, Exception):
        raise variant
    kind, values = variant
    plugin, device = kind(**values), pytestconfig.getoption("--attnbench-device")
    dtype = "float32" if device == "cpu" else "bfloat16"
    workload = Workload(seq=seq, kv_seq=seq, device=device, dtype=dtype, threads=usable_cores())
    if device not in plugin.devices:
        pytest.skip(f"runs on {' and '.join(plugin.devices)} only")
    if reason := plugin.supports(workload):
        pytest.skip(reason)
    torch.set_num_threads(workload.threads)
    tensors = inputs.empty(workload)  # query, key, value: (1, 8, seq, 64)
    inputs.fill(tensors, workload, 0)
    query, key, value = tensors
    built = plugin.build(workload)
    attention = built if isinstance(built, Attention) else Attention(built, kind.__name__)
    with torch.no_grad():
        attention.call(query, key, value)  # compiles what is compiled at the first call
        benchmark.group = workload.label()
        benchmark.extra_info.update(workload.as_dict(), implementation=attention.implementation)
        out = benchmark(_finished(attention.call, device), query, key, value)  # (1, 8, seq, 64)
    rows = reference.sample_rows(seq, 0)
    expected = reference.expected(plugin.definition(workload), workload, query, key, value, rows)
    problem = deviation.verdict(
        deviation.compare(out[:, :, rows], expected), deviation.tolerance(workload, plugin.family)
    )
    assert problem is None, problem


def _finished(call: Call, device: str) -> Call:
    """`call` that returns when its work is done; on CUDA it would return once that is queued."""
    if device == "cpu":
        return call

    def synchronized(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = call(query, key, value)
        torch.cuda.synchronize()
        return out

    return synchronized
