"""A small model and its dense float64 twin, which shares no code with the library."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.reference import dense_rotation

SITES = {"e": 6, "a": 6, "c": 24, "h.b": 8}
"""The layers of the model with the length of the axis that rotates."""

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 3]])


class Model(nn.Module):
    """An embedding, a Linear, a convolution (whose weight rotates) and a Linear inside another module; a counter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.e, self.a, self.c = nn.Embedding(10, 6), nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.h = nn.Sequential()
        self.h.add_module("b", nn.Linear(8, 5, bias=False))
        self.register_buffer("calls", torch.zeros(()))
        for parameter in self.double().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        x = torch.tanh(self.a(self.e(ids)))
        return self.h(torch.sin(self.c(x.transpose(1, 2))).transpose(1, 2))


class Twin:
    """Base weights, and for each adapter a skew and a block size a site, all plain tensors."""

    def __init__(self, model: Model) -> None:
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.adapters: dict[str, dict[str, tuple[torch.Tensor, int]]] = {}
        self.active: tuple[str, ...] = ()

    def copy(self) -> Twin:
        return copy.deepcopy(self)

    def round_(self) -> None:
        """What a trip through float32 leaves."""
        self.weights = {n: w.float().double() for n, w in self.weights.items()}
        for skews in self.adapters.values():
            skews.update({s: (v.float().double(), b) for s, (v, b) in skews.items()})

    def rotation(self, site: str, skews: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """``R1 R2 ...`` of what acts at a site, dense."""
        result = torch.eye(SITES[site], dtype=torch.float64)
        for name in self.active:
            if site in self.adapters.get(name, {}):
                skew, size = self.adapters[name][site]
                value = skew if skews is None else skews.get(f"{name}.{site}", skew)
                result = result @ rotation_of(value, size)
        return result

    def run(self, ids: torch.Tensor, skews: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """What the model should give out."""
        w = self.weights
        x = F.embedding(ids, w["e.weight"]) @ self.rotation("e", skews)
        x = torch.tanh(x @ self.rotation("a", skews) @ w["a.weight"].T + w["a.bias"])
        kernel = (w["c.weight"].flatten(1) @ self.rotation("c", skews).T).view_as(w["c.weight"])
        x = torch.sin(F.conv1d(x.transpose(1, 2), kernel, w["c.bias"], padding=1)).transpose(1, 2)
        return x @ self.rotation("h.b", skews) @ w["h.b.weight"].T

    def fold(self) -> None:
        """Put what acts into the weights."""
        for site in SITES:
            name, r = f"{site}.weight", self.rotation(site)
            flat = self.weights[name].flatten(1)
            turned = flat @ r if site == "e" else flat @ r.T
            self.weights[name] = turned.view_as(self.weights[name])
        self.adapters, self.active = {}, ()

    def gradients(self, ids: torch.Tensor, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Of the sum of squares, for every skew of these adapters."""
        skews = {f"{n}.{s}": v.clone().requires_grad_() for n in names for s, (v, _) in self.adapters[n].items()}
        loss = self.run(ids, skews).square().sum()
        found = torch.autograd.grad(loss, list(skews.values()), allow_unused=True)
        return {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(skews.items(), found, strict=True)}


def rotation_of(skew: torch.Tensor, size: int) -> torch.Tensor:
    """``I + 2 (Q + Q^2 + Q^3) + Q^4`` of every block, dense and differentiable."""
    if not skew.requires_grad:
        return dense_rotation(skew, size)
    rows, columns = torch.triu_indices(size, size, 1)
    blocks = []
    for vector in skew:
        q = torch.zeros(size, size, dtype=torch.float64).index_put((rows, columns), vector)
        q = q - q.T
        blocks.append(torch.eye(size, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return torch.block_diag(*blocks)
