"""How much memory the fold of one large layer takes, in units of its weight in float32."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.quantized import quantize
from tests.reference import randomize
from tests.storage_tracker import StorageTracker

ROWS, COLUMNS = 1024, 3072
UNIT = 4 * ROWS * COLUMNS
MOMENTS = 4 * COLUMNS**2 / UNIT  # what calibrating keeps of the inputs, which is counted apart


class Model(nn.Module):
    """One layer, and inputs for it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def model_of(layer):
    return randomize(oftfx.transform(Model(layer), {"layer": OFT(32)}), std=0.05)


def float_layer(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype).requires_grad_(False)


def quantized_layer(kind):
    torch.manual_seed(0)
    return quantize(nn.Linear(COLUMNS, ROWS), kind)


def batches():
    return [(torch.randn(64, COLUMNS),), (torch.randn(32, COLUMNS),)]


def peak_of(model, policy, **options):
    tracker = StorageTracker()
    with tracker.watching():
        result = oftfx.fold(model, quantized=policy, **options)
    assert [s.action for s in result.report] != ["untouched"]
    return tracker.peak / UNIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_layer(dtype):
    assert peak_of(model_of(float_layer(dtype)), "keep") <= 4


def test_two_adapters_at_once():
    model = model_of(float_layer(torch.bfloat16))
    oftfx.add_adapter(model, "second", {"layer": OFT(64)})
    oftfx.set_adapter(model, ["default", "second"])
    assert peak_of(randomize(model, std=0.05), "keep") <= 4


QUANTIZED = [
    pytest.param(kind, marks=pytest.mark.needs(package))
    for kind, package in (("bnb4", "bitsandbytes"), ("hqq", "hqq"), ("gptq", "gptqmodel"), ("torchao", "torchao"))
]


@pytest.mark.parametrize("policy", ["keep", "float", "requantize"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_layer(kind, policy):
    assert peak_of(model_of(quantized_layer(kind)), policy) <= 4


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_calibrated_layer(kind):
    peak = peak_of(model_of(quantized_layer(kind)), "calibrate", calibration=batches())
    assert peak - MOMENTS <= 8


@pytest.mark.needs("bitsandbytes")
def test_scales_that_are_quantized_together():
    from oftfx.formats.bnb4 import make_linear4bit

    layer = make_linear4bit(float_layer(), double_quant=True)
    assert peak_of(model_of(layer), "requantize") <= 4
    peak = peak_of(model_of(layer), "calibrate", calibration=batches())
    assert peak - MOMENTS <= 8


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("calibration", [None, batches()])
def test_from_the_original_weight(calibration):
    base, model = Model(float_layer(torch.bfloat16)), model_of(quantized_layer("bnb4"))
    peak = peak_of(model, "reference", reference=base, calibration=calibration)
    assert peak - (MOMENTS if calibration else 0) <= (8 if calibration else 5)  # with the original itself
