"""Models written by hand in plain torch, for what no library model shows."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

HIDDEN, VOCABULARY = 32, 96


class Encoder(nn.Module):
    """``nn.TransformerEncoder``, whose attention never calls its layers, and one ``nn.MultiheadAttention`` more."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.memory = nn.Linear(HIDDEN, 16)
        self.cross = nn.MultiheadAttention(HIDDEN, 4, kdim=16, vdim=16, batch_first=True)
        self.head = nn.Linear(HIDDEN, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoded, memory = self.encoder(x), self.memory(x)
        return self.head(self.cross(encoded, memory, memory, need_weights=False)[0] + encoded)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Convolutions with stride, groups and a 1x1 shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.Sequential(_Block(16, 16, 1), _Block(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Functional(nn.Module):
    """Weights that no module calls, two layers with one weight, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, HIDDEN)
        self.w = nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
        self.narrow, self.widen = nn.Parameter(torch.zeros(HIDDEN, 16)), nn.Parameter(torch.zeros(HIDDEN, 16))
        self.gate = _Gate()
        self.twice = nn.Linear(HIDDEN, HIDDEN)
        self.one, self.other = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.other.weight = self.one.weight
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + torch.tanh(F.linear(x, self.w))
        x = x + torch.tanh(self.gate(x))
        x = x + F.linear(torch.tanh(x @ self.narrow), self.widen)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(self.other(torch.tanh(self.one(x))))


class _Gate(nn.Module):
    """A raw parameter that is called ``weight``, as in the routers of expert models."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(HIDDEN, HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Convolutions(nn.Module):
    """Every convolution of torch, plain and transposed, with groups, dilation and padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.c2 = nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect")
        self.t2 = nn.ConvTranspose2d(16, 8, (2, 3), stride=(2, 1), padding=(0, 1), groups=2)
        self.c3 = nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1), groups=2)
        self.t3 = nn.ConvTranspose3d(8, 4, (1, 2, 2), stride=(1, 2, 2))
        self.c1 = nn.Conv1d(4, 8, 3, padding=2, dilation=2)
        self.t1 = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.t2(torch.tanh(self.c2(x))))
        x = torch.tanh(self.t3(torch.tanh(self.c3(x[:, :, None]))))
        return self.t1(torch.tanh(self.c1(x.mean((2, 3)))))


class Branching(nn.Module):
    """Layers and the number of their calls depend on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.again, self.head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x) if x.sum() > 0 else self.down(x)
        for _ in range(int(x.abs().max().clamp(1, 3))):
            x = torch.tanh(self.again(x))
        return self.head(x)
