"""Counted parameters against those of the released weights."""

import pytest

from attnbench import AttnbenchError
from attnbench.theory.models import PRESETS, Model, preset

RELEASED = {
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "minilm-l6": 22_713_216,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl-1.5b": 1_557_611_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
}
IN_A_PAPER = {"transformer-base": 65e6, "transformer-big": 213e6}  # Vaswani 2017, table 3


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_are_those_of_the_released_weights(name: str) -> None:
    model = preset(name)
    assert isinstance(model, Model)
    assert model.parameters() == RELEASED[name]


@pytest.mark.parametrize("name", IN_A_PAPER)
def test_parameters_are_about_what_the_paper_says(name: str) -> None:
    model = preset(name)
    assert isinstance(model, Model)
    assert model.parameters() == pytest.approx(IN_A_PAPER[name], rel=0.04)


def test_every_model_is_compared() -> None:
    assert {name for name, shape in PRESETS.items() if isinstance(shape, Model)} == {*RELEASED, *IN_A_PAPER}


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(AttnbenchError, match="no preset 'lama-3-8b'; there is: llama-3-8b"):
        preset("lama-3-8b")
