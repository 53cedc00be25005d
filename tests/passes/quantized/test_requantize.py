import pytest
import torch

from oftfx.formats import format_of
from oftfx.passes import Program, Requantize
from tests.passes.quantized.layers import dense, rotated
from tests.reference import rel

pytestmark = pytest.mark.needs("bitsandbytes")


def test_the_codes_are_those_that_the_package_gives_to_the_turned_weight():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = rotated()
    weight, rotation = dense(model[2])
    wanted = (weight @ rotation.T).float()
    result = Requantize().run(Program.of(model))
    theirs = dequantize_4bit(*quantize_4bit(wanted, quant_type="nf4", blocksize=64)).double()
    mine = format_of(model[2]).dequantize(model[2]).double()
    # A value in the middle between two codes may go either way.
    assert (mine - theirs).abs().gt(1e-6).double().mean() < 1e-3
    (line,) = result.found.sites
    assert (line.fqn, line.action) == ("2", "requantized")
    assert line.relative_error == pytest.approx(rel(mine, wanted), rel=1e-4)
    update = wanted.double() - weight
    assert line.survival == pytest.approx(float(((mine - weight) * update).sum() / update.square().sum()), rel=1e-4)
    assert not hasattr(model[2], "oft")


def test_an_identity_is_left_alone():
    model = rotated()
    with torch.no_grad():
        model[2].oft.default.skew.zero_()
    before = model[2].weight.detach().clone()
    (line,) = Requantize().run(Program.of(model)).found.sites
    assert line.action == "untouched"
    assert torch.equal(model[2].weight, before)
