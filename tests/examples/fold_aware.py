"""Train an adapter, then train on through its fold: the 4-bit model that comes out is the one that was trained."""

import torch
from torch import nn

import oftfx
from oftfx import OFT
from oftfx.formats.bnb4 import make_linear4bit

torch.manual_seed(0)
base = nn.Sequential(make_linear4bit(nn.Linear(64, 128)), nn.ReLU(), make_linear4bit(nn.Linear(128, 4)))
points = torch.randn(512, 64)
labels = (points[:, :4] + points[:, 4:8] * points[:, 8:12]).argmax(1)
batches = list(zip(points.split(64), labels.split(64), strict=True))


def train(model: nn.Module, passes: int) -> None:
    """Any loop."""
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=3e-3)
    model.train()
    for _ in range(passes):
        for x, y in batches:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


model = oftfx.transform(base, {"*": OFT(16)})
train(model, 20)
unfolded = model(points)

# --8<-- [start:aware]
inputs = [(x,) for x, _ in batches]
oftfx.fold_aware(model, "calibrate", calibration=inputs)  # sites compute with 4-bit weights from here on
train(model, 5)  # the loop you had
result = oftfx.fold(model)  # writes what was trained
print(result.report)
oftfx.fold_aware(model, None)  # the rotations act again, and are what they were
# --8<-- [end:aware]

assert {site.action for site in result.report} == {"as trained"}
assert {site.relative_error for site in result.report} == {0.0}
assert torch.equal(model(points), unfolded)


def loss_of(a_model: nn.Module) -> float:
    """On all points."""
    with torch.no_grad():
        return float(nn.functional.cross_entropy(a_model(points), labels))


nearest = oftfx.fold(model, quantized="requantize").model
assert loss_of(result.model) < loss_of(nearest), (loss_of(result.model), loss_of(nearest))
