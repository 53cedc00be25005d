"""What a file says of itself: the model, its adapters and their hashes, and what a fold did."""

from __future__ import annotations

import json

import torch.nn as nn

from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.store import find_store
from oftfx.fold_note import fold_note
from oftfx.onnx.adapters import AdapterMode
from oftfx.onnx.adapters.blocks import interface_of
from oftfx.placement import rotated_sites


def describe(model: nn.Module, mode: AdapterMode) -> dict[str, str]:
    """Entries of the file's ``metadata_props``; JSON where a value has parts.

    ``oftfx.state`` is ``unfolded``, ``folded`` or ``plain``; ``oftfx.adapter_hashes`` are the adapters'
    `fingerprint`; ``oftfx.fold`` says with which adapters, what was done to how many sites of which format, and how
    large the error is.
    """
    from oftfx import __version__

    fold = fold_note(model)
    entries = {
        "oftfx.version": __version__,
        "oftfx.model": type(model).__name__,
        "oftfx.interface": str(interface_of(model)),
        "oftfx.state": "unfolded" if mode.active else "folded" if fold is not None else "plain",
        **mode.metadata(),
    }
    if mode.named and find_store(model) is not None:
        entries["oftfx.adapter_hashes"] = json.dumps({n: fingerprint(model, n) for n in mode.named})
    if fold is not None:
        entries["oftfx.fold"] = json.dumps(fold, sort_keys=True)
    if kept := [fqn for fqn, p in rotated_sites(model) if p.fixed]:
        entries["oftfx.kept_rotations"] = str(len(kept))
    return entries
