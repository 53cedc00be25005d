"""Codes and trained scales of a fold-aware adapter, in a file beside it."""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn
from torch import Tensor

from oftfx.errors import AdapterFileError
from oftfx.folding.aware import Maker
from oftfx.placement.aware import Aware
from oftfx.placement.aware_scales import AwareScales
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites

SCALE_FILE = "oftfx_scales.safetensors"


def scale_tensors(root: nn.Module, adapter: str) -> dict[str, Tensor]:
    """``<site>.packed``, ``.scale``, ``.shift`` and, where the format has them, ``.zero`` of an adapter; maybe none."""
    found = dict[str, Tensor]()
    for fqn, placement in rotated_sites(root):
        aware = placement.through.get((adapter,))
        if isinstance(aware, AwareScales):
            found.update((f"{fqn}.{part}", t) for part, t in aware.tensors().items())
    return found


def saved_scales(directory: Path) -> Maker:
    """`AwareScales` as an adapter's directory has them; sites that are not in it stay as they are.

    Raises:
        AdapterFileError: there is no such file, or it is not readable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = directory / SCALE_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"{path}: {error}. save_adapter writes it for an adapter whose scales train (oftfx.fold_aware)"
        ) from error
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        fqn, _, part = key.rpartition(".")
        sites.setdefault(fqn, {})[part] = tensor

    def make(fqn: str, placement: Placement, names: tuple[str, ...]) -> Aware | None:
        if fqn not in sites:
            return None
        try:
            return AwareScales.restored(placement, names, sites[fqn])
        except (KeyError, ValueError) as error:
            raise AdapterFileError(f"{path}: {fqn} does not fit this layer: {error}") from error

    return make
