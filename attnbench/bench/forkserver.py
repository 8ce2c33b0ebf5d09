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
from typing import IO, NoReturn

import psutil

from attnbench.bench.channel import Channel, Closed, Message

# A worker that prints without end is stopped by this, not by a full disk.
_LARGEST_FILE = 1 << 30
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
        return self._log.read().decode(errors="replace").strip()


class Forkserver:
    """The session's handle of the server process. A context manager: on exit every worker is gone."""

    def __init__(self, threads: int) -> None:
        # Idle workers must not spin: a waiting OpenMP pool would take the core of the one that is being timed.
        self._environment = os.environ | {
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(threads),
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
            Closed: the server is gone, and a new one did not start.
        """
        try:
            return self._start(memory)
        except Closed:  # something killed the server
            self.close()
            self._launch()
            return self._start(memory)

    def _start(self, memory: int | None) -> Worker:
        ours, theirs = Channel.pair()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
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
        """See `Worker.end`. None where the server itself is gone."""
        try:
            self._channel.send({"op": "reap", "pid": pid})
            code = self._channel.receive(30)["code"]
        except Exception:  # a dead server took its workers along
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

    workers: set[int] = set()
    try:
        while True:
            message = channel.receive()
            if message["op"] == "start":
                _, fds, _, _ = socket.recv_fds(server, 1, 2)
                pid = os.fork()
                if pid == 0:
                    _become_worker(server, fds, message["memory"], libc)
                    worker.serve(Channel(socket.socket(fileno=fds[0])))
                    os._exit(0)
                with contextlib.suppress(OSError):
                    os.setpgid(pid, pid)  # the child does it too; whoever is first
                for inherited in fds:
                    os.close(inherited)
                workers.add(pid)
                channel.send({"pid": pid})
            else:
                workers.discard(message["pid"])
                channel.send({"code": _end(message["pid"])})
                _end_orphans(workers)
    except Closed:
        pass
    finally:
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
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))


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
            _kill_group(pid)
            killed = True
        time.sleep(0.002)
    _kill_group(pid)
    return code


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
