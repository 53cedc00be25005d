"""The models that tools/compare/compare_peft.py adapts, each of one layer or two, and their inputs."""

import torch
import torch.nn as nn


class Tied(nn.Module):
    """An embedding and a head that are one Parameter, as in most small language models."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 16), nn.Linear(16, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def one(make, **settings):
    """Build a model of one layer, the same at every call; ``dtype`` and ``memory_format`` as for ``.to``."""
    moved = {k: settings.pop(k) for k in ("dtype", "memory_format") if k in settings}

    def build():
        torch.manual_seed(0)
        return nn.Sequential(make(**settings)).to(**moved).eval()

    return build


def identity(size):
    """One Linear that hands its input on, so that its output shows the rotation."""

    def build():
        model = nn.Sequential(nn.Linear(size, size, bias=False))
        nn.init.eye_(model[0].weight)
        return model.eval()

    return build


def tied():
    torch.manual_seed(0)
    return Tied().eval()


def gpt2_layer():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(24, 16)).eval()


def nf4_layer():
    from oftfx.formats.bnb4 import make_linear4bit

    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight, std=0.05)  # as trained weights are, and as NF4 expects
    return nn.Sequential(make_linear4bit(linear)).eval()


def noise(*shape, **moved):
    return lambda: (torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(**moved),)


def tokens():
    return (torch.arange(12).view(2, 6),)


def conv(**settings):
    return one(nn.Conv2d, **{"in_channels": 8, "out_channels": 6, **settings})
