"""What a fold was made from: adapters and their hashes, versions, the command, the calibration."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from oftfx.folding.peers import Peers
from oftfx.folding.record import SiteFold
from oftfx.model.running import Inputs
from oftfx.version import __version__

_PACKAGES = {
    "bnb4": "bitsandbytes",
    "bnb8": "bitsandbytes",
    "bnb4_experts": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "hqq": "hqq",
    "aqlm": "aqlm",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "compressed_tensors": "compressed-tensors",
    "inc_fp8": "neural-compressor-pt",
    "inc_woq": "neural-compressor-pt",
}
"""The packages whose layers formats are."""


@dataclass(frozen=True)
class Provenance:
    """Where a fold comes from.

    Attributes:
        model: class of the model.
        hashes: `oftfx.adapter.fingerprint.fingerprint` of each adapter by name.
        versions: of Python and of the packages that took part.
        command: the ``oftfx`` command; empty where it is not known, or a program of the user's called the library. Of
            paths the last part.
        calibration_inputs: how many were given.
        calibration_tokens: tokens in them, without padding; None where they are no tokens.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3, init="normal")})
        >>> origin = oftfx.fold(model, calibration=[(torch.randn(5, 6),)]).report.provenance
        >>> origin.model, len(origin.hashes["default"]), origin.calibration_inputs, origin.calibration_tokens
        ('Sequential', 64, 1, None)
    """

    model: str = ""
    hashes: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    calibration_inputs: int = 0
    calibration_tokens: int | None = None

    def joined(self, peers: Peers) -> Provenance:
        """That of a fold of several processes, with the inputs of all."""
        every = peers.exchange("calibration inputs", (self.calibration_inputs, self.calibration_tokens))
        tokens = [t for count, t in every if count]
        known = sum(t for t in tokens if t is not None) if tokens and None not in tokens else None
        return replace(self, calibration_inputs=sum(count for count, _ in every), calibration_tokens=known)


def provenance_of(
    model: object,
    sites: Iterable[SiteFold],
    hashes: Mapping[str, str],
    batches: Sequence[Inputs] = (),
    *,
    command: str = "",
) -> Provenance:
    """That of a fold in this process.

    Args:
        model: what was folded.
        sites: what was done; their formats say which packages matter.
        hashes: of the adapters.
        batches: calibration inputs.
        command: see `command_line`; a fold of files leaves it out of what it writes, since a fold that was interrupted
            and gone on with writes the same bytes as one that was not.
    """
    names = {"transformers", "safetensors", *(_PACKAGES[s.format] for s in sites if s.format in _PACKAGES)}
    versions = {"oftfx": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    for name in sorted(names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Provenance(type(model).__name__, dict(hashes), versions, command, len(batches), tokens_in(batches))


def tokens_in(batches: Sequence[Inputs]) -> int | None:
    """Tokens of calibration inputs, without padding; None where one has no ``input_ids``."""
    count = 0
    for batch in batches:
        if not isinstance(batch, Mapping) or (ids := batch.get("input_ids")) is None:
            return None
        mask = batch.get("attention_mask")
        count += int((mask != 0).sum()) if mask is not None and mask.shape == ids.shape else ids.numel()
    return count if batches else None


def command_line() -> str:
    """The command that this process is, where it is ours; paths without what stands before their last part."""
    program = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    if program.stem != "oftfx" and program.parts[-3:-1] != ("oftfx", "cli"):
        return ""
    words = [re.sub(r"(^|=)/(?:.*/)?", r"\1", w) for w in sys.argv[1:]]
    return shlex.join(["oftfx", *words])
