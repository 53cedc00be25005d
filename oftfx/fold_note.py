"""What a folded model knows of its fold, for the files made from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from oftfx.report.fold_report import FoldReport

_ATTRIBUTE = "_oftfx_fold"


def note_fold(model: nn.Module, report: FoldReport, hashes: Mapping[str, str]) -> None:
    """Remember what was folded: numbers only, the model keeps no tensor for it.

    Args:
        model: the folded model.
        report: of the fold.
        hashes: `fingerprint` of each folded adapter.
    """
    vars(model)[_ATTRIBUTE] = {
        "adapters": dict(hashes),
        "sites": dict(Counter(f"{s.format}: {s.action}" for s in report)),
        "survival": report.survival,
        "worst_relative_error": max((s.relative_error for s in report), default=0.0),
        "output_error": report.output_error,
    }


def fold_note(model: nn.Module) -> dict[str, Any] | None:
    """What `note_fold` left; None for a model that was not folded."""
    return vars(model).get(_ATTRIBUTE)


def forget_fold(model: nn.Module) -> None:
    """Of a fold that is undone."""
    vars(model).pop(_ATTRIBUTE, None)
