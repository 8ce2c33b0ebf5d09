"""Starts workers in a tenth of a second, by a server process that forks itself for each: see `fork`.

A worker leads its own process group; when it ends, its group and whatever it orphaned are killed, and when the session
that owns the server dies, the server kills all and ends too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, TypeVar

from msgspec import DecodeError, msgpack

from attnbench import home
from attnbench.environment import ISAS
from attnbench.errors import AttnbenchError
from attnbench.workers.channel import Channel, Closed
from attnbench.workers.kinds import Answer, Request
from attnbench.workers.messages import COMPILER, Failure, Preload, Reap, Start, decode_answer, encode, printable

_LAST_BYTES = 2000  # of what a worker printed

A = TypeVar("A", bound=Answer)


class Worker:
    """The session's handle of one worker process."""

    def __init__(self, server: Forkserver, pid: int, channel: Channel, log: IO[bytes]) -> None:
        self._server, self.pid, self.channel, self._log = server, pid, channel, log
        self._code: int | None = None
        self._ended, self._printed = False, ""

    def request(self, request: Request[A], seconds: float | None = None) -> A | Failure:
        """Sends a request and waits for its answer.

        Raises:
            Closed, Expired: see `Channel.receive`.
        """
        self.send(request)
        return self.answer(request, seconds)

    def send(self, request: Request[A]) -> None:
        """Sends a request alone. Raises: Closed: the worker is gone."""
        self.channel.send(encode(request))  # type: ignore[arg-type]

    def answer(self, request: Request[A], seconds: float | None = None) -> A | Failure:
        """Waits for the answer to a request that was sent.

        Raises:
            Closed, Expired: see `Channel.receive`.
        """
        try:
            answer = decode_answer(self.channel.receive(seconds))
        except DecodeError as error:  # something else than `serve` has written to its socket
            raise Closed from error
        return answer  # type: ignore[return-value]

    def end(self) -> int | None:
        """Ends the worker, its process group and what it orphaned. The exit code, negative for a signal."""
        if not self._ended:
            self._ended = True
            self.channel.close()
            self._code = self._server.reap(self.pid)
            self._printed = self.output()
            self._log.close()
        return self._code

    def output(self) -> str:
        """The last of what the worker printed."""
        if not self._log.closed:
            size = self._log.seek(0, os.SEEK_END)
            self._log.seek(max(0, size - _LAST_BYTES))
            self._printed = printable(self._log.read().decode(errors="replace")).strip()
        return self._printed


def environment(given: Mapping[str, str], threads: int) -> dict[str, str]:
    """The variables of all workers, where these are the user's."""
    ours = {
        "OMP_NUM_THREADS": str(threads),
        # A pool's threads spin for half a millisecond after each region and sleep then. Asleep at once, they would have
        # to be woken for each of many small operations, which takes several times as long as in a process of the
        # user's, where they spin for some milliseconds; for as long, those of an idle worker would take a core of the
        # one that is being timed.
        "GOMP_SPINCOUNT": "20000",
        "KMP_BLOCKTIME": "1",  # milliseconds, of LLVM's OpenMP
        "OPENBLAS_NUM_THREADS": "1",  # numpy's would start threads at import, before the forks
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its compiler processes outlive a compilation, and spin
        # Whether there is a GPU is asked of NVML: asking CUDA itself would make it useless in every fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # torch reads its own sources in the locale's encoding.
        "PYTHONUTF8": "1",
        # Whoever makes errors of warnings means their own code, not what torch warns of as it is imported.
        "PYTHONWARNINGS": "",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return {name: value for name, value in given.items() if name != "OMP_WAIT_POLICY"} | home.environment() | ours


class Forkserver:
    """The session's handle of the server process. A context manager: on exit every worker is gone.

    isa: of `environment.ISAS`, what workers are held to. given: the user's variables, with what that sets.
    """

    def __init__(self, threads: int, isa: str = "auto") -> None:
        self.threads, self.isa = threads, isa
        self.given = os.environ | ISAS[isa]
        self._environment = environment(self.given, threads)
        self._launch()

    def _launch(self) -> None:
        self._loaded = set[str]()
        self._socket, theirs = socket.socketpair()
        self._channel = Channel(self._socket)
        program = f"from attnbench.workers.fork import serve_forks; serve_forks({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", program],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # where ours is closed, what it opens next would take its place
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

    def start(self, memory: int | None = None, path: str = "") -> Worker:
        """A new worker that may allocate `memory` bytes beyond what it starts with (None: no limit).

        path: a folder that it imports from before all others: what the server has loaded already stays what it is.

        Raises:
            AttnbenchError: torch can't be loaded; or the server is gone, and a new one did not start a worker either.
        """
        for _ in range(2):
            try:
                return self._start(Start(memory, path))
            except Closed:  # something killed the server
                self.close()
                self._launch()
        raise AttnbenchError("can't start a worker process: too little memory, or too many processes?")

    def _start(self, asked: Start) -> Worker:
        ours, theirs = Channel.pair()
        try:
            log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        except OSError as error:
            raise AttnbenchError(f"can't make a temporary file: {error.strerror}; set TMPDIR") from None
        try:
            self._channel.send(msgpack.encode(asked))
            socket.send_fds(self._socket, [b"f"], [theirs.fileno(), log.fileno()])
            pid = msgpack.decode(self._channel.receive(), type=int | str)
        except OSError as error:
            raise Closed from error
        finally:
            theirs.close()
        if isinstance(pid, str):
            raise AttnbenchError(f"torch can't be loaded here: {printable(pid)}")
        return Worker(self, pid, ours, log)

    def preload(self, modules: tuple[str, ...] = COMPILER) -> None:
        """Loads modules of torch, its compiler where none are said, once for all workers to come."""
        if self._loaded.issuperset(modules):
            return
        self._loaded |= set(modules)
        with suppress(Closed):  # whoever starts the next worker finds out that the server is gone
            self._channel.send(msgpack.encode(Preload(modules)))
            self._channel.receive()

    def reap(self, pid: int) -> int | None:
        """See `Worker.end`. None where the server itself is gone: it took its workers along."""
        try:
            self._channel.send(msgpack.encode(Reap(pid)))
            return msgpack.decode(self._channel.receive(30), type=int | None)
        except Exception:
            self._channel.close()  # a late answer would be taken for that of the next request
            return None
