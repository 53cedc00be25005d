"""What the tests of single policies run on: a quantized layer between float ones, with random rotations."""

import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.formats import format_of
from tests.reference import randomize

INPUT = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))


def original():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(24, 128), nn.Tanh(), nn.Linear(128, 40), nn.Linear(40, 9)).eval()


def rotated(std=0.2):
    """NF4 in the middle, of a width that bitsandbytes' own CPU kernels read right; floats before and behind."""
    from oftfx.formats.bnb4 import make_linear4bit

    model = original()
    model[2] = make_linear4bit(model[2])
    return randomize(oftfx.transform(model, {"*": OFT(8)}), std=std).eval()


def stored(layer):
    """Every byte of a quantized weight."""
    state = layer.weight.quant_state
    return [layer.weight.detach().clone(), state.absmax.clone()]


def dense(layer):
    """The weight in float64, and the whole rotation in front of it."""
    blocks = layer.oft.default.matrices().detach().double()
    return format_of(layer).dequantize(layer).double(), torch.block_diag(*blocks)
