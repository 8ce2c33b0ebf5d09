"""What a session and its workers say to each other: typed, checked on arrival, and nothing else."""

from __future__ import annotations

import math

import msgspec
import pytest

from attnbench.judge.cases import Case
from attnbench.task.promise import Promise
from attnbench.theory.roofline import Ceilings
from attnbench.workers import messages as m
from attnbench.workers.about_caches import CacheDescribed, CacheInstance, CacheJudged, DescribeCache, JudgeCache
from attnbench.workers.about_models import NeedleScore, WindowScore
from attnbench.workers.about_parallel import (
    Called,
    CallTogether,
    DescribeScheme,
    Join,
    Joined,
    SchemeDescribed,
    SchemeInstance,
)
from attnbench.workers.about_witness import Given, Placed, Witness, Witnessed
from attnbench.workers.channel import Channel, Closed
from attnbench.workers.kinds import Choice
from attnbench.workers.server import Worker
from attnbench.workload import Workload

W = Workload(seq=8, kv_seq=8)
CACHE = CacheInstance("int4:group=32", "a:B", {"group": 32, "rotate": False})
SCHEME = SchemeInstance("ring", "a:B", {"order": "zigzag"}, [[None, "why"]], [[1 << 40, None]])
REQUESTS: list[m.AnyRequest] = [
    m.AskMachine(2),
    m.AskModel("smollm2", ["a.txt"], [512]),
    m.Calibrate("cpu", 2),
    m.Capture("smollm2", [3, 9], 512),
    m.Describe("sdpa", "a:B", {"rows": "1"}, False, [W, W.replace(mask="causal")]),
    DescribeCache("int4", "a:B", {"group": "32"}, True),
    CallTogether(3, 1, 1 << 40, True),
    DescribeScheme("ring", "a:B", {"order": "zigzag"}, True, [W], [1, 2]),
    Join(W, SCHEME, 1, 2, "/tmp/meeting", 45.0, 1 << 40),
    m.Generate(W, "a:B", {"rows": 1, "scale": 0.5, "on": True, "how": "so"}, 3, 4, 5),
    JudgeCache("smollm2", [], 64, 32, "float32", 2, CACHE, CACHE, 4, 9.5, [0.5], 40),
    m.JudgeModel("smollm2", [], W, "a:B", {"rows": 1}, 4, 9.5, [0.0, 0.5], 8),
    m.Try(Case("odd", "shapes", W, lay="slice", values="huge"), "a:B", {"rows": 1}),
    m.Prepare(W, "a:B", {}, True, 1 << 40, True, True),
    Witness(W, Given((1 << 40, 2), True, 3), 2, b"out"),
    m.Aim(3, 1, 7, 2),
    m.Burst(),
    m.Look(),
    m.Judge(),
    m.Finish(0.5),
    m.Release(),
]
ANSWERS: list[m.AnyAnswer] = [
    m.Failure("error", "why", "where"),
    m.Facts({"cpu": "Some CPU", "cores": 2}, {"cpu": m.Found(None, 9, {"peak_bytes": "why"}), "cuda": m.Found("none")}),
    m.Calibrated(Ceilings("cpu", 2, {"float32": 1e11}, 1e10, at={"float32": "x"})),
    m.Captured(),
    m.Described(
        "exact",
        ["cpu"],
        ["forward"],
        {"rows": Choice(1, "of it", (1, 32))},
        [m.Instance("a", {}, [Promise(None, 1 << 40, 9)])],
    ),
    m.Generated(1.0, [1.0], [2.0], 0.0, "torch"),
    CacheDescribed("quantized", "what", {"rows": Choice(1, "help", (1, 32))}, [CACHE]),
    CacheJudged(
        [WindowScore(0, 511, 9.5)], None, [NeedleScore(0.5, True, 0.25)], 1 << 40, 9, "C++", "", [1.0], [], 2.0
    ),
    Called(1.0, 2.0, {"tolerance": 1e-3}, "NaN"),
    Joined(0.5, {"sent_bytes": 9.0, "peak_bytes": None}),
    SchemeDescribed("what", {"order": Choice("zigzag", "of it", ("zigzag",))}, [SCHEME], ("torch.fx",)),
    m.ModelFacts("smollm2", "what", "Apache-2.0", "", False, 9, 3, 64, 30, 8192, None, 1 << 40, {512: 3}),
    m.ModelJudged(
        "torch",
        30,
        "",
        [WindowScore(0, 511, 9.5, 9.0, 0.5, 500)],
        0.1,
        None,
        [NeedleScore(0.5, True, 0.25)],
        [1.0],
        [2.0],
        [],
        [],
        None,
        3.5,
    ),
    m.Tried("wrong", "why", "torch", {"tolerance": 1e-3}, "where"),
    m.Prepared(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, {"density": None, "timing": "clock"}, "NaN"),
    Witnessed(1e-7, 1e-6, 1.0, 1e-6),
    m.Aimed(0.5),
    m.Timed(1.0, 2.0, 3.0, None),
    m.Timed(1.0, 2.0, 3.0, 4.0, 0.5, (Placed(1 << 47, [2, 3], [12, 4], 4),)),
    m.Looked(0.5, None, {"tolerance": 1e-3}, b"out"),
    m.Finished(0.0, {}),
    m.Released(),
]


def test_every_kind_is_tried() -> None:
    assert {type(each) for each in REQUESTS} == set(m.AnyRequest.__args__)
    assert {type(each) for each in ANSWERS} == set(m.AnyAnswer.__args__)


@pytest.mark.parametrize("message", REQUESTS, ids=lambda x: type(x).__name__)
def test_a_request_comes_as_it_went(message: m.AnyRequest) -> None:
    assert m.decode_request(m.encode(message)) == message


@pytest.mark.parametrize("message", ANSWERS, ids=lambda x: type(x).__name__)
def test_an_answer_comes_as_it_went(message: m.AnyAnswer) -> None:
    assert m.decode_answer(m.encode(message)) == message


def test_nan_stays_nan() -> None:
    found = m.decode_answer(m.encode(m.Finished(math.nan, {"x": math.inf})))
    assert isinstance(found, m.Finished)
    assert math.isnan(found.leak_bytes)
    assert found.columns["x"] == math.inf


@pytest.mark.parametrize("column", [object(), 1 << 70, "\ud800"])
def test_what_is_no_figure_can_not_be_said(column: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        m.encode(m.Finished(0.0, {"x": column}))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"hello",
        msgspec.msgpack.encode({"type": "Timed", "start": 1.0}),
        msgspec.msgpack.encode({"type": "Timed", "start": "now", "seconds": 1.0, "calls_s": 1.0, "wall_s": None}),
        msgspec.msgpack.encode({"type": "Praise"}),
        m.encode(m.Release()),
    ],
)
def test_anything_else_on_the_socket_is_a_worker_that_is_gone(said: bytes) -> None:
    ours, theirs = Channel.pair()
    worker = Worker(None, 0, ours, None)  # type: ignore[arg-type]
    theirs.send(said)
    with pytest.raises(Closed):
        worker.request(m.Burst(), 5)


def test_texts_keep_their_lines_and_lose_what_moves_a_cursor() -> None:
    assert m.printable("one\ntwo\x1b[2J\ud800") == "one\ntwo\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}"
