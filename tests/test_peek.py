"""What lies in another process's memory, read without its help: as its own process would show it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from attnbench.devices.peek import can_peek, tensor
from attnbench.workers.subject import _placed
from attnbench.workers.witness import as_bytes

LAID = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "a slice": lambda x: x[:, 1:, ::2, 3:],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", LAID)
def test_a_tensor_is_read_as_it_would_be_shown(how: str, dtype: torch.dtype) -> None:
    laid = LAID[how](torch.randn(2, 4, 8, 16).to(dtype))
    (at,) = _placed(laid)
    assert tensor(os.getpid(), at.address, at.shape, at.strides, at.itemsize) == as_bytes(laid)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_nothing_is_read_where_nothing_is(other: subprocess.Popen[bytes]) -> None:
    assert can_peek(other.pid)
    assert tensor(other.pid, 8, [4], [4], 4) is None
    assert tensor(os.getpid(), -8, [4], [4], 4) is None
    assert tensor(os.getpid(), 1 << 70, [4], [4], 4) is None
    (at,) = _placed(torch.zeros(4))
    assert tensor(os.getpid(), at.address, [0], [4], 4) is None
    assert tensor(os.getpid(), at.address, [1 << 40], [4], 4) is None, "spread over more than anything is"
    other.kill()
    other.wait()
    assert not can_peek(other.pid)
    assert tensor(other.pid, at.address, [4], [4], 4) is None
