"""What a file says of itself: the model, its adapters and their hashes, and what a fold did."""

from __future__ import annotations

import json

import torch.nn as nn

from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.store import find_store
from oftfx.folding.note import fold_notes
from oftfx.onnx.adapters import AdapterMode
from oftfx.onnx.adapters.model_number import interface_of
from oftfx.placement.find import rotated_sites
from oftfx.serving.copied.runtime.contract import INTERFACE, MODEL
from oftfx.version import __version__


def describe(model: nn.Module, mode: AdapterMode) -> dict[str, str]:
    """Entries of the file's ``metadata_props``; JSON where a value has parts.

    ``oftfx.state`` is ``unfolded``, ``folded`` or ``plain``; ``oftfx.adapter_hashes`` are the adapters'
    `fingerprint`; ``oftfx.folds`` says for each fold with which adapters, what was done to how many sites of which
    format, and how large the error is. ``oftfx.interface`` identifies what adapters of the file fit; see
    `interface_of`.
    """
    folds = fold_notes(model)
    entries = {
        "oftfx.version": __version__,
        MODEL: type(model).__name__,
        INTERFACE: str(interface_of(model, mode.slots.names if mode.slots is not None else {})),
        "oftfx.state": "unfolded" if mode.active else "folded" if folds else "plain",
        **mode.metadata(),
    }
    if mode.named and find_store(model) is not None:
        entries["oftfx.adapter_hashes"] = json.dumps({n: fingerprint(model, n) for n in mode.named})
    if folds:
        entries["oftfx.folds"] = json.dumps(folds, sort_keys=True)
    if kept := [fqn for fqn, p in rotated_sites(model) if p.fixed]:
        entries["oftfx.kept_rotations"] = str(len(kept))
    return entries
