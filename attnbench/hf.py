"""Any variant as the attention of a transformers model: `model.set_attn_implementation(register("int8"))`.

transformers makes a mask once for a forward pass, by the function registered for the attention's name, and hands it to
each layer's attention. Here that function makes no matrix: it finds out which keys a query sees, as a pattern and for
each batch entry the keys that are no padding, and the attention builds the variant for the problem that this is.
transformers' own cache stays what it is: few queries on many keys are one forward pass, masked bottom-right.

Nothing that a model asks for is left out: what the variant can't honour is an error that names variant and layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnbench import registry
from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole
from attnbench.plugin import Plugin, Value, built
from attnbench.task.promise import refusal
from attnbench.workload import Mask, Workload

__all__ = ["register"]

_FULL = Mask()
_BUILT = 16  # workloads of one variant that are kept built; those of masks hold (seq, kv_seq) bools each
_STRIP = 1 << 22  # elements of a mask looked at at a time


Span: TypeAlias = tuple[int, int]
"""The first of an entry's keys that are no padding, and the one behind the last."""


@dataclass(frozen=True)
class _Seen:
    """What the queries of a forward pass see.

    spans: of each batch entry. problem: why it can't be told. first: causal: the key that came with the first query.
    """

    mask: Mask = _FULL
    spans: tuple[Span, ...] = ()
    problem: str = ""
    first: int = 0


class _Marked(Tensor):
    """What stands for a mask and knows what is `seen`; where a model takes a part of it, that does not."""

    seen: _Seen

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:  # which generate asks for with a static cache; it would take memory
            return args[0]
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func in (Tensor.to, Tensor.clone, Tensor.detach) and hasattr(args[0], "seen"):
            out.seen = args[0].seen
        return out


class _Variant:
    """A plugin, and what it built for the workloads that a model has come with."""

    def __init__(self, plugin: Plugin, spec: str) -> None:
        self.plugin, self.spec = plugin, spec
        self.built: Callable[[Workload], Callable[..., Tensor] | str] = lru_cache(_BUILT)(self._built)

    def _built(self, workload: Workload) -> Callable[..., Tensor] | str:
        """The call, or why there is none."""
        if self.plugin.gates(workload):
            return "it has gates, which a model with attention does not project"
        if reason := refusal(self.plugin, workload):
            return reason + ("; call the model under torch.no_grad()" if workload.trains else "")
        return built(self.plugin, workload).call


_registered: dict[str, _Variant] = {}


@only_whole()
def register(spec: str | Plugin) -> str:
    """Makes a variant known to transformers; gives the name for `model.set_attn_implementation(name)`.

    spec: as `--plugins` takes it, such as "int8:rows=32", or a plugin with its options set.

    Each layer's call builds the variant for the problem at hand (kept, as many as 16) with torch's number of threads: a
    forward pass, or where a gradient is wanted phase train. Entries of a padded batch are computed one by one, without
    their padding.
    A layer raises AttnbenchError for what the variant can't do, and for what no variant does: a mask that is neither
    causal nor full with padding at one end, dropout, a bias on the scores, attention weights as output.

    Raises:
        AttnbenchError: the spec names no plugin or several, or transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise AttnbenchError(f"could not import transformers ({error}); pip install transformers") from None
    plugin = registry.create(spec) if isinstance(spec, str) else spec
    own = spec if isinstance(spec, str) else _canonical(spec)
    name, number = _name(own), 2
    while (known := _registered.get(name)) and (type(known.plugin), known.spec) != (type(plugin), own):
        name, number = f"{_name(own)}-{number}", number + 1
    if known is None or not isinstance(spec, str):
        _registered[name] = _Variant(plugin, own)
    AttentionInterface.register(name, partial(_attention, _registered[name]))
    AttentionMaskInterface.register(name, _mask)
    return name


def _canonical(plugin: Plugin) -> str:
    values: dict[str, Value] = {name: getattr(plugin, name) for name in plugin.options}
    return registry.canonical(type(plugin).__name__.lower(), values)


def _name(spec: str) -> str:
    for word in ("flash", "flex", "sdpa", "eager"):  # a name with one of these in it is taken for transformers' own
        spec = spec.replace(word, f"{word[:2]}_{word[2:]}")
    return "attnbench-" + spec.replace("|", "-")


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What transformers calls to make a mask: a tensor (batch, 1, q_length, kv_length) of one NaN, that knows `_Seen`.

    It is a tensor so that it passes wherever a mask does, and NaN so that nobody who adds it to scores overlooks it.

    mask_function: (batch index, head index, query position, key position) -> whether it is seen, of tensors.
    attention_mask: bool (batch, tokens so far), False for padding. local_size: of a window, if it is one.
    """
    first = int(q_offset) - kv_offset  # the key that came with the first query
    sizes = batch_size, q_length, kv_length
    mask = None if use_vmap else _pattern(mask_function, sizes, (int(q_offset), kv_offset), local_size, device)
    if mask is None:
        seen = _Seen(problem="a mask that is neither full nor causal nor a causal window")
    else:
        keys = min(first + q_length, kv_length) if mask.causal else kv_length
        seen = _Seen(mask, *_spans(attention_mask, batch_size, kv_offset, keys), first)
    nothing = torch.full((1,), torch.nan, device=device)
    marked = nothing.expand(batch_size, 1, q_length, kv_length).as_subclass(_Marked)
    marked.seen = seen
    return marked


def _pattern(
    function: Any, sizes: tuple[int, int, int], offsets: tuple[int, int], window: int | None, device: Any
) -> Mask | None:
    """The mask that a mask function of transformers stands for: found out by calling it, where it is no known one.

    sizes: batch, queries, keys. offsets: the positions of the first query and key.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if function is causal_mask_function:
        return Mask(causal=True)
    if function is bidirectional_mask_function:
        return _FULL
    batch, queries, keys = sizes
    entry = torch.arange(batch, device=device)[:, None, None, None]  # (batch, 1, 1, 1)
    head = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    row = torch.arange(offsets[0], offsets[0] + queries, device=device)[:, None]  # (queries, 1)
    key = torch.arange(offsets[1], offsets[1] + keys, device=device)  # (keys,)
    possible = [Mask(causal=True), *([Mask(causal=True, window=window)] if window else []), _FULL]
    for part in torch.split(row, max(1, _STRIP // (batch * keys))):
        shown = function(entry, head, part, key)  # what broadcasts to (batch, 1, rows, keys)
        possible = [mask for mask in possible if bool((mask.visible(part, key, 0) == shown).all())]
    return possible[0] if possible else None


def _spans(tokens: Tensor | None, batch: int, first: int, keys: int) -> tuple[tuple[Span, ...], str]:
    """The keys of each entry that are no padding, and what is wrong; tokens: bool (batch, tokens), or None."""
    if tokens is None:
        return ((0, keys),) * batch, ""
    spans = []
    for row in tokens[:, first : first + keys].bool().cpu():
        places = row.nonzero().flatten()
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if len(places) != stop - start:
            return (), "padding in the middle of a batch entry, where only its ends may be padded"
        spans.append((start, stop))
    return tuple(spans) if len(spans) == batch else tuple(spans) * batch, ""


_UNKNOWN = {
    "position_bias": "adds a bias to the scores",
    "cu_seq_lens_q": "packs several sequences into one entry",
    "indices": "chooses keys for each query",
    "block_indices": "chooses keys for each query",
    "block_table": "keeps its keys in pages",
}


def _attention(
    variant: _Variant,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: query (batch, heads, length, head_dim), key and value (batch, kv_heads, kv_length, ..).

    softcap: as `Workload.softcap`. s_aux, sinks: two names of the sinks' logits (heads,).

    Returns:
        (batch, length, heads, value_dim), and None for the weights.
    """
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"

    def can_not(what: str) -> AttnbenchError:
        return AttnbenchError(f"{variant.spec} in {layer}: {what}")

    seen = _read(attention_mask, module, is_causal, query, key)
    if problem := asked_in_vain(module, dropout, kwargs) or seen.problem:
        raise can_not(problem)
    sinks = s_aux if sinks is None else sinks
    if scaling is None or math.isclose(scaling, query.shape[3] ** -0.5, rel_tol=1e-6):
        scaling = 0.0
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if wants_gradient and sinks is not None:
        raise can_not("a gradient through attention sinks, which no variant has; call the model under torch.no_grad()")
    one = Workload(
        seq=1, kv_seq=1, heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=str(query.dtype).removeprefix("torch."), device=query.device.type,
        softmax_scale=scaling, softcap=softcap or 0.0, sinks=sinks is not None,
        phase="train" if wants_gradient else "forward", threads=torch.get_num_threads(),
    )  # fmt: skip
    more = () if sinks is None else (sinks,)

    def attend(mask: Mask, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        workload = one.replace(batch=query.shape[0], seq=query.shape[2], kv_seq=key.shape[2], mask=str(mask))
        call = variant.built(workload)
        if isinstance(call, str):
            raise can_not(f"{call} ({workload.label()})")
        return call(query, key, value, *more)

    out = _entries(seen, query, key, value, attend)  # (batch, heads, length, value_dim)
    return out.transpose(1, 2).contiguous(), None


def asked_in_vain(module: torch.nn.Module, dropout: float, given: Mapping[str, Any]) -> str | None:
    """What a model asks for that no variant has."""
    if dropout:
        return f"dropout of {dropout} on the weights, which no variant has; set the model's to 0 or eval()"
    if given.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return "attention weights as output, which no variant gives; use eager attention for them"
    asked = (name for name in _UNKNOWN if given.get(name) is not None)
    return next((f"the model {_UNKNOWN[name]} ({name}), which no variant does" for name in asked), None)


def _read(mask: Tensor | None, module: torch.nn.Module, is_causal: bool | None, query: Tensor, key: Tensor) -> _Seen:
    """What is seen by the mask that a layer gets."""
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None:
        seen: _Seen | None = getattr(mask, "seen", None)
        if seen is None:
            return _Seen(problem="a mask that the model made or changed itself")
        return seen if mask.shape[-1] == keys else _Seen(problem=f"a mask of {mask.shape[-1]} keys on {keys}")
    causal = length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and length != keys:
        return _Seen(problem=f"{length} queries on {keys} keys, causal without a mask that says which")
    return _Seen(Mask(causal=causal), ((0, keys),) * batch)


Attend: TypeAlias = Callable[[Mask, Tensor, Tensor, Tensor], Tensor]
"""(mask, query, key, value) of some rows and keys -> their output; the mask is aligned bottom-right."""


def _entries(seen: _Seen, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
    """The output of all entries: those of a batch without padding at once, otherwise one by one without theirs."""
    if len(set(seen.spans)) == 1:
        return _entry(seen, seen.spans[0], query, key, value, attend)
    each = (slice(b, b + 1) for b in range(len(query)))
    return torch.cat([_entry(seen, seen.spans[b.start], query[b], key[b], value[b], attend) for b in each])


def _entry(seen: _Seen, span: Span, query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
    """Padding that asks as a query gets 0 where the mask is causal. In a full one it gets what it asks for, apart from
    the others, as nothing tells self-attention from attention to another sequence, of which it would be no padding."""
    (start, stop), mask, length = span, seen.mask, query.shape[2]
    if mask.causal:
        rows = slice(max(0, start - seen.first), max(0, min(length, stop - seen.first)))
        if mask.window:  # the first query sees no key before
            start = max(start, seen.first + rows.start + 1 - mask.window)
            mask = mask if mask.window < stop - start else Mask(causal=True)
    else:
        rows = slice(0, length) if length != key.shape[2] else slice(start, stop)
    key, value = key[:, :, start:stop], value[:, :, start:stop]  # (batch, kv_heads, keys, ..)
    if stop <= start or rows.stop <= rows.start:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    if rows == slice(0, length):
        return attend(mask, query, key, value)
    before, own, behind = query[:, :, : rows.start], query[:, :, rows], query[:, :, rows.stop :]
    out = attend(mask, own, key, value)
    sizes = [before.shape[2], behind.shape[2]]
    if mask.causal:
        rest = [query.new_zeros(*query.shape[:2], size, value.shape[3]) for size in sizes]
    else:
        pieces = torch.split(torch.cat([before, behind], 2), key.shape[2], 2)  # no more queries than keys
        rest = list(torch.split(torch.cat([attend(mask, piece, key, value) for piece in pieces], 2), sizes, 2))
    return torch.cat([rest[0], out, rest[1]], 2)
