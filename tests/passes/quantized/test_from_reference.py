import pytest

from oftfx.folding.reference import ReferenceWeights
from oftfx.formats import format_of
from oftfx.passes import FromReference, Program
from tests.passes.quantized.layers import dense, original, rotated
from tests.reference import rel

pytestmark = pytest.mark.needs("bitsandbytes")


def test_the_original_weight_is_turned_and_then_rounded():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = rotated()
    weight, rotation = dense(model[2])
    wanted = original()[2].weight.detach().double() @ rotation.T
    (line,) = FromReference(ReferenceWeights(original())).run(Program.of(model)).found.sites
    mine = format_of(model[2]).dequantize(model[2]).double()
    theirs = dequantize_4bit(*quantize_4bit(wanted.float(), quant_type="nf4", blocksize=64)).double()
    assert (mine - theirs).abs().gt(1e-6).double().mean() < 1e-3
    assert line.action == "from reference"
    # It is nearer to the original than what rounding the rounded weight once more would give.
    twice = dequantize_4bit(*quantize_4bit((weight @ rotation.T).float(), quant_type="nf4", blocksize=64)).double()
    assert rel(mine, wanted) < 0.8 * rel(twice, wanted)
