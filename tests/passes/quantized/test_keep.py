import pytest
import torch

from oftfx.passes import Keep, PassManager, Program
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.module import Rotation
from tests.passes.quantized.layers import INPUT, dense, rotated, stored
from tests.reference import rel

pytestmark = pytest.mark.needs("bitsandbytes")


def test_the_bytes_stay_and_the_rotation_is_fixed_numbers():
    model = rotated()
    before, (weight, rotation) = stored(model[2]), dense(model[2])
    expected = model(INPUT)
    result = PassManager([Keep()], verify=(INPUT,)).run(Program.of(model))
    assert all(torch.equal(a, b) for a, b in zip(stored(model[2]), before, strict=True))
    (held,) = model[2].oft.children()
    assert isinstance(held, FrozenRotation)
    assert rel(torch.block_diag(*held.blocks.double()), rotation) < 1e-7
    assert rel(model(INPUT), expected) < 1e-6
    hidden = torch.tanh(model[0](INPUT)).double()
    assert rel(model[2](torch.tanh(model[0](INPUT))), hidden @ rotation @ weight.T + model[2].bias.double()) < 1e-6
    (line,) = result.found["keep"].sites
    assert (line.fqn, line.action, line.relative_error, line.survival) == ("2", "kept", 0.0, 1.0)
    assert line.bytes_after - line.bytes_before == held.blocks.numel() * 4


def test_float_layers_stay_rotated():
    model = rotated()
    result = Keep().run(Program.of(model))
    assert [c.site for c in result.changes] == ["2"]
    assert isinstance(model[0].oft.default, Rotation)
    assert isinstance(model[3].oft.default, Rotation)
