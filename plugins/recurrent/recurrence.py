"""What the recurrent variants share: tokens in chunks, decoding from a state, the scalar decay, and fla's kernels.

A variant is S_t = decay_t S_{t-1} + k_t v_t^T, perhaps with more to it, and out_t = q_t S_t. In chunks, the state goes
from one chunk to the next, and inside a chunk every query reads every earlier key at once (Hua et al. 2022,
"Transformer Quality in Linear Time", section 3.2; with decays Sun et al. 2023, "Retentive Network", equation 7).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from attnbench.plugin import Attention, Choice, Decoding, Implementation, Option, Recurrence
from attnbench.workload import Workload

Run: TypeAlias = Callable[..., tuple[Any, Tensor]]
"""(state, query or None, key, value, *gates) -> (out, state)."""

FEW = 16  # new tokens up to which a decoding step takes fla's kernel without chunks


class Recurrent(Choice):
    """A recurrence in float32, whatever the dtype of the inputs; its state is all that it keeps of the past.

    `impl=fla` is flash-linear-attention's Triton kernels, `impl=torch` plain torch; `impl=auto` is fla's where they can
    run. A variant gives `terms` and, where its state decays by more than a scalar, `advance`.
    """

    family: ClassVar[str] = "recurrent"
    options: ClassVar[Mapping[str, Option]] = {
        "chunk": Option(0, "torch: tokens at a time; 0: 64"),
        "impl": Option("auto", "what computes it", ("auto", "torch", "fla")),
    }
    chunk: int

    kernel: ClassVar[str] = "simple_gla"
    """The recurrence's name in fla.ops."""

    def terms(self, workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
        """(key, value, *gates) -> the k_t and v_t that enter the state, its log decay, and what else `advance` needs.

        All for any number of tokens; gates in float32.
        """
        raise NotImplementedError

    def definition(self, workload: Workload) -> Recurrence:
        raise NotImplementedError

    def advance(self, state: Tensor, query: Tensor | None, *terms: Tensor) -> tuple[Tensor | None, Tensor]:
        """One chunk: what its queries read, and the state behind it. See `decayed` for the shapes."""
        key, value, decay = terms
        return decayed(state, query, key, value, *left(decay))

    def handed(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """What fla's kernels get, in order and by name, of queries and terms that are in their layout."""
        decay, *beta = rest
        return (query, key, value, decay), {"beta": beta[0]} if beta else {}

    def supports(self, workload: Workload) -> str | None:
        if self.chunk < 0:
            return "chunk must be at least 0"
        if not workload.is_causal:
            return "a recurrence runs forward: --mask causal"
        return super().supports(workload)

    def implementations(self, workload: Workload) -> Sequence[Implementation]:
        return (
            _implementation("fla", self._fla, unsupported=self._no_fla),
            _implementation("torch", self._torch, workspace_bytes=self._torch_bytes),
        )

    def flops(self, workload: Workload) -> int:
        """Multiplications and additions of the matrix products: the state made and read, and the chunks' own scores."""
        w = workload
        tokens, rows, length = self._sizes(w)
        return 2 * (tokens + rows) * w.head_dim * w.value_dim + 2 * rows * length * (w.head_dim + w.value_dim)

    def _torch_bytes(self, workload: Workload) -> int | None:
        """Three states, what a chunk holds in float32, and the chunks' outputs until they are joined."""
        w = workload
        if w.phase == "train":
            return None
        length, dims = self._sizes(w)[2], w.head_dim + w.value_dim
        states = 3 * w.kv_heads * w.head_dim * w.value_dim
        # Each in float32, decayed, and as a step on the way to either; so with the scores and decays between them.
        held = 4 * (w.heads + w.kv_heads) * length * (dims + length)
        return w.batch * (4 * (states + held) + w.heads * w.seq * w.value_dim * w.itemsize)

    def _sizes(self, workload: Workload) -> tuple[int, int, int]:
        """Tokens that enter a call's states, query rows that read one, and tokens of a chunk."""
        w = workload
        new = w.kv_seq - w.past
        return w.batch * w.kv_heads * new, w.batch * w.heads * w.seq, min(self._step, new)

    @property
    def _step(self) -> int:
        return self.chunk or 64

    def _no_fla(self, workload: Workload) -> str | None:
        if workload.device != "cuda":
            return "fla's kernels are for CUDA"
        if self.chunk:
            return "fla's kernels choose their own chunk"
        if workload.group > 1 or workload.head_dim > 256:
            return "fla's kernels are for as many kv heads as heads, and head_dim up to 256"
        try:
            import_module("fla.ops")
        except (ImportError, OSError) as error:
            return f"fla-core can't be imported: {error}"
        return None

    def _torch(self, workload: Workload) -> tuple[Run, str]:
        w, terms, definition = workload, self.terms(workload), self.definition(workload)

        def one(state: Tensor, query: Tensor, *tokens: Tensor) -> tuple[Tensor, Tensor]:
            key, value, *gates = (x.float().squeeze(2) for x in tokens)  # (batch, kv_heads, ..)
            state = definition.update(state, definition.key(key), value, *gates)  # (.., head_dim, value_dim)
            q = definition.query(query.float()).squeeze(2).unflatten(1, (w.kv_heads, w.group))  # (.., group, head_dim)
            out = q @ state  # (batch, kv_heads, group, value_dim)
            return out.to(query.dtype).flatten(1, 2).unsqueeze(2), state

        def run(state: Tensor, query: Tensor | None, *tokens: Tensor) -> tuple[Tensor | None, Tensor]:
            if query is not None and query.shape[2] == 1:  # less work than a chunk of one token
                return one(state, query, *tokens)
            # split, not slices: its gradient is one concatenation, theirs a whole tensor of zeros for each chunk.
            parts = list(zip(*(x.split(self._step, 2) for x in tokens), strict=True))
            queries: Sequence[Tensor | None] = [None] * len(parts)
            if query is not None:
                queries = query.unflatten(1, (w.kv_heads, w.group)).split(self._step, 3)  # (.., group, length, ..)
            outs = []
            for q, part in zip(queries, parts, strict=True):
                rows = None if q is None else definition.query(q.float()).transpose(2, 3).flatten(2, 3)
                out, state = self.advance(state, rows, *terms(*(x.float() for x in part)))  # (.., rows, value_dim)
                if out is not None:
                    outs.append(out.unflatten(2, (-1, w.group)).transpose(2, 3).to(tokens[0].dtype))
            return torch.cat(outs, 3).flatten(1, 2) if outs else None, state  # (batch, heads, seq, value_dim)

        asked = " (as asked)" if self.impl == "torch" else ""
        return run, f"plain torch, chunks of {self._sizes(w)[2]}{asked}"

    def _fla(self, workload: Workload) -> tuple[Run, str]:
        w, terms, phi = workload, self.terms(workload), self.definition(workload).query
        module = import_module(f"fla.ops.{self.kernel}")
        chunked, one_by_one = (getattr(module, f"{how}_{self.kernel}") for how in ("chunk", "fused_recurrent"))

        def run(state: Tensor, query: Tensor | None, *tokens: Tensor) -> tuple[Any, Tensor]:
            key, value, *gates = tokens
            k, v, *rest = terms(key, value, *(x.float() for x in gates))
            q = k if query is None else phi(query)  # an output that nobody reads may be anything
            # In fla's layout, (batch, length, heads, ..).
            q, k, v = (x.to(key.dtype).transpose(1, 2) for x in (q, k, v))
            given, named = self.handed(q, k, v, *(x.transpose(1, 2) for x in rest))
            # What takes one token after the other has no backward pass everywhere.
            kernel = one_by_one if w.phase == "decode" and key.shape[2] <= FEW else chunked
            out, state = kernel(*given, **named, scale=1.0, initial_state=state, output_final_state=True)
            return out.transpose(1, 2), state

        return run, f"fla-core {version('fla-core')} {self.kernel}"


def _implementation(name: str, make: Callable[[Workload], tuple[Run, str]], **says: Any) -> Implementation:
    """What `make` returns, a run and its name, as a call over all tokens and as decoding from a state."""

    def build(workload: Workload) -> Attention:
        run, how = make(workload)

        def call(query: Tensor, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
            offset, new = key.shape[2] - query.shape[2], query.shape[2]
            past, own = zip(*(x.split((offset, new), 2) for x in (key, value, *gates)), strict=True)
            return run(_behind(run, *past), query, *own)[0]

        return Attention(call, how)

    def decoding(workload: Workload) -> Decoding:
        run, how = make(workload)

        def start(key: Tensor, value: Tensor, *gates: Tensor, capacity: int) -> tuple[Tensor]:
            return (_behind(run, key, value, *gates),)  # as large for any capacity

        def step(state: tuple[Tensor], query: Tensor, *tokens: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            out, after = run(state[0], query, *tokens)
            return out, (after,)

        return Decoding(start, step, how)

    return Implementation(name, build, decoding=decoding, **says)


def _behind(run: Run, key: Tensor, value: Tensor, *gates: Tensor) -> Tensor:
    """The state behind these tokens, of which there may be none: (batch, kv_heads, head_dim, value_dim) float32."""
    state = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1], dtype=torch.float32)
    return run(state, None, key, value, *gates)[1] if key.shape[2] else state


def decayed(
    state: Tensor, query: Tensor | None, key: Tensor, value: Tensor, since: Tensor, between: Tensor
) -> tuple[Tensor | None, Tensor]:
    """One chunk of S_t = exp(decay_t) S_{t-1} + k_t v_t^T: q_t S_t for each of its tokens, and the last S_t.

    state: (batch, kv_heads, head_dim, value_dim).
    query: (batch, kv_heads, length * group, head_dim), a token's group of heads together; None where nothing is read.
    key, value: (batch, kv_heads, length, ..). since, between: what `left` makes of the decay.
    """
    last = between[:, :, -1:].mT  # what is left of each token at the end: (batch, kv_heads, length, 1)
    after = since[:, :, -1:] * state + (key * last).mT @ value  # (batch, kv_heads, head_dim, value_dim)
    if query is None:
        return None, after
    scores = times(query @ key.mT, between)  # (batch, kv_heads, length * group, length)
    return scores @ value + times(query, since) @ state, after  # (batch, kv_heads, length * group, value_dim)


def left(decay: Tensor) -> tuple[Tensor, Tensor]:
    """What is left at token i of the state before the chunk (.., length, 1), and of token j (.., length, length).

    decay: (.., length), the logarithm, at most 0. Of a j behind i nothing is. The sums from j to i are made one by one:
    as differences of two sums from the first token they would lose their digits behind a strong decay.
    """
    length = decay.shape[-1]
    sums = decay.unsqueeze(-1).expand(*decay.shape, length).tril(-1).cumsum(-2)  # (.., length, length)
    return decay.cumsum(-1).exp().unsqueeze(-1), sums.exp().tril()


def times(rows: Tensor, factor: Tensor) -> Tensor:
    """Query rows (.., length * group, n) times their token's factor (.., length, n or 1)."""
    return (rows.unflatten(-2, (factor.shape[-2], -1)) * factor.unsqueeze(-2)).flatten(-3, -2)


def outer(key: Tensor, value: Tensor) -> Tensor:
    """k v^T: (batch, kv_heads, head_dim, value_dim)."""
    return key.unsqueeze(-1) * value.unsqueeze(-2)


def rates(workload: Workload) -> tuple[Tensor, Tensor]:
    """Mamba-2's A and dt_bias (kv_heads, 1) float64, as it begins: A in [1, 16], softplus(dt_bias) in [0.001, 0.1].

    It draws A uniformly and log softplus(dt_bias) too; here the heads stand evenly over both, so that they differ
    alike in every run.
    """
    at = evenly(workload.kv_heads, workload).unsqueeze(-1)  # (kv_heads, 1)
    return 1 + 15 * at, step_bias(at)


def evenly(n: int, workload: Workload) -> Tensor:
    """n numbers evenly between 0 and 1, float64 (n,)."""
    return (torch.arange(n, dtype=torch.float64, device=workload.device) + 0.5) / n


def step_bias(at: Tensor) -> Tensor:
    """Mamba-2's dt_bias at this share of its range."""
    dt = 0.001 * 100**at
    return dt.expm1().log()  # softplus(log(exp(dt) - 1)) = dt
