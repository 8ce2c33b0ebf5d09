"""The contract: options, defaults, and the one definition of a causal mask."""

import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnbench import Attention, AttnbenchError, Option, Plugin, Softmax, Workload
from attnbench.plugin import Value, expand_kv, visible

OPTIONS = {
    "window": Option(256, "keys on each side"),
    "decay": Option(0.5, "weight of the past"),
    "fused": Option(True, "one kernel or two"),
    "pattern": Option("window", "which keys", choices=("window", "bigbird")),
    "block": Option(64, "rows a block", choices=(64, 128)),
}


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("window", "512", 512),
        ("window", "-1", -1),
        ("decay", "2", 2.0),
        ("decay", "1e-3", 0.001),
        ("fused", "false", False),
        ("fused", "True", True),
        ("pattern", "bigbird", "bigbird"),
        ("block", "128", 128),
    ],
)
def test_an_option_has_the_type_of_its_default(option: str, text: str, value: Value) -> None:
    found = OPTIONS[option].parse(text, option)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("option", "text", "said"),
    [
        ("window", "abc", "expected int, such as 256"),
        ("window", "1.5", "expected int, such as 256"),
        ("window", "", "expected int, such as 256"),
        ("window", "9" * 5000, "expected int, such as 256"),
        ("decay", "half", "expected float, such as 0.5"),
        ("decay", "nan", "expected float, such as 0.5"),
        ("decay", "-inf", "expected float, such as 0.5"),
        ("fused", "1", "expected bool, such as True"),
        ("pattern", "strided", "expected one of window, bigbird"),
        ("pattern", "a\nb", "expected one of window, bigbird"),
        ("block", "65", "expected one of 64, 128"),
    ],
)
def test_what_is_no_value_of_an_option(option: str, text: str, said: str) -> None:
    with pytest.raises(AttnbenchError) as caught:
        OPTIONS[option].parse(text, option)
    message = str(caught.value)
    assert message.startswith(f"option {option}=")
    assert message.endswith(said)
    assert "\n" not in message


@given(option=st.sampled_from(list(OPTIONS)), text=st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_text_is_a_value_or_a_line(option: str, text: str) -> None:
    try:
        value = OPTIONS[option].parse(text, option)
    except AttnbenchError as error:
        message = str(error)
    else:
        assert type(value) is type(OPTIONS[option].default)
        assert not isinstance(value, float) or math.isfinite(value)
        return
    assert len(message.splitlines()) == 1


class Windowed(Plugin):
    options: ClassVar = OPTIONS
    window: int

    def build(self, workload: Workload) -> Attention:
        return Attention(lambda query, key, value: query * self.window, "scaled", density=0.5)


def test_options_become_attributes() -> None:
    assert vars(Windowed()) == {name: option.default for name, option in OPTIONS.items()}
    assert vars(Windowed(window=8, fused=False)) == vars(Windowed()) | {"window": 8, "fused": False}
    built = Windowed(window=3).build(Workload(seq=1, kv_seq=1))
    assert built.call(torch.ones(1), torch.ones(1), torch.ones(1)) == 3


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Windowed, "no option 'windw'; options are: window, decay, fused, pattern, block"),
        (Plugin, "no option 'windw'; options are: none"),
    ],
)
def test_an_unknown_option_names_those_that_are(kind: type[Plugin], said: str) -> None:
    with pytest.raises(AttnbenchError) as caught:
        kind(windw=8)
    assert str(caught.value) == said


def test_a_plugin_that_writes_nothing_is_exact_and_can_do_all() -> None:
    plugin, w = Plugin(), Workload(seq=4, kv_seq=4)
    assert (plugin.family, plugin.devices, dict(plugin.options)) == ("exact", ("cpu", "cuda"), {})
    assert (plugin.supports(w), plugin.workspace_bytes(w), plugin.flops(w)) == (None, None, None)
    assert plugin.definition(w) == Softmax()
    with pytest.raises(NotImplementedError, match="Plugin has no build"):
        plugin.build(w)


@pytest.mark.parametrize(
    ("mask", "seq", "kv_seq", "shown"),
    [
        ("full", 2, 3, ["111", "111"]),
        ("causal", 3, 3, ["100", "110", "111"]),
        ("causal", 2, 5, ["11110", "11111"]),  # bottom-right: the last query sees the last key
        ("causal", 1, 4, ["1111"]),  # one step of a decoder with a cache
    ],
)
def test_visible(mask: str, seq: int, kv_seq: int, shown: list[str]) -> None:
    w = Workload(seq=seq, kv_seq=kv_seq, mask=mask)
    seen = visible(w, torch.arange(seq)[:, None], torch.arange(kv_seq))
    assert seen.dtype == torch.bool
    assert ["".join(str(int(x)) for x in row) for row in seen] == shown
    only = visible(w, torch.tensor([[seq - 1]]), torch.arange(kv_seq))
    assert torch.equal(only[0], seen[-1])


def test_expand_kv_repeats_each_head_for_its_group() -> None:
    x = torch.arange(2 * 2 * 3 * 1).view(2, 2, 3, 1)  # (batch, kv_heads, length, dim)
    assert expand_kv(x, 2) is x
    wide = expand_kv(x, 6)
    assert wide.shape == (2, 6, 3, 1)
    for head in range(6):
        assert torch.equal(wide[:, head], x[:, head // 3])
