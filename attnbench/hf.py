"""Any variant as the attention of a transformers model: `model.set_attn_implementation(register("int8"))`.

transformers makes a mask once for a forward pass, by the function registered for the attention's name, and hands it to
each layer's attention. Here that function makes no matrix: it finds out which keys a query sees, as a pattern and for
each batch entry the keys that are no padding, and the attention builds the variant for the problem that this is.
transformers' own cache stays what it is: few queries on many keys are one forward pass, masked bottom-right.

Nothing that a model asks for is left out: what the variant can't honour is an error that names variant and layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from attnbench import registry
from attnbench.errors import AttnbenchError
from attnbench.packages import only_whole
from attnbench.plugin import Plugin, Value, built
from attnbench.task.promise import refusal
from attnbench.workload import Workload

__all__ = ["register"]

_BUILT = 16  # workloads of one variant that are kept built; those of masks hold (seq, kv_seq) bools each
_STRIP = 1 << 22  # elements of a mask looked at at a time


@dataclass(frozen=True)
class _Seen:
    """What the queries of a forward pass see.

    mask: as `Workload.mask`. spans: of each batch entry the first of its keys and the one behind its last.
    end: causal: the key behind the one that the last query sees, itself included. problem: why it is no such mask.
    """

    mask: str = "full"
    spans: tuple[tuple[int, int], ...] = ()
    end: int = 0
    problem: str = ""


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
    # transformers takes every name with "flash" in it for FlashAttention, and what is before a "|" for paging.
    return "attnbench-" + spec.replace("flash", "fl_ash").replace("|", "-")


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What transformers calls to make a mask: a tensor (batch, 1, q_length, kv_length) of one NaN, that knows `_Seen`.

    It is a tensor so that it passes wherever a mask does, and NaN so that nobody who adds it to scores overlooks it.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    end = int(q_offset) + q_length - kv_offset
    if mask_function is causal_mask_function:
        seen = _padded("causal", attention_mask, batch_size, kv_length, kv_offset, end)
    elif mask_function is bidirectional_mask_function:
        seen = _padded("full", attention_mask, batch_size, kv_length, kv_offset, kv_length)
    else:
        seen = _Seen(problem="a mask that is neither causal nor full")
    nothing = torch.full((1,), torch.nan, device=device)
    marked = nothing.expand(batch_size, 1, q_length, kv_length).as_subclass(_Marked)
    marked.seen = seen
    return marked


def _padded(mask: str, tokens: Tensor | None, batch: int, length: int, first: int, end: int) -> _Seen:
    """With the keys of each entry; tokens: bool (batch, at least up to the keys), False for padding, or None."""
    if tokens is None:
        return _Seen(mask, ((0, min(end, length)),) * batch, end)
    valid = tokens[:, first : first + min(end, length)].bool()  # (batch, keys)
    spans = []
    for row in valid.cpu():
        places = row.nonzero().flatten()
        start, stop = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
        if len(places) != stop - start:
            return _Seen(problem="padding in the middle of a batch entry, where only its ends may be padded")
        spans.append((start, stop))
    return _Seen(mask, tuple(spans) if len(spans) == batch else tuple(spans) * batch, end)


_UNKNOWN = {
    "position_bias": "adds a bias to the scores",
    "cu_seq_lens_q": "packs several sequences into one entry",
    "indices": "chooses keys for each query",
    "block_indices": "chooses keys for each query",
    "block_table": "keeps its keys in pages",
    "s_aux": "has attention sinks",
    "sinks": "has attention sinks",
    "softcap": "caps the scores",
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
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer calls: query (batch, heads, length, head_dim), key and value (batch, kv_heads, kv_length, ..).

    Returns:
        (batch, length, heads, value_dim), and None for the weights.
    """
    layer = f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"

    def can_not(what: str) -> AttnbenchError:
        return AttnbenchError(f"{variant.spec} in {layer}: {what}")

    if dropout:
        raise can_not(f"dropout of {dropout} on the weights, which no variant has; set the model's to 0 or eval()")
    if output_attentions or getattr(getattr(module, "config", None), "output_attentions", False):
        raise can_not("attention weights as output, which no variant gives; use eager attention for them")
    for name, what in _UNKNOWN.items():
        if kwargs.get(name) is not None:
            raise can_not(f"the model {what} ({name}), which it does not do")
    seen = _read(attention_mask, module, is_causal, query, key)
    if seen.problem:
        raise can_not(seen.problem)
    dtype = str(query.dtype).removeprefix("torch.")
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    one = Workload(
        seq=1, kv_seq=1, heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[3],
        value_dim=value.shape[3], dtype=dtype, device=query.device.type, mask=seen.mask,
        phase="train" if wants_gradient else "forward", threads=torch.get_num_threads(),
    )  # fmt: skip
    if scaling is not None:
        query = query * (scaling / one.scale)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        workload = one.replace(batch=query.shape[0], seq=query.shape[2], kv_seq=key.shape[2])
        call = variant.built(workload)
        if isinstance(call, str):
            raise can_not(f"{workload.label()}: {call}")
        return call(query, key, value)

    out = _entries(seen, query, key, value, attend)  # (batch, heads, length, value_dim)
    return out.transpose(1, 2).contiguous(), None


def _read(mask: Tensor | None, module: torch.nn.Module, is_causal: bool | None, query: Tensor, key: Tensor) -> _Seen:
    """What is seen by the mask that a layer gets."""
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None:
        seen: _Seen | None = getattr(mask, "seen", None)
        if seen is None:
            return _Seen(problem="a mask that the model made itself or changed")
        return seen if mask.shape[-1] == keys else _Seen(problem=f"a mask of {mask.shape[-1]} keys on {keys}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and length > 1 and length != keys:
        return _Seen(problem=f"{length} queries on {keys} keys, causal without a mask that says which")
    return _Seen("causal" if causal and length > 1 else "full", ((0, keys),) * batch, keys)


def _entries(
    seen: _Seen, query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The output of all entries: those of a batch without padding at once, otherwise one by one without theirs.

    Padding that asks as a query gets 0 where the mask is causal; in a full one it gets what it asks for, as it may be
    the query of another sequence than the keys'.
    """
    if len(set(seen.spans)) == 1:
        return _entry(seen, seen.spans[0], query, key, value, attend)
    outs = [
        _entry(seen, span, query[b : b + 1], key[b : b + 1], value[b : b + 1], attend)
        for b, span in enumerate(seen.spans)
    ]
    return torch.cat(outs)


def _entry(
    seen: _Seen, span: tuple[int, int], query: Tensor, key: Tensor, value: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    start, stop = span
    length = query.shape[2]
    first = seen.end - length if seen.mask == "causal" else 0  # the key that came with the first query
    whole = seen.mask == "full" and length != key.shape[2]  # of another sequence
    rows = slice(0, length) if whole else slice(max(0, start - first), max(0, min(length, stop - first)))
    key, value = key[:, :, start:stop], value[:, :, start:stop]  # (batch, kv_heads, keys, ..)
    if rows == slice(0, length) and stop > start:
        return attend(query, key, value)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    if stop > start and rows.stop > rows.start:
        out[:, :, rows] = attend(query[:, :, rows], key, value)
    if stop > start and seen.mask == "full":
        rest = torch.ones(length, dtype=torch.bool, device=query.device)
        rest[rows] = False
        out[:, :, rest] = attend(query[:, :, rest], key, value)
    return out
