"""A small quantized model and its dense float64 twin, which reads the layers' bytes by the published formats."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.formats.bnb4 import Bnb4
from tests.hostile.twin import rotation_of
from tests.quantized import quantize

WIDTHS = {"a": 64, "b": 128, "c": 32}
"""The layers with their inputs: NF4 in blocks of 64, a row and half a row, and floats.

Where rows are no whole blocks, bitsandbytes' own product on a CPU is some per cent off, so no twin can follow it.
"""

X = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """Two quantized Linears and a float one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = quantize(nn.Linear(64, 128)), quantize(nn.Linear(128, 32))
        for layer in (self.a, self.b):
            Bnb4().prepare(layer)  # else the package rounds scales in the first forward
        self.c = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Twin:
    """Weights, and for each adapter a skew and a block size a site; what stands in place of the rotations.

    Attributes:
        through: by site and the adapters that act there: None where the nearest values of the rotated weight are
            computed with, else the weight that is.
    """

    def __init__(self, model: Model) -> None:
        self.table = model.a.weight.quant_state.code.double()
        self.weights = {s: read(getattr(model, s)) for s in WIDTHS}
        self.biases = {s: getattr(model, s).bias.detach().double() for s in WIDTHS}
        self.adapters: dict[str, dict[str, tuple[Tensor, int]]] = {}
        self.active: tuple[str, ...] = ()
        self.through: dict[tuple[str, tuple[str, ...]], Tensor | None] = {}

    def copy(self) -> Twin:
        return copy.deepcopy(self)

    def here(self, site: str, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The adapters that act at a site."""
        return tuple(n for n in (self.active if names is None else names) if site in self.adapters[n])

    def rotation(self, site: str, skews: dict[str, Tensor] | None = None) -> Tensor:
        """All that act there, as one matrix."""
        result = torch.eye(WIDTHS[site], dtype=torch.float64)
        for name in self.here(site):
            skew, size = self.adapters[name][site]
            result = result @ rotation_of(skew if skews is None else skews[f"{name}.{site}"], size)
        return result

    def turned(self, site: str, skews: dict[str, Tensor] | None = None) -> Tensor:
        """The weight times the rotations."""
        return self.weights[site] @ self.rotation(site, skews).T

    def rounded(self, site: str, target: Tensor) -> Tensor:
        """The nearest values that the format has; groups that have not moved stay."""
        groups, old = target.reshape(-1, 64), self.weights[site].reshape(-1, 64)
        scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-12)
        near = self.table[(groups.unsqueeze(-1) / scale.unsqueeze(-1) - self.table).abs().argmin(-1)] * scale
        moved = (groups - old).norm(dim=1, keepdim=True) > 1e-6 * old.norm(dim=1, keepdim=True)
        return torch.where(moved, near, old).reshape(target.shape)

    def weight(self, site: str, skews: dict[str, Tensor] | None = None, folded: bool = True) -> Tensor:
        """What the site computes with; gradients go straight through the rounding, to a rotation in front of it."""
        turned = self.turned(site, skews)
        key = (site, self.here(site))
        if not folded or key not in self.through:
            return turned
        instead = self.through[key]
        if instead is not None:
            return instead
        rounded, rotation = self.rounded(site, turned.detach()), self.rotation(site, skews)
        again = (rounded @ rotation.detach()) @ rotation.T
        return again + (rounded - again).detach()

    def run(self, x: Tensor, skews: dict[str, Tensor] | None = None, folded: bool = True) -> Tensor:
        """What the model should give out."""
        hidden = x.double()
        for site in WIDTHS:
            hidden = hidden @ self.weight(site, skews, folded).T + self.biases[site]
            hidden = hidden if site == "c" else hidden.tanh()
        return hidden

    def trains(self) -> list[tuple[str, str]]:
        """Adapter and site of the skews whose gradient is not stopped by scales that train instead."""
        found = [(n, s) for n in self.active for s in self.adapters[n]]
        return [(n, s) for n, s in found if self.through.get((s, self.here(s))) is None]

    def gradients(self, x: Tensor) -> dict[tuple[str, str], Tensor]:
        """Of the mean square, for the skews that train."""
        keys = self.trains()
        skews = {f"{n}.{s}": v.clone() for n in self.active for s, (v, _) in self.adapters[n].items()}
        for n, s in keys:
            skews[f"{n}.{s}"].requires_grad_()
        if not keys:
            return {}
        loss = self.run(x, skews).square().mean()
        found = torch.autograd.grad(loss, [skews[f"{n}.{s}"] for n, s in keys], allow_unused=True)
        return {
            k: torch.zeros_like(skews[f"{k[0]}.{k[1]}"]) if g is None else g for k, g in zip(keys, found, strict=True)
        }

    def forget(self, names: tuple[str, ...]) -> None:
        """Rotations act again where just these do."""
        for site in WIDTHS:
            self.through.pop((site, self.here(site, names)), None)

    def remove(self, name: str) -> None:
        """An adapter is gone, and with it what stood for it and others."""
        del self.adapters[name]
        self.through = {k: v for k, v in self.through.items() if name not in k[1]}
        self.active = tuple(n for n in self.active if n != name)

    def fold(self, kept: set[str]) -> None:
        """What the nearest codes, or those that were trained, leave; ``kept`` sites turn as before."""
        for site in WIDTHS:
            turned, key = self.turned(site), (site, self.here(site))
            if site == "c" or site in kept:
                self.weights[site] = turned
            elif key in self.through:
                self.weights[site] = self.weight(site).detach()
            else:
                self.weights[site] = self.rounded(site, turned)
        self.adapters, self.active, self.through = {}, (), {}


def read(layer: nn.Module) -> Tensor:
    """The weight in float64; of NF4 from its bytes: two codes each, and a scale for 64."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach().double()
    raw = weight.detach().reshape(-1).view(torch.uint8)
    codes = torch.stack([raw >> 4, raw & 15], dim=1).reshape(-1).long()
    return (state.code.double()[codes].view(-1, 64) * state.absmax.double().view(-1, 1)).view(state.shape)
