"""The rows of tools/compare/compare_peft.py, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from oftfx import OFT
from tools.compare.peft_measures import (
    block_size,
    cost,
    drift,
    dropped,
    errors,
    files,
    half,
    onnx,
    parameter_changes,
    recomputed,
    tie,
    two_adapters,
)
from tools.compare.peft_models import conv, gpt2_layer, identity, nf4_layer, noise, one, tied, tokens

PLAIN = OFT(4)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: the row.
        build: makes the base model; the same one at every call.
        inputs: makes its input.
        measure: both sides' figures.
        config: fields of PEFT's `OFTConfig` besides target and block size 4.
        spec: ours, with the same meaning.
        target: path of the adapted layer.
        std: of the random skews.
        brief: whether the documentation shows the row too.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    measure: Callable[[Case], dict[str, dict[str, float | str]]] = errors
    config: dict = field(default_factory=dict)
    spec: OFT = PLAIN
    target: str = "0"
    std: float = 0.1
    brief: bool = True


IMAGE = noise(2, 8, 12, 12)
EXACT = {"use_cayley_neumann": False}
LAST = {"memory_format": torch.channels_last}
HALF = {"dtype": torch.bfloat16}
LINEAR = one(nn.Linear, in_features=16, out_features=10)
EMBEDDING = one(nn.Embedding, num_embeddings=13, embedding_dim=16)
WIDE = one(nn.Linear, in_features=2048, out_features=2048, bias=False)

CASES = (
    Case("Conv2d k=3", conv(kernel_size=3), IMAGE),
    Case("Conv2d k=3, padding 1, stride 2", conv(kernel_size=3, padding=1, stride=2), IMAGE),
    Case("Conv2d k=4, stride 4", conv(kernel_size=4, stride=4), IMAGE),
    Case("Conv2d k=7, padding 3", conv(kernel_size=7, padding=3), IMAGE),
    Case("Conv2d kernel (1, 3)", conv(kernel_size=(1, 3)), IMAGE),
    Case(
        "Conv2d k=3, groups 4",
        conv(kernel_size=3, groups=4, out_channels=8),
        IMAGE,
        config={"oft_block_size": 6},
        spec=OFT(6),
    ),
    Case("Conv2d k=1, groups 2", conv(kernel_size=1, groups=2), IMAGE),
    Case("Conv2d k=3, channels_last", conv(kernel_size=3, **LAST), noise(2, 8, 12, 12, **LAST)),
    Case("Conv2d k=1, channels_last", conv(kernel_size=1, **LAST), noise(2, 8, 12, 12, **LAST), brief=False),
    Case("Conv2d k=1, unbatched", conv(kernel_size=1), noise(8, 12, 10)),
    Case("Conv2d k=1, unbatched, width = channels", conv(kernel_size=1), noise(8, 12, 8)),
    Case("Conv2d k=3, dilation (1, 2)", conv(kernel_size=3, dilation=(1, 2)), IMAGE),
    Case("Conv2d k=3, dilation 2", conv(kernel_size=3, dilation=2), IMAGE),
    *(
        Case(
            f"Conv2d k=3, padding_mode {mode}",
            conv(kernel_size=3, padding=2, padding_mode=mode),
            IMAGE,
            brief=mode == "circular",
        )
        for mode in ("reflect", "circular", "replicate")
    ),
    Case("Conv2d k=3, bfloat16", conv(kernel_size=3, **HALF), noise(2, 8, 12, 12, **HALF)),
    Case("Linear, 4-D input", LINEAR, noise(2, 3, 5, 16)),
    Case("Linear, two adapters at once", LINEAR, noise(7, 16), two_adapters, std=0.3),
    Case("Conv2d k=1, two adapters at once", conv(kernel_size=1), IMAGE, two_adapters, std=0.3, brief=False),
    Case("Embedding, two adapters at once", EMBEDDING, tokens, two_adapters, std=0.3, brief=False),
    Case(
        "dropout 0.9", identity(512), lambda: (torch.eye(512),), dropped, {"module_dropout": 0.9}, OFT(4, dropout=0.9)
    ),
    Case(
        "COFT, one eval forward",
        LINEAR,
        noise(7, 16),
        parameter_changes,
        {"coft": True, "eps": 0.2},
        OFT(4, coft_eps=0.2),
        std=0.5,
    ),
    Case("tied weights, adapter on the head", tied, tokens, tie, target="head", std=0.3),
    Case("tied weights, adapter on the embedding", tied, tokens, tie, target="embed", std=0.3),
    Case("GPT-2 Conv1D", gpt2_layer, noise(7, 16), config={"fan_in_fan_out": True}),
    Case("scale to a half (PEFT: scale_layer, ours: halve the skew)", LINEAR, noise(7, 16), half),
    Case("fold and unfold n times, float32", one(nn.Linear, in_features=256, out_features=256), noise(7, 256), drift),
    Case(
        "fold and unfold n times, bfloat16",
        one(nn.Linear, in_features=256, out_features=256, **HALF),
        noise(7, 256),
        drift,
    ),
    Case("fold and unfold n times, NF4", nf4_layer, noise(7, 256), drift, {"oft_block_size": 32}, OFT(32), std=0.02),
    Case("cost of a fold, Linear 2048x2048", WIDE, noise(1, 2048), cost, {"oft_block_size": 32}, OFT(32), std=0.02),
    Case("eval: how often R is computed, Linear", LINEAR, noise(7, 16), recomputed),
    Case("eval: how often R is computed, Conv2d k=1", conv(kernel_size=1), IMAGE, recomputed, brief=False),
    Case("ONNX, Cayley-Neumann, unfolded", LINEAR, noise(7, 16), onnx, brief=False),
    Case("ONNX, exact Cayley, unfolded", LINEAR, noise(7, 16), onnx, EXACT, OFT(4, parameterization="cayley")),
    Case(
        "block size 32 asked, in_features 53",
        one(nn.Linear, in_features=53, out_features=10),
        noise(7, 53),
        block_size,
        {"oft_block_size": 32},
        OFT(32),
    ),
    Case(
        "in_features 53, nearest block size",
        one(nn.Linear, in_features=53, out_features=10),
        noise(7, 53),
        config={"oft_block_size": 32},
        spec=OFT(32, on_indivisible="nearest"),
        std=0.02,
        brief=False,
    ),
    Case("Linear", LINEAR, noise(2, 5, 16)),
    Case(
        "Linear, exact Cayley",
        LINEAR,
        noise(2, 5, 16),
        config=EXACT,
        spec=OFT(4, parameterization="cayley"),
        brief=False,
    ),
    Case("Conv2d k=1", conv(kernel_size=1), IMAGE),
    Case("Conv2d k=1, bfloat16", conv(kernel_size=1, **HALF), noise(2, 8, 12, 12, **HALF), brief=False),
    Case("Conv2d k=1, stride 2", conv(kernel_size=1, stride=2), IMAGE, brief=False),
    Case("Conv2d, kernel as large as the input", conv(kernel_size=5), noise(2, 8, 5, 5)),
    Case("Embedding", EMBEDDING, tokens),
    Case("Conv2d k=1, files", conv(kernel_size=1), IMAGE, files),
    Case("Conv2d, kernel as large as the input, files", conv(kernel_size=5), noise(2, 8, 5, 5), files),
    Case("Embedding, files", EMBEDDING, tokens, files),
)
