"""An adapter knows its base: another one of the same shapes is told, a quantized one of the same weights is not."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxWarning
from oftfx.formats.bnb4 import make_linear4bit
from tests.reference import randomize

pytestmark = pytest.mark.filterwarnings("error:.*(was made for another base|had other values than)")


def net(seed, size=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10))


@pytest.mark.parametrize("convention", ["peft", "oftfx"])
def test_another_base_of_the_same_shapes_is_told(tmp_path, convention):
    model = randomize(oftfx.transform(net(1), {"*": OFT(16)}))
    oftfx.save_adapter(model, tmp_path, convention=convention)
    oftfx.load_adapter(net(1), tmp_path)
    with pytest.warns(OftfxWarning, match=r"was made for another base: .* a cosine of -?0\.[0-3]"):
        oftfx.load_adapter(net(2), tmp_path)
    nudged = net(1)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    oftfx.load_adapter(nudged, tmp_path)  # as a base that was trained on


@pytest.mark.needs("bitsandbytes")
def test_the_same_base_in_four_bits_is_the_same(tmp_path):
    plain, packed = net(1), net(1)
    packed[0] = make_linear4bit(packed[0])
    oftfx.save_adapter(randomize(oftfx.transform(packed, {"*": OFT(16)})), tmp_path / "q")
    oftfx.load_adapter(plain, tmp_path / "q")
    oftfx.save_adapter(randomize(oftfx.transform(net(1), {"*": OFT(16)})), tmp_path / "f")
    again = net(1)
    again[0] = make_linear4bit(again[0])
    oftfx.load_adapter(again, tmp_path / "f")
    other = net(7)
    other[0] = make_linear4bit(other[0])
    with pytest.warns(OftfxWarning, match="another base"):
        oftfx.load_adapter(other, tmp_path / "f")


def test_files_without_a_note_and_bases_without_numbers_pass(tmp_path):
    from safetensors.torch import load, save_file

    oftfx.save_adapter(randomize(oftfx.transform(net(1), {"*": OFT(16)})), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with torch.device("meta"):
        bare = net(1)
    oftfx.load_adapter(bare, tmp_path)
    tensors = load(file.read_bytes())  # not a view of the file that is written over
    for notes in ({"format": "pt"}, {"format": "pt", "oftfx_base_sketch": "[1, 2"}, {"oftfx_base_sketch": "[3]"}):
        save_file(tensors, file, metadata=notes)
        oftfx.load_adapter(net(2), tmp_path)


def test_values_that_are_replaced_are_said(tmp_path):
    model = randomize(oftfx.transform(net(1), {"*": OFT(16)}))
    oftfx.save_adapter(model, tmp_path / "a")
    fresh = oftfx.transform(net(1), {"*": OFT(16)})
    oftfx.load_adapter(fresh, tmp_path / "a")  # values of nobody
    oftfx.load_adapter(fresh, tmp_path / "a")  # the same ones
    oftfx.save_adapter(randomize(model, seed=3), tmp_path / "b")
    with pytest.warns(OftfxWarning, match="adapter 'default' had other values than .* which are replaced"):
        oftfx.load_adapter(fresh, tmp_path / "b")
