"""Weight matrices of a model that no site stands for, and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn as nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from oftfx.formats.unread import load_instead
from oftfx.model.names import read_as
from oftfx.model.structure import is_own_module
from oftfx.planning.program import Program

# What packed weights are made of; masks and positions are booleans and int64.
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def unreachable(program: Program) -> Iterator[tuple[str, str, str]]:
    """``(path, path of the module, reason)`` of every matrix that cannot be rotated."""
    weights = {s.weight_name for s in program.sites}
    holders = {s.module for s in program.sites}
    quantized = {s.module for s in program.sites if s.is_layer and s.format != "dense"}  # scales are part of a weight
    for fqn, module in program.index.modules.items():
        if is_own_module(module) or fqn in quantized:
            continue
        if fqn in program.refused:
            yield fqn, fqn, program.refused[fqn]
            continue
        matrices = [n for n, p in module._parameters.items() if p is not None and is_matrix(p)]
        for name in matrices:
            path = read_as(f"{fqn}.{name}" if fqn else name)
            if path not in weights:
                path = fqn if name == "weight" and fqn else path
                yield path, fqn, program.refused.get(path) or _why(program, module, name)
        packed = any(b is not None and is_matrix(b) and b.dtype in _PACKED for b in module._buffers.values())
        if packed and not matrices and fqn not in holders and not any(module.children()):
            yield fqn, fqn, _why(program, module, "weight")


def can_look_into(module: nn.Module) -> bool:
    """Whether a recording inside a module can show how it uses its parameters."""
    return not hasattr(module, "parametrizations") and not isinstance(module, (nn.Linear, nn.RNNBase))


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a tensor has rows and columns; one of a lazy module has no shape yet."""
    return not isinstance(tensor, nn.UninitializedParameter) and tensor.dim() >= 2


def _why(program: Program, module: nn.Module, parameter: str) -> str:
    if hasattr(module, "parametrizations"):
        return "its weight is computed by a parametrization; remove that first (torch.nn.utils.parametrize)"
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        weight = module.weight
        stored = (
            weight.dtype if type(weight) is nn.Parameter else type(weight).__name__
        )  # whose dtype is not its storage
        return f"a Linear whose weight is stored as {stored}, which no known format reads" + _instead(module)
    if isinstance(module, nn.RNNBase):
        return "the weights of a recurrent layer are read by one fused kernel, step by step"
    if parameter not in module._parameters:
        return f"layers of class {type(module).__name__} cannot be rotated yet" + _instead(module)
    if program.recording is None or program.recording.rung == "tree":
        reason = program.recording.reason if program.recording else "pass example_inputs"
        return f"a parameter that {type(module).__name__} uses by itself; only a recorded forward shows how ({reason})"
    return f"the recorded forward does not use this parameter of {type(module).__name__} as a matrix"


def _instead(module: nn.Module) -> str:
    instead = load_instead(module)
    return "" if instead is None else f"; {instead}"
