"""What a row holds: each column in one line, from which records, exports, reports and docs/columns.md take it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from attnbench.workload import Workload

SCHEMA = 1
STATUSES = ("ok", "unsupported", "skipped", "out-of-memory", "timeout", "crashed", "error", "wrong")
WELL = ("ok", "unsupported", "skipped")
FAILED = ("out-of-memory", "timeout", "crashed", "error")
Row = dict[str, Any]
Meta = Mapping[str, Any]
"""What run.json says of a run."""


class Column(NamedTuple):
    """One thing that is known of a cell.

    kind: "name" and "size" (a whole number) are always there; "text" may be empty, "count" (a whole number) and
        "number" may be missing; "flag" is yes or no, "kinds" a list of names.
    unit: as in the name, "" for none. means: in words. since: the release that wrote it first.
    """

    name: str
    kind: str
    unit: str
    means: str
    since: str = "0.1.0"


_AGAINST, _REL_L2 = "error against", ", in float64: relative L2"
SCHEMA_COLUMNS = (
    Column("plugin", "name", "", "the variant's name with every option: with the workload, the row's key"),
    Column("variant", "name", "", "its bare name"),
    Column("family", "name", "", "exact, sparse, quantized, kernel or recurrent: which tolerance it is held to"),
    Column("implementation", "text", "", "what ran, as the variant says"),
    Column("emulated", "flag", "", "whether that stands in for what the variant is about, as int8 by float32", "0.2.0"),
    Column("distribution", "text", "", "the package that brought it, with its version"),
    Column("baseline", "text", "", "what speedup refers to; empty for nothing"),
    Column("scope", "name", "", "attention alone or inside a block"),
    Column("block", "text", "", "encoder, decoder or decoder-only; empty for attention alone"),
    Column("norm", "text", "", "pre or post, of the block"),
    Column("style", "text", "", "of the block: llama or bert; empty for classic", "0.2.0"),
    Column("layers", "size", "", "blocks stacked on each other"),
    Column("phase", "name", "", "forward, decode or train"),
    Column("device", "name", "", "cpu or cuda"),
    Column("dtype", "name", "", "of the inputs"),
    Column("batch", "size", "", "entries"),
    Column("heads", "size", "", "query heads"),
    Column("kv_heads", "size", "", "key and value heads"),
    Column("seq", "size", "tokens", "queries"),
    Column("kv_seq", "size", "tokens", "keys"),
    Column("head_dim", "size", "", "of queries and keys"),
    Column("value_dim", "size", "", "of values"),
    Column("lengths", "text", "tokens", "of a ragged batch's entries, or its --batch-spec; empty where all are kv_seq"),
    Column("mask", "name", "", "full, causal, window:N for causal over no more than N keys, or tree:2x3 of drafts"),
    Column("softmax_scale", "number", "", "what scores are multiplied with; 0 for 1 / sqrt(head_dim)", "0.2.0"),
    Column("softcap", "number", "", "c of scores c tanh(s / c); 0 for scores as they are", "0.2.0"),
    Column("bias", "text", "", "added to scores by distance: alibi or relative (T5); empty for none", "0.2.0"),
    Column("sinks", "flag", "", "whether softmax sums over one more logit for each head", "0.2.0"),
    Column("inputs", "name", "", "normal or outlier as they were drawn, or the model's layer they are of: smollm2:3"),
    Column("seed", "size", "", "of the inputs"),
    Column("threads", "size", "", "of the CPU"),
    Column("machine", "text", "", "what it was measured on, in a few words: nothing is compared across two", "0.2.0"),
    Column("node", "text", "", "of a cluster, where it was measured; empty for a run without one", "0.2.0"),
    Column("status", "name", "", "ok, unsupported, skipped, out-of-memory, timeout, crashed, error or wrong"),
    Column("reason", "text", "", "why it is not ok, in one line"),
    Column("timing", "text", "", "what the timer read: clock, events or graph"),
    Column("l2", "text", "", "whether a GPU's L2 cache was kept or flushed before each call"),
    Column("isa", "text", "", "what all kernels of the CPU were held to, avx2 or avx2_vnni; auto for nothing", "0.2.0"),
    Column("start_throttled", "text", "", "why the GPU held its clocks down as the cell began; empty for nothing"),
    Column("end_throttled", "text", "", "why it did as the cell ended"),
    Column("latency_s", "number", "s", "a call: the median over rounds"),
    Column("latency_low_s", "number", "s", "where the 95% interval of it begins; none where there were too few rounds"),
    Column("latency_high_s", "number", "s", "where it ends"),
    Column("speedup", "number", "x", "the baseline's seconds over this variant's, paired by round"),
    Column("speedup_low", "number", "x", "where the 95% interval of it begins"),
    Column("speedup_high", "number", "x", "where it ends"),
    Column("rounds", "count", "", "bursts of calls that were timed"),
    Column("held_up", "count", "", "of them, those that waited for a core: see docs/measuring.md", "0.2.0"),
    Column("processes", "count", "", "in how many processes, one after the other"),
    Column(
        "converged",
        "flag",
        "",
        "whether the speedup's interval is within the precision asked for; without a baseline, a call's",
    ),
    Column("confidence", "number", "", "of the intervals, by the look that ended the cell"),
    Column("peak_bytes", "count", "bytes", "the most that a call holds: inputs, output and workspace"),
    Column("workspace_bytes", "count", "bytes", "of that, what is neither inputs nor output nor saved for training"),
    Column(
        "built_bytes",
        "count",
        "bytes",
        "held before the first call beside weights and past; part of the workspace",
        "0.2.0",
    ),
    Column(
        "first_call_bytes",
        "count",
        "bytes",
        "what the first call left behind; part of the workspace from 8 MiB up",
        "0.2.0",
    ),
    Column("predicted_workspace_bytes", "count", "bytes", "what the variant said it would be"),
    Column("input_bytes", "count", "bytes", "inputs, parameters of the block and the past's cache"),
    Column("output_bytes", "count", "bytes", "output, and gradients in training"),
    Column("saved_bytes", "count", "bytes", "what the forward pass keeps for the backward one"),
    Column("cache_bytes", "count", "bytes", "what a decoding variant keeps of the past"),
    Column("flops", "count", "operations", "of the products that exact attention needs, and of the block around it"),
    Column("flops_per_s", "number", "operations/s", "these over the latency"),
    Column("variant_flops", "count", "operations", "as the variant counts its own"),
    Column("density", "number", "", "share of query-key pairs that are computed; none where it is not sparse"),
    Column("setup_s", "number", "s", "to build the variant, compilation included"),
    Column("first_call_s", "number", "s", "the first call"),
    Column("implementation_rel_l2", "number", "", f"{_AGAINST} the function that the variant defines{_REL_L2}"),
    Column("implementation_max_abs", "number", "", "the same: the largest difference"),
    Column("implementation_cosine", "number", "", "the same: cosine similarity"),
    Column("approximation_rel_l2", "number", "", f"{_AGAINST} exact softmax attention{_REL_L2}"),
    Column("approximation_max_abs", "number", "", "the same: the largest difference"),
    Column("approximation_cosine", "number", "", "the same: cosine similarity"),
    Column("tolerance", "number", "", "what the implementation error may reach, by dtype and family"),
    Column("query_gradient_rel_l2", "number", "", f"error of dQ against the definition's{_REL_L2}"),
    Column("key_gradient_rel_l2", "number", "", "of dK"),
    Column("value_gradient_rel_l2", "number", "", "of dV"),
    Column("gate_gradient_rel_l2", "number", "", "of the gates' gradients"),
    Column("wall_s", "number", "s", "a call on a GPU by the host's clock"),
    Column("energy_j", "number", "J", "a call's, by the GPU's counter"),
    Column("reserved_bytes", "count", "bytes", "the most that torch had taken of the GPU, cached blocks included"),
    Column("process_bytes", "count", "bytes", "that NVML counts for the process"),
    *(
        Column(f"{end}_{name}", "number", unit, f"{what} while the {calls} calls ran")
        for name, unit, what in (
            ("clock_hz", "Hz", "the GPU's clock"),
            ("memory_clock_hz", "Hz", "its memory's clock"),
            ("temperature_c", "degrees C", "its temperature"),
            ("power_w", "W", "its power"),
            ("power_cap_w", "W", "the most that it may take"),
            ("other_processes", "", "processes on it that are not this run's"),
        )
        for end, calls in (("start", "first"), ("end", "last"))
    ),
    Column("warnings", "kinds", "", "what to be wary of: see attnbench/stats/doubts.py"),
    Column("traceback", "text", "", "of an error"),
)

COLUMNS = tuple(column.name for column in SCHEMA_COLUMNS)


def of_kind(*kinds: str) -> tuple[str, ...]:
    """The names of all columns of these kinds, in order."""
    return tuple(column.name for column in SCHEMA_COLUMNS if column.kind in kinds)


TEXTS, COUNTS, NUMBERS = of_kind("text"), of_kind("count"), of_kind("count", "number")
WORKLOAD = tuple(name for name in COLUMNS if name in {field.name for field in fields(Workload)})
GPU_STATE = (
    "clock_hz", "memory_clock_hz", "temperature_c", "power_w", "power_cap_w", "throttled", "other_processes"
)  # fmt: skip
"""Of the GPU, from NVML: SI units but for degrees Celsius; `throttled` in words, "" for nothing."""
SAMPLE = (
    "process", "round", "start", "calls", "seconds", "cpu_s", "others_s", "steal_s", "throttled_s", "waited_s",
    "throttled_periods",
)  # fmt: skip
"""Of one burst; what comes after its seconds since 0.2.0, and None where the system does not tell."""
SAMPLED = (5, 10, len(SAMPLE))  # how many of them runs have had


def key(row: Row) -> tuple[str, Workload]:
    """What names a cell: its plugin and its workload."""
    return row["plugin"], Workload.from_dict(row)


def table() -> str:
    """All columns as a table in Markdown, as docs/columns.md has it."""
    head = "| column | kind | unit | what it is | since |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(f"| `{c.name}` | {c.kind} | {c.unit} | {c.means} | {c.since} |\n" for c in SCHEMA_COLUMNS)
