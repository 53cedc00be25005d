"""A float checkpoint in bitsandbytes' formats, and what that cost each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.errors import MissingExtraError, OftfxError
from oftfx.folding.record import SiteFold
from oftfx.folding.report import FoldReport
from oftfx.folds import FoldResult
from oftfx.formats.registry import format_of
from oftfx.opened import open_model
from oftfx.precision import relative_error

KINDS = ("nf4", "fp4", "llm.int8")


def quantize_bnb(directory: str | Path, kind: str, *, dtype: str = "auto") -> FoldResult:
    """Load a float checkpoint with its linear layers in ``kind``, as transformers does; its nearest codes.

    Args:
        directory: the checkpoint.
        kind: one of `KINDS`.
        dtype: of what stays float.

    Returns:
        The model, and a report with a row for each quantized layer: ``|W_quantized - W| / |W|``.

    Raises:
        MissingExtraError: bitsandbytes or transformers is not installed.
        OftfxError: the checkpoint is quantized already.
    """
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise MissingExtraError(error.name or "bitsandbytes", "bnb", f"Quantizing to {kind}") from error
    if kind not in KINDS:
        raise OftfxError(f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    plain: Any = open_model(directory, dtype=dtype)
    for path, module in plain.named_modules():
        known = format_of(module)
        if known is not None and not known.lossless:
            raise OftfxError(f"{path} of {directory} is quantized already ({known.name}); give the float checkpoint")
    wanted = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "llm.int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=plain.dtype)
    )
    made = open_model(directory, dtype=dtype, quantization_config=wanted)
    rows = tuple(_row(path, module, plain) for path, module in made.named_modules() if _is_quantized(module))
    return FoldResult(made, FoldReport(rows))


def _is_quantized(module: nn.Module) -> bool:
    known = format_of(module)
    return known is not None and not known.lossless


def _row(path: str, module: nn.Module, plain: nn.Module) -> SiteFold:
    known = format_of(module)
    assert known is not None
    weight: Any = plain.get_submodule(path).weight
    error = relative_error(known.dequantize(module).float().cpu(), weight.detach().float().cpu())
    before = weight.numel() * weight.element_size()
    return SiteFold(
        path, "dense", "requantized", relative_error=error, bytes_before=before, bytes_after=known.nbytes(module)
    )
