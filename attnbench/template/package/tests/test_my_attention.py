"""A test for each case of `attnbench check`: shapes, dtypes, masks, extreme values, decoding, gradients and so on."""

from attnbench.conformance import Conformance


class TestMyAttention(Conformance):
    plugin = "my-attention"
