"""All that a training run is decided by, as one TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from oftfx.errors import MissingExtraError, OftfxError
from oftfx.files import write_whole

FILE = "oftfx_train.toml"


class RecipeError(OftfxError, ValueError):
    """A field of a recipe is unknown or out of range, or two do not go together."""


@dataclass(frozen=True)
class Recipe:
    """What is trained, on what, and how. Every field is a key of the TOML file and an option of ``oftfx train``.

    Attributes:
        base: checkpoint directory.
        data: a file of texts or conversations, or a folder with a folder of images for each class.
        target: layers, as in ``target_modules`` of PEFT: names, or ``all-linear``.
        rules: a ``.toml`` file of rules or a PEFT ``adapter_config.json``, instead of ``target``.
        block_size: of the rotations; with ``target``.
        share_input: one rotation for layers that read the same; with ``target``.
        dropout: of blocks; with ``target``.
        dtype: of the base's floats: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``: a GPU where torch sees one, else the CPU; or a device by its name in torch.
        sequence: tokens of a row at most; of texts.
        batch: rows of a forward.
        accumulate: forwards of a step.
        steps: optimiser steps; 0: by ``epochs``.
        epochs: passes over the data.
        rate: largest learning rate.
        warmup: share of the steps in which it rises.
        weight_decay: of AdamW.
        clip: largest norm of a gradient; 0: any.
        fold_aware: steps after these in which the scales of the folded codes train; see `oftfx.fold_aware`.
        calibration_tokens: of the data, for the codes of ``fold_aware``.
        held_out: a file, or empty: the last rows of the data.
        held_out_rows: how many of them, where no file is given.
        seed: of the order of the rows, and of dropout.
        every: steps between what is written to disk.
        gradient_checkpointing: recompute activations in the backward, for memory.
    """

    base: str
    data: str
    target: str = "all-linear"
    rules: str = ""
    block_size: int = 32
    share_input: bool = False
    dropout: float = 0.0
    dtype: str = "auto"
    device: str = "auto"
    sequence: int = 512
    batch: int = 4
    accumulate: int = 1
    steps: int = 0
    epochs: float = 1.0
    rate: float = 2.5e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    fold_aware: int = 0
    calibration_tokens: int = 8192
    held_out: str = ""
    held_out_rows: int = 16
    seed: int = 0
    every: int = 10
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        positive = ("block_size", "sequence", "batch", "accumulate", "every")
        for name in positive:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)!r}; expected 1 or more")
        for name in ("steps", "fold_aware", "held_out_rows", "clip", "weight_decay"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} = {getattr(self, name)!r}; expected 0 or more")
        if not self.rate > 0 or not 0 <= self.warmup < 1 or not self.epochs > 0:
            raise RecipeError(
                f"rate = {self.rate}, warmup = {self.warmup}, epochs = {self.epochs}; expected a rate and epochs above "
                "0, and warmup in [0, 1)"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise RecipeError(f"dtype = {self.dtype!r}; expected 'auto', 'float32', 'bfloat16' or 'float16'")
        if self.rules and self.target != "all-linear":
            raise RecipeError(f"rules = {self.rules!r} and target = {self.target!r}; give one of them")

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Recipe:
        """A recipe from a file, with other values for some fields.

        Raises:
            RecipeError: there is no such file, or a field that is not known or not of its type.
        """
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{path} cannot be read as TOML: {error}") from None
        return cls.of({**found, **changes}, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Recipe:
        """A recipe from values by name."""
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise RecipeError(f"{where}: {unknown[0]!r} is no field of a recipe; there are {', '.join(known)}")
        if missing := [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in values]:
            raise RecipeError(f"{where}: {missing[0]!r} is missing")
        fitting: dict[str, Any] = {}
        for name, value in values.items():
            kind = {"str": str, "int": int, "float": float, "bool": bool}[str(known[name].type)]
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise RecipeError(f"{where}: {name} = {value!r}; expected a {kind.__name__}")
            fitting[name] = value
        return cls(**fitting)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            MissingExtraError: tomli-w is not installed.
        """
        try:
            import tomli_w
        except ImportError as error:
            raise MissingExtraError("tomli_w", "cli", "Writing a recipe") from error
        write_whole(path, tomli_w.dumps(asdict(self)).encode(), RecipeError)

    def differences(self, other: Recipe) -> list[str]:
        """Names of the fields that differ, in words: ``rate: 0.1, there 0.2``."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {value!r}, there {theirs[name]!r}" for name, value in mine.items() if value != theirs[name]]
