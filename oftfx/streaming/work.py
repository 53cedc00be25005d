"""The list of work: what is written where, each piece independent of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from oftfx.errors import FoldError
from oftfx.passes.quantized.dequantize import activation_dtype
from oftfx.streaming.decisions import Decision, Decisions
from oftfx.streaming.directory import BITS, CheckpointDirectory, Shard, Stored
from oftfx.streaming.maps import NAMES
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.transformers_loader import module_path

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

    @classmethod
    def of(cls, directory: CheckpointDirectory, skeleton: Skeleton, decisions: Decisions) -> Work:
        """Lay the result out.

        Raises:
            FoldError: the checkpoint lacks what a site needs.
        """
        shapes = _Shapes.of(skeleton, decisions)
        files = tuple(_out_file(s, shapes, last=s is directory.shards[-1]) for s in directory.shards)
        targets = {n: t for f in files for n, t in f.targets.items()}
        units = list[Unit]()
        for fold in shapes.folds:
            units.append(Fold(fold.path, fold.sites, fold.stored, tuple(targets[n] for n in fold.names)))
        folded = {n for f in shapes.folds for n in f.names}
        replaced = [(targets[n], source) for n, source in shapes.whole.items() if n not in folded]
        units += [Replace(((t, source),)) for t, source in replaced]
        taken = folded | {t.name for t, _ in replaced}
        stored = {t.name: t for t in directory}
        copied = [(shapes.clones.get(n) or stored[n], t) for n, t in targets.items() if n not in taken]
        units += [Copy(tuple(run)) for run in _runs(copied)]
        order = {f.file: i for i, f in enumerate(files)}
        units.sort(key=lambda u: min((order[t.file], math.inf if t.begin is None else t.begin) for t in targets_of(u)))
        return cls(files, tuple(units), {n: t.file for n, t in targets.items()})


def targets_of(unit: Unit) -> Iterator[Target]:
    """What a unit writes."""
    if isinstance(unit, Copy):
        return (t for _, t in unit.pairs)
    return (t for t, _ in unit.values) if isinstance(unit, Replace) else iter(unit.targets)


@dataclass(frozen=True)
class _Folding:
    path: str
    sites: tuple[Decision, ...]
    stored: tuple[Stored, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Shapes:
    """What the result has other than the checkpoint.

    Attributes:
        folds: layers.
        whole: names in the checkpoint of what the adapter brings, with those in the adapter.
        clones: new names of tensors that were shared, with what they were.
        gone: names that vanish.
        made: dtype and shape of new tensors, by the file that they go into.
    """

    folds: tuple[_Folding, ...]
    whole: Mapping[str, str]
    clones: Mapping[str, Stored]
    gone: frozenset[str]
    made: Mapping[str, tuple[str | None, str, tuple[int, ...]]]

    @classmethod
    def of(cls, skeleton: Skeleton, decisions: Decisions) -> _Shapes:
        folds, gone = list[_Folding](), set[str]()
        made: dict[str, tuple[str | None, str, tuple[int, ...]]] = {}
        layers: dict[str, list[Decision]] = {}
        for site in decisions.sites:
            if site.changes:
                layers.setdefault(site.entry.site.module, []).append(site)
        for path, sites in layers.items():
            stored = skeleton.stored.get(path, ())
            if sites[0].action == "folded":
                stored, names = _dense(skeleton, sites, stored, made)
            else:
                names = tuple(t.name for t in stored if not _is_bias(skeleton, t))
            if sites[0].action == "float":
                names = _floats(skeleton, path, sites, stored, made)
                gone |= {t.name for t in stored} - {*names}
            folds.append(_Folding(path, tuple(sites), stored, names))
        whole, clones = _whole(skeleton, decisions), dict[str, Stored]()
        for name in sorted(decisions.untied):
            if name not in made and not _stored_as(skeleton, name):
                (source,) = _sources(skeleton, name)
                made[name], clones[name] = (None, source.dtype, source.shape), source
                if twin := next((n for n in skeleton.tied(name) if n in decisions.whole), None):
                    whole[name] = twin
        gone -= {*made}
        return cls(tuple(folds), whole, clones, frozenset(gone), made)


def _dense(
    skeleton: Skeleton,
    sites: Sequence[Decision],
    stored: tuple[Stored, ...],
    made: dict[str, tuple[str | None, str, tuple[int, ...]]],
) -> tuple[tuple[Stored, ...], tuple[str, ...]]:
    names = list[str]()
    for site in sites:
        name = site.entry.site.weight_name
        sources = _sources(skeleton, name)
        if own := _stored_as(skeleton, name):
            names += [t.name for t in own]
        else:  # only the name of another that shared it is in the checkpoint
            made[name] = (None, sources[0].dtype, sources[0].shape)
            names.append(name)
    return stored, tuple(names)


def _floats(
    skeleton: Skeleton,
    path: str,
    sites: Sequence[Decision],
    stored: Sequence[Stored],
    made: dict[str, tuple[str | None, str, tuple[int, ...]]],
) -> tuple[str, ...]:
    """Names of a layer that becomes a float one."""
    site, dtype = sites[0].entry.site, NAMES[activation_dtype(skeleton.model, skeleton.dtype)]
    if not site.is_layer:
        raise FoldError(f"{site.fqn}: 4-bit parameters cannot become floats in files; load the model and fold that")
    prefix = next((t.name.rpartition(".")[0] for t in stored if _is_bias(skeleton, t)), None)
    if prefix is None:
        first = min((t.name for t in stored), key=len)
        prefix = path if first.startswith(f"{path}.") else first.rpartition(".")[0]
    made[f"{prefix}.weight"] = (stored[0].file, dtype, (site.out_features, site.in_features))
    names = [f"{prefix}.weight"]
    for bias in (t for t in stored if _is_bias(skeleton, t)):
        made[bias.name] = (bias.file, dtype, bias.shape)
        names.append(bias.name)
    return tuple(names)


def _is_bias(skeleton: Skeleton, stored: Stored) -> bool:
    return skeleton.naming.renamed[stored.name].endswith(".bias")


def _stored_as(skeleton: Skeleton, name: str) -> tuple[Stored, ...]:
    """What the checkpoint has under just this name of the model."""
    own = skeleton.stored.get(module_path(skeleton.model, name), ())
    return tuple(t for t in own if skeleton.naming.renamed[t.name] == name)


def _sources(skeleton: Skeleton, name: str) -> tuple[Stored, ...]:
    found = skeleton.sources(name)
    if not found:
        raise FoldError(f"the checkpoint has no {name}, whose weight the adapter rotates; is it complete?")
    return found


def _whole(skeleton: Skeleton, decisions: Decisions) -> dict[str, str]:
    """Where the adapter's own tensors go."""
    found = dict[str, str]()
    for name in decisions.whole:
        for known in (name, *skeleton.tied(name)):
            for stored in _stored_as(skeleton, known):
                if skeleton.naming.how[stored.name] == "model":
                    raise FoldError(
                        f"{name} trains whole, and the checkpoint has it in several tensors ({stored.name}); load the "
                        "model and use oftfx.fold"
                    )
                found[stored.name] = name
    return found


def _out_file(shard: Shard, shapes: _Shapes, *, last: bool) -> OutFile:
    file, order = shard.file, {n: i for i, n in enumerate(shard.names)}
    listed = dict[str, tuple[str, tuple[int, ...], int]]()
    for tensor in shard.tensors:
        if tensor.name in shapes.gone:
            continue
        _, dtype, shape = shapes.made.get(tensor.name, (None, tensor.dtype, tensor.shape))
        size = tensor.nbytes if tensor.name not in shapes.made else _nbytes(dtype, shape)
        listed[tensor.name] = dtype, shape, size
    for name, (where, dtype, shape) in shapes.made.items():
        if name not in listed and (where == file or (where is None and last and name not in order)):
            listed[name] = dtype, shape, _nbytes(dtype, shape)
    variable = {n for f in shapes.folds for n in f.names if _TAIL in n}
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
