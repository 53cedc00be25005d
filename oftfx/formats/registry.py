"""Which formats there are, and which of them stores the weight of a layer."""

from __future__ import annotations

import torch.nn as nn

from oftfx.errors import FormatError
from oftfx.formats.aqlm import Aqlm
from oftfx.formats.awq import Awq
from oftfx.formats.base import WeightFormat
from oftfx.formats.bnb4 import Bnb4
from oftfx.formats.bnb8 import Bnb8
from oftfx.formats.compressed_tensors import CompressedTensors
from oftfx.formats.dense import Dense
from oftfx.formats.eetq import Eetq
from oftfx.formats.gptq import Gptq
from oftfx.formats.hf_fp8 import HfFp8
from oftfx.formats.hqq import Hqq
from oftfx.formats.inc_fp8 import IncFp8
from oftfx.formats.inc_woq import IncWeightOnly
from oftfx.formats.quanto import Quanto
from oftfx.formats.torchao import TorchAO

_BUILTIN: tuple[WeightFormat, ...] = (
    *(Aqlm(), Eetq(), IncFp8(), HfFp8(), IncWeightOnly(), TorchAO(), CompressedTensors(), Quanto()),
    *(Awq(), Gptq(), Hqq(), Bnb8(), Bnb4(), Dense()),
)
_formats: dict[str, WeightFormat] = {f.name: f for f in _BUILTIN}  # in the order they are asked


def register_format(weight_format: WeightFormat) -> WeightFormat:
    """Add a format; later ones are asked first, so a user's format can take over a class of layers.

    Examples:
        >>> import torch
        >>> from oftfx.formats import format_named, format_of, register_format
        >>> class Mine(type(format_named("dense"))):
        ...     name = "mine"
        >>> mine = register_format(Mine())
        >>> format_of(torch.nn.Linear(6, 4)).name
        'mine'
    """
    others = {n: f for n, f in _formats.items() if n != weight_format.name}
    _formats.clear()
    _formats.update({weight_format.name: weight_format, **others})
    return weight_format


def formats() -> dict[str, WeightFormat]:
    """All formats by name, in the order they are asked.

    Examples:
        >>> from oftfx.formats import formats
        >>> list(formats())[-1], "bnb4" in formats()
        ('dense', True)
    """
    return dict(_formats)


def format_of(module: nn.Module) -> WeightFormat | None:
    """The format that stores the weight of ``module``, or None where none does.

    Examples:
        >>> import torch
        >>> from oftfx.formats import format_of
        >>> format_of(torch.nn.Linear(6, 4)).name, format_of(torch.nn.ReLU())
        ('dense', None)
    """
    return next((f for f in _formats.values() if f.matches(module)), None)


def format_named(name: str) -> WeightFormat:
    """The format of that name.

    Raises:
        FormatError: there is none.

    Examples:
        >>> from oftfx.formats import format_named
        >>> format_named("dense").lossless, format_named("bnb4").lossless
        (True, False)
    """
    if name not in _formats:
        raise FormatError(f"unknown weight format {name!r}; known: {', '.join(sorted(_formats))}")
    return _formats[name]
