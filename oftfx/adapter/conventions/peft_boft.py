"""BOFT of PEFT, and of sd-scripts' networks.boft, which has its formula under flattened names.

``boft_R (m, k, b, b)``: factors ``F_i = P_i diag(R) P_i^T`` with ``R = (I - Q)(I + Q)^-1``, ``Q = (A - A^T) / 2``; then
``W' = diag(boft_s) W (F_m ... F_1)^T``. A factor turns groups of ``b * 2^i`` inputs, so their product has blocks of
``b * 2^(m-1)``, dense, and is made one rotation here: ``2^(m-1)`` times the numbers of one factor for the product of an
input, and no butterfly any more. PEFT itself needs its CUDA extension for more than one factor.

Verified against peft 0.21.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oftfx.adapter.conventions.base import Contents, Foreign, Target, Turn, check_shape, only
from oftfx.adapter.conventions.names import resolve
from oftfx.adapter.conventions.oft_v2 import FLAT
from oftfx.adapter.conventions.orthogonal import blocks_of_skew, butterfly, turn_of
from oftfx.adapter.conventions.peft_config import by_layer, checked_config, read_others, required, rows_scale
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.peft_files import PREFIX
from oftfx.model.site import Site

FACTORS, SCALE = ".boft_R", ".boft_s"


@dataclass(frozen=True)
class BOFT(Foreign):
    """Of PEFT, or of sd-scripts."""

    name: str  # type: ignore[misc]
    made_by: str  # type: ignore[misc]
    is_directory: bool  # type: ignore[misc]
    read_only = "a rotation of full blocks is no product of butterfly factors"

    def recognizes(self, source: Source) -> bool:
        """By its key; with PEFT's prefix or without."""
        keys = [k for k in source.heads if k.endswith(FACTORS)]
        return bool(keys) and self.is_directory == any(k.startswith(PREFIX) for k in keys)

    def read(self, source: Source, target: Target) -> Contents:
        """One rotation for the factors of a layer, and scales of rows."""
        if not self.is_directory:
            only(source, (FACTORS, SCALE), self.name)
            names = dict.fromkeys(k.removesuffix(FACTORS).removesuffix(SCALE) for k in source.heads)
            paths, remarks = resolve(source, names, target, FLAT)
            keys = {f: {e: n + e for e in (FACTORS, SCALE) if n + e in source.heads} for n, f in paths.items()}
            return Contents({f: self._turn(source, k, target.sites[f]) for f, k in keys.items()}, remarks=remarks)
        config = checked_config(source, "BOFT")
        layers, others = by_layer(source, target, (FACTORS, SCALE))
        turns = {fqn: self._turn(source, keys, target.sites[fqn]) for fqn, keys in layers.items()}
        return Contents(turns, read_others(source, others), config)

    def _turn(self, source: Source, keys: dict[str, str], site: Site) -> Turn:
        key = required(source, keys, FACTORS, site.fqn)
        check_shape(source, key, site, site.in_features, dims=4)
        a = source.wide(key)
        count, _, size, _ = a.shape

        def order(i: int) -> Tensor:
            whole = torch.arange(site.in_features)
            if count == 1:
                return whole
            # Parts of b/2: first those with even numbers in the group, then the others. P v reads v so, and F is P D
            # P^T.
            read = whole.view(-1, 2**i, 2, size // 2).transpose(1, 2).flatten()
            return torch.empty_like(read).index_copy_(0, read, whole)

        r = butterfly(blocks_of_skew((a - a.transpose(-1, -2)) / 2), order, source.named(key))
        return turn_of(r, source.named(key), scale=rows_scale(source, keys.get(SCALE), site.out_features))


PEFT_BOFT = BOFT("peft-boft", "PEFT", True)
SD_SCRIPTS_BOFT = BOFT("sd-scripts-boft", "sd-scripts", False)
