"""What the tests of single passes run on: a small model with awkward sizes, recorded."""

from __future__ import annotations

import torch
import torch.nn as nn

from oftfx.passes import PassManager
from oftfx.planning.program import Program
from oftfx.trace.record import record_best
from tests.reference import dense_rotation

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 10], [7, 7, 8, 0, 2]])


class Awkward(nn.Module):
    """Three layers that read one tensor, one of them a producer; a convolution; a tied head; a layer never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.emb = nn.Embedding(11, 12)
        self.q, self.k = nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.v, self.o = nn.Linear(12, 6), nn.Linear(6, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, bias=False)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.emb.weight
        self.never = nn.Linear(10, 7)
        self.eval()

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.emb(ids)
        weights = torch.softmax(self.q(x) @ self.k(x.contiguous()).mT, -1)
        y = self.o(weights @ self.v(x))
        return self.head(self.conv(y.mT).mT)


def program_of(model, *inputs):
    """With a recording, where inputs are given."""
    return Program.of(model, record_best(model, inputs) if inputs else None)


def run(program, *passes, verify=None):
    """Held to their contract: honest about ``modified``, in order, post-conditions."""
    return PassManager(passes, verify=verify).run(program)


def said(result):
    """``{site: (action, reason, refused)}``."""
    return {c.site: (c.action, c.reason, c.refused) for c in result.changes}


@torch.no_grad()
def fill(model, std=0.2):
    """Random skews; returns them by site, and by adapter where that is another than the default one."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, parameter in model.named_parameters():
        if name.endswith(".skew"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            site, _, adapter = name.removesuffix(".skew").rpartition(".")
            site = site.removesuffix(".oft")
            found[site if adapter == "default" else f"{site}.{adapter}"] = parameter.detach().clone()
    return found


def dense(weight, skew, size):
    """``W R^T`` in float64; a convolution's as its flattened patches."""
    flat = weight.detach().double().flatten(1)
    return (flat @ dense_rotation(skew, size).T).view(weight.shape)
