"""Models that foreign adapters are for: linear layers and convolutions, names with dots and underscores."""

import torch
import torch.nn as nn

from tests.reference import rel


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q = nn.Linear(width, 12, bias=True)
        self.to_out = nn.ModuleList([nn.Linear(12, width, bias=False)])

    def forward(self, x):
        return x + self.to_out[0](torch.tanh(self.to_q(x)))


class Net(nn.Module):
    """``(N, 4, 6, 6)`` to ``(N, 36, 8)``."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.proj = nn.Conv2d(8, 8, 1, bias=False)
        self.blocks = nn.ModuleList([Block(8), Block(8)])

    def forward(self, x):
        x = self.proj(torch.tanh(self.conv_in(x)))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


LINEARS = ("blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_q", "blocks.1.to_out.0")
CONVOLUTIONS = ("conv_in", "proj")


def spread(shape, start, width=1.0):
    """Numbers that no random generator decides, so that files beside the tests stay right: the golden ratio's."""
    count = torch.Size(shape).numel()
    steps = torch.arange(1, count + 1, dtype=torch.float64) * 0.6180339887498949 + start * 0.7548776662466927
    return ((steps % 1 - 0.5) * 2 * width).reshape(shape)


def net(dtype=torch.float32):
    model = Net()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(spread(parameter.shape, index, parameter[0].numel() ** -0.5))
    return model.to(dtype).eval()


def images(dtype=torch.float32):
    return spread((3, 4, 6, 6), 0.5, 2.0).to(dtype)


def outputs(model):
    with torch.no_grad():
        return model(images(next(model.parameters()).dtype))


def with_weights(weights):
    """The net in float64 with other weight matrices at some layers."""
    model = net().double()
    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.weight.data = weight.double().reshape(module.weight.shape)
    return model


def matrix(name):
    """A layer's weight as ``(out, in * kernel)``, float64."""
    return net().get_submodule(name).weight.detach().double().flatten(1)


def apart(model):
    """How far a model is from the untouched net."""
    return rel(outputs(model), outputs(net()))
