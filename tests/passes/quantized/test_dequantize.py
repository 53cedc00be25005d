import pytest
import torch.nn as nn

from oftfx.passes import Dequantize, PassManager, Program
from tests.passes.quantized.layers import INPUT, dense, rotated
from tests.reference import rel

pytestmark = pytest.mark.needs("bitsandbytes")


def test_a_float_layer_stands_in_its_place_with_the_turned_weight():
    model = rotated()
    weight, rotation = dense(model[2])
    bias, expected = model[2].bias.detach().clone(), model(INPUT)
    result = PassManager([Dequantize()], verify=(INPUT,)).run(Program.of(model))
    assert type(model[2]) is nn.Linear
    assert not hasattr(model[2], "oft")
    assert rel(model[2].weight, weight @ rotation.T) < 1e-6
    assert (model[2].bias == bias).all()
    assert rel(model(INPUT), expected) < 1e-6
    (line,) = result.found["dequantize"].sites
    assert (line.action, line.bytes_after) == ("dequantized", 40 * 128 * 4)
    assert line.update == pytest.approx(rel(weight @ rotation.T, weight), rel=1e-5)


def test_it_has_the_dtype_of_the_layers_around_it():
    model = rotated().bfloat16()
    Dequantize().run(Program.of(model))
    assert model[2].weight.dtype == model[0].weight.dtype
