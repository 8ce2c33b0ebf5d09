"""Runs the command line as a process of its own, with the faulty plugins in reach, and sees what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from attnbench import records

PLUGINS = Path(__file__).parent / "plugins"
SHAPE = ("--heads", "2", "--head-dim", "32", "--scope", "attention", "--threads", "1", "--baseline", "good")
# However slow the machine, no cell is dropped for want of time; and each stops at its first look.
QUICK = ("--budget", "600", "--precision", "90%")
_MARK = "ATTNBENCH_TEST_SWEEP"
# A job in the background ignores Ctrl-C, and so would all it starts; a handler becomes the default at exec.
signal.signal(signal.SIGINT, signal.default_int_handler)
_PATIENCE = 300.0  # seconds; only a sweep that never ends takes so long


@dataclass
class Result:
    """A sweep that has ended."""

    code: int
    out: str
    err: str
    path: Path | None
    """The run's folder, if it made exactly one."""
    survivors: list[str]
    """Command lines of processes that it left behind."""
    rows: list[records.Row] = field(default_factory=list)

    def row(self, plugin: str, seq: int | None = None) -> records.Row:
        """The one row of this plugin, named as in the column or by its bare name."""
        (row,) = (r for r in self.rows if plugin in (r["plugin"], r["variant"]) and seq in (None, r["seq"]))
        return row

    def statuses(self) -> dict[str, str]:
        return {r["plugin"]: r["status"] for r in self.rows}


class Sweep:
    """`attnbench run` in the background, its output in files."""

    def __init__(
        self, folder: Path, *arguments: str, shape: tuple[str, ...] = SHAPE, wrapper: tuple[str, ...] = (), **popen: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.results = folder / "results"
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "attnbench", "run"]
        if "--resume" not in arguments:
            # What these plugins can do. A later option of the same name counts.
            command += [*shape, "--mask", "full", "--dtype", "float32", "--out", str(self.results)]
        environment = os.environ | {"PYTHONPATH": _path(), _MARK: self._mark}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*wrapper, *command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=folder,
                start_new_session=True,
                **popen,
            )

    def wait(self, seconds: float = _PATIENCE) -> Result:
        """Waits until the sweep has ended and what it may have left behind has had time to go."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"the sweep did not end within {seconds:.0f} s: {self.stderr()[-2000:]}") from None
        survivors = self.survivors()
        runs = sorted(self.results.glob("*/run.json"))
        path = runs[0].parent if len(runs) == 1 else None
        return Result(code, self._out.read_text(), self.stderr(), path, survivors, records.rows(path) if path else [])

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Waits until stderr holds the text."""
        deadline = time.monotonic() + seconds
        while text not in self.stderr():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.stderr()}"
            assert time.monotonic() < deadline, f"no {text!r} within {seconds:.0f} s: {self.stderr()}"
            time.sleep(0.02)

    def stderr(self) -> str:
        return self._err.read_text()

    def living(self) -> list[psutil.Process]:
        """Every process that has the environment of this sweep: its own, workers, and whatever those started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def survivors(self, seconds: float = 20) -> list[str]:
        """Command lines of the processes that are still there after a grace; they are killed."""
        deadline = time.monotonic() + seconds
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.stop()

    def stop(self) -> list[str]:
        """Kills all that is left of the sweep and says what that was."""
        left = self.living()
        names = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                names.append(" ".join(process.cmdline()))
                process.send_signal(signal.SIGKILL)
        return names


def run(folder: Path, *arguments: str, **options: Any) -> Result:
    """Runs a sweep to its end."""
    return Sweep(folder, *arguments, **options).wait()


def _path() -> str:
    return os.pathsep.join([str(PLUGINS), *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)])
