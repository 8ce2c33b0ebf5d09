"""The command line that measures a row again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def repeat_command(row: Mapping[str, Any]) -> str:
    """`attnbench run ...` for the one workload of a row, quoted for a POSIX shell.

    Batch, heads, length, dtype, device, scope and threads are always spelled out, since their defaults depend on the
    machine or are what a reader looks for; any other flag only where it differs from its default. The row's baseline
    is measured along with it, so that a speedup results.
    """
    plugin, baseline = str(row["plugin"]), row.get("baseline")
    has_baseline = isinstance(baseline, str) and baseline != ""
    plugins = [plugin] if not has_baseline or baseline == plugin else [plugin, str(baseline)]
    in_block, decodes = row["scope"] == "block", row["phase"] == "decode"
    usual_mask, usual_block = ("causal", "decoder-only") if decodes else ("full", "encoder")
    layers, lengths = int(row.get("layers", 1)), row.get("lengths")
    lengths = lengths if isinstance(lengths, str) else ""
    flags: list[tuple[str, Any, bool]] = [
        ("plugins", ",".join(plugins), True),
        ("seq", int(row["seq"]), True),
        ("kv-seq", int(row["kv_seq"]), decodes or row["kv_seq"] != row["seq"]),
        ("batch", int(row["batch"]), True),
        ("heads", int(row["heads"]), True),
        ("kv-heads", int(row["kv_heads"]), row["kv_heads"] != row["heads"]),
        ("head-dim", int(row["head_dim"]), row["head_dim"] != 64),
        ("value-dim", int(row["value_dim"]), row["value_dim"] != row["head_dim"]),
        ("dtype", row["dtype"], True),
        ("device", row["device"], True),
        # A decoder block brings its own masks.
        ("mask", row["mask"], row["mask"] != usual_mask and not (in_block and row["block"] != "encoder")),
        ("phase", row["phase"], row["phase"] != "forward"),
        ("scope", row["scope"], True),
        ("block", row["block"], in_block and row["block"] != usual_block),
        ("norm", row["norm"], in_block and row["norm"] != "pre"),
        ("layers", layers, layers > 1),
        ("lengths", lengths, bool(lengths)),
        ("inputs", row["inputs"], row["inputs"] != "normal"),
        ("seed", int(row["seed"]), row["seed"] != 0),
        ("threads", int(row["threads"]), True),
        ("l2", row.get("l2"), row.get("l2") == "flushed"),
        ("baseline", baseline, has_baseline and baseline != "sdpa"),
    ]
    words = ["attnbench", "run"]
    for name, value, wanted in flags:
        if wanted:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
