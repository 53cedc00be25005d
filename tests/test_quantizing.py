"""A float model rounded to integers: against rounding by hand, GPTQ's aim on fresh inputs, the package's own loader."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("compressed_tensors", "transformers")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 32, bias=False), nn.Tanh(), nn.Linear(32, 8))


def inputs(count, seed=0, width=64):
    """Correlated, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(
        width, width, generator=torch.Generator().manual_seed(9)
    )
    return mixed * torch.logspace(-1, 0.5, width) / 8


def by_hand(weight, size, bits=4):
    """The nearest codes under the scale of each group's largest magnitude."""
    parts = weight.view(len(weight), -1, size)
    scale = parts.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
    return ((parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).view_as(weight)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 16), (4, -1)])
def test_without_inputs_the_nearest_codes(bits, size):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = oftfx.quantize(model, bits=bits, group_size=size)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [s.action for s in result.report] == ["requantized"] * 3
    x = inputs(50)
    twin = net()
    for layer in (twin[0], twin[2], twin[4]):
        # No search of scales can be further from the weights than the plain one.
        plain = by_hand(layer.weight.detach(), layer.in_features if size == -1 else size, bits)
        (line,) = [s for s in result.report if s.fqn == {id(twin[0]): "0", id(twin[2]): "2"}.get(id(layer), "4")]
        assert 0 < line.relative_error <= rel(plain, layer.weight.detach()) * 1.0001
        layer.weight.data = plain
    assert rel(result.model(x), twin(x)) < (0.1 if bits == 4 else 0.01)


def test_by_inputs_it_is_nearer_on_fresh_ones():
    model, fresh = net(), inputs(800, seed=5)
    wanted = model(fresh)
    nearest = rel(oftfx.quantize(model).model(fresh), wanted)
    result = oftfx.quantize(model, calibration=[(inputs(800, seed=s),) for s in range(4)])
    assert rel(result.model(fresh), wanted) < 0.7 * nearest
    assert [s.action for s in result.report] == ["calibrated"] * 3
    assert abs(result.report.measured.output_error - rel(result.model(fresh), wanted)) < 0.3 * nearest
    assert "rounded 3 layers: 3 calibrated" in str(result.report)
    assert "survival" not in str(result.report)
    assert result.report.sites[0].bytes_after == 64 * 96 // 2 + 4 * 64 * 96 // 32


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_a_base_that_servers_do_not_read(tiny_llama, ids, tmp_path, bits):
    """Folded to floats, rounded, written, and read by transformers."""
    from oftfx.formats.bnb8 import make_linear8bit

    pytest.importorskip("bitsandbytes")
    base = tiny_llama()
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            base.set_submodule(name, make_linear8bit(layer))
    model = randomize(oftfx.transform(base, {"all-linear": OFT(16)}), std=0.1).eval()
    floats = oftfx.fold(model, quantized="float").model
    result = oftfx.quantize(floats, bits=bits, calibration=[ids(8, 40, seed=s) for s in range(4)])
    with torch.no_grad():
        wanted, got = floats(**ids()).logits, result.model(**ids()).logits
        assert rel(got, wanted) < (0.2 if bits == 4 else 0.02)
    result.save(tmp_path / "out", save_as="compressed-tensors", server="vllm")
    loaded = oftfx.load_folded(tmp_path / "out")
    with torch.no_grad():
        assert rel(loaded(**ids()).logits, got) < 1e-6


def test_what_is_refused():
    model = net()
    with pytest.raises(FoldError, match="0 has 64 inputs, no whole groups of 48"):
        oftfx.quantize(model, group_size=48)
    with pytest.raises(FoldError, match="bits=3"):
        oftfx.quantize(model, bits=3)
    with pytest.raises(FoldError, match="0 has a rotation; fold"):
        oftfx.quantize(oftfx.transform(model, {"*": OFT(8)}))
    with pytest.raises(FoldError, match="is quantized already"):
        oftfx.quantize(oftfx.quantize(model).model)
    with pytest.raises(FoldError, match="no linear layer"):
        oftfx.quantize(nn.Sequential(nn.Tanh()))


def test_progress_counts_layers():
    seen = []
    oftfx.quantize(net(), calibration=[(inputs(100),)], progress=lambda done, whole: seen.append((done, whole)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
