"""What a workload costs by formula: integers, from shapes alone. Loads no torch.

A multiplication and its addition are two operations. Only matrix products are counted: softmax, norms, biases and
ReLU are of lower order, and the FlashAttention papers leave them out too, so figures compare. A causal mask is counted
by the pairs that it shows, seq * (seq + 1) / 2 where both lengths are equal; those papers say half of seq^2.

Of each product, training needs two more, one for the gradient of each factor: three times the operations. What a
variant computes once more in its backward pass is its own affair (those papers count it: 3.5 times).
"""

import math
from dataclasses import dataclass
from functools import partial

from attnbench.workload import Workload


def block_workspace(workload: Workload, attention: float) -> float:
    """Bytes that a block's forward pass (`task.transformer`) holds at its peak beside inputs, parameters and output.

    Either while an attention runs (its workspace, query, key, value and output) or while the FFN's activation does
    (d_ff twice, gated three times), each with what its sub-layer got, and pre-norm with that normalised. A stack holds
    one block's input more, however many layers it has.

    attention: workspace bytes of the attention alone.
    """
    w = workload
    x = w.batch * w.seq * w.width * w.itemsize
    norm = x if w.norm == "pre" else 0
    hidden = w.batch * w.seq * w.styled.hidden(w.width) * w.itemsize
    stages: list[float] = [x + norm + (3 if w.styled.gated else 2) * hidden]
    for name, a in attentions(w).items():
        rows, keys = a.batch * a.heads * a.seq, a.batch * a.kv_heads * a.kv_seq
        own = (rows + keys) * (a.head_dim + a.value_dim) * a.itemsize
        stages.append(attention + own + norm + (x if name == "cross" else 0))
    most = max(stages) if attention == attention else math.nan
    return most + (x if w.layers > 1 else 0) - x


def peak(workload: Workload, attention: float, holds_scores: bool = False) -> float:
    """Predicted bytes at the peak of a call: inputs, parameters and output, and what is held beside them.

    That is the workspace of attention alone (`attention`, bytes), and of a block's forward pass `block_workspace`. In
    training with exact attention it is at least what the forward pass leaves or, as that goes while the gradients come,
    all gradients, whichever is more; what the backward pass holds for a moment is left out.
    """
    if workload.trains:
        gradients, out = output_bytes(workload), output_bytes(workload.replace(phase="forward"))
        left = out + saved_bytes(workload, holds_scores)
        return _tensor_bytes(workload) - gradients + max(left, gradients)
    inside = workload.scope == "block" and not workload.decodes
    return _tensor_bytes(workload) + (block_workspace(workload, attention) if inside else attention)


def ffn_flops(workload: Workload) -> float:
    return flops_by_part(workload)["ffn"]


def score_bytes(workload: Workload) -> float:
    """Bytes of the largest matrix of scores, one value for each pair, head and batch entry."""
    return max(a.batch * a.heads * a.seq * a.kv_seq * a.itemsize for a in attentions(workload).values())


FFN_EXPANSION = 4  # d_ff / d_m (Vaswani 2017, section 3.3: 2048 / 512)


def attentions(workload: Workload) -> dict[str, Workload]:
    """The attention problems inside a workload, each as a workload of scope attention.

    An encoder block: "self", with the workload's mask. A decoder block: "self", causal over its own `seq` positions,
    and "cross", every position over all `kv_seq` positions of the encoder's output. A decoder-only block: "self",
    causal, or in a window. A workload of scope attention is its own: "self". Decoding, both attentions of a decoder
    have kv_seq keys.
    """
    alone = {"scope": "attention", "block": "", "norm": "", "style": "", "layers": 1}
    if workload.block == "decoder":
        own = workload.kv_seq if workload.decodes else workload.seq
        cross = workload.replace(**alone, mask="full", bias="")
        return {"self": workload.replace(**alone, mask="causal", kv_seq=own), "cross": cross}
    mask = "causal" if workload.block == "decoder-only" and not workload.masked.window else workload.mask
    return {"self": workload.replace(**alone, mask=mask)}


def visible_pairs(workload: Workload) -> int:
    """(query, key) pairs that the mask shows, of seq * kv_seq."""
    return workload.masked.pairs(workload.seq, workload.kv_seq)


@dataclass(frozen=True)
class Product:
    """One matrix product of a workload, over all its batch entries and heads.

    layer: "self", "cross" or "ffn".
    name: as in the lecture: W_Q, W_K, W_V, QK^T, PV, W_O, W_1, W_2.
    flops: two operations for each multiplication and addition.
    elements: of both factors and of the result, each moved once; the scores are a result and a factor as if they went
        through memory, which is what fused attention avoids.
    count: in how many products the lecture counts it: one a head, or one.
    parameters: elements of its weight and bias; 0 where both factors are activations.
    """

    layer: str
    name: str
    flops: int
    elements: int
    count: int
    parameters: int = 0


def products(workload: Workload, d_ff: int | None = None, gated: bool = False) -> list[Product]:
    """Every matrix product of one block's forward pass, in the order in which it is computed.

    All that is counted here follows from this list. Decoding, keys and values are projected for new tokens alone.

    d_ff: the FFN's inner width, the style's unless given. gated: it has a third matrix (Shazeer 2020, "GLU variants"),
        as the style may say too.
    """
    style = workload.styled
    linear = partial(_linear, biases=style.biases)
    found: list[Product] = []
    for layer, w in attentions(workload).items():
        entries = w.entries()
        rows, keys = (
            w.heads * sum(e.batch * e.seq for e in entries),
            w.kv_heads * sum(e.batch * e.kv_seq for e in entries),
        )
        shown = w.heads * sum(e.batch * visible_pairs(e) for e in entries)
        scores = Product(layer, "QK^T", 2 * shown * w.head_dim, shown + (rows + keys) * w.head_dim, w.heads)
        mix = Product(layer, "PV", 2 * shown * w.value_dim, shown + (rows + keys) * w.value_dim, w.heads)
        if workload.scope == "attention":
            return [scores, mix]
        new = w.batch * w.new
        found += [
            linear(layer, "W_Q", w.batch * w.seq, w.width, w.heads * w.head_dim, w.heads),
            linear(layer, "W_K", new, w.width, w.kv_heads * w.head_dim, w.kv_heads),
            linear(layer, "W_V", new, w.width, w.kv_heads * w.value_dim, w.kv_heads),
            scores,
            mix,
            linear(layer, "W_O", w.batch * w.seq, w.heads * w.value_dim, w.width),
        ]
    tokens, hidden = workload.batch * workload.seq, d_ff or style.hidden(workload.width)
    inner = ("W_1", "W_3") if gated or style.gated else ("W_1",)
    found += [linear("ffn", name, tokens, workload.width, hidden) for name in inner]
    return [*found, linear("ffn", "W_2", tokens, hidden, workload.width)]


def _linear(layer: str, name: str, tokens: int, inner: int, outer: int, count: int = 1, biases: bool = True) -> Product:
    weights = inner * outer + biases * outer
    moved = tokens * (inner + outer) + weights if tokens else 0
    return Product(layer, name, 2 * tokens * inner * outer, moved, count, weights)


def flops(workload: Workload) -> int:
    """Operations of the workload, the same for every variant.

    Scope attention: 2 * batch * heads * pairs * (head_dim + value_dim), with `visible_pairs`. Scope block: its
    projections, attentions and FFN (`flops_by_part`), times layers. Training: three times that.
    """
    return sum(flops_by_part(workload).values())


def passes(workload: Workload) -> int:
    """By how much a phase multiplies the products of a forward pass."""
    return 3 if workload.trains else 1


def flops_by_part(workload: Workload) -> dict[str, int]:
    """`flops` split into "self projections", "self attention", the same two of "cross", and "ffn", where there."""
    parts: dict[str, int] = {}
    times = workload.layers * passes(workload)
    for p in products(workload):
        inside = "projections" if p.parameters else "attention"
        part = p.layer if p.layer == "ffn" else f"{p.layer} {inside}"
        parts[part] = parts.get(part, 0) + times * p.flops
    return parts


def parameters(workload: Workload) -> int:
    """Weights and biases of all blocks, norms (LayerNorm two vectors of `width` a sub-layer, RMSNorm one) with them.

    0 for scope attention, which has none.
    """
    if workload.scope == "attention":
        return 0
    sublayers = len(attentions(workload)) + 1
    norms = sublayers * (1 if workload.styled.rms else 2) * workload.width
    return workload.layers * (sum(p.parameters for p in products(workload)) + norms)


def cache_bytes(workload: Workload) -> int:
    """Bytes of the keys and values that decoding finds in a plain KV cache before its step; 0 in other phases."""
    each = (w.batch * w.kv_heads * w.past * (w.head_dim + w.value_dim) for w in attentions(workload).values())
    return workload.layers * sum(each) * workload.itemsize


def input_bytes(workload: Workload) -> int:
    """Bytes of query, key and value; for a block of x, and a decoder's memory. Weights are not among them.

    Decoding, the past's keys and values count as in a plain KV cache. Training, the output's gradient comes in too.
    """
    w = workload
    if w.scope == "block":
        whole = w.block == "decoder" and not w.decodes
        elements = w.batch * (w.seq + w.kv_seq if whole else w.seq) * w.width
    else:
        elements = w.batch * (w.heads * w.seq * w.head_dim + w.kv_heads * w.new * _pair(w))
    return elements * w.itemsize + cache_bytes(w) + (_out_bytes(w) if w.trains else 0)


def output_bytes(workload: Workload) -> int:
    """Bytes of the output: (batch, heads, seq, value_dim), or (batch, seq, width) of a block.

    Training, the gradients of the inputs and of a block's parameters come out too.
    """
    w = workload
    if not w.trains:
        return _out_bytes(w)
    return input_bytes(w) + parameters(w) * w.itemsize  # the one gradient that came in is as large as the output


def min_bytes(workload: Workload) -> int:
    """Bytes that must move at least: inputs and parameters read once, the output written once.

    What pads a ragged batch, of attention alone, need not.
    """
    return sum(map(_tensor_bytes, unpadded(workload)))


def unpadded(workload: Workload) -> list[Workload]:
    """The entries of a ragged batch of attention alone; else the whole, as a block computes what pads it."""
    return workload.entries() if workload.scope == "attention" else [workload]


def _tensor_bytes(workload: Workload) -> int:
    return input_bytes(workload) + parameters(workload) * workload.itemsize + output_bytes(workload)


def saved_bytes(workload: Workload, scores: bool) -> int:
    """Bytes that autograd keeps from a training step's forward pass for its backward one, for exact attention.

    Inputs, parameters and the output are there anyway and not among them. Of a block each tensor is
    counted once: what every linear layer takes in (of W_2 that is what ReLU keeps too), what every LayerNorm takes in
    with its means and standard deviations, and query, key and value. Of an encoder whose heads are all kv heads that is
    12 * d_m elements a token and layer, as in ZeRO (Rajbhandari 2020, section 3.2), less the first one's input. And:

    Another activation than ReLU keeps what it took in, a gate both factors; RoPE's sines and cosines are not counted.

    scores: the softmax (batch, heads, seq, kv_seq), and key and value repeated for each head. Where false, attention is
        fused and keeps the logarithm of each row's sum of exponentials in float32 (Dao 2023, section 3.1).
    """
    w, kept = workload, 0  # of one layer
    for a in attentions(w).values():
        rows = a.batch * a.heads * a.seq
        keys = a.batch * (a.heads if scores else a.kv_heads) * a.kv_seq
        kept += rows * (a.kv_seq * a.itemsize if scores else 4)
        if w.scope == "block":
            kept += (rows + keys) * _pair(a) * a.itemsize  # query, key, value, and what W_O takes in
        elif scores and a.group > 1:
            kept += keys * _pair(a) * a.itemsize
    if w.scope == "attention":
        return kept
    tokens, sublayers = w.batch * w.seq, len(attentions(w)) + 1
    style = w.styled
    inner = 1 + (style.activation != "relu") + 2 * style.gated
    # What norms, W_Q, W_1 and W_2 take in, and the activation.
    kept += tokens * (2 * sublayers * w.width + inner * style.hidden(w.width)) * w.itemsize
    statistic = w.itemsize if w.on_host else 4  # torch keeps them in float32 on a GPU alone
    kept += tokens * (1 if style.rms else 2) * sublayers * statistic
    if style.rms and w.on_host:  # several operations there, of which one keeps what was normalised, too
        kept += tokens * sublayers * w.width * w.itemsize
    return w.layers * kept - tokens * w.width * w.itemsize


def _pair(w: Workload) -> int:
    return w.head_dim + w.value_dim


def _out_bytes(w: Workload) -> int:
    return w.batch * w.seq * (w.width if w.scope == "block" else w.heads * w.value_dim) * w.itemsize
