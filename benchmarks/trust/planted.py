"""The kernel that the proofs measure: alone in its file, since every worker imports it."""

import torch

from attnbench.plugin import Option, Plugin
from attnbench.workload import Workload


class Planted(Plugin):
    """torch's attention with `extra` per cent of the query rows computed a second time."""

    options = {"extra": Option(0.0, "per cent of the rows computed twice")}  # noqa: RUF012
    extra: float

    def build(self, workload: Workload):  # type: ignore[no-untyped-def]
        attend = torch.nn.functional.scaled_dot_product_attention
        again = round(workload.seq * self.extra / 100)

        def call(query, key, value):  # type: ignore[no-untyped-def]
            out = attend(query, key, value)
            if again:
                attend(query[:, :, :again], key, value)
            return out

        return call
