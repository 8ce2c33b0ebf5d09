"""A phase is a line in `PHASES` and, where it is not one forward pass, one in `CALLS`; who says nothing of it has none."""

from __future__ import annotations

from pathlib import Path

from altered import attnbench, measured, reported

NEW_PHASE = """
import torch
from attnbench.task.call import CALLS
from attnbench.workload import PHASES, Phase

PHASES["inference"] = Phase()
CALLS["inference"] = lambda task, *tensors: torch.inference_mode()(task.plain)(*tensors)
"""


def test_a_phase_is_its_line_and_its_call(tmp_path: Path) -> None:
    _, row = measured(tmp_path, NEW_PHASE, "--phase", "inference", "--dtype", "float32")
    assert (row["phase"], row["status"]) == ("inference", "ok")
    assert row["implementation_rel_l2"] < 1e-6
    assert "--phase inference" in reported(tmp_path, NEW_PHASE)  # the command that repeats it
    said = attnbench(tmp_path, NEW_PHASE, "run", "--plugins", "naive,willing", "--seq", "64", "--scope", "attention",
                     "--phase", "inference", "--baseline", "none", "--dry-run")  # fmt: skip
    (refused,) = (line for line in said.splitlines() if "naive" in line)
    assert "it has no phase inference" in refused
    assert "inference" in attnbench(tmp_path, NEW_PHASE, "theory", "--phase", "inference")


def test_what_is_timed_is_the_call_of_the_phase(tmp_path: Path) -> None:
    waits = (
        NEW_PHASE
        + """
import time
def call(task, *tensors):
    time.sleep(0.05)
    return task.plain(*tensors)
CALLS["inference"] = call
"""
    )
    _, row = measured(tmp_path, waits, "--phase", "inference")
    assert row["latency_s"] > 0.05
