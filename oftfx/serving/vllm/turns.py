"""The rotations in an adapter's directory, and the form in which a layer of a server keeps them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from oftfx.adapter.peft_files import CONFIG_FILE, PLAN_FILE, WEIGHT_FILE, read_keys
from oftfx.adapter.read import read_config, read_plan, read_weights
from oftfx.errors import AdapterFileError
from oftfx.planning.from_peft import spec_from_config
from oftfx.rotation.module import Rotation
from oftfx.rotation.skew import skew_size
from oftfx.rotation.spec import OFT
from oftfx.typed_json import parsed


@dataclasses.dataclass(frozen=True)
class Turn:
    """One site's rotation.

    Attributes:
        blocks: ``(blocks, b, b)``, float32.
        shared: whether the only block is that of every part of the input.
    """

    blocks: Tensor
    shared: bool

    def in_blocks_of(self, size: int, width: int) -> Tensor:
        """The same rotation of ``width`` inputs in larger blocks, ``(width / size, size, size)``.

        Raises:
            AdapterFileError: it is of another width, or its blocks do not fit into larger ones of this size.
        """
        own = self.blocks.shape[-1]
        count = width // own if self.shared else len(self.blocks)
        if count * own != width:
            raise AdapterFileError(f"it turns {count * own} inputs, the layer has {width}; is it of another model?")
        if size % own:
            raise AdapterFileError(
                f"its blocks are of size {own}, and there is room for blocks of {size}; start the server with "
                f"OFTFX_VLLM_BLOCK_SIZE={own}, or with several sizes and commas between them"
            )
        blocks = self.blocks.expand(count, -1, -1)
        made = blocks.new_zeros(width // size, size, size)
        for part in range(size // own):
            at = slice(part * own, (part + 1) * own)
            made[:, at, at] = blocks[part :: size // own]
        return made


def is_oft(directory: str | Path) -> bool:
    """Whether a directory holds an OFT adapter, of PEFT's convention or of our own; no file is checked for more."""
    if (Path(directory) / PLAN_FILE).is_file():
        return True
    try:
        config = parsed((Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "OFT"


def read_turns(directory: str | Path) -> dict[str, Turn]:
    """Every rotation by the path of its site.

    Raises:
        AdapterFileError: not readable, or an adapter that trained more than rotations of linear layers.
    """
    where = Path(directory) / WEIGHT_FILE
    tensors, _ = read_weights(where)
    skews, others = read_keys(tensors, str(where))
    if others:
        raise AdapterFileError(
            f"{where}: it has {next(iter(others))} besides its rotations (bias=..., modules_to_save), which a server "
            "has one of for all adapters; fold this adapter instead"
        )
    specs = _specs(Path(directory))
    return {site: _turn(tensors[key], specs(site), f"{where}: {site}") for site, key in skews.items()}


def _specs(directory: Path) -> Callable[[str], OFT]:
    """How each site's numbers become a rotation."""
    plan = directory / PLAN_FILE
    if not plan.is_file():
        spec = spec_from_config(read_config(directory / CONFIG_FILE))
        return lambda _: spec
    known: Mapping[str, OFT] = {e.fqn: e.spec for e in read_plan(plan)}

    def of(site: str) -> OFT:
        if site not in known:
            raise AdapterFileError(f"{plan} does not name {site}, which {WEIGHT_FILE} rotates")
        return known[site]

    return of


def _turn(skew: Tensor, spec: OFT, where: str) -> Turn:
    size = (1 + math.isqrt(1 + 8 * skew.shape[-1])) // 2
    if skew.dim() != 2 or skew_size(size) != skew.shape[-1] or (spec.block_share and len(skew) != 1):
        raise AdapterFileError(f"{where}: a skew of shape {tuple(skew.shape)} is no rotation")
    # The rows that there are, each once: what blocks share is repeated where the width is known.
    rows = dataclasses.replace(spec, block_size=size, blocks=None, block_share=False, into="site")
    rotation = Rotation(len(skew) * size, rows).eval()
    with torch.no_grad():
        rotation.skew.copy_(skew)
        return Turn(rotation.matrices(), spec.block_share)
