"""A small attention network with three readers of one tensor in each block; the same in every process."""

from __future__ import annotations

import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from tests.reference import randomize


class Block(nn.Module):
    """Attention without softmax tables: three readers of one tensor, then two layers."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(width, width) for _ in range(5))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
        return x + torch.tanh(self.up(x))


class Network(nn.Module):
    """Two blocks and a head."""

    def __init__(self, width=16):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base():
    """The network, in float64."""
    torch.manual_seed(5)
    return Network().double()


def transformed(share, std=0.1):
    """With random rotations, in training mode."""
    example = (torch.zeros(2, 3, 16, dtype=torch.float64),)
    spec = {"all-linear": OFT(8, share_input=share)}
    return randomize(oftfx.transform(base(), spec, example_inputs=example), std=std).train()
