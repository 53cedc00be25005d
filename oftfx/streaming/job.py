"""A fold of a checkpoint directory, from the checks to the files in their places."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from oftfx.adapter import peft_files
from oftfx.adapter.folded import NOTE, own_files
from oftfx.adapter.from_file import AdapterFiles
from oftfx.adapter.kept import FILE as ROTATIONS
from oftfx.adapter.save import PLAN_FILE
from oftfx.errors import FoldError, warn
from oftfx.folding.checkpoint import checkpoint_digest
from oftfx.folding.record import SiteFold
from oftfx.folding.reference import ReferenceWeights
from oftfx.folding.report import FoldReport
from oftfx.streaming.decisions import Choice, Decisions
from oftfx.streaming.directory import CONFIG, CheckpointDirectory
from oftfx.streaming.finish import Finish, report_of
from oftfx.streaming.fold_layer import Folder
from oftfx.streaming.journal import Done, Journal
from oftfx.streaming.maps import NAMES, Maps
from oftfx.streaming.ranks import Ranks
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.staging import Staging
from oftfx.streaming.transformers_loader import quiet
from oftfx.streaming.work import Copy, Fold, Replace, Target, Work
from oftfx.streaming.writer import Writer, put_at
from oftfx.version import __version__

Progress = Callable[[int, int], None]
Folded = tuple[tuple[SiteFold, ...], dict[str, torch.Tensor]]
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
        *,
        overwrite: bool,
    ) -> Job:
        """Check all that can be known before a byte is written.

        Raises:
            FoldError: the checkpoint is not complete, the output is in the way or has no room, or a policy cannot be.
            AdapterError: the adapter is not one, or of another model.
        """
        _check_apart(base, out)
        directory = CheckpointDirectory.read(base)
        files = AdapterFiles.read(adapter)
        if (base / ROTATIONS).exists():
            raise FoldError(
                f"{base} has rotations in front of its weights ({ROTATIONS}), which act before the adapter's; load it "
                "with oftfx.load_folded and use oftfx.fold"
            )
        original = None if reference is None else ReferenceWeights(reference)
        maps = Maps(base)
        skeleton = Skeleton.of(directory, maps)
        decisions = Decisions.of(skeleton, files, quantized, original is not None)
        work = Work.of(directory, skeleton, decisions)
        key = _key(directory, adapter, reference, decisions)
        made = cls(directory, files, out, skeleton, decisions, work, maps, original, key, ())
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

    def run(self, adapter: str, progress: Progress, ranks: Ranks) -> FoldReport:
        """Do it, or what is left of it, this process its share.

        Raises:
            FoldError: see `oftfx.fold_checkpoint`.
        """
        staging = Staging(self.out)
        with ExitStack() as stack:
            ranks.from_first(lambda: stack.enter_context(staging.alone()))
            shares = ranks.from_first(lambda: self._prepared(staging, ranks))
            if shares is not None:
                ranks.all_do(lambda: self._work(staging, ranks.rank, shares[ranks.rank], progress))
                ranks.from_first(lambda: self._end(staging, adapter))
            ranks.from_first(lambda: staging.land(staging.landing(self.key) or (), CONFIG))
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
        return ranks.shares({i: u.nbytes for i, u in enumerate(self.work.units) if i not in (done or {})})

    def _done(self, staging: Staging) -> dict[int, Done] | None:
        """What earlier processes with the same input have done; None where there were none, or some had another."""
        found = [Journal.read(p, self.key) for p in staging.journals]
        if not found or None in found:
            return None
        return {unit: done for journal in found if journal is not None for unit, done in journal.done.items()}

    def _end(self, staging: Staging, adapter: str) -> None:
        done = self._done(staging) or {}
        _headers(staging.new, self.work, done)
        parts = (self.base, self.files, self.skeleton, self.decisions, self.work, done, adapter)
        Finish(*parts).write(staging.new)
        staging.begin_landing(self.key, self.stale)

    def _work(self, staging: Staging, rank: int, share: Sequence[int], progress: Progress) -> None:
        path = staging.journal(rank)
        journal = Journal.read(path, self.key) or Journal.begin(path, self.key)
        units = [(i, self.work.units[i]) for i in share]
        total = sum(u.nbytes for u in self.work.units)
        done = _Count(total - sum(u.nbytes for _, u in units), total, progress)
        done(0)
        folder = Folder(self.skeleton, self.maps, self.files.skews, self.decisions.whole, self.reference)
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
                        writer.write(index, [(t, _bytes(v)) for t, v in values], (), {})
                    else:
                        if len(folding) == side_by_side:
                            self._write(writer, *folding.popleft())
                        folding.append((index, unit, pool.submit(folder.fold, unit.path, unit.sites, unit.stored)))
                while folding:
                    self._write(writer, *folding.popleft())
            writer.finish()
        finally:
            torch.set_num_threads(threads)
            writer.close()

    def _write(self, writer: Writer, index: int, unit: Fold, future: Future[Folded]) -> None:
        lines, tensors = future.result()
        parts, tails = _parts(unit, tensors)
        writer.write(index, parts, lines, tails)
        for stored in unit.stored:
            self.maps.forget(stored.file, stored.begin, stored.end)

    def _brought(self, name: str, target: Target) -> torch.Tensor:
        dtype = next(d for d, n in NAMES.items() if n == target.dtype)
        return self.decisions.whole[name].to(dtype)


class _Count:
    """Adds bytes up for a progress function."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = done, total, progress

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress(min(self.done, self.total), self.total)


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _parts(unit: Fold, tensors: Mapping[str, torch.Tensor]) -> tuple[list[tuple[Target, Any]], dict[str, bytes]]:
    """What is written, and what comes last; both as was planned."""
    parts, tails = list[tuple[Target, Any]](), dict[str, bytes]()
    for target in unit.targets:
        tensor = tensors.get(target.name)
        if tensor is None:
            there = ", ".join(sorted(tensors)) or "nothing"
            raise FoldError(f"{unit.path}: its fold gave no {target.name} (it gave {there})")
        if target.begin is None:
            tails[target.name] = bytes(_bytes(tensor))
            continue
        got, wanted = (NAMES[tensor.dtype], tuple(tensor.shape)), (target.dtype, target.shape)
        if got != wanted:
            raise FoldError(
                f"{target.name}: its fold gave {got[0]} {list(got[1])}, the file has {wanted[0]} {list(wanted[1])}; "
                "load the model and use oftfx.fold"
            )
        parts.append((target, _bytes(tensor)))
    return parts, tails


def _headers(directory: Path, work: Work, done: Mapping[int, Done]) -> None:
    """Write what comes last in each file, its header, and cut it to its length."""
    tails = {n: t for d in done.values() for n, t in d.tails.items()}
    for file in work.files:
        handle, places = os.open(directory / file.file, os.O_WRONLY | os.O_CREAT, 0o644), dict[str, tuple[int, int]]()
        try:
            place = max((t.end or 0 for t in file.targets.values()), default=0) or file.start
            for name, target in file.targets.items():
                if target.begin is None:
                    put_at(handle, tails[name], place)
                    places[name] = place, len(tails[name])
                    place += len(tails[name])
            text = file.header(places)
            put_at(handle, (file.start - 8).to_bytes(8, "little") + text.ljust(file.start - 8), 0)
            os.ftruncate(handle, place)
            os.fsync(handle)
        finally:
            os.close(handle)


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


def _key(directory: CheckpointDirectory, adapter: Path, reference: Path | None, decisions: Decisions) -> str:
    """Of everything that decides the bytes of the result."""
    parts = [__version__, torch.__version__, version("transformers")]
    parts.append(directory.fingerprint(checkpoint_digest(directory.path)))
    files = (adapter / n for n in (peft_files.WEIGHT_FILE, peft_files.CONFIG_FILE, PLAN_FILE))
    parts += [f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files if f.is_file()]
    if reference is not None:
        facts = checkpoint_digest(reference) if reference.is_dir() else reference.stat().st_mtime_ns
        parts.append(f"reference {facts}")
    parts.append(json.dumps([(s.entry.fqn, s.action) for s in decisions.sites]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
