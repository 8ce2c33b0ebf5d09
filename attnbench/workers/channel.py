"""Carries messages between two processes: bytes with a length in front, on a private socket.

A worker's stdout belongs to the plugin, so nothing of ours travels there.
"""

from __future__ import annotations

import select
import socket
import struct
import time

_HEADER = struct.Struct("!I")
_LARGEST = 1 << 26


class Closed(Exception):
    """The other end is gone, or sent what is no message."""


class Expired(Exception):
    """No whole message came before the deadline."""


class Channel:
    """One end of a socket pair that carries messages."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        left, right = socket.socketpair()
        return cls(left), cls(right)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, message: bytes) -> None:
        """Raises: Closed."""
        try:
            self._socket.sendall(_HEADER.pack(len(message)))
            self._socket.sendall(message)
        except OSError as error:
            raise Closed from error

    def receive(self, seconds: float | None = None) -> bytearray:
        """The next message; waits at most `seconds` of wall time for all of it.

        Raises:
            Closed: the other end is gone, or sent what is no message.
            Expired: the deadline passed.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        (size,) = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if size > _LARGEST:
            raise Closed
        return self._read(size, deadline)

    def _read(self, size: int, deadline: float | None) -> bytearray:
        data, done = bytearray(size), 0  # filled in place: an output may have megabytes
        while done < size:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._socket], [], [], wait)[0]:
                raise Expired
            try:
                got = self._socket.recv_into(memoryview(data)[done:])
            except OSError as error:
                raise Closed from error
            if not got:
                raise Closed
            done += got
        return data
