import pytest
import torch
import torch.nn as nn

from oftfx.formats.bnb4 import Bnb4, make_linear4bit
from oftfx.formats.packing import bnb4_cpu
from oftfx.formats.scalar import ScalarFormat

pytestmark = pytest.mark.needs("bitsandbytes")


@pytest.fixture
def used(monkeypatch):
    """The results that came from the package."""
    found, whole = [], bnb4_cpu.looked_up

    def noted(*arguments):
        found.append(whole(*arguments))
        return found[-1]

    monkeypatch.setattr(bnb4_cpu, "looked_up", noted)
    return found


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 48), (128, 37), (192, 96)])
def test_the_packages_values_are_ours_to_the_bit(kind, double_quant, shape, used):
    torch.manual_seed(0)
    layer = make_linear4bit(nn.Linear(*shape, dtype=torch.bfloat16), quant_type=kind, double_quant=double_quant)
    found = Bnb4().dequantize(layer)
    expected = ScalarFormat.dequantize(Bnb4(), layer)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    raw = layer.weight.data.reshape(-1)  # by the published layout
    codes = torch.stack([raw >> 4, raw & 15], dim=1).reshape(-1, 64)
    dense = layer.weight.quant_state.code.double()[codes.long()].view(shape[1], shape[0])
    scales = Bnb4().codes(layer).scale.double().repeat_interleave(64).view(dense.shape)
    assert torch.allclose(found.double(), dense * scales, rtol=1e-7)
    assert [u is not None for u in used] == [True]


def test_rows_that_are_no_whole_blocks_are_ours(used):
    layer = make_linear4bit(nn.Linear(100, 66))
    assert torch.equal(Bnb4().dequantize(layer), ScalarFormat.dequantize(Bnb4(), layer))
    assert used == [None]


@pytest.mark.parametrize("wrong", ["bits", "dtype", "gone"])
def test_a_package_that_does_otherwise_is_not_asked(monkeypatch, used, wrong):
    layer, whole = make_linear4bit(nn.Linear(64, 48)), bnb4_cpu._values

    def values(*arguments):
        if wrong == "gone":
            raise AttributeError("no such operator")
        found = whole(*arguments)
        return found.bfloat16().float() if wrong == "bits" else found.double()

    expected = ScalarFormat.dequantize(Bnb4(), layer)
    monkeypatch.setattr(bnb4_cpu, "_values", values)
    bnb4_cpu._is_exact.cache_clear()
    try:
        assert torch.equal(Bnb4().dequantize(layer), expected)
        assert used == [None]
    finally:
        bnb4_cpu._is_exact.cache_clear()
