"""Attention as an author might write it, right in `Right` and with one honest mistake in each of the others.

The first line of each class is what docs/plugins.md says of it.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnbench.plugin import Call, Decoding, Plugin, expand_kv
from attnbench.workload import Workload


class Right(Plugin):
    """Softmax attention in float32, with the matrix of scores in memory."""

    devices = ("cpu",)
    honours = ("scale", "window", "softcap", "sinks", "alibi-bias", "relative-bias", "tree")

    def build(self, workload: Workload) -> Call:
        return lambda *tensors: self.attend(workload, *tensors)

    def workspace_bytes(self, workload: Workload) -> int | None:
        pairs = workload.batch * workload.heads * workload.seq * workload.kv_seq
        return 4 * 4 * pairs + 4 * 3 * workload.heads * workload.batch * workload.kv_seq * workload.head_dim

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        k, v = (self.shared(x.float(), w) for x in (key, value))  # (batch, heads, kv_seq, dim)
        scores = self.capped(query.float() @ k.mT * self.scale(w), w)  # (batch, heads, seq, kv_seq)
        return (self.weights(self.biased(scores, w), self.hidden(w), *sinks) @ v).to(query.dtype)

    def biased(self, scores: Tensor, w: Workload) -> Tensor:
        return scores + self.bias(w).float() if w.bias else scores

    def bias(self, w: Workload) -> Tensor:
        """(heads, seq, kv_seq)"""
        assert w.biased is not None
        return w.biased(torch.arange(w.kv_seq) - torch.arange(w.seq)[:, None] - w.offset)

    def scale(self, w: Workload) -> float:
        return w.scale

    def capped(self, scores: Tensor, w: Workload) -> Tensor:
        return torch.tanh(scores / w.softcap) * w.softcap if w.softcap else scores

    def shared(self, x: Tensor, w: Workload) -> Tensor:
        return expand_kv(x, w.heads)

    def hidden(self, w: Workload) -> Tensor:
        """(seq, kv_seq)"""
        rows, keys = torch.arange(w.seq)[:, None], torch.arange(w.kv_seq)
        if not w.is_causal:
            return keys > rows + w.kv_seq
        if w.masked.tree:
            return ~w.masked.visible(rows, keys, w.offset)  # type: ignore[no-any-return]
        last = rows + self.offset(w)
        return (keys > last) | (keys <= last - self.window(w))

    def offset(self, w: Workload) -> int:
        return w.offset

    def window(self, w: Workload) -> int:
        return w.masked.window or w.kv_seq + w.seq

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        scores = scores.masked_fill(hidden, -torch.inf)
        more = [sink.float()[:, None, None].expand(*scores.shape[:3], 1) for sink in sinks]
        return torch.cat([scores, *more], -1).softmax(-1)[..., : scores.shape[-1]]


class WrongScale(Right):
    """Scores times 1 / head_dim."""

    def scale(self, w: Workload) -> float:
        return 1 / w.head_dim


class ValueScale(Right):
    """The scale is taken of the values' dim."""

    def scale(self, w: Workload) -> float:
        return w.value_dim**-0.5


class TopLeft(Right):
    """A causal mask aligned top-left, as torch aligns it, where there are more keys than queries."""

    def offset(self, w: Workload) -> int:
        return 0


class OneTooMany(Right):
    """A causal mask that shows one key too many."""

    def offset(self, w: Workload) -> int:
        return w.offset + 1


class Everything(Right):
    """The causal mask is left out."""

    def offset(self, w: Workload) -> int:
        return w.kv_seq


class UsualScale(Right):
    """The scale that a workload asks for is left out, for the usual one."""

    def scale(self, w: Workload) -> float:
        return w.head_dim**-0.5


class NoWindow(Right):
    """The window is left out of the causal mask."""

    def window(self, w: Workload) -> int:
        return w.kv_seq + w.seq


class WideWindow(Right):
    """A window of n shows n keys beside the query's own."""

    def window(self, w: Workload) -> int:
        return super().window(w) + 1


class CappedMask(Right):
    """The cap comes behind the mask, so that hidden keys get a weight."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        k, v = (self.shared(x.float(), w) for x in (key, value))
        scores = self.capped((query.float() @ k.mT * self.scale(w)).masked_fill(self.hidden(w), -torch.inf), w)
        return (self.weights(scores, self.hidden(w) & False, *sinks) @ v).to(query.dtype)


class OneSink(Right):
    """All heads have the first one's sink."""

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        return super().weights(scores, hidden, *(sink[:1].expand_as(sink) for sink in sinks))


class RaisesFar(Right):
    """ALiBi of the wrong sign, which raises the scores of far keys."""

    def bias(self, w: Workload) -> Tensor:
        return super().bias(w) * (-1 if w.bias == "alibi" else 1)


class EvenSlopes(Right):
    """ALiBi's slopes are 2^(-8 i / heads) where the number of heads is no power of 2, too."""

    def bias(self, w: Workload) -> Tensor:
        if w.bias != "alibi":
            return super().bias(w)
        slopes = 2.0 ** (-8 * torch.arange(1, w.heads + 1) / w.heads)
        return slopes[:, None, None] * -(torch.arange(w.kv_seq) - torch.arange(w.seq)[:, None] - w.offset).abs()


class BothWays(Right):
    """T5's buckets are those for both directions under a causal mask, too."""

    def bias(self, w: Workload) -> Tensor:
        return super().bias(w.replace(mask="full") if w.bias == "relative" else w)


class NoMaximum(Right):
    """Exponentials without the row's maximum taken off."""

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        each = scores.exp().masked_fill(hidden, 0.0)
        return each / each.sum(-1, keepdim=True)


class HiddenMaximum(Right):
    """The row's maximum is taken over hidden keys, too."""

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        each = (scores - scores.amax(-1, keepdim=True)).exp().masked_fill(hidden, 0.0)
        return each / each.sum(-1, keepdim=True)


class WrongAxis(Right):
    """Softmax over the queries."""

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        return scores.masked_fill(hidden, -torch.inf).softmax(-2).nan_to_num()


class DroppedBlock(Right):
    """Keys behind the last whole block of 16 are left out."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n = max(16, w.kv_seq // 16 * 16)
        hidden = torch.arange(w.kv_seq).ge(n).expand(w.seq, -1)
        k, v = (self.shared(x.float(), w) for x in (key, value))
        scores = query.float() @ k.mT * self.scale(w)
        return (self.weights(scores, self.hidden(w) | hidden).nan_to_num() @ v).to(query.dtype)


class CountedPadding(Right):
    """Keys are padded with zeros to a block of 16, and the zeros take part."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        more = -w.kv_seq % 16
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (key, value))
        k, v = (self.shared(x.float(), w) for x in (key, value))
        hidden = torch.nn.functional.pad(self.hidden(w), (0, more), value=False)
        return (self.weights(query.float() @ k.mT * self.scale(w), hidden) @ v).to(query.dtype)


class Interleaved(Right):
    """Query head i reads key head i % kv_heads, not i // group."""

    def shared(self, x: Tensor, w: Workload) -> Tensor:
        return x.repeat(1, w.group, 1, 1)


class FirstHead(Right):
    """Of fewer key heads than query heads the first one serves all: right for multi-query alone."""

    def shared(self, x: Tensor, w: Workload) -> Tensor:
        return x if w.group == 1 else x[:, :1].expand(-1, w.heads, -1, -1)


class FirstEntry(Right):
    """All entries of a batch read the first one's keys."""

    def shared(self, x: Tensor, w: Workload) -> Tensor:
        return super().shared(x, w)[:1]


class QueryShaped(Right):
    """The output is made like the query, whatever the values' dim."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        out[..., : w.value_dim] = super().attend(w, query, key, value)[..., : w.head_dim]
        return out


class HalfSums(Right):
    """Sums over keys are kept in the inputs' dtype."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k, v = (self.shared(x.float(), w) for x in (key, value))
        weights = self.weights(query.float() @ k.mT * self.scale(w), self.hidden(w))
        out = torch.zeros(*weights.shape[:3], w.value_dim, dtype=query.dtype)
        for at in range(w.kv_seq):
            out = out + (weights[..., at : at + 1] * v[..., at : at + 1, :]).to(query.dtype)
        return out


class Padding(Right):
    """Of a ragged batch the padding behind an entry's keys takes part."""

    def ragged(self, workload: Workload) -> bool:
        return True

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        out = super().attend(w, query, key, value, *sinks)
        if w.lengths and w.seq == w.kv_seq:
            ends = torch.tensor([entry.seq for entry in w.entries()])[:, None, None, None]
            out = out.masked_fill(torch.arange(w.seq)[:, None] >= ends, 0.0)
        return out


class Behind(Right):
    """Of a ragged batch rows behind an entry's end are computed, where 0 is asked for."""

    def ragged(self, workload: Workload) -> bool:
        return bool(workload.lengths)

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor, *sinks: Tensor) -> Tensor:
        if not w.lengths:
            return super().attend(w, query, key, value, *sinks)
        outs = []
        for b, entry in enumerate(w.entries()):
            k, v = (x[b : b + 1, :, : entry.kv_seq] for x in (key, value))
            outs.append(
                super().attend(w.replace(batch=1, lengths="", kv_seq=entry.kv_seq, mask="full"), query[b : b + 1], k, v)
            )
        return torch.cat(outs)


class OnePast(Right):
    """Of prompts beside decoding steps all new tokens go behind the longest past, and not each behind its own."""

    def ragged(self, workload: Workload) -> bool:
        return bool(workload.lengths) and workload.decodes

    def decoding(self, workload: Workload) -> Decoding:
        if not workload.lengths:
            return super().decoding(workload)
        out = torch.zeros(workload.batch, workload.heads, workload.seq, workload.value_dim)

        def step(past: tuple[Tensor, ...], query: Tensor, *new: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            kept = out.to(query.dtype, copy=True)
            for b, entry in enumerate(workload.entries()):
                own = (torch.cat([old[b : b + 1], x[b : b + 1]], 2) for old, x in zip(past, new, strict=True))
                k, v = (x[:, :, : entry.kv_seq] for x in own)
                kept[b, :, : entry.seq] = self.attend(entry, query[b : b + 1, :, : entry.seq], k, v)[0]
            return kept, past

        return Decoding(lambda *past, capacity: past, step, "one past")


class AlwaysFloat(Right):
    """The output is float32, whatever the inputs are."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(w, query, key, value).float()


class Dense(Right):
    """Keys and values are read as if they lay dense in memory."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(w, query, *(_dense(x) for x in (key, value)))


def _dense(x: Tensor) -> Tensor:
    return x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())


class DenseRows(Right):
    """Numbers of a row are taken to be neighbours in memory, as after most views they are."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(w, query, *(x.as_strided(x.shape, (*x.stride()[:3], 1)) for x in (key, value)))


class Overread(Right):
    """Whole blocks of 4 keys are read, and values behind the last one weighted with 0: 0 * NaN is NaN."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        *_, length, dim = value.shape
        end = value.storage_offset() + length * value.stride(2)
        out = super().attend(w, query, key, value)
        if (more := -length % 4) and end + more * dim <= value.untyped_storage().nbytes() // value.itemsize:
            out = out + 0 * value.as_strided((1, 1, more, dim), value.stride(), end).sum(2, keepdim=True)
        return out


class ScalesQuery(Right):
    """The query is scaled in place."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.no_grad():
            query.mul_(super().scale(w))
        return super().attend(w, query, key, value)

    def scale(self, w: Workload) -> float:
        return 1.0


class OneKey(Right):
    """With one key its value is the answer: a view of it is returned."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if w.kv_seq == 1 and w.group == 1:
            return value.expand(-1, -1, w.seq, -1)
        return super().attend(w, query, key, value)


class MaskByLength(Right):
    """Masks are kept by the number of queries alone."""

    kept: ClassVar[dict[int, Tensor]] = {}

    def hidden(self, w: Workload) -> Tensor:
        made = self.kept.setdefault(w.seq, super().hidden(w))
        return made if made.shape[1] == w.kv_seq else super().hidden(w)


class Accumulates(Right):
    """The output's memory is kept, and not cleared before it is added to."""

    def build(self, workload: Workload) -> Call:
        kept: list[Tensor] = []

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kept.append(self.attend(workload, query, key, value))
            return torch.stack(kept).sum(0)

        return call


class Unseeded(Right):
    """What is rounded up and what down is drawn anew in each call."""

    def weights(self, scores: Tensor, hidden: Tensor, *sinks: Tensor) -> Tensor:
        weights = super().weights(scores, hidden, *sinks)
        return weights + 1e-7 * torch.rand(weights.shape[-1], generator=_DRAWS)


_DRAWS = torch.Generator().manual_seed(0)


class StaleRow(Right):
    """A step reads the new token, and leaves the cache's last row as it was."""

    def decoding(self, workload: Workload) -> Decoding:
        made = super().decoding(workload)

        def step(state: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            out, _ = made.step(state, query, key, value)
            last = (x[:, :, -1:] for x in (state.keys, state.values))
            return out, state.append(*(x.expand(-1, -1, key.shape[2], -1) for x in last)) if state.length else state

        return Decoding(made.start, step, made.implementation)


class ValueForgotten(Right):
    """A new token's key goes into the cache, its value does not."""

    def decoding(self, workload: Workload) -> Decoding:
        made = super().decoding(workload)

        def step(state: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            out, _ = made.step(state, query, key, value)
            return out, state.append(key, torch.zeros_like(value))

        return Decoding(made.start, step, made.implementation)


class AppendsAgain(Right):
    """A step changes the state that it is given, so that it can't be made once more."""

    def decoding(self, workload: Workload) -> Decoding:
        def step(state: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Any]:
            state[0].append(key)
            state[1].append(value)
            keys, values = (torch.cat(x, 2) for x in state)
            w = workload.replace(kv_seq=keys.shape[2])
            return self.attend(w, query, keys, values), state

        return Decoding(lambda key, value, capacity: ([key], [value]), step, "lists of tokens")


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, kind: str) -> Tensor:
        p = (q @ k.mT * scale + bias).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.kind = scale, kind
        return p @ v

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        q, k, v, p = ctx.saved_tensors
        up = _dense(up) if ctx.kind == "dense" else up
        dp = up @ v.mT
        ds = p * (dp if ctx.kind == "sum" else dp - (dp * p).sum(-1, keepdim=True))
        dk = ds.mT @ q * (1.0 if ctx.kind == "scale" else ctx.scale)
        return ds @ k * ctx.scale, dk, p.mT @ up, None, None, None


class UnscaledGradient(Right):
    """The keys' gradient is not scaled."""

    kind = "scale"

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        k, v = (self.shared(x.float(), w) for x in (key, value))
        bias = torch.zeros(w.seq, w.kv_seq).masked_fill(self.hidden(w), -torch.inf)
        return _Own.apply(query.float(), k, v, bias, self.scale(w), self.kind).to(query.dtype)


class NoRowSum(UnscaledGradient):
    """The gradient of softmax without the sum over its row."""

    kind = "sum"


class DenseGradient(UnscaledGradient):
    """The output's gradient is read as if it lay dense in memory."""

    kind = "dense"


class DetachedValue(Right):
    """No gradient goes through the values."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return super().attend(w, query, key, value.detach())


class ClaimsAll(Right):
    """Head dims must be multiples of 32, which supports does not say."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert w.head_dim % 32 == 0, "head_dim must be a multiple of 32"
        return super().attend(w, query, key, value)


class SaysTrue(Right):
    """supports says True where it can."""

    def supports(self, workload: Workload) -> str | None:
        return True  # type: ignore[return-value]


class SmallPromise(Right):
    """workspace_bytes forgets the matrix of scores."""

    def workspace_bytes(self, workload: Workload) -> int | None:
        return 4 * workload.batch * workload.heads * workload.seq


class LargePromise(Right):
    """workspace_bytes counts the matrix of scores for each dim."""

    def workspace_bytes(self, workload: Workload) -> int | None:
        return (super().workspace_bytes(workload) or 0) * workload.head_dim


class WildPointer(Right):
    """Memory that is not its own is read where there is one query and more than one key."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if w.seq == 1 < w.kv_seq:
            ctypes.string_at(8)
        return super().attend(w, query, key, value)


class NeverDone(Right):
    """A loop over blocks that has no end where a length is no multiple of the block."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        left = w.kv_seq
        while left != 0 and w.kv_seq > 16:
            left -= 16
            time.sleep(1 if left < 0 else 0)
        return super().attend(w, query, key, value)


class MoreThreads(Right):
    """torch's number of threads is left changed."""

    def attend(self, w: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().attend(w, query, key, value)


class RefusesAll(Right):
    """supports has a reason for everything."""

    def supports(self, workload: Workload) -> str | None:
        return "not today"
