"""attnbench as it is where every Python process of it begins with some lines, as what it does it does in many."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLUGIN = """
from torch.nn.functional import scaled_dot_product_attention
from attnbench.plugin import Plugin

class Willing(Plugin):
    devices = ("cpu:0", "cpu")
    phases = ("forward", "train", "inference")
    def build(self, workload):
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=workload.scale)
"""


def attnbench(folder: Path, at_start: str, *words: str, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints; it must end with one of `codes`. Beside attnbench's own there is a plugin `willing`."""
    (folder / "sitecustomize.py").write_text(at_start)
    (folder / "willing.py").write_text(PLUGIN)
    info = folder / "willing-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: willing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnbench.plugins]\nwilling = willing:Willing\n")
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "attnbench", *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout + done.stderr


def measured(folder: Path, at_start: str, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a small run of `willing`: what it says of the machine, and the one row."""
    small = ("--seq", "64", "--heads", "2", "--scope", "attention", "--budget", "300", "--precision", "0.9",
             "--mask", "full")  # fmt: skip
    chosen = ("--plugins", "willing", "--baseline", "willing", "--out", "results")
    attnbench(folder, at_start, "run", *chosen, *small, *words)
    (run,) = (folder / "results").iterdir()
    (row,) = json.loads((run / "cells.jsonl").read_text())["cells"]
    assert row["status"] == "ok", row["reason"]
    return json.loads((run / "run.json").read_text())["machine"], row


def reported(folder: Path, at_start: str) -> str:
    """The page of what was measured there."""
    attnbench(folder, at_start, "report")
    return html.unescape((folder / "reports" / "index.html").read_text())
