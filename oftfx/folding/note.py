"""What a folded model knows of its folds, for the files made from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn as nn

from oftfx.folding.report import FoldReport

_ATTRIBUTE = "_oftfx_folds"


def note_fold(model: nn.Module, report: FoldReport, hashes: Mapping[str, str]) -> None:
    """Remember what was folded: numbers only, the model keeps no tensor for it. Earlier folds stay noted.

    Args:
        model: the folded model.
        report: of the fold.
        hashes: `fingerprint` of each folded adapter.
    """
    vars(model)[_ATTRIBUTE] = [*vars(model).get(_ATTRIBUTE, ()), noted(report, hashes)]


def noted(report: FoldReport, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What is remembered."""
    return {
        "adapters": dict(hashes),
        "sites": dict(Counter(f"{s.format}: {s.action}" for s in report)),
        "survival": report.survival,
        "worst_relative_error": max((s.relative_error for s in report), default=0.0),
        "output_error": report.output_error,
    }


def fold_notes(model: nn.Module) -> list[dict[str, Any]]:
    """What was noted in a model and its parts, with the part's path as ``"module"``; oldest first."""
    return [{"module": path, **note} for path, m in model.named_modules() for note in vars(m).get(_ATTRIBUTE, ())]


def note_again(model: nn.Module, notes: Sequence[Mapping[str, Any]]) -> None:
    """Inverse of `fold_notes`, for a model that was read from a file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for note in notes:
        found.setdefault(note["module"], []).append({k: v for k, v in note.items() if k != "module"})
    for path, own in found.items():
        vars(model.get_submodule(path))[_ATTRIBUTE] = own


def forget_fold(model: nn.Module) -> None:
    """Of a fold that is undone, the last one."""
    if notes := vars(model).pop(_ATTRIBUTE, [])[:-1]:
        vars(model)[_ATTRIBUTE] = notes
