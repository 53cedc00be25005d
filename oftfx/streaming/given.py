"""The adapter of a fold of files: in any convention that says it without the weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from oftfx.adapter.conventions.base import Convention
from oftfx.adapter.conventions.checkpoint import Checkpoint
from oftfx.adapter.conventions.registry import convention_named, convention_of
from oftfx.adapter.conventions.source import Source
from oftfx.adapter.from_file import AdapterFiles
from oftfx.adapter.load import read_adapter
from oftfx.adapter.peft_files import CONFIG_FILE, PLAN_FILE
from oftfx.errors import AdapterError, FoldError
from oftfx.planning.plans import Plan
from oftfx.planning.program import Program
from oftfx.streaming.skeleton import Skeleton


class NeedsWeightsError(FoldError):
    """The adapter is said by the weights of the model, which a fold of files does not have all at once."""


@dataclass(frozen=True)
class Given:
    """The files, opened but not read.

    Attributes:
        source: of the adapter.
        convention: what they mean.
        part: the prefix of this model's keys, where one file is of several models.
    """

    source: Source
    convention: Convention
    part: str | None

    @classmethod
    def open(cls, path: Path, convention: str | None, part: str | None) -> Given:
        """Find out what they are.

        Raises:
            AdapterFileError: no such file, a damaged one, or one that could be of several conventions.
            AdapterError: no such convention, or a checkpoint of a model with rotations, which has no rules with it.
        """
        source = Source.open(path)
        meaning = convention_of(source) if convention is None else convention_named(convention)
        if isinstance(meaning, Checkpoint):
            raise AdapterError(
                f"{path} is a checkpoint of a model with rotations, which has numbers and not how they become "
                "rotations; make an adapter of it first: oftfx convert BASE CHECKPOINT ADAPTER --rules RULES"
            )
        return cls(source, meaning, part)

    @property
    def facts(self) -> list[str]:
        """What tells these files, and their meaning, from others."""
        directory = self.source.directory
        files = dict.fromkeys([*self.source.files.values(), directory / CONFIG_FILE, directory / PLAN_FILE])
        sums = [f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files if f.is_file()]
        return [*sums, f"convention {self.convention.name} {self.part}"]

    def read(self, skeleton: Skeleton) -> tuple[Plan, AdapterFiles]:
        """The plan and the numbers.

        Raises:
            AdapterError: it is of another model, or its numbers are damaged.
            NeedsWeightsError: it has more than rotations.
        """
        plan, files = read_adapter(self.source, self.convention, Program.of(skeleton.model), None, part=self.part)
        if own := [n for n in plan.brought if n in files.others and files.others[n].is_meta]:
            raise NeedsWeightsError(
                f"{self.source.path}: more than rotations (scales of rows, or reflections) for {len(own)} weights, "
                f"e.g. {own[0]}, which is said by the weights themselves; load the model, and use oftfx.load_adapter "
                "and oftfx.fold"
            )
        return plan, files
