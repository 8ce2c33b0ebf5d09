"""Attention variants that are broken, each in one way, beside one that is right."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnbench.plugin import Attention, Call, Definition, Option, Plugin, Softmax, Value
from attnbench.workload import Workload

NO_PLUGIN = "an entry point names it"


class Good(Plugin):
    """Exact attention, as torch computes it. The others differ from it in their one fault."""

    def build(self, workload: Workload) -> Call:
        self.calls = 0

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.calls += 1
            return self.fault(query, key, value)

        return call

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key, value)


def right(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, enable_gqa=True)


# Errors.


class SupportsRaises(Good):
    def supports(self, workload: Workload) -> str | None:
        raise RuntimeError("asked too much")


class BuildRaises(Good):
    def build(self, workload: Workload) -> Call:
        raise RuntimeError("no kernel for this shape")


class CallRaises(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise RuntimeError("launch failed\nwith details")


class Unprintable(Good):
    class Problem(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise self.Problem


class Surrogate(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise RuntimeError("a lone surrogate \ud800 and an escape \x1b[31m")


class NoResult(Good):
    def build(self, workload: Workload) -> Call:
        return None  # type: ignore[return-value]


# Wrong answers.


class NotANumber(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key, value) * float("nan")


class NanRow(Good):
    """One row is NaN, of many."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = right(query, key, value)
        out[:, :, query.shape[2] // 3] = float("nan")
        return out


class Shape(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key, value).transpose(1, 2)


class Dtype(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key, value).double()


class InPlace(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = right(query, key, value)
        key.sub_(key.mean(dim=2, keepdim=True))  # softmax does not change by it, the caller's key does
        return out


class InPlaceLate(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls > 3:
            key.sub_(key.mean(dim=2, keepdim=True))
        return right(query, key, value)


class ReturnsInput(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query.copy_(right(query, key, value))


class Cached(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls == 1:
            self.out = right(query, key, value)
        return self.out


class OneBuffer(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls == 1:
            self.out = torch.empty_like(query)
        return self.out.copy_(right(query, key, value))


class ByPointer(Good):
    """Remembers by where the input lies, and only from the fifth call on, when rehearsals are over."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        known = self.__dict__.setdefault("known", {})
        if self.calls < 5 or query.data_ptr() not in known:
            known[query.data_ptr()] = right(query, key, value)
        return known[query.data_ptr()].clone()


class LastAnswer(Good):
    """Never wrong, but while its inputs stay as they are it works once and then hands out what it kept."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls == 1 or query._version != self.version:
            self.out, self.version = right(query, key, value), query._version
        return self.out


class Empty(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(query)


class UnwrittenTail(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        out[:, :, :-16] = right(query[:, :, :-16], key, value)
        return out


class LastRows(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = right(query, key, value)
        out[:, :, -16:] *= 1.01
        return out


class DropsKeys(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(query, key[:, :, :-64], value[:, :, :-64])


class FreshScale(Good):
    """Query and key rounded to int8 with one scale each: right, as its definition says the same."""

    family = "quantized"

    def definition(self, workload: Workload) -> Definition:
        return Softmax(operands=lambda q, k, v: (rounded(q, scale(q)), rounded(k, scale(k)), v))

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return right(rounded(query, scale(query)), rounded(key, scale(key)), value)


class StaleScale(FreshScale):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls == 1:
            self.scales = scale(query), scale(key)
        return right(rounded(query, self.scales[0]), rounded(key, self.scales[1]), value)


def scale(x: Tensor) -> Tensor:
    return x.abs().amax() / 127


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-127, 127) * scale


class State(Good):
    """Right, but leaves something changed that others in its process rely on."""

    options: ClassVar = {
        "what": Option(
            "threads", "what it changes", ("threads", "dtype", "grad", "precision", "tf32", "seed", "environment")
        )
    }
    what: str

    def build(self, workload: Workload) -> Call:
        if self.what == "grad":
            torch.set_grad_enabled(not torch.is_grad_enabled())
        return super().build(workload)

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = right(query, key, value)
        if self.what == "threads":
            torch.set_num_threads(torch.get_num_threads() + 1)
        elif self.what == "dtype":
            torch.set_default_dtype(torch.float64)
        elif self.what == "precision":
            torch.set_float32_matmul_precision("medium")
        elif self.what == "tf32":
            torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
        elif self.what == "seed":
            torch.manual_seed(self.calls + 1000)
        elif self.what == "environment":
            os.environ["OMP_NUM_THREADS"] = "1000"
        return out


# Right answers with bad manners.


class Prints(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        print("NOISE from print")
        print("NOISE on stderr", file=sys.stderr)
        os.write(1, b"NOISE from write\n")
        if self.calls == 1:
            subprocess.run(["echo", "NOISE from a child"], check=True)
        return right(query, key, value)


class Clock(Good):
    """Sleeps 5 ms in a call, and stops every clock of module time."""

    def build(self, workload: Workload) -> Call:
        sleep = time.sleep
        for name in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "time", "process_time"):
            setattr(time, name, lambda: 1)
        call = super().build(workload)

        def slow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            sleep(0.005)
            return call(query, key, value)

        return slow


class NumpyAnswers(Good):
    """Answers with numbers and names that JSON does not know."""

    def workspace_bytes(self, workload: Workload) -> int | None:
        return np.int64(4096)  # type: ignore[return-value]

    def flops(self, workload: Workload) -> int | None:
        return np.int64(1_000_000)  # type: ignore[return-value]

    def build(self, workload: Workload) -> Attention:
        return Attention(super().build(workload), type(self), torch.tensor(0.5))  # type: ignore[arg-type]


class Threads(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls <= 2:
            threading.Thread(target=time.sleep, args=(1000,)).start()
        return right(query, key, value)


class Orphan(Good):
    """Leaves behind a process that has a session and a child of its own."""

    def build(self, workload: Workload) -> Call:
        subprocess.run(["setsid", "--fork", "sh", "-c", "sleep 1000 & wait"], check=True)
        return super().build(workload)


class Leak(Good):
    def __init__(self, **values: Value) -> None:
        super().__init__(**values)
        self.kept: list[Tensor] = []

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        time.sleep(0.02)  # one call a block, so that few calls are made
        self.kept.append(torch.ones(10 << 20, dtype=torch.uint8))
        return right(query, key, value)


class Hog(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = []
        while True:
            kept.append(torch.ones(64 << 20, dtype=torch.uint8))


class Large(Good):
    """Says that it needs the l x l scores of a model that is far too large."""

    def workspace_bytes(self, workload: Workload) -> int | None:
        return 1 << 40


# Ends of a process.


class Exits(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        sys.exit(3)


class ExitsZero(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os._exit(0)


class Segfault(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctypes.string_at(0)
        raise AssertionError


class Sigkill(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class ClosesFiles(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os.closerange(0, 1000)
        return right(query, key, value)


class LeavesGroup(Good):
    """Joins the process group of its parent, and then neither works nor goes."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os.setpgid(0, os.getpgid(os.getppid()))
        os.closerange(3, 1000)
        time.sleep(1000)
        raise AssertionError


class Forks(Good):
    """Its child comes back from the call as the parent does."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.calls == 1:
            os.fork()
        return right(query, key, value)


class KillsServer(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(1000)
        raise AssertionError


class HangPython(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        while True:
            pass


class HangC(Good):
    """In C, with the interpreter's lock held."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctypes.PyDLL(None).sleep(1000)
        raise AssertionError


class HangPrinting(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        while True:
            print("NOISE without end")


class HangSigterm(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1000)


class HangStopped(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise AssertionError


class HangGrandchild(Good):
    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        subprocess.run(["sleep", "1000"], check=True)
        raise AssertionError


class HangSession(Good):
    """Waits for a process that called setsid, ignores SIGTERM and has a child of its own."""

    def fault(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        script = "trap '' TERM INT HUP; sleep 1000 & sleep 1000"
        subprocess.run(["sh", "-c", script], check=True, start_new_session=True)
        raise AssertionError
