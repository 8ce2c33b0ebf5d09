"""What this process has sent over TCP, as the kernel counts it: no library's word for it is needed."""

from __future__ import annotations

import os
import socket
import struct

# Where struct tcp_info (linux/tcp.h) has tcpi_bytes_sent and tcpi_bytes_retrans, since Linux 4.19.
_SENT, _AT = struct.Struct("QQ"), 200
_LONGEST = 256


def sent_bytes() -> int | None:
    """Bytes that this process's open TCP connections have sent so far; None where the system does not tell.

    Payload of TCP: what a library frames its messages with is in it; headers of packets are not, nor what was sent
    again because a busy receiver was slow to confirm it.
    """
    if not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    try:
        for each in os.listdir("/proc/self/fd"):
            info = _info(int(each))
            if info:
                sent, again = _SENT.unpack_from(info, _AT)
                total += sent - again
    except (OSError, struct.error):
        return None
    return total


def _info(fd: int) -> bytes | None:
    """struct tcp_info of an open file; None where that is no TCP connection."""
    try:
        there = socket.socket(fileno=fd)
    except OSError:  # no socket, or closed meanwhile
        return None
    try:
        if there.family not in (socket.AF_INET, socket.AF_INET6) or there.type != socket.SOCK_STREAM:
            return None
        return there.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LONGEST)
    finally:
        there.detach()  # it is not ours to close
