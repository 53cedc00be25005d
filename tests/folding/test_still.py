import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.quantized import quantize
from tests.reference import randomize

pytestmark = pytest.mark.needs("bitsandbytes")


@pytest.mark.parametrize("inplace", [False, True])
def test_layers_without_a_rotation_are_not_repacked_while_a_fold_runs_the_model(inplace):
    """Where the CPU has AVX512-BF16, bitsandbytes rounds the scales of a weight that it repacks."""
    torch.manual_seed(0)
    turned, free = quantize(nn.Linear(64, 64), "bnb4"), quantize(nn.Linear(64, 64), "bnb4")
    free.support_avx512bf16_for_cpu = "where a user has left it"
    model = randomize(oftfx.transform(nn.Sequential(turned, free), {"0": OFT(16)}), std=0.05)
    before = free.weight.quant_state.absmax.clone()
    own = model[1]
    held = []
    own.register_forward_pre_hook(lambda module, args: held.append(module.support_avx512bf16_for_cpu))
    result = oftfx.fold(model, quantized="calibrate", calibration=[(torch.randn(40, 64),)], inplace=inplace)
    assert held
    assert not any(held)
    after = result.model[1]
    assert after.support_avx512bf16_for_cpu == own.support_avx512bf16_for_cpu == "where a user has left it"
    assert torch.equal(after.weight.quant_state.absmax, before)
