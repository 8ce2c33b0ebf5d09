"""Which attention a loaded model computes with: its own exact one, or a variant's, in all layers or in those without a
sliding window."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnbench import hf
from attnbench.errors import AttnbenchError
from attnbench.models.loading import Loaded
from attnbench.plugin import Plugin

EXACT = "sdpa"
"""transformers' name of torch's scaled_dot_product_attention."""


class Attending:
    """A variant in a model. `name` is what `use` takes for it; `layers` says in how many it computes."""

    def __init__(self, loaded: Loaded, plugin: Plugin) -> None:
        self.model = loaded.model
        self.whole = self.name = hf.register(plugin)
        self.layers = loaded.layers
        kinds = getattr(loaded.config, "layer_types", None) or []
        self._full = sum(kind == "full_attention" for kind in kinds)

    def use(self, name: str) -> None:
        """From here on the model attends by this name: `EXACT`, or `self.name`."""
        self.model.set_attn_implementation(name)

    def spare_windows(self, problem: AttnbenchError) -> None:
        """Leaves layers with a sliding window to exact attention, for a variant that can't do them.

        Raises:
            AttnbenchError: the problem, where the model has no such layers, or has no others, or has been spared them.
        """
        if not 0 < self._full < self.layers or self.name != self.whole:
            raise problem
        self.name, self.layers = _beside_windows(self.whole), self._full


def _beside_windows(name: str) -> str:
    """Registers an attention that is `name` where a layer sees all keys, and exact where it sees a window of them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import causal_mask_function

    attend, attend_exactly = AttentionInterface()[name], AttentionInterface()[EXACT]
    mask, exact_mask = AttentionMaskInterface()[name], AttentionMaskInterface()[EXACT]

    def masked(*args: Any, mask_function: Any = causal_mask_function, **kwargs: Any) -> Tensor | None:
        of_all = mask_function is causal_mask_function
        # Without a mask the layer would be taken for causal over all keys.
        kwargs |= {} if of_all else {"allow_is_causal_skip": False}
        made: Tensor | None = (mask if of_all else exact_mask)(*args, mask_function=mask_function, **kwargs)
        return made

    def attention(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        chosen = attend if kwargs.get("sliding_window") is None else attend_exactly
        out: tuple[Tensor, None] = chosen(module, *args, **kwargs)
        return out

    mixed = f"{name}-beside-windows"
    AttentionInterface.register(mixed, attention)
    AttentionMaskInterface.register(mixed, masked)
    return mixed
