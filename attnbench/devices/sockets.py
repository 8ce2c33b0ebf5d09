"""What this process has sent over TCP, as the kernel counts it: no library's word for it is needed."""

from __future__ import annotations

import os
import socket
import struct

_BYTES_SENT, _U64 = 200, struct.Struct("Q")  # where struct tcp_info (linux/tcp.h) has tcpi_bytes_sent, since Linux 4.19
_LONGEST = 256


def sent_bytes() -> int | None:
    """Bytes that this process's open TCP connections have sent so far; None where the system does not tell.

    Payload of TCP: what a library frames its messages with is in it, headers of packets are not.
    """
    if not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    try:
        for each in os.listdir("/proc/self/fd"):
            info = _info(int(each))
            if info:
                total += _U64.unpack_from(info, _BYTES_SENT)[0]
    except (OSError, struct.error):
        return None
    return total


def _info(fd: int) -> bytes | None:
    """struct tcp_info of an open file; None where that is no TCP connection."""
    try:
        copy = socket.socket(fileno=os.dup(fd))
    except OSError:  # no socket, or closed meanwhile
        return None
    with copy:
        if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
            return None
        return copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LONGEST)
