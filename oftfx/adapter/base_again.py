"""The base, out of a fold that has kept its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from oftfx.adapter.fixed_rotations import CONFIG_KEY
from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.folded import NOTE, own_files, read_note
from oftfx.errors import FoldError
from oftfx.files import landing, write
from oftfx.folding.checkpoint import ROTATION
from oftfx.typed_json import read_object

_CONFIG = "config.json"
_KEPT = ("kept", "untouched")


def base_again(folded: Path, out: Path) -> int:
    """Write the checkpoint without rotations and without our notes; the number of sites that had one.

    Raises:
        FoldError: a site's weight was changed by the fold, or ``out`` holds a checkpoint of others, whose weights would
            be mixed with these.
        AdapterFileError: it is no fold, or not complete.
    """
    sites = read_note(folded)["report"]["sites"]
    changed = [s for s in sites if s["action"] not in _KEPT]
    if changed:
        raise FoldError(
            f"{folded}: {changed[0]['fqn']} was {changed[0]['action']}"
            + (f", like {len(changed) - 1} more" if changed[1:] else "")
            + "; the base's weights are not in there any more. Use the checkpoint that was folded"
        )
    with landing(out, _CONFIG, FoldError, stale=own_files(out)) as made:
        for file in sorted(folded.iterdir()):
            if file.name in (NOTE, ROTATIONS, _CONFIG) or file.name.startswith(".") or file.is_dir():
                continue
            if not _without_rotations(file, made / file.name):
                shutil.copyfile(file, made / file.name)
        config = read_object(folded / _CONFIG)
        config.pop(CONFIG_KEY, None)
        write(made / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    return sum(s["action"] == "kept" for s in sites)


def _without_rotations(file: Path, target: Path) -> bool:
    """Write a file of weights, or their index, without what belongs to rotations; False where there is nothing such."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            names = [*opened.keys()]
            own = [n for n in names if not ROTATION.search(n)]
            if own == names:
                return False
            save_file({n: opened.get_tensor(n) for n in own}, target, metadata=opened.metadata())
        return True
    if file.name.endswith(".index.json"):
        index = read_object(file)
        named = index.get("weight_map")
        if not isinstance(named, dict):
            raise FoldError(f"{file}: no weight_map from tensor names to files")
        index["weight_map"] = {n: f for n, f in named.items() if not ROTATION.search(n)}
        write(target, (json.dumps(index, indent=2) + "\n").encode())
        return True
    return False
