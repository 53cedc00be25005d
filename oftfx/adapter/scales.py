"""Codes and trained scales of a fold-aware adapter, in a file beside it."""

from __future__ import annotations

from pathlib import Path

import torch.nn as nn
from torch import Tensor

from oftfx.adapter.fingerprint import fingerprint
from oftfx.errors import AdapterFileError
from oftfx.folding.aware import Maker
from oftfx.placement.aware import Aware
from oftfx.placement.aware_scales import AwareScales
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites

SCALE_FILE = "oftfx_scales.safetensors"
ADAPTER = "oftfx_adapter_sha256"
"""In its metadata: the adapter that the codes were made for, see `fingerprint`."""


def scale_tensors(root: nn.Module, adapter: str) -> dict[str, Tensor]:
    """``<site>.packed``, ``.scale``, ``.shift`` and, where the format has them, ``.zero`` of an adapter; maybe none."""
    found = dict[str, Tensor]()
    for fqn, placement in rotated_sites(root):
        aware = placement.through.get((adapter,))
        if isinstance(aware, AwareScales):
            found.update((f"{fqn}.{part}", t) for part, t in aware.tensors().items())
    return found


def saved_scales(directory: Path, root: nn.Module, adapter: str) -> Maker:
    """`AwareScales` as an adapter's directory has them; sites that are not in it were the identity, and stay so.

    Raises:
        AdapterFileError: there is no such file, it is not readable, or it was written with other values of the adapter.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / SCALE_FILE
    try:
        with safe_open(path, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (no dictionary)
    except (OSError, SafetensorError, KeyError) as error:
        raise AdapterFileError(
            f"{path}: {error}. save_adapter writes it for an adapter whose scales train (oftfx.fold_aware)"
        ) from error
    if notes.get(ADAPTER) != fingerprint(root, adapter):
        raise AdapterFileError(
            f"{path}: these codes were made for other values than adapter {adapter!r} has; load the adapter from the "
            "same directory first"
        )
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
