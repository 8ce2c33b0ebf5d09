"""Starts workers in a tenth of a second: a server process loads torch once and forks itself for each.

The server never starts a thread and never touches CUDA, so that its children may do both. A worker leads its own
process group; when it ends, its group and whatever it orphaned are killed, and when the session that owns the
server dies, the server kills all and ends too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from typing import IO, NoReturn

import psutil

from attnbench.bench.channel import Channel, Closed, Message, printable
from attnbench.errors import AttnbenchError

# A worker that prints without end is stopped by this, not by a full disk.
_LARGEST_FILE = 1 << 30
# What plugins import most and torch loads late: seconds for each worker, unless the server has it already.
_PRELOADED = ("torch.nn.attention.flex_attention", "torch._inductor.compile_fx")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Worker:
    """The session's handle of one worker process."""

    def __init__(self, server: Forkserver, pid: int, channel: Channel, log: IO[bytes]) -> None:
        self._server, self.pid, self.channel, self._log = server, pid, channel, log
        self._code: int | None = None
        self._ended = False

    def request(self, message: Message, seconds: float | None = None) -> Message:
        """Sends a request and waits for its answer.

        Raises:
            Closed, Expired: see `Channel.receive`.
        """
        self.channel.send(message)
        return self.channel.receive(seconds)

    def end(self) -> int | None:
        """Ends the worker, its process group and what it orphaned. The exit code, negative for a signal."""
        if not self._ended:
            self._ended = True
            self.channel.close()
            self._code = self._server.reap(self.pid)
        return self._code

    def output(self, limit: int = 2000) -> str:
        """The last of what the worker printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - limit))
        return printable(self._log.read().decode(errors="replace")).strip()


class Forkserver:
    """The session's handle of the server process. A context manager: on exit every worker is gone."""

    def __init__(self, threads: int) -> None:
        # Idle workers must not spin: a waiting OpenMP pool would take the core of the one that is being timed.
        # Nor may inductor's compiler processes, which outlive a compilation.
        self._environment = os.environ | {
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": "1",  # numpy's would start threads at import, before the forks
            # Whether there is a GPU is asked of NVML: asking CUDA itself would make it useless in every fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self._launch()

    def _launch(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._channel = Channel(self._socket)
        program = f"from attnbench.bench.forkserver import _serve; _serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=self._environment,
        )
        theirs.close()

    def __enter__(self) -> Forkserver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def start(self, memory: int | None = None) -> Worker:
        """A new worker that may allocate `memory` bytes beyond what it starts with (None: no limit).

        Raises:
            AttnbenchError: the server is gone, and a new one did not start a worker either.
        """
        for _ in range(2):
            try:
                return self._start(memory)
            except Closed:  # something killed the server
                self.close()
                self._launch()
        raise AttnbenchError("can't start a worker process: too little memory, or too many processes?")

    def _start(self, memory: int | None) -> Worker:
        ours, theirs = Channel.pair()
        try:
            log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        except OSError as error:
            raise AttnbenchError(f"can't make a temporary file: {error.strerror}; set TMPDIR") from None
        try:
            self._channel.send({"op": "start", "memory": memory})
            socket.send_fds(self._socket, [b"f"], [theirs.fileno(), log.fileno()])
            pid = self._channel.receive()["pid"]
        except OSError as error:
            raise Closed from error
        finally:
            theirs.close()
        return Worker(self, pid, ours, log)

    def reap(self, pid: int) -> int | None:
        """See `Worker.end`. None where the server itself is gone: it took its workers along."""
        try:
            self._channel.send({"op": "reap", "pid": pid})
            code = self._channel.receive(30)["code"]
        except Exception:
            self._channel.close()  # a late answer would be taken for that of the next request
            return None
        return None if code is None else int(code)


def _serve(fd: int) -> NoReturn:
    """The server's loop. Runs in the server process."""
    server = socket.socket(fileno=fd)
    channel = Channel(server)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from attnbench.bench import worker  # loads torch, once for all

    for module in _PRELOADED:
        with contextlib.suppress(ImportError):
            import_module(module)

    workers: set[int] = set()
    try:
        while True:
            message = channel.receive()
            if message["op"] == "start":
                _, fds, _, _ = socket.recv_fds(server, 1, 2)
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        _become_worker(server, fds, message["memory"], libc)
                        worker.serve(Channel(socket.socket(fileno=fds[0])))
                        code = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(code)  # whatever happens, it must not go on as a second server
                with contextlib.suppress(OSError):
                    os.setpgid(pid, pid)  # the child does it too; whoever is first
                for inherited in fds:
                    os.close(inherited)
                workers.add(pid)
                channel.send({"pid": pid})
            elif (pid := message["pid"]) in workers:
                workers.discard(pid)
                channel.send({"code": _end(pid)})
                _end_orphans(workers)
            else:  # a worker of a server before this one
                channel.send({"code": None})
    except Closed:
        pass
    finally:
        for pid in workers:
            _kill(pid)
        for pid in workers:
            _end(pid)
        _end_orphans(set())
        os._exit(0)


def _become_worker(server: socket.socket, fds: list[int], memory: int | None, libc: ctypes.CDLL) -> None:
    os.setpgid(0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server.close()
    os.dup2(fds[1], 1)
    os.dup2(fds[1], 2)
    os.close(fds[1])
    _limit(resource.RLIMIT_FSIZE, _LARGEST_FILE)
    _limit(resource.RLIMIT_CORE, 0)
    if memory is not None:
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
        _limit(resource.RLIMIT_DATA, held + memory)


def _limit(kind: int, value: int) -> None:
    """Lowers a limit of this process for good; one that is lower already stays."""
    least = min(v for v in (value, *resource.getrlimit(kind)) if v != resource.RLIM_INFINITY)
    resource.setrlimit(kind, (least, least))


def _end(pid: int) -> int | None:
    """Kills a worker that has not ended yet, with its process group, and waits for it."""
    deadline, code, killed = time.monotonic() + 20, None, False
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        # The session asks only after the channel has closed or its deadline passed; an orderly end needs a moment.
        if killed or time.monotonic() > deadline - 19.5:
            _kill(pid)
            killed = True
        time.sleep(0.002)
    _kill_group(pid)
    return code


def _kill(pid: int) -> None:
    """Kills a child that was not waited for yet: its group, and itself where it left that."""
    _kill_group(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_orphans(workers: set[int]) -> None:
    """Kills what dead workers left behind: the server is their reaper, so they are its children now."""
    for _ in range(100):
        orphans = [child for child in psutil.Process().children() if child.pid not in workers]
        if not orphans:
            return
        for child in orphans:
            with contextlib.suppress(psutil.Error, ChildProcessError):
                child.kill()
                os.waitpid(child.pid, 0)
