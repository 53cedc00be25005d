"""How far a training run is, on disk: numbers only, never a pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import OftfxError
from oftfx.files import write_whole

FILE = "training.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_progress(
    folder: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, losses: Sequence[float]
) -> None:
    """Write parameters, the moments of AdamW, the losses and the state of the random numbers, by one rename.

    Raises:
        OftfxError: it cannot be written; what was there is as it was.
    """
    from safetensors.torch import save

    tensors = {f"parameter.{i}": p.detach().cpu().contiguous() for i, p in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{name}.{i}": state[name].detach().cpu().clone() for name in _MOMENTS if name in state}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors["random"] = torch.get_rng_state()
    write_whole(folder / FILE, save(tensors))


@torch.no_grad()
def resume(folder: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """Take up what `save_progress` wrote; the losses so far, none where nothing was written.

    Raises:
        OftfxError: the file is damaged, or not of these parameters; nothing has changed then.
    """
    path = folder / FILE
    if not path.exists():
        return []
    tensors = _read(path)
    _check(path, tensors, parameters)
    try:
        torch.set_rng_state(tensors["random"])
    except (RuntimeError, TypeError) as error:
        raise OftfxError(f"{path} is damaged (random: {error}); remove it to train from the start") from None
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
        state = {name: tensors[f"{name}.{i}"] for name in _MOMENTS if f"{name}.{i}" in tensors}
        if state:
            # AdamW counts its steps in a tensor on the CPU, whatever the parameter's device.
            optimizer.state[parameter] = {n: t if n == "step" else t.to(parameter) for n, t in state.items()}
    return [float(x) for x in tensors["losses"]]


def losses_so_far(folder: Path) -> list[float]:
    """The losses of the steps that are done, without a model.

    Raises:
        OftfxError: the file is damaged.
    """
    path = folder / FILE
    return [float(x) for x in _read(path)["losses"]] if path.exists() else []


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        losses, _ = tensors["losses"], tensors["random"]
        if losses.dim() != 1 or not losses.is_floating_point():
            raise ValueError(f"losses is {losses.dtype} of {losses.dim()} axes, expected a row of floats")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise OftfxError(f"{path} is damaged ({error}); remove it to train from the start") from None
    return tensors


def _check(path: Path, tensors: dict[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
    count = sum(name.startswith("parameter.") for name in tensors)
    if count != len(parameters):
        raise OftfxError(f"{path} has {count} parameters, here are {len(parameters)}: it is of another adapter")
    for i, parameter in enumerate(parameters):
        there = [name for name in _MOMENTS if f"{name}.{i}" in tensors]
        if f"parameter.{i}" not in tensors or len(there) not in (0, len(_MOMENTS)):
            raise OftfxError(
                f"{path} is damaged: of parameter {i} it has {', '.join(there) or 'nothing'}; expected its value and "
                f"none or all of {', '.join(_MOMENTS)}. Remove it to train from the start"
            )
        for name in ("parameter", *_MOMENTS):
            found = tensors.get(f"{name}.{i}")
            if found is None:
                continue
            if not found.is_floating_point():
                raise OftfxError(f"{path} is damaged: {name} {i} is {found.dtype}, expected floats")
            shape = torch.Size() if name == "step" else parameter.shape
            if found.shape != shape:
                raise OftfxError(
                    f"{path}: {name} {i} is {tuple(found.shape)}, here it is {tuple(shape)}: it is of another adapter"
                )
