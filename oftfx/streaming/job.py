"""A fold of a checkpoint directory, from the checks to the files in their places."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.folded import NOTE, own_files
from oftfx.adapter.from_file import AdapterFiles
from oftfx.errors import FoldError, warn
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.folding.inputs import digest_of
from oftfx.folding.peers import Peers
from oftfx.folding.record import SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.report import FoldReport
from oftfx.folding.spill import Spill
from oftfx.model.running import Inputs
from oftfx.streaming.calibrated import Calibrating
from oftfx.streaming.decisions import Choice, Decisions, Means
from oftfx.streaming.directory import CONFIG, CheckpointDirectory
from oftfx.streaming.finish import Finish, report_of
from oftfx.streaming.fold_layer import Folder
from oftfx.streaming.given import Given
from oftfx.streaming.journal import Done, Journal
from oftfx.streaming.maps import Maps
from oftfx.streaming.ranks import Ranks
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.staging import Staging
from oftfx.streaming.tensor_bytes import bytes_of, dtype_named, parts_of, read_back, write_headers
from oftfx.streaming.transformers_loader import quiet, short_collections
from oftfx.streaming.work import Copy, Fold, Replace, Target, Work, is_calibrated
from oftfx.streaming.writer import Writer
from oftfx.terminal import bar
from oftfx.version import __version__

Progress = Callable[[int, int], None]
Folded = tuple[tuple[SiteFold, ...], Mapping[str, torch.Tensor]]
_FOLDS = 2
"""Layers that are folded at the same time."""


@dataclass(frozen=True)
class Job:
    """Everything that was checked, and what is to be done; nothing is written yet.

    Attributes:
        base: the checkpoint.
        files: the adapter.
        out: the directory that is made.
        skeleton: the model.
        decisions: per site.
        work: what is written.
        maps: of the checkpoint.
        reference: of the float weights, or None.
        calibration: inputs of the model.
        on_disk: whether their hidden states are kept in files.
        key: tells a run with the same input.
        stale: files of an earlier result in the output that this one replaces.
    """

    base: CheckpointDirectory
    files: AdapterFiles
    out: Path
    skeleton: Skeleton
    decisions: Decisions
    work: Work
    maps: Maps
    reference: ReferenceWeights | None
    calibration: tuple[Inputs, ...]
    on_disk: bool
    key: str
    stale: tuple[str, ...]

    @classmethod
    def of(
        cls,
        base: Path,
        adapter: Path,
        out: Path,
        quantized: Choice | None,
        reference: Path | None,
        calibration: Sequence[Inputs] = (),
        *,
        hidden_states: str = "memory",
        overwrite: bool,
        convention: str | None = None,
        part: str | None = None,
    ) -> Job:
        """Check all that can be known before a byte is written.

        Raises:
            FoldError: the checkpoint is not complete, the output is in the way or has no room, or a policy cannot be.
            AdapterError: the adapter is not one, or of another model.
        """
        if hidden_states not in ("memory", "disk"):
            raise FoldError(f"hidden_states: got {hidden_states!r}, expected 'memory' or 'disk'")
        if hidden_states == "disk" and not Spill.possible:
            raise FoldError("hidden_states='disk': this system cannot reserve room in files; use 'memory'")
        _check_apart(base, out)
        directory = CheckpointDirectory.read(base)
        given = Given.open(adapter, convention, part)
        if (base / ROTATIONS).exists():
            raise FoldError(
                f"{base} has rotations in front of its weights ({ROTATIONS}), which act before the adapter's; load it "
                "with oftfx.load_folded and use oftfx.fold"
            )
        original = None if reference is None else ReferenceWeights(reference)
        maps = Maps(base)
        skeleton = Skeleton.of(directory, maps)
        plan, files = given.read(skeleton)
        decisions = Decisions.of(skeleton, plan, files, quantized, Means(original is not None, bool(calibration)))
        work = Work.of(directory, skeleton, decisions)
        inputs = tuple(calibration) if any(s.action == "calibrate" for s in decisions.sites) else ()
        if calibration and not inputs:
            warn("calibration: no layer is calibrated, so these inputs are not used; quantized='calibrate' asks for it")
        key = _key(directory, given, reference, decisions, inputs)
        made = cls(
            directory, files, out, skeleton, decisions, work, maps, original, inputs, hidden_states == "disk", key, ()
        )
        if Staging(out).landing(key) is not None:  # an earlier run was bringing the files to their places
            return made
        return replace(made, stale=_stale(out, overwrite=overwrite))

    @property
    def nbytes(self) -> int:
        """What the result takes on the disk, at most."""
        others = sum((self.base.path / n).stat().st_size for n in self.base.others)
        kept = sum(k.nbytes for k in self.decisions.kept.values())
        return self.work.nbytes + others + kept + 2**20

    def summary(self) -> str:
        """What would be done, in words."""
        actions = Counter(f"{s.format}: {s.action}" for s in self.decisions.sites)
        changed = sum(u.nbytes for u in self.work.units if not isinstance(u, Copy))
        kind, files = type(self.skeleton.model).__name__, len(self.work.files)
        return "\n".join(
            [
                f"{kind} in {files} files, {len(self.decisions.sites)} sites",
                *(f"  {count} of {what}" for what, count in sorted(actions.items())),
                f"{self.nbytes:,} bytes to write, {changed:,} of them made anew, the others copied",
            ]
        )

    def check_room(self) -> None:
        """Raise `FoldError` where the disk has less room than is missing."""
        if (missing := self.missing()) > 0:
            raise FoldError(self.no_room(missing))

    def missing(self) -> int:
        """How many bytes there are too few on the disk; negative where there are enough."""
        place = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        new = Staging(self.out).new
        there = sum(p.stat().st_blocks * 512 for p in new.iterdir()) if new.is_dir() else 0
        return self.nbytes - there - shutil.disk_usage(place).free

    def no_room(self, missing: int) -> str:
        """Words for it."""
        return (
            f"{self.out}: the disk is full: {max(missing, 1):,} bytes are missing of the {self.nbytes:,} that the "
            "result takes. Make room there and run the same again: what was written stays and is not written twice"
        )

    def run(self, adapter: str, progress: Progress, ranks: Ranks, *, show: bool = False) -> FoldReport:
        """Do it, or what is left of it, this process its share.

        Args:
            adapter: name for the report.
            progress: told the bytes done, and all.
            ranks: the processes.
            show: a bar of its own for layers that are calibrated, which take longest for their bytes.

        Raises:
            FoldError: see `oftfx.fold_checkpoint`.
        """
        staging = Staging(self.out)
        with ExitStack() as stack, short_collections():
            ranks.from_first(lambda: stack.enter_context(staging.alone()))
            shares = ranks.from_first(lambda: self._prepared(staging, ranks))
            if shares is not None:
                ranks.all_do(lambda: self._work(staging, ranks.rank, shares[ranks.rank], progress))
                done = ranks.from_first(lambda: self._done(staging) or {})  # before anybody adds to it
                ranks.all_do(lambda: self._calibrate(staging, done, ranks.peers, progress, show=show))
                ranks.from_first(lambda: self._end(staging, adapter))
            ranks.from_first(lambda: staging.land(staging.landing(self.key) or (), CONFIG))
        total = self.work.to_write
        progress(total, total)  # of tensors whose length depends on what is in them, the most was counted
        return report_of(self.out / NOTE)

    def _prepared(self, staging: Staging, ranks: Ranks) -> list[list[int]] | None:
        """What each process has still to do; None where the files only have to take their places."""
        if staging.landing(self.key) is not None:
            return None
        self.check_room()
        done = self._done(staging)
        if done is None:
            if staging.journals:
                warn(f"{self.out}: an earlier run with other input ended early; this one starts anew")
            staging.begin_anew()
            Journal.begin(staging.journal(), self.key)
        left = {i: u.nbytes for i, u in enumerate(self.work.units) if i not in (done or {}) and not is_calibrated(u)}
        return ranks.shares(left)

    def _done(self, staging: Staging) -> dict[int, Done] | None:
        """What earlier processes with the same input have done; None where there were none, or some had another."""
        found = [Journal.read(p, self.key) for p in staging.journals]
        if not found or None in found:
            return None
        return {unit: done for journal in found if journal is not None for unit, done in journal.done.items()}

    def _end(self, staging: Staging, adapter: str) -> None:
        done = self._done(staging) or {}
        write_headers(staging.new, self.work, done)
        parts = (self.base, self.files, self.skeleton, self.decisions, self.work, done, adapter, self.calibration)
        Finish(*parts).write(staging.new)
        staging.begin_landing(self.key, self.stale)

    def _work(self, staging: Staging, rank: int, share: Sequence[int], progress: Progress) -> None:
        path = staging.journal(rank)
        journal = Journal.read(path, self.key) or Journal.begin(path, self.key)
        units = [(i, self.work.units[i]) for i in share]
        total = self.work.to_write
        left = sum(u.nbytes for _, u in units) + sum(u.nbytes for u in self.work.units if is_calibrated(u))
        done = _Count(total - left, total, progress)
        done(0)
        folder = self._folder()
        writer = Writer(staging.new, journal, done, tuple(f.file for f in self.work.files))
        threads = torch.get_num_threads()
        side_by_side = min(_FOLDS, threads)
        try:
            torch.set_num_threads(threads // side_by_side)  # layers side by side do not wait for each other's threads
            with quiet(), ThreadPoolExecutor(side_by_side, "oftfx-fold") as pool:
                folding = deque[tuple[int, Fold, Future[Folded]]]()
                for index, unit in units:
                    if isinstance(unit, Copy):
                        writer.copy(index, unit, self.maps)
                    elif isinstance(unit, Replace):
                        values = ((t, self._brought(name, t)) for t, name in unit.values)
                        writer.write(index, [(t, bytes_of(v)) for t, v in values], (), {})
                    else:
                        if len(folding) == side_by_side:
                            self._write_next(writer, folding)
                        folding.append((index, unit, pool.submit(folder.fold, unit.path, unit.sites, unit.stored)))
                while folding:
                    self._write_next(writer, folding)
            writer.finish()
        finally:
            torch.set_num_threads(threads)
            writer.close()

    def _calibrate(
        self, staging: Staging, done: dict[int, Done], peers: Peers, progress: Progress, *, show: bool
    ) -> None:
        """Fold the layers that need to see what they read, one after the other; the first process writes them."""
        units = {u.path: (i, u) for i, u in enumerate(self.work.units) if isinstance(u, Fold)}
        left = {i: u for i, u in units.values() if is_calibrated(u) and i not in done}
        if not left:
            return
        writer = None
        if peers.rank == 0:
            journal = Journal.read(staging.journal(), self.key) or Journal.begin(staging.journal(), self.key)
            total = self.work.to_write
            count = _Count(total - sum(u.nbytes for u in left.values()), total, progress)
            writer = Writer(staging.new, journal, count, tuple(f.file for f in self.work.files))
        begin, end = (len(self.calibration) * r // peers.world for r in (peers.rank, peers.rank + 1))
        every = sum(is_calibrated(u) for u in self.work.units)

        def result(path: str) -> Mapping[str, torch.Tensor] | None:
            index, unit = units[path]
            if index not in done:
                return None
            return {t.name: read_back(staging.new, t, done[index]) for t in unit.targets}

        def write(path: str, folded: Folded) -> None:
            index, unit = units[path]
            if writer is not None:
                self._write(writer, index, unit, folded)
                writer.finish()  # a layer takes minutes of a large model: none is lost
                done[index] = journal.done[index]
            done[index] = peers.exchange("written", done.get(index))[0] or Done()
            del left[index]
            advance(every - len(left), every)

        try:
            with peers.together(), quiet(), bar("calibrate") if show else nullcontext(_nothing) as advance:
                advance(every - len(left), every)
                parts = (self._folder(), self.files, self.decisions, {p: u for p, (_, u) in units.items()})
                spill = Spill(staging.root) if self.on_disk else None
                Calibrating(*parts, result, write, peers).run(self.calibration[begin:end], spill)
        finally:
            if writer is not None:
                writer.close()

    def _folder(self) -> Folder:
        return Folder(self.skeleton, self.maps, self.files.skews, self.decisions.whole, self.reference)

    def _write(self, writer: Writer, index: int, unit: Fold, folded: Folded) -> None:
        lines, tensors = folded
        parts, tails = parts_of(unit, tensors)
        writer.write(index, parts, lines, tails)

    def _write_next(self, writer: Writer, folding: deque[tuple[int, Fold, Future[Folded]]]) -> None:
        index, unit, future = folding.popleft()
        self._write(writer, index, unit, future.result())
        for stored in unit.stored:
            self.maps.forget(stored.file, stored.begin, stored.end)

    def _brought(self, name: str, target: Target) -> torch.Tensor:
        return self.decisions.whole[name].to(dtype_named(target.dtype))


def _nothing(done: int, total: int) -> None:
    """No bar."""


class _Count:
    """Adds bytes up for a progress function."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = done, total, progress

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress(min(self.done, self.total), self.total)


def _check_apart(base: Path, out: Path) -> None:
    inside, outside = out.resolve(), base.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise FoldError(
            f"{out} and {base} are one directory, or one is in the other; choose another place for the result"
        )


def _stale(out: Path, *, overwrite: bool) -> tuple[str, ...]:
    if out.exists() and not out.is_dir():
        raise FoldError(f"{out} is a file; choose another place for the result")
    found = tuple(own_files(out))
    if found and not overwrite:
        raise FoldError(
            f"{out} holds an earlier result; overwrite=True (--overwrite) replaces it, or choose another directory"
        )
    return found


def _key(
    directory: CheckpointDirectory,
    given: Given,
    reference: Path | None,
    decisions: Decisions,
    calibration: Sequence[Inputs],
) -> str:
    """Of everything that decides the bytes of the result."""
    parts = [__version__, torch.__version__, version("transformers")]
    parts.append(directory.fingerprint(checkpoint_digest(directory.path)))
    parts += given.facts
    if reference is not None:
        facts = checkpoint_digest(reference) if reference.is_dir() else reference.stat().st_mtime_ns
        parts.append(f"reference {facts}")
    parts += [digest_of(batch) for batch in calibration]
    parts.append(json.dumps([(s.entry.fqn, s.action) for s in decisions.sites]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
