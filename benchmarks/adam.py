"""Bytes a parameter in a mixed-precision training step with Adam: `python benchmarks/adam.py`.

A stack of attnbench's blocks in bfloat16 on the CPU, its gradients in bfloat16, and torch.optim.Adam over a copy of the
parameters in float32. Theory is `attnbench.footprint`, after Rajbhandari 2020 (ZeRO): 2 + 2 + 12 bytes a parameter
(section 3.1), and 12 * d_m elements a token and layer that the forward pass keeps for the backward one (section 3.2).

Measured is what is resident beside code, with allocations as mappings of their own and no freed page kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnbench.devices.cpu import DEVICE as CPU
from attnbench.devices.cpu import status_bytes
from attnbench.devices.device import describe
from attnbench.devices.machine import usable_cores
from attnbench.plugin import Attention
from attnbench.registry import find, load
from attnbench.task.transformer import Block
from attnbench.theory import costs, footprint
from attnbench.theory.models import Model
from attnbench.workload import Workload

MIB = 2**20
BETAS = (0.9, 0.999)  # Kingma 2015, section 2


def held() -> int:
    """Resident bytes, without pages of files: code that a first call brings in."""
    return (CPU.kept_bytes() or 0) - status_bytes("RssFile")


class Training:
    """A stack of blocks and its optimizer, made step by step."""

    def __init__(self, workload: Workload, layers: int) -> None:
        built = load(find()["sdpa"].target)().build(workload.replace(scope="attention", block="", norm=""))
        call = built.call if isinstance(built, Attention) else built
        seeded = (workload.replace(seed=layer) for layer in range(layers))
        self.stack = nn.Sequential(*(Block(w, {"self": call}) for w in seeded))
        self.parameters = list(self.stack.parameters())
        self.masters: list[nn.Parameter] = []

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stack(x)
        return out

    def add_states(self) -> None:
        """The float32 copy, and Adam's momentum and variance, which come with the first step."""
        self.masters = [nn.Parameter(p.detach().float()) for p in self.parameters]
        self.adam = torch.optim.Adam(self.masters, lr=1e-4, betas=BETAS, foreach=False)
        self.step()

    def step(self) -> None:
        """Parameter by parameter, so that only one gradient at a time is there in float32 too."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None, "backward comes first"
            master.grad = parameter.grad.float()
            self.adam.step()
            master.grad = None
            with torch.no_grad():
                parameter.copy_(master)


def peak(act: Callable[[], None]) -> int:
    """Bytes that a call holds at its peak beside what was there before."""
    held = CPU.peak(act)[1]
    assert held is not None, "memory is measured on Linux alone"
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="blocks in the stack")
    parser.add_argument("--heads", type=int, default=8, help="of 64 elements each: d_m is 64 times that")
    parser.add_argument("--seq", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    asked = parser.parse_args()

    CPU.begin(None)
    torch.set_num_threads(usable_cores())
    w = Workload(
        seq=asked.seq, kv_seq=asked.seq, batch=asked.batch, heads=asked.heads, kv_heads=asked.heads, dtype="bfloat16",
        mask="causal", scope="block", block="decoder-only", norm="pre", phase="train", threads=usable_cores(),
    )  # fmt: skip
    model = Model(
        w.heads, w.kv_heads, w.head_dim, w.value_dim, "", layers=asked.layers, width=w.width,
        d_ff=costs.FFN_EXPANSION * w.width, vocabulary=0, norms=0,
    )  # fmt: skip
    # What torch's first calls leave behind for good is no part of the model.
    x, up = (torch.randn(w.batch, w.seq, w.width, dtype=torch.bfloat16) for _ in range(2))
    first = Training(w, 1)
    torch.autograd.backward(first.forward(x), up)
    first.add_states()
    del first

    stages = [held()]
    training = Training(w, asked.layers)
    stages.append(held())
    out = training.forward(x)
    stages.append(held())
    torch.autograd.backward(out, up)
    del out
    stages.append(held())
    training.add_states()
    stages.append(held())
    momentary = peak(training.step)

    start, parameters, forward, gradients, states = stages
    lines = {line.what: line for line in footprint.training(model, w.batch, w.seq)}
    measured = {
        "parameters": parameters - start,
        "gradients": gradients - parameters,
        "optimizer states": states - gradients,
        "activations": forward
        - parameters
        - x.nbytes,  # the output is as large as the input, and not kept for backward
    }
    count = model.parameters()
    assert count == sum(p.numel() for p in training.parameters), "the formula counts the real stack"
    here = describe()
    print(f"{here['cpu']}, {usable_cores()} threads, torch {torch.__version__}, {here['system']}")
    print(f"{asked.layers} blocks, d_m {w.width}, {count / 1e6:.1f} M parameters, {w.batch} x {w.seq} tokens, bfloat16")
    print(f"{'':18} {'theory':>11} {'measured':>11} {'measured/theory':>16}   bytes a parameter: theory, measured")
    rows: list[dict[str, Any]] = []
    for what, size in measured.items():
        rows.append(_row(what, lines[what].bytes, size, count))
        if what == "optimizer states":
            rows.append(_row("together", sum(r["expected_bytes"] for r in rows), sum(r["measured_bytes"] for r in rows),
                             count))  # fmt: skip
    exact = costs.saved_bytes(w.replace(layers=asked.layers), scores=False)
    rows.append(_row("activations, exact", exact, measured["activations"], count))
    for row in rows:
        show(row)
    print(
        f"a step holds {momentary / MIB:.1f} MiB more for a moment: one parameter's gradient in float32 and temporaries"
    )
    if asked.out:
        record = {"machine": here, "workload": w.replace(layers=asked.layers).as_dict(), "parameters": count}
        asked.out.write_text(json.dumps(record | {"rows": rows, "momentary_bytes": momentary}, indent=1) + "\n")


def _row(what: str, expected: int, measured: int, parameters: int) -> dict[str, Any]:
    return {
        "what": what,
        "expected_bytes": expected,
        "measured_bytes": measured,
        "expected_bytes_a_parameter": expected / parameters,
        "measured_bytes_a_parameter": measured / parameters,
    }


def show(row: dict[str, Any]) -> None:
    expected, measured = row["expected_bytes"], row["measured_bytes"]
    each = ""
    if not row["what"].startswith("activations"):
        each = f"{row['expected_bytes_a_parameter']:20.2f}, {row['measured_bytes_a_parameter']:.2f}"
    print(f"{row['what']:18} {expected / MIB:7.1f} MiB {measured / MIB:7.1f} MiB {measured / expected:16.3f}{each}")


if __name__ == "__main__":
    main()
