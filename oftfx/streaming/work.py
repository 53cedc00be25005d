"""The list of work: what is written where, each piece independent of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from oftfx.streaming.changes import Changes
from oftfx.streaming.decisions import Decision, Decisions
from oftfx.streaming.directory import BITS, CheckpointDirectory, Shard, Stored
from oftfx.streaming.skeleton import Skeleton

_TAIL = ".quant_state."
"""In names of tensors whose length depends on the numbers in them (JSON): they come last in their file."""
_TAIL_ROOM = 1024
_RUN = 64 * 2**20
"""Bytes of neighbours that are copied as one unit."""


@dataclass(frozen=True)
class Target:
    """A tensor of the result.

    Attributes:
        name: in the file.
        file: its name.
        dtype: as safetensors writes it.
        shape: its shape.
        begin: first byte, from the start of the file; None of those that come last.
        nbytes: its bytes; of those the most that it may have.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int | None
    nbytes: int

    @property
    def end(self) -> int | None:
        """One behind its last byte."""
        return None if self.begin is None else self.begin + self.nbytes


@dataclass(frozen=True)
class Copy:
    """Tensors that stay: bytes from there to here."""

    pairs: tuple[tuple[Stored, Target], ...]

    @property
    def nbytes(self) -> int:
        """That are written."""
        return sum(t.nbytes for _, t in self.pairs)


@dataclass(frozen=True)
class Replace:
    """Tensors that the adapter brings."""

    values: tuple[tuple[Target, str], ...]

    @property
    def nbytes(self) -> int:
        """That are written."""
        return sum(t.nbytes for t, _ in self.values)


@dataclass(frozen=True)
class Fold:
    """A layer that is folded."""

    path: str
    sites: tuple[Decision, ...]
    stored: tuple[Stored, ...]
    targets: tuple[Target, ...]

    @property
    def nbytes(self) -> int:
        """That are written."""
        return sum(t.nbytes for t in self.targets)


Unit = Copy | Replace | Fold


@dataclass(frozen=True)
class OutFile:
    """A file of the result.

    Attributes:
        file: its name.
        notes: metadata of its header.
        targets: by name, as the header lists them.
        start: where the tensors begin.
        size: bytes of the file, at most.
    """

    file: str
    notes: Mapping[str, str] | None
    targets: Mapping[str, Target]
    start: int
    size: int

    def header(self, tails: Mapping[str, tuple[int, int]]) -> bytes:
        """Text of the header; ``tails`` gives begin and bytes of the tensors that come last."""
        entries: dict[str, object] = {} if self.notes is None else {"__metadata__": dict(self.notes)}
        for name, target in self.targets.items():
            begin, nbytes = tails[name] if target.begin is None else (target.begin, target.nbytes)
            shape = [nbytes] if target.begin is None else list(target.shape)
            offsets = [begin - self.start, begin - self.start + nbytes]
            entries[name] = {"dtype": target.dtype, "shape": shape, "data_offsets": offsets}
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Work:
    """All of it, in the order of the files.

    Attributes:
        files: what is written.
        units: the pieces.
        where: files of the result by the names of their tensors.
    """

    files: tuple[OutFile, ...]
    units: tuple[Unit, ...]
    where: Mapping[str, str] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Of the files of weights, at most."""
        return sum(f.size for f in self.files)

    @property
    def to_write(self) -> int:
        """Bytes of all units."""
        return sum(u.nbytes for u in self.units)

    @classmethod
    def of(cls, directory: CheckpointDirectory, skeleton: Skeleton, decisions: Decisions) -> Work:
        """Lay the result out.

        Raises:
            FoldError: the checkpoint lacks what a site needs.
        """
        changes = Changes.of(skeleton, decisions)
        files = tuple(_out_file(s, changes, last=s is directory.shards[-1]) for s in directory.shards)
        targets = {n: t for f in files for n, t in f.targets.items()}
        units = list[Unit]()
        for fold in changes.folds:
            units.append(Fold(fold.path, fold.sites, fold.stored, tuple(targets[n] for n in fold.names)))
        folded = {n for f in changes.folds for n in f.names}
        replaced = [(targets[n], source) for n, source in changes.whole.items() if n not in folded]
        units += [Replace(((t, source),)) for t, source in replaced]
        taken = folded | {t.name for t, _ in replaced}
        stored = {t.name: t for t in directory}
        copied = [(changes.clones.get(n) or stored[n], t) for n, t in targets.items() if n not in taken]
        units += [Copy(tuple(run)) for run in _runs(copied)]
        order = {f.file: i for i, f in enumerate(files)}
        units.sort(key=lambda u: min((order[t.file], math.inf if t.begin is None else t.begin) for t in targets_of(u)))
        return cls(files, tuple(units), {n: t.file for n, t in targets.items()})


def is_calibrated(unit: Unit) -> bool:
    """Whether it has to see what its layer reads, so that it comes last, in the order in which the model runs."""
    return isinstance(unit, Fold) and unit.sites[0].action == "calibrate"


def targets_of(unit: Unit) -> Iterator[Target]:
    """What a unit writes."""
    if isinstance(unit, Copy):
        return (t for _, t in unit.pairs)
    return (t for t, _ in unit.values) if isinstance(unit, Replace) else iter(unit.targets)


def _out_file(shard: Shard, changes: Changes, *, last: bool) -> OutFile:
    file, order = shard.file, {n: i for i, n in enumerate(shard.names)}
    listed = dict[str, tuple[str, tuple[int, ...], int]]()
    for tensor in shard.tensors:
        if tensor.name in changes.gone:
            continue
        _, dtype, shape = changes.made.get(tensor.name, (None, tensor.dtype, tensor.shape))
        size = tensor.nbytes if tensor.name not in changes.made else _nbytes(dtype, shape)
        listed[tensor.name] = dtype, shape, size
    for name, (where, dtype, shape) in changes.made.items():
        if name not in listed and (where == file or (where is None and last and name not in order)):
            listed[name] = dtype, shape, _nbytes(dtype, shape)
    variable = {n for f in changes.folds for n in f.names if _TAIL in n}
    names = [*(n for n in shard.names if n in listed), *(n for n in listed if n not in order)]

    def laid_out(start: int) -> OutFile:
        targets, place = dict[str, Target](), start
        for name, (dtype, shape, size) in listed.items():
            if name not in variable:
                targets[name] = Target(name, file, dtype, shape, place, size)
                place += size
        for name in (n for n in listed if n in variable):
            dtype, shape, size = listed[name]
            targets[name] = Target(name, file, dtype, shape, None, max(size, _TAIL_ROOM))
            place += targets[name].nbytes
        return OutFile(file, shard.notes, {n: targets[n] for n in names}, start, place)

    start, guess = 0, laid_out(8)
    tails = {n: (guess.size + 2**20, 10**6) for n, t in guess.targets.items() if t.begin is None}
    while (needed := 8 + -(-len(guess.header(tails)) // 8) * 8) != start:
        start = needed
        guess = laid_out(start)
    return guess


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BITS[dtype] // 8


def _runs(copied: Sequence[tuple[Stored, Target]]) -> Iterator[list[tuple[Stored, Target]]]:
    """Neighbours in both files, not too many at a time."""
    run, size = list[tuple[Stored, Target]](), 0
    for stored, target in sorted(copied, key=lambda p: (p[1].file, p[1].begin or 0)):
        if run:
            before, made = run[-1]
            near = (stored.file, stored.begin) == (before.file, before.end) and target.begin == made.end
            if not near or size + target.nbytes > _RUN:
                yield run
                run, size = [], 0
        run.append((stored, target))
        size += target.nbytes
    if run:
        yield run
