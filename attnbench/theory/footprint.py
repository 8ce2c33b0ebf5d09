"""Memory that a whole model needs to be trained and to infer, by formula, and whether a device has it.

After Rajbhandari 2020 ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", sections 3.1 and 3.2):
mixed precision keeps P parameters and P gradients in 2 bytes each, and for Adam K = 12 bytes a parameter in float32:
a copy of the parameter, momentum and variance.
"""

from dataclasses import dataclass

from attnbench.theory.models import Model

NARROW = 2  # bytes of a parameter, a gradient or an activation in mixed precision
ADAM = 12  # bytes of optimizer states for a parameter
ACTIVATIONS = 12  # elements saved for each token, layer and unit of d_m (ZeRO, section 3.2)


@dataclass(frozen=True)
class Line:
    """What takes memory, how many bytes, and by which formula."""

    what: str
    bytes: int
    formula: str


def training(model: Model, batch: int, seq: int) -> list[Line]:
    """One step of training with Adam in mixed precision."""
    p = model.parameters()
    return [
        Line("parameters", NARROW * p, "2 P"),
        Line("gradients", NARROW * p, "2 P"),
        Line("optimizer states", ADAM * p, "K P, K = 12 for Adam: parameter, momentum, variance in float32"),
        Line("activations", NARROW * activations(model, batch, seq), "2 * 12 * batch * seq * d_m * layers"),
    ]


def inference(model: Model, batch: int, seq: int) -> list[Line]:
    """A batch of sequences that have reached `seq` tokens, with a cache of keys and values."""
    cached = model.kv_heads * (model.head_dim + model.value_dim)
    layers = model.decoder_layers or model.layers
    formula = "2 * batch * seq * kv_heads * (head_dim + value_dim) * layers"
    cache = Line("KV cache", NARROW * batch * seq * cached * layers, formula)
    return [Line("parameters", NARROW * model.parameters(), "2 P"), cache]


def workspaces(model: Model, batch: int, seq: int) -> list[Line]:
    """What one layer's attention holds beside its inputs and output, by kind of variant, forward."""
    rows = batch * model.heads * seq
    state = batch * model.kv_heads * model.head_dim * (model.value_dim + 1)
    recurrent = "4 * batch * kv_heads * head_dim * (value_dim + 1), and chunks"
    return [
        Line("naive", 2 * NARROW * rows * seq, "2 matrices of batch * heads * l^2, 2 bytes each"),
        Line("fused: FlashAttention, memory-efficient, tiled", 4 * rows, "4 * batch * heads * l, and tiles"),
        Line("linear attention, recurrences", 4 * state, recurrent),
    ]


def activations(model: Model, batch: int, seq: int) -> int:
    """Elements that the backward pass needs."""
    return ACTIVATIONS * batch * seq * model.width * model.depth


def total(lines: list[Line]) -> int:
    return sum(line.bytes for line in lines)


def remedies(model: Model, batch: int, seq: int, device: int) -> list[str]:
    """What would make training fit into `device` bytes, each by itself and then all together."""
    *state_lines, saved = training(model, batch, seq)
    states, found = total(state_lines), []
    if (fits := (device - states) * batch // saved.bytes) > 0:
        found.append(f"a batch of {fits}: states {gb(states)}, activations {gb(fits * saved.bytes // batch)}")
    kept = recomputed(model, batch, seq)
    if states + kept <= device:
        found.append(f"recomputing activations layer by layer: {gb(kept)} of them instead of {gb(saved.bytes)}")
    for what, activation in (("", saved.bytes), (", with activations recomputed", kept)):
        if activation < device and states + activation > device:
            count = -(-states // (device - activation))
            found.append(f"states partitioned over {count} devices (ZeRO stage 3){what}")
            break
    return found or ["nothing of this alone: shorter sequences, a smaller batch and more devices together"]


def recomputed(model: Model, batch: int, seq: int) -> int:
    """Bytes where only each layer's input is kept, and one layer's activations at a time (Chen 2016)."""
    inputs = batch * seq * model.width * model.depth
    return NARROW * (inputs + activations(model, batch, seq) // model.depth)


def gb(count: int) -> str:
    """Gigabytes of 10^9 bytes, as the papers count."""
    return f"{count / 1e9:.3g} GB"
