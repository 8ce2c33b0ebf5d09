"""What a notebook can: the public verbs, with the words and errors of the command line."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnbench
from attnbench import AttnbenchError, Plugin, Workload
from attnbench.commands import find
from attnbench.judge.conformance import Variant
from attnbench.plugin import Call
from attnbench.sweep.settings import Given

SMALL = Workload(seq=60, kv_seq=60, heads=2, kv_heads=2, head_dim=32, value_dim=32)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


class Forgetful(Plugin):
    """Leaves out the last key."""

    def build(self, workload: Workload) -> Call:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1])


class Greedy(Plugin):
    def build(self, workload: Workload) -> Call:
        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query.zero_()
            return exact(query, key, value)

        return call


SCRIPT = """
import attnbench
seen = []
frame = attnbench.run("naive", [16, 32], baseline="naive", heads=1, scope="attention", threads=1, budget=300,
                      precision=0.9, out="run", progress=lambda rows, left: seen.append(([r["seq"] for r in rows], left)))
assert [seq for seq, _ in seen[:2]] == [[16], [32]] and all(left > 0 for _, left in seen), seen
print(*frame["status"], frame.equals(attnbench.load("run")))
"""


def test_a_script_without_a_main_guard_measures(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ok ok True\n"


def test_without_out_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    frame = attnbench.run(
        "sdpa", 16, heads="1", head_dim=16, scope="attention", threads=1, budget=300, precision="90%", dtype="bfloat16"
    )
    assert isinstance(frame, pd.DataFrame)
    assert (list(frame["status"]), list(frame["dtype"]), list(frame["head_dim"])) == (["ok"], ["bfloat16"], [16])
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"plugins": "sdqa"}, "did you mean sdpa"),
        ({"seq": "512..1000"}, "does not hit 1000"),
        ({"seq": []}, "is no size"),
        ({"seq": -1}, "is no size"),
        ({"heads": 3, "kv_heads": 2}, "must be a multiple"),
        ({"mask": "casual"}, "--mask must be one of full, causal, window:N, tree:2x3, not 'casual'"),
        ({"preset": "standard", "heads": 4}, "drop --heads"),
        ({"preset": "gpt5"}, "no preset 'gpt5'"),
        ({"precision": 3}, "--precision"),
        ({"memory": "lots"}, "--memory 'lots'"),
        ({"baseline": "int8:*"}, "must name one plugin"),
    ],
)
def test_what_is_not_to_be_had_is_one_line_before_anything_starts(
    asked: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnbench.sweep.engine.Forkserver", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(AttnbenchError) as caught:
        attnbench.run(**asked)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(AttnbenchError, match="is there already"):
        attnbench.run("sdpa", 16, scope="attention", threads=1, budget=1, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_library_and_the_command_ask_alike() -> None:
    """One list of words: a sweep's, and beside it where a run goes and who watches."""
    given = set(Given.__annotations__)
    assert given | {"on", "out", "progress"} == set(inspect.signature(attnbench.run).parameters)
    options = {str(p.name) for p in find("run").params}
    assert given | {"on", "out", "name", "resume", "dry_run", "quiet", "as_json"} == options
    defaults = {n: p.default for n, p in inspect.signature(attnbench.run).parameters.items() if n in given}
    spoken = {str(p.name): p.default for p in find("run").params if p.name in given}
    assert {n: d for n, d in defaults.items() if d is not None} == {
        n: spoken[n] for n, d in defaults.items() if d is not None
    }


@pytest.mark.parametrize("variant", ["sdpa", exact])
def test_check_finds_what_is_right_right(variant: Variant) -> None:
    found = attnbench.check(variant, SMALL)
    assert (found.status, found.reason) == ("ok", "")
    assert found.implementation_error == found.approximation_error < 1e-6
    assert {"implementation_max_abs", "approximation_cosine", "tolerance"} <= set(found.measures)


def test_check_tells_the_two_errors_apart() -> None:
    found = attnbench.check("int8", SMALL)
    assert found.status == "ok"
    assert found.implementation_error < 1e-5 < 1e-3 < found.approximation_error
    assert found.implementation


@pytest.mark.parametrize(
    ("variant", "status", "says"),
    [
        (Forgetful, "wrong", "implementation error"),
        (Forgetful(), "wrong", "implementation error"),
        (Greedy(), "wrong", "changes its inputs"),
        (lambda q, k, v: exact(q, k, v).double(), "wrong", "output is torch.float64"),
        (lambda q, k, v: exact(q, k, v)[:, :1], "wrong", "output has shape"),
        (lambda q, k, v: q, "wrong", "shares its memory with an input"),
        (lambda q, k, v: None, "wrong", "returned a NoneType"),
        (lambda q, k, v: exact(q, k, v) * float("nan"), "wrong", "NaN"),
        (lambda q, k: q, "error", "TypeError"),
        ("gated-delta", "unsupported", "--mask causal"),
    ],
)
def test_check_says_what_is_wrong(variant: object, status: str, says: str) -> None:
    found = attnbench.check(variant, SMALL)
    assert found.status == status
    assert says in found.reason
    assert "\n" not in found.reason


@pytest.mark.parametrize(
    "workload",
    [
        SMALL.replace(phase="train", mask="causal"),
        SMALL.replace(phase="decode", mask="causal", seq=1),
        SMALL.replace(scope="block", block="encoder", norm="pre"),
    ],
    ids=Workload.label,
)
def test_check_knows_every_phase_and_the_block(workload: Workload) -> None:
    assert attnbench.check("naive", workload).status == "ok"
    assert attnbench.check("linear", workload).status == "ok"


@pytest.mark.parametrize("verb", [attnbench.check, attnbench.attend])
@pytest.mark.parametrize(
    ("spec", "says"), [("sdqa", "did you mean"), ("sdpa,naive", "one plugin"), ("int8:rows=3", "rows")]
)
def test_a_bad_spec_is_one_line(verb: object, spec: str, says: str) -> None:
    with pytest.raises(AttnbenchError, match=says):
        verb(spec, SMALL)


def test_attend_is_the_call_and_says_what_it_is() -> None:
    query, key, value = torch.randn(3, 1, 2, 60, 32)
    attend = attnbench.attend("naive", SMALL)
    torch.testing.assert_close(attend(query, key, value), exact(query, key, value))
    assert "matrix in memory" in attend.implementation
    with pytest.raises(AttnbenchError, match="--mask causal"):
        attnbench.attend("retention", SMALL)
    with pytest.raises(AttnbenchError, match="a block or a past"):
        attnbench.attend("naive", SMALL.replace(phase="decode", seq=1, mask="causal"))


def test_nothing_heavy_loads_until_a_verb_is_called() -> None:
    code = "import sys, attnbench; attnbench.run; attnbench.load; print(*{'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
