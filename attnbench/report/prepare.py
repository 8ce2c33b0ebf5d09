"""Rows as a report needs them: every column that it reads, and panels of those rows that may share an axis.

A panel holds one problem at many lengths, and differs from its neighbours by name.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from attnbench import environment
from attnbench.analysis import attainable, shares
from attnbench.analysis.frames import as_rows, filled
from attnbench.batch import is_spec
from attnbench.records.machines import identity
from attnbench.records.schema import NUMBERS, WORKLOAD, Meta, Row
from attnbench.report import units
from attnbench.workload import DEVICES

GRADIENTS = tuple(name for name in NUMBERS if name.endswith("_gradient_rel_l2"))


def prepared(frame: pd.DataFrame, runs: Sequence[Meta] = ()) -> pd.DataFrame:
    """All the columns that a report needs, whatever an older record lacks, with numbers as numbers.

    runs: what run.json says, one a run; without, nothing is known of ceilings.
    """
    frame = filled(frame.reset_index(drop=True))
    frame["variant"] = frame["variant"].astype(object).fillna(frame["plugin"].astype(str).str.split(":").str[0])
    frame["run"] = frame["run"].fillna("").astype(str)
    frame["converged"], frame["emulated"] = frame["converged"].ne(False), frame["emulated"].eq(True)
    frame = frame.sort_values(["run", "plugin"], kind="stable") if frame["run"].nunique() > 1 else frame
    return frame.join([shares.attention_share(frame), shares.amdahl(frame), attainable.columns(frame, runs)])


def warning_kinds(value: Any) -> list[str]:
    """The kinds of warning in one cell, whatever a reader of Parquet or JSON made of the list."""
    if value is None or isinstance(value, float) or len(value) == 0:
        return []
    return [value] if isinstance(value, str) else [str(kind) for kind in value]


@dataclass(frozen=True)
class Panel:
    """The rows of one problem, which differ in plugin and length only.

    title: what sets this panel apart from the others; empty where it is the only one.
    shared: what all panels have in common.
    axis: what `length` counts.
    frame: the rows, with a column `length` in tokens, sorted by it.
    words: each dimension of the problem in words, usual values as empty ones.
    """

    title: str
    shared: str
    axis: str
    frame: pd.DataFrame
    words: Mapping[str, str] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        return self.title or self.shared

    @property
    def name(self) -> str:
        """For a column of a table that names the panel."""
        return self.title or "all"


def arrange(frame: pd.DataFrame, runs: Sequence[Meta]) -> list[Panel]:
    """The panels of a report: one for each combination of whatever varies beside plugin and length.

    Runs are kept apart where they come from different machines or measured the same cell; otherwise they
    complete each other. A batch that shrinks as the length grows (batch * length constant, the convention of the
    FlashAttention papers) is one problem, not several.
    """
    if frame.empty:
        return []
    words = pd.DataFrame([dimensions(row, _apart(frame, runs)) for row in as_rows(frame)], index=frame.index)
    words, lengths = _name_lengths(frame, words)
    words = _join_batches(frame, words, lengths)
    if words["inputs"].nunique() > 1:
        words["inputs"] = words["inputs"].replace("", "normal inputs")
    varying = [name for name in words if words[name].nunique() > 1]
    shared = ", ".join(word for name in words if name not in varying and (word := str(words[name].iloc[0])))
    rows = frame.assign(length=lengths)
    panels = []
    groups = words[varying].agg("\0".join, axis=1) if varying else pd.Series("", index=frame.index)
    for key in groups[_order(frame)].unique():
        part = rows[groups == key].sort_values(["length", "plugin"], kind="stable")
        title = ", ".join(word for word in key.split("\0") if word)
        by_keys = (part["length"] != part["seq"]).any() or (part["seq"].nunique() == 1 < part["kv_seq"].nunique())
        own = {str(name): str(word) for name, word in words.loc[part.index[0]].items()}
        panels.append(Panel(title, shared, "key length" if by_keys else "length", part, own))
    return panels


def alike(panels: Sequence[Panel], but: str) -> list[list[Panel]]:
    """Panels that differ in one dimension alone, together; those that have no such neighbour are left out."""
    groups: dict[tuple[str, ...], list[Panel]] = {}
    for panel in panels:
        groups.setdefault(tuple(word for name, word in panel.words.items() if name != but), []).append(panel)
    return [group for group in groups.values() if len(group) > 1]


def machine_name(run: Meta) -> str:
    """A machine in a few words: its GPU where it has one, otherwise its CPU and cores; and what holds torch down."""
    machine = run.get("machine") or {}
    return ", ".join(filter(None, [_hardware(machine), environment.words(machine)]))


def _hardware(machine: Mapping[str, Any]) -> str:
    if machine.get("named"):  # by whoever shared the run
        return str(machine["named"])
    if machine.get("gpu"):
        return str(machine["gpu"])
    cores = f", {units.count(machine['cores'], 'core')}" if machine.get("cores") else ""
    return f"{machine.get('cpu') or 'an unnamed machine'}{cores}"


def command_line(run: Meta) -> str:
    """The command that a run was started with, as one would type it."""
    command = run.get("command") or []
    return command if isinstance(command, str) else shlex.join(map(str, command)) or "unknown"


def _apart(frame: pd.DataFrame, runs: Sequence[Meta]) -> bool:
    """Whether rows of different runs must not share a line."""
    if frame["run"].nunique() < 2:
        return False
    cells = frame.groupby(["plugin", *WORKLOAD], dropna=False)["run"].nunique()
    return bool((cells > 1).any()) or len({identity(dict(run.get("machine") or {})) for run in runs}) > 1


def dimensions(row: Row, apart: bool = False) -> dict[str, str]:
    """Each dimension of a row's workload in words; a dimension's usual value is an empty word."""
    grouped, same_dim = row["kv_heads"] != row["heads"], row["head_dim"] == row["value_dim"]
    heads = units.count(int(row["heads"]), "head")
    lengths = row["lengths"] if isinstance(row["lengths"], str) else ""
    return {
        "run": f"run {row['run']}" if apart else "",
        "scope": _scope(row),
        "layers": f"{int(row['layers'])} layers" if row["layers"] > 1 else "",
        "phase": "" if row["phase"] == "forward" else str(row["phase"]),
        "device": str(row["device"]),
        "dtype": str(row["dtype"]),
        "mask": f"{str(row['mask']).replace(':', ' ')} mask",
        "scale": f"scale {row['softmax_scale']:g}" if row["softmax_scale"] else "",
        "softcap": f"softcap {row['softcap']:g}" if row["softcap"] else "",
        "bias": f"{row['bias']} bias" if isinstance(row["bias"], str) and row["bias"] else "",
        "sinks": "sinks" if row["sinks"] else "",
        "batch": "" if is_spec(lengths) else f"batch {int(row['batch'])}",
        "heads": heads + (f" on {units.count(int(row['kv_heads']), 'kv head')}" if grouped else ""),
        "dim": f"head dim {int(row['head_dim'])}" + ("" if same_dim else f", value dim {int(row['value_dim'])}"),
        "ragged": f"batch {lengths}" if is_spec(lengths) else "ragged batch" if lengths else "",
        "inputs": "" if row["inputs"] == "normal" else f"{row['inputs']} inputs",
        "seed": f"seed {int(row['seed'])}" if row["seed"] else "",
        "threads": units.count(int(row["threads"]), "thread") if DEVICES[row["device"]].host else "",
        "l2": "L2 cache flushed" if row["l2"] == "flushed" else "",
    }


def _scope(row: Row) -> str:
    if row["scope"] == "attention":
        return "attention alone"
    style = row["style"] if isinstance(row["style"], str) else ""
    return f"{style} {row['block']} block ({row['norm']}-norm)".lstrip()


def _name_lengths(frame: pd.DataFrame, words: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """What the length axis shows: the one length of self-attention, or the longer-ranging of queries and keys."""
    lengths, names = frame["seq"].copy(), pd.Series("", index=frame.index)
    for _, group in frame.groupby([words[name] for name in words], sort=False):
        if (group["seq"] == group["kv_seq"]).all():
            continue
        if group["kv_seq"].nunique() == 1 < group["seq"].nunique():
            names[group.index] = group["kv_seq"].map(lambda n: units.count(int(n), "key"))
        else:
            named = group["lengths"].map(lambda text: not (isinstance(text, str) and is_spec(text)))  # says it itself
            queries = group["seq"].map(lambda n: units.count(int(n), "query", "queries"))
            names[group.index] = queries.where(named, "")
            lengths[group.index] = group["kv_seq"]
    return words.assign(lengths=names), lengths


def _join_batches(frame: pd.DataFrame, words: pd.DataFrame, lengths: pd.Series) -> pd.DataFrame:
    tokens = frame["batch"] * lengths
    batch = words["batch"].copy()
    for _, group in frame.groupby([words[name] for name in words if name != "batch"], sort=False):
        if group["batch"].nunique() > 1 and tokens[group.index].nunique() == 1:
            batch[group.index] = f"batch x length = {units.length(tokens[group.index[0]])}"
    return words.assign(batch=batch)


def _order(frame: pd.DataFrame) -> pd.Index:
    """The index in a report's order: names in the order they came, attention before block, small before large."""
    came = {name: pd.Series(pd.factorize(frame[name])[0], frame.index) for name in ("run", "device", "dtype", "phase")}
    keys = frame.assign(**came, mask=frame["mask"] != "full")
    names = (
        "run scope block norm style layers phase device dtype mask batch heads kv_heads head_dim value_dim seq kv_seq"
    )
    return keys.sort_values(names.split(), kind="stable").index
