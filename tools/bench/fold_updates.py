"""A small update in every format: how much of it each policy lets through, on one layer of a real model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import oftfx
from oftfx.formats.registry import format_of
from tools.bench.fold_models import Encoder

UPDATE = 0.01
"""How far the rotation moves the weight, relative to its norm."""


def layers() -> dict[str, Callable[[nn.Linear], nn.Module]]:
    """Each format's quantizer, by what tables call it."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    from oftfx.formats import aqlm, awq, bnb4, bnb8, eetq, gptq, hf_fp8, hqq, inc_fp8, inc_woq, torchao

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64))
    return {
        "bnb nf4": bnb4.make_linear4bit,
        "bnb nf4, double": lambda m: bnb4.make_linear4bit(m, double_quant=True),
        "bnb fp4": lambda m: bnb4.make_linear4bit(m, quant_type="fp4"),
        "bnb int8": bnb8.make_linear8bit,
        "gptq 8": lambda m: gptq.make_gptq(m, bits=8, group_size=64),
        "gptq 4": lambda m: gptq.make_gptq(m, bits=4, group_size=64),
        "gptq 4, sym, act-order": lambda m: gptq.make_gptq(m, bits=4, group_size=64, sym=True, desc_act=True),
        "gptq 3": lambda m: gptq.make_gptq(m, bits=3, group_size=64),
        "gptq 2": lambda m: gptq.make_gptq(m, bits=2, group_size=64),
        "awq 4": lambda m: awq.make_awq(m, group_size=64),
        "hqq 8": lambda m: hqq.make_hqq(m, nbits=8),
        "hqq 4": lambda m: hqq.make_hqq(m, nbits=4),
        "hqq 4, axis 0": lambda m: hqq.make_hqq(m, nbits=4, axis=0),
        "hqq 3": lambda m: hqq.make_hqq(m, nbits=3),
        "hqq 2": lambda m: hqq.make_hqq(m, nbits=2),
        "torchao int8": lambda m: torchao.make_torchao(m, Int8WeightOnlyConfig()),
        "torchao int4": lambda m: torchao.make_torchao(m, int4),
        "torchao float8": lambda m: torchao.make_torchao(m, Float8WeightOnlyConfig()),
        "transformers fp8 blocks": hf_fp8.make_fp8_linear,
        "inc fp8": inc_fp8.make_patched_linear,
        "inc woq 4": lambda m: inc_woq.make_inc_woq(m, bits=4),
        "eetq int8": eetq.make_eetq,
        "aqlm 2x8": aqlm.make_aqlm,
    }


def measure(task: Encoder, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a format and policy: survival in the weight, survival and error in the output on held-out inputs."""
    linear = task.base.encoder.layer[2].intermediate.dense  # type: ignore[union-attr, index]
    calibration, held_out = _inputs(task, linear, task.calibration), _inputs(task, linear, task.held_out)
    rows = []
    for name, make in layers().items():
        say(f"a {UPDATE:.0%} update in {name}")
        layer = make(copy.deepcopy(linear).requires_grad_(False))
        model = oftfx.transform(nn.Sequential(layer), {"0": oftfx.OFT(32)})
        _rotate(model, UPDATE)
        weight_format = format_of(model[0])
        assert weight_format is not None
        base = weight_format.dequantize(model[0])
        target = oftfx.fold(model, quantized="float").model[0].weight.float()  # type: ignore[index]
        for policy in ("requantize", "calibrate"):
            result = oftfx.fold(model, quantized=policy, calibration=[(calibration,)])
            folded = weight_format.dequantize(result.model[0])  # type: ignore[index]
            (site,) = result.report
            asked, arrived = held_out @ (target - base).T, held_out @ (folded - base).T
            rows.append(
                {
                    "format": name,
                    "policy": policy,
                    "survival": site.survival,
                    "output_survival": float((asked * arrived).sum() / asked.square().sum()),
                    "output_error": float((held_out @ (folded - target).T).norm() / (held_out @ target.T).norm()),
                }
            )
    return rows


def _rotate(model: nn.Module, update: float) -> None:
    """Random skews of a size that moves the weight by ``update``: ``|2 S| / sqrt(n)`` of each block's rows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for skew in oftfx.adapter_parameters(model):
            skew.copy_(torch.randn(skew.shape, generator=generator) * update / (2 * 31**0.5))


def _inputs(task: Encoder, linear: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            task.base(**batch)
    handle.remove()
    return torch.cat(seen)
