"""How much memory the fold of one large layer takes, in units of its weight in float32."""

import gc
import weakref

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
BELIEVED = 2 * MOMENTS  # of few inputs also as far as they are believed


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
    assert peak - BELIEVED <= 8


@pytest.mark.needs("bitsandbytes")
def test_scales_that_are_quantized_together():
    from oftfx.formats.bnb4 import make_linear4bit

    layer = make_linear4bit(float_layer(), double_quant=True)
    assert peak_of(model_of(layer), "requantize") <= 4
    peak = peak_of(model_of(layer), "calibrate", calibration=batches())
    assert peak - BELIEVED <= 8


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("calibration", [None, batches()])
def test_from_the_original_weight(calibration):
    base, model = Model(float_layer(torch.bfloat16)), model_of(quantized_layer("bnb4"))
    peak = peak_of(model, "reference", reference=base, calibration=calibration)
    assert peak - (MOMENTS if calibration else 0) <= (8 if calibration else 5)  # with the original itself


def stack(kind, count=4):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64) for _ in range(count)]
    layers = layers if kind is None else [quantize(layer, kind) for layer in layers]
    return randomize(oftfx.transform(nn.Sequential(*layers), {"*": OFT(16)}), std=0.05)


@pytest.mark.parametrize(
    ("kind", "policy", "calibrated"),
    [
        (None, "keep", False),
        (None, "keep", True),
        *(
            pytest.param("bnb4", policy, calibrated, marks=pytest.mark.needs("bitsandbytes"))
            for policy in ("float", "requantize", "calibrate")
            for calibrated in ((False, True) if policy != "calibrate" else (True,))
        ),
    ],
)
def test_in_place_old_weights_go_layer_by_layer(kind, policy, calibrated):
    """Also where the outputs before the fold are compared with those after it."""
    stack(kind)(torch.randn(1, 64))  # the first forward of all may log an exception, whose frames keep layers
    model = stack(kind)
    old = [weakref.ref(layer.weight.untyped_storage()) for layer in model]
    alive = []
    data = [(torch.randn(40, 64),) for _ in range(2)]
    with torch.no_grad():
        expected = [model(*x) for x in data]

    def progress(done, _):
        if kind == "bnb4":  # whose weights know their layer: what is left of one are cycles
            gc.collect()
        alive.append((done, sum(r() is not None for r in old)))

    gc.collect()
    report = oftfx.fold(
        model,
        quantized=policy,
        calibration=data if calibrated else None,
        inplace=True,
        progress=progress,
    ).report
    # The progress is that of a layer which stands there; where another one took its place it is one behind, and where
    # the unfolded model runs beside, whose forwards are still before that layer.
    late = int(policy in ("float", "calibrate"))
    assert alive == [(done, len(old) - done + late) for done in range(1, len(old) + 1)]
    if calibrated:
        missed = sum(float((model(*x) - y).double().square().sum()) for x, y in zip(data, expected, strict=True))
        whole = sum(float(y.double().square().sum()) for y in expected)
        assert report.output_error == pytest.approx((missed / whole) ** 0.5, rel=1e-3, abs=1e-9)


def test_what_is_measured_in_place_is_what_is_measured_beside():
    data = [(torch.randn(40, 64),) for _ in range(3)]
    beside = oftfx.fold(stack(None), calibration=data).report
    within = oftfx.fold(stack(None), calibration=data, inplace=True).report
    assert 0 < within.output_error == beside.output_error < 1e-5


def test_rotated_weights_that_forwards_have_kept_go_as_well():
    """A convolution keeps its rotated weight from one forward to the next; the measured outputs are such forwards."""
    model = nn.Sequential(*[nn.Conv2d(16, 16, 3, padding=1, dtype=torch.bfloat16) for _ in range(4)])
    model = randomize(oftfx.transform(model, {"*": OFT(16)}), std=0.05).eval()
    tracker, alive = StorageTracker(), []
    with tracker.watching():
        oftfx.fold(
            model,
            calibration=[(torch.randn(1, 16, 4, 4).bfloat16(),)],
            inplace=True,
            progress=lambda done, _: alive.append(tracker.live),
        )
    one = model[0].weight.nbytes
    assert alive[0] < 2 * one
    assert alive[3] < 5 * one
