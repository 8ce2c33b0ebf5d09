"""The command line that measures a row again."""

import shlex
from collections.abc import Mapping
from typing import Any

from attnbench.batch import is_spec
from attnbench.workload import flag

_SIZES = ("seq", "kv_seq", "batch", "heads", "kv_heads", "head_dim", "value_dim")
_REST = (
    "dtype", "device", "mask", "softmax_scale", "softcap", "bias", "phase", "scope", "block", "norm", "style", "layers",
    "lengths", "inputs", "seed", "threads",
)  # fmt: skip


def repeat_command(row: Mapping[str, Any]) -> str:
    """`attnbench run ...` for the one workload of a row, quoted for a POSIX shell.

    Batch, heads, length, dtype, device, mask, scope, block and threads are always spelled out, since their defaults
    depend on the machine or are what a reader looks for; any other flag only where it differs from its default. The
    row's baseline is measured along with it, so that a speedup results.
    """
    plugin, baseline = str(row["plugin"]), row.get("baseline")
    baseline = baseline if isinstance(baseline, str) else ""
    mixed = is_spec(str(row.get("lengths") or ""))
    decodes, own_masks = row["phase"] == "decode", row["scope"] == "block" and row["block"] != "encoder"
    usual = {
        "kv_seq": None if decodes else row["seq"],
        "kv_heads": row["heads"],
        "head_dim": 64,
        "value_dim": row["head_dim"],
        "mask": row["mask"] if own_masks and row["mask"] in ("full", "causal") else None,
        "softmax_scale": 0.0,
        "softcap": 0.0,
        "phase": "decode" if mixed else "forward",
        "norm": "pre",
        "layers": 1,
        "inputs": "normal",
        "seed": 0,
        "l2": "kept",
        "isa": "auto",
        "baseline": "sdpa",
    }
    values: dict[str, Any] = {"plugins": ",".join(dict.fromkeys(filter(None, (plugin, baseline))))}
    values |= {name: row.get(name, usual.get(name)) for name in (*_SIZES, *_REST, "l2", "isa")} | {"baseline": baseline}
    if mixed:
        values |= dict.fromkeys(("seq", "kv_seq", "batch", "lengths")) | {"batch_spec": row["lengths"]}
    words = ["attnbench", "run"]
    for name, value in values.items():
        if value not in ("", None, usual.get(name)) and value == value:
            exact = isinstance(value, str) or name in ("softmax_scale", "softcap")
            words += ["--scale" if name == "softmax_scale" else flag(name), str(value if exact else int(value))]
    return shlex.join(words)
