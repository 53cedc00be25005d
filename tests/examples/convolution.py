"""A convolution network: rotate every Conv2d and Linear, train, fold, export. Folded, it is a plain network again."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT, Rule

torch.manual_seed(0)


class Network(nn.Module):
    """Two convolutions with a norm, a grouped one, and a head; any network of this kind will do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.point = nn.Conv2d(16, 32, 1)
        self.head = nn.Linear(32 * 4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(images)))
        x = F.relu(self.point(F.relu(self.grouped(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


# Which quarter of the image is bright?
labels = torch.arange(64) % 4
images = torch.rand(64, 3, 16, 16)
for image, label in zip(images, labels, strict=True):
    row, column = divmod(int(label), 2)
    image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
base = Network()

# --8<-- [start:plan]
rules = [
    Rule("stem", OFT(9)),  # a patch has 3 channels x 3 x 3 = 27 elements
    Rule(nn.Conv2d, OFT(8)),  # 16 / 2 groups x 3 x 3 = 72, and 16 of the 1x1
    Rule("head", OFT(16)),
]
plan = oftfx.plan(base, rules, example_inputs=(images[:2],))
print(plan)
# --8<-- [end:plan]

# --8<-- [start:train]
model = oftfx.transform(base, plan)
model.eval()  # the statistics of BatchNorm belong to no adapter: they stay
optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
for _ in range(100):
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
# --8<-- [end:train]

# --8<-- [start:fold]
result = oftfx.fold(model, calibration=[(images[:8],)])
print(result.report)
print(oftfx.export_onnx(result.model, "network.onnx", {"images": images[:2]}))
# --8<-- [end:fold]

with torch.no_grad():
    before = F.cross_entropy(base.eval()(images), labels)
    difference = (model(images) - result.model(images)).norm() / model(images).norm()
assert loss < 0.7 * before, (before, loss)
assert difference < 1e-5, difference
assert [type(m) for m in result.model.modules()] == [type(m) for m in Network().modules()]
