"""The fork server: a process that loads torch once and forks itself for each worker.

It never starts a thread and never touches CUDA, so that its children may do both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from importlib import import_module
from typing import NoReturn

import psutil
from msgspec import msgpack

from attnbench.packages import only_whole
from attnbench.workers import system
from attnbench.workers.channel import Channel, Closed
from attnbench.workers.messages import Preload, Reap, Start


@only_whole()
def serve_forks(fd: int) -> NoReturn:
    """The server's loop. Runs in the server process, from which it and all workers see no broken package."""
    server = socket.socket(fileno=fd)
    channel = Channel(server)
    system.adopt_orphans()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from attnbench.workers import serve, subject  # loads torch, once for all

        subject.functions()
    except Exception as problem:
        _refuse(server, channel, problem)

    workers: set[int] = set()
    requests = msgpack.Decoder(Start | Reap | Preload)
    try:
        while True:
            message = requests.decode(channel.receive())
            if isinstance(message, Start):
                _, fds, _, _ = socket.recv_fds(server, 1, 2)
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        _become_worker(server, fds, message)
                        serve.serve(Channel(socket.socket(fileno=fds[0])))
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
                channel.send(msgpack.encode(pid))
            elif isinstance(message, Preload):
                for module in message.modules:
                    with contextlib.suppress(Exception):  # whatever ails it here is for the plugin that needs it
                        import_module(module)
                channel.send(msgpack.encode(None))
            elif (pid := message.pid) in workers:
                workers.discard(pid)
                channel.send(msgpack.encode(_end(pid)))
                _end_orphans(workers)
            else:  # a worker of a server before this one
                channel.send(msgpack.encode(None))
    except Closed:
        pass
    finally:
        for pid in workers:
            _kill(pid)
        for pid in workers:
            _end(pid)
        _end_orphans(set())
        os._exit(0)


def _refuse(server: socket.socket, channel: Channel, problem: Exception) -> NoReturn:
    """Answers the first request for a worker by why there can be none, and ends."""
    with contextlib.suppress(Closed, OSError):
        channel.receive()
        socket.recv_fds(server, 1, 2)  # unread, they would cut the answer off
        channel.send(msgpack.encode(" ".join(f"{type(problem).__name__}: {problem}".split())[:500]))
    os._exit(1)


def _become_worker(server: socket.socket, fds: list[int], asked: Start) -> None:
    os.setpgid(0, 0)
    system.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server.close()
    os.dup2(fds[1], 1)
    os.dup2(fds[1], 2)
    os.close(fds[1])
    if asked.path:
        sys.path.insert(0, asked.path)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of processes that a plugin starts
    system.limit(asked.memory)


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
