"""HQQ's scales and zeros in narrow dtypes."""

import pytest
import torch
import torch.nn as nn

from oftfx.formats.hqq import make_hqq
from oftfx.formats.registry import format_named
from tests.reference import rel

pytestmark = pytest.mark.needs("hqq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [4, 3])
def test_what_was_rounded_is_what_the_package_reads(dtype, axis, nbits):
    """Also groups of zeros, whose scale must not become 0 in float16."""
    weight_format = format_named("hqq")
    layer = make_hqq(nn.Linear(128, 64).to(dtype), nbits=nbits, axis=axis, group_size=64)
    weight = torch.randn(64, 128) * 0.05
    weight[5:9] = 0
    if axis == 0:
        weight[:, 7] = 0
    x = torch.randn(500, 128)
    bits = weight_format.grid(layer)
    for coded, state in (
        (bits.nearest(weight, weight_format.codes(layer)), weight_format.requantize(weight, layer)),
        (None, weight_format.calibrate(weight, layer, x.T @ x)),
    ):
        weight_format.write(layer, state)
        now = weight_format.dequantize(layer)
        assert now.isfinite().all()
        assert torch.equal(now, layer.dequantize().float())
        if axis == 1:
            assert not now[5:9].any()
        else:
            assert now[:, 7].abs().max() < 1e-5  # what makes up for other columns
        assert rel(now, weight) < (0.12 if nbits == 4 else 0.25)
        if coded is not None:
            assert torch.equal(bits.values(coded), now)  # nothing is rounded again when it is stored
