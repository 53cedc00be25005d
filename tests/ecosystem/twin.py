"""What a transformed model has to equal, made without the library's arithmetic."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

import oftfx
from tests.reference import dense_rotation


def skews(model):
    """The rotations' parameters by their names."""
    return {n: p for n, p in model.named_parameters() if ".oft." in n}


def values(model):
    """A copy of every rotation's parameter."""
    return {n: p.detach().clone() for n, p in skews(model).items()}


def gradients(model):
    """A copy of every gradient."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dense_twin(base, model, adapter="default"):
    """A copy of the base whose weights were multiplied by dense float64 rotations."""
    twin, parameters = copy.deepcopy(base), dict(model.named_parameters())
    for entry in oftfx.adapters(model)[adapter]:
        skew = parameters[f"{entry.owner}.oft.{adapter}.skew"].detach()
        rotation = dense_rotation(skew, entry.block_size, entry.blocks)
        layer = twin.get_submodule(entry.fqn)
        # A parameter of its own: a tied weight must not drag the other one along.
        layer.weight = nn.Parameter((layer.weight.detach().double() @ rotation.T).to(layer.weight.dtype))
    return twin


def explicit_rotation(skew, size):
    """``blockdiag(R)`` of the default parameterization, differentiable: Q entry by entry, powers written out."""
    places = [(r, c) for r in range(size) for c in range(r + 1, size)]
    basis = torch.zeros(len(places), size, size, dtype=skew.dtype)
    for k, (r, c) in enumerate(places):
        basis[k, r, c], basis[k, c, r] = 1.0, -1.0
    blocks = []
    for row in skew:
        q = (row[:, None, None] * basis).sum(0)
        blocks.append(torch.eye(size, dtype=skew.dtype) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return torch.block_diag(*blocks)


class Explicit(nn.Module):
    """``y = (x R) W^T + b`` through an MLP, every rotation a dense product written out in the forward.

    The counterpart of ``oftfx.transform(mlp, {"all-linear": OFT(size)})``: same parameters in the same order.
    """

    def __init__(self, mlp, size):
        super().__init__()
        self.layers, self.size = [m for m in mlp if isinstance(m, nn.Linear)], size
        first = self.layers[0].weight
        pairs = size * (size - 1) // 2
        self.skews = nn.ParameterList(
            torch.zeros(m.in_features // size, pairs, dtype=first.dtype) for m in self.layers
        )  # fmt: skip

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = torch.tanh(x) if index else x
            weight, bias = layer.weight.detach(), layer.bias.detach()
            x = x @ explicit_rotation(self.skews[index], self.size) @ weight.T + bias
        return x


def mlp(dtype=torch.float64, width=12):
    """A small network with tanh between its layers."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8)).to(dtype)
