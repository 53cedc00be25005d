"""The public interface as a type checker sees it: tools/check runs `mypy --strict` on this file."""

from pathlib import Path
from typing import assert_type

import torch
import torch.nn as nn

import oftfx


class Net(nn.Module):
    """A model whose own attributes a checker knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers."""
        return self.last(self.first(x).relu())


def road(folder: Path) -> float:
    """From a model to a folded one that has been read back: its error."""
    base, x = Net(), torch.randn(5, 12)
    assert_type(oftfx.plan(base, {"first": oftfx.OFT(4)}), oftfx.Plan)
    model = oftfx.transform(base, {"*": oftfx.OFT(4, init="normal")})
    assert_type(model, Net)  # its class stays
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    oftfx.save_adapter(model, folder / "adapter", convention="oftfx")
    again = oftfx.load_adapter(Net(), folder / "adapter")
    assert_type(again, Net)
    with oftfx.disable_adapters(model):
        model(x)
    result = oftfx.fold(model, quantized="keep")
    assert_type(result.report, oftfx.FoldReport)
    for site in result.report:
        assert_type(site.survival, float)
    wanted: torch.Tensor = model(x).detach()
    found: torch.Tensor = result.model(x).detach()
    return float((found - wanted).norm() / wanted.norm())
