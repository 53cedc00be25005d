"""Write adapter directories: the old files or the new ones, never some of each."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn as nn

from oftfx.adapter import base_sketch, peft_files
from oftfx.adapter.belonging import KEY, digest_of
from oftfx.adapter.contents import adapter_tensors, check_in_place
from oftfx.adapter.conventions.base import Foreign
from oftfx.adapter.conventions.peft import as_016
from oftfx.adapter.conventions.registry import CONVENTIONS, written_names
from oftfx.adapter.fingerprint import fingerprint
from oftfx.adapter.foreign import write_foreign
from oftfx.adapter.packed import packed
from oftfx.adapter.peft_files import PLAN_FILE
from oftfx.adapter.scales import ADAPTER, SCALE_FILE, scale_tensors
from oftfx.adapter.store import located
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.files import landing, write


def save_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    adapter: str = "default",
    convention: str = "peft",
    part: str | None = None,
) -> Path:
    """Write one adapter as a directory, or as one file.

    Where its scales train for a fold (`oftfx.fold_aware` with ``"calibrate"``), they and the codes are written beside
    it, ``oftfx_scales.safetensors``; ``fold_aware(model, "calibrate", calibration=path)`` takes them up again. Scales
    of several adapters together are in the model's ``state_dict`` only.

    Args:
        model: a transformed model.
        path: the directory, made where it does not exist; of other tools' conventions with one file, that file, whose
            name ends with ``.safetensors``.
        adapter: its name in the model; the files do not contain it.
        convention: ``"peft"``: ``adapter_model.safetensors`` and ``adapter_config.json``, which PEFT loads;
            ``"oftfx"``: the same tensors with the plan beside them, for adapters whose sites differ in block size or
            settings. Or one of another tool, where that can say this adapter: a directory ``"peft-0.16"`` or
            ``"peft-0.14"``, one file ``"diffusers"``, ``"oft_v2"``, ``"lycoris"``, ``"kohya"``, ``"comfyui"``.
        part: in such a file, what stands before the paths of this model (``"lora_unet"``, say); None for the usual.

    Returns:
        The directory, or the file.

    Raises:
        AdapterError: an unknown adapter or convention, or an adapter that the convention cannot say.
        AdapterFileError: the files cannot be written; an adapter that was there is as it was.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> sorted(file.name for file in oftfx.save_adapter(model, "news").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    root, store = located(model)
    store.require(adapter)
    check_in_place(root, store, adapter)
    if convention not in (names := written_names()):
        why = getattr(CONVENTIONS.get(convention), "read_only", "") or f"expected one of {', '.join(names)}"
        raise AdapterError(f"convention: got {convention!r}, {why}")
    if isinstance(foreign := CONVENTIONS[convention], Foreign):
        return write_foreign(foreign, root, store, adapter, Path(path), part)
    if part is not None:
        raise AdapterError(f"part={part!r}: files of convention {convention!r} are of one model")
    plan = store.adapters[adapter].plan
    if convention != "oftfx":
        side, other = peft_files.CONFIG_FILE, PLAN_FILE
        config = peft_files.config_for(plan, root)
        text = json.dumps(as_016(config) if convention == "peft-0.16" else config, indent=2, sort_keys=True)
        peft_files.warn_of_unusable(plan, root)
    else:
        side, other, text = PLAN_FILE, peft_files.CONFIG_FILE, plan.to_json()
    tensors = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
        for k, v in adapter_tensors(root, store, adapter)
    }
    scales = {k: v.detach().cpu().contiguous() for k, v in scale_tensors(root, adapter).items()}
    directory = Path(path)
    # The side file decides what the numbers mean; one of another convention must not stay beside them.
    with landing(directory, side, AdapterFileError, stale=[other, *([] if scales else [SCALE_FILE])]) as made:
        write(made / side, text.encode())
        notes = {"format": "pt", KEY: digest_of(json.loads(text)), base_sketch.KEY: base_sketch.sketch_of(root, plan)}
        write(made / peft_files.WEIGHT_FILE, packed(tensors, notes))
        if scales:
            write(made / SCALE_FILE, packed(scales, {"format": "pt", ADAPTER: fingerprint(root, adapter)}))
    return directory
