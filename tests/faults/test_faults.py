"""A plugin may do what it likes: its cell ends as one row that says what happened, and the sweep goes on.

The sweeps start together in the background, as most of their time is spent waiting for what hangs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import QUICK, Result, Sweep, run

TIMEOUT = 5

# plugin: (status, what the reason says)
FAULTS = {
    "import-error": ("error", "at import: ImportError: the kernel library is not there"),
    "import-exit": ("error", "at import: SystemExit: not on this machine"),
    "import-segfault": ("crashed", "at import: killed by SIGSEGV"),
    "import-hog": ("out-of-memory", "at import: MemoryError"),
    "no-module": ("error", "at import: ModuleNotFoundError: No module named 'no_such_module'"),
    "no-plugin": ("error", "at import: TypeError: faulty:NO_PLUGIN is no subclass of attnbench.Plugin"),
    "twin": ("error", "two plugins are called 'twin': one from faulty 1.0, one from twin 1.0"),
    "supports-raises": ("error", "RuntimeError: asked too much"),
    "build-raises": ("error", "at build: RuntimeError: no kernel for this shape"),
    "call-raises": ("error", "at first call: RuntimeError: launch failed"),
    "unprintable": ("error", "at first call: Problem"),
    "surrogate": ("error", "at first call: RuntimeError: a lone surrogate"),
    "no-result": ("error", "at first call: TypeError"),
    "exits": ("error", "at first call: SystemExit: 3"),
    "nan": ("wrong", "output has NaN or infinite values"),
    "nan-row": ("wrong", "output has NaN or infinite values"),
    "shape": ("wrong", "output has shape (1, 128, 2, 32), not (1, 2, 128, 32)"),
    "dtype": ("wrong", "output is torch.float64, not torch.float32"),
    "in-place": ("wrong", "changes its inputs"),
    "in-place-late": ("wrong", "changes its inputs"),
    "returns-input": ("wrong", "output shares its memory with an input"),
    "cached": ("wrong", "overwrites the output of the call before"),
    "one-buffer": ("wrong", "overwrites the output of the call before"),
    "clock": ("wrong", "replaces time."),
    "by-pointer": ("wrong", "implementation error"),
    "last-answer": ("wrong", "output of the call before"),
    "empty": ("wrong", ""),  # NaN where the poison was hit, an error over the tolerance elsewhere
    "unwritten-tail": ("wrong", ""),
    "last-rows": ("wrong", "implementation error"),
    "drops-keys": ("wrong", "implementation error"),
    "stale-scale": ("wrong", "implementation error"),
    "state:what=threads": ("wrong", "changes global state: torch.get_num_threads()"),
    "state:what=dtype": ("wrong", "changes global state: torch.get_default_dtype()"),
    "state:what=grad": ("wrong", "changes global state: torch.is_grad_enabled()"),
    "state:what=precision": ("wrong", "changes global state: torch.get_float32_matmul_precision()"),
    "state:what=tf32": ("wrong", "changes global state: torch.backends.cudnn.allow_tf32"),
    "state:what=seed": ("wrong", "changes global state: torch.initial_seed()"),
    "state:what=environment": ("wrong", "changes global state: os.environ['OMP_NUM_THREADS']"),
    "exits-zero": ("crashed", "exit code 0 without a result"),
    "segfault": ("crashed", "killed by SIGSEGV"),
    "sigkill": ("crashed", "killed by SIGKILL"),
    "closes-files": ("crashed", "exit code"),
    "leaves-group": ("crashed", "killed by SIGKILL"),
    "hog": ("out-of-memory", "at first call"),
    "large": ("skipped", "predicted memory 1024.0 GiB is over the limit of 1.0 GiB (--memory)"),
}
MANNERS = ("fresh-scale", "prints", "numpy-answers", "threads", "orphan", "leak")
HANGS = (
    "hang-python",
    "hang-c",
    "hang-printing",
    "hang-sigterm",
    "hang-stopped",
    "hang-grandchild",
    "hang-session",
)


@pytest.fixture(scope="session")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Sweep]]:
    folder = tmp_path_factory.mktemp("faults")
    hangs = ("--timeout", str(TIMEOUT), *QUICK)
    started = {
        "import-hang": Sweep(folder / "import-hang", "--plugins", "import-hang,good", "--seq", "64", *hangs),
        "hangs": Sweep(folder / "hangs", "--plugins", ",".join(HANGS), "--seq", "64", *hangs),
        "faults": Sweep(
            folder / "faults",
            *("--plugins", ",".join([*{name.partition(":")[0] for name in FAULTS} - {"state"}, "state:*", *MANNERS])),
            *("--seq", "128", "--memory", "1GiB", *QUICK),
        ),
    }
    yield started
    for sweep in started.values():
        sweep.stop()


@pytest.fixture(scope="session")
def faults(sweeps: dict[str, Sweep]) -> Result:
    return sweeps["faults"].wait()


@pytest.fixture(scope="session")
def hangs(sweeps: dict[str, Sweep]) -> Result:
    return sweeps["hangs"].wait()


@pytest.fixture(scope="session")
def import_hang(sweeps: dict[str, Sweep]) -> Result:
    return sweeps["import-hang"].wait()


@pytest.mark.parametrize("plugin", FAULTS)
def test_a_fault_becomes_a_status_with_its_reason(faults: Result, plugin: str) -> None:
    status, reason = FAULTS[plugin]
    row = faults.row(plugin)
    assert (row["status"], row["reason"]) == (status, row["reason"])
    assert reason in row["reason"]
    assert row.get("latency_s") is None
    assert row.get("speedup") is None


def test_an_error_keeps_its_traceback(faults: Result) -> None:
    assert "no kernel for this shape" in faults.row("build-raises")["traceback"]
    assert "faulty_import_error.py" in faults.row("import-error")["traceback"]
    assert "with details" in faults.row("call-raises")["traceback"]


def test_a_sweep_with_bad_cells_finishes(faults: Result) -> None:
    assert faults.code == 1
    assert "Traceback" not in faults.err
    assert sorted(faults.statuses()) == sorted(set(FAULTS) | {r["plugin"] for r in faults.rows})
    assert len(faults.statuses()) == len(faults.rows) == len(FAULTS) + len(MANNERS) + 1
    counted = faults.out.splitlines()[0]
    assert counted.startswith(
        f"{len(faults.rows)} of {len(faults.rows)} cells: {len(MANNERS) + 1} ok, 1 skipped, 2 out"
    )


@pytest.mark.parametrize("plugin", ["good", *MANNERS])
def test_what_is_right_is_measured_beside_what_is_broken(faults: Result, plugin: str) -> None:
    row = faults.row(plugin)
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["latency_s"] > 0
    assert row["speedup"] > 0
    assert row["samples"]


def test_no_process_outlives_the_sweep(faults: Result) -> None:
    assert faults.survivors == []


def test_stdout_holds_nothing_of_a_plugin(faults: Result, hangs: Result) -> None:
    for result in (faults, hangs):
        assert "NOISE" not in result.out + result.err
        assert result.out.splitlines()[-1] == f"run: {result.path}"


def test_the_summary_holds_no_control_characters(faults: Result) -> None:
    assert "surrogate" in faults.out
    assert all(c.isprintable() for c in faults.out.replace("\n", ""))


def test_numbers_of_other_kinds_become_plain(faults: Result) -> None:
    row = faults.row("numpy-answers")
    assert (row["predicted_workspace_bytes"], row["variant_flops"], row["density"]) == (4096, 1_000_000, 0.5)
    assert "NumpyAnswers" in row["implementation"]


def test_a_leak_is_a_warning(faults: Result) -> None:
    assert "memory-leak" in faults.row("leak")["warnings"]
    assert "memory-leak" not in faults.row("good")["warnings"]


def test_errors_of_a_wrong_answer_are_kept(faults: Result) -> None:
    for plugin in ("last-rows", "drops-keys", "stale-scale"):
        row = faults.row(plugin)
        assert row["implementation_rel_l2"] > row["tolerance"] > 0


@pytest.mark.parametrize("plugin", HANGS)
def test_a_hang_is_a_timeout(hangs: Result, plugin: str) -> None:
    row = hangs.row(plugin)
    assert (row["status"], row["reason"]) == ("timeout", f"no answer within {TIMEOUT} s (--timeout)")
    assert row.get("latency_s") is None


def test_nothing_that_hung_is_left(hangs: Result) -> None:
    assert hangs.survivors == []
    assert hangs.code == 1
    assert hangs.row("good")["latency_s"] > 0


def test_an_import_that_hangs_is_a_timeout(import_hang: Result) -> None:
    row = import_hang.row("import-hang")
    assert row["status"] == "timeout"
    assert row["reason"].startswith("at import: no answer within ")
    assert import_hang.row("good")["latency_s"] > 0
    assert import_hang.survivors == []


def test_long_inputs_hide_no_missing_keys_or_rows(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--plugins", "drops-keys,last-rows,unwritten-tail", "--seq", "4096", "--kv-seq", "4096",
        *QUICK,
    )  # fmt: skip
    bad = dict.fromkeys(("drops-keys", "last-rows", "unwritten-tail"), "wrong")
    assert result.statuses() == bad | {"good": "ok"}


def test_a_failed_baseline_leaves_the_rows(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--plugins", "good", "--seq", "64", *QUICK,
        shape=("--heads", "2", "--scope", "attention", "--threads", "1", "--baseline", "segfault"),
    )  # fmt: skip
    assert result.statuses() == {"segfault": "crashed", "good": "ok"}
    assert result.row("good")["latency_s"] > 0
    assert result.row("good")["speedup"] is None


def test_a_plugin_that_kills_the_server_costs_no_other_workload(tmp_path: Path) -> None:
    result = run(tmp_path, "--plugins", "kills-server", "--seq", "64,128", *QUICK)
    assert [r["status"] for r in result.rows if r["variant"] == "kills-server"] == ["crashed", "crashed"]
    assert len(result.rows) == 4
    assert "Traceback" not in result.err
    assert result.survivors == []


def test_a_plugin_that_forks_leaves_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, "--plugins", "forks", "--seq", "64", *QUICK)
    assert len(result.rows) == 2
    assert result.row("good")["status"] == "ok"
    assert result.survivors == []


def test_only_what_was_asked_for_is_loaded(tmp_path: Path) -> None:
    """`import-hang` and the others are installed, and would be noticed."""
    result = run(tmp_path, "--plugins", "good", "--seq", "64", *QUICK)
    assert (result.code, result.statuses()) == (0, {"good": "ok"})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("plugin", "status", "reason"),
    [
        ("cuda-assert", "error", "device-side assert"),
        ("cuda-illegal", "error", "illegal memory access"),
        ("cuda-hog", "out-of-memory", "out of memory"),
    ],
)
def test_a_cuda_error_is_a_row_and_the_next_cell_is_healthy(
    tmp_path: Path, plugin: str, status: str, reason: str
) -> None:
    result = run(
        tmp_path, "--plugins", f"good,{plugin}", "--seq", "32,64,128", "--device", "cuda", "--budget", "20",
        "--memory", "4GiB",
    )  # fmt: skip
    assert [result.row(plugin, seq)["status"] for seq in (32, 64, 128)] == ["ok", status, "ok"]
    assert reason in result.row(plugin, 64)["reason"]
    assert [result.row("good", seq)["status"] for seq in (32, 64, 128)] == ["ok"] * 3
    assert result.survivors == []


@pytest.mark.gpu
def test_a_row_from_a_gpu_says_how_it_was_timed_and_what_the_gpu_did(tmp_path: Path) -> None:
    result = run(
        tmp_path, "--plugins", "good", "--seq", "64,4096", "--device", "cuda", "--budget", "40", "--l2", "flushed",
    )  # fmt: skip
    small, large = result.row("good", 64), result.row("good", 4096)
    assert (small["timing"], large["timing"]) == ("graph", "events")
    for row in (small, large):
        assert row["l2"] == "flushed"
        assert row["wall_s"] > 0
        assert row["reserved_bytes"] >= row["workspace_bytes"]
        assert row["start_clock_hz"] > 1e8
        assert row["end_power_w"] > 10
    assert small["wall_s"] > small["latency_s"]
    assert "launch-bound" in small["warnings"]
    assert large["energy_j"] > 0
