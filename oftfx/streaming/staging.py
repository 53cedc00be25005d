"""Where a run keeps what it has made until all of it is there: a hidden directory in the output, for one process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from oftfx.errors import FoldError
from oftfx.files import is_name, lock, rename, settle, sync, write
from oftfx.typed_json import made, parsed

_NAME, _NEW, _OLD = ".oftfx-fold-checkpoint", "new", "old"
_JOURNAL, _BESIDE, _LANDING = "journal.jsonl", "journal-", "landing.json"


@dataclass(frozen=True)
class _Landing:
    """All files are made: of which input, their names, and those of an older result that go."""

    key: str
    names: tuple[str, ...]
    stale: tuple[str, ...]


@dataclass(frozen=True)
class Staging:
    """The hidden directory. It stays where a run ends early, and the next run goes on in it.

    Attributes:
        out: the directory that the files are for.
    """

    out: Path

    @property
    def root(self) -> Path:
        """The hidden directory itself."""
        return self.out / _NAME

    @property
    def new(self) -> Path:
        """The files that are made."""
        return self.root / _NEW

    def journal(self, rank: int = 0) -> Path:
        """What a process has done."""
        return self.root / (_JOURNAL if rank == 0 else f"{_BESIDE}{rank}.jsonl")

    @property
    def journals(self) -> list[Path]:
        """Those that are there, of any number of processes."""
        return sorted(p for p in self.root.glob("journal*.jsonl") if p.is_file())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make it where it is not there, and keep other processes out.

        Raises:
            FoldError: one is in it.
        """
        absent = [p for p in (self.out, *self.out.parents) if not p.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        handle = lock(self.root)
        if handle is None and os.name != "nt":
            raise FoldError(f"{self.out}: another process folds into it now; wait for it, or choose another directory")
        try:
            self.new.mkdir(exist_ok=True)
            yield
        finally:
            if self.root.is_dir() and not self.journals:
                shutil.rmtree(self.root, ignore_errors=True)
                for path in absent:
                    if path.is_dir() and not any(path.iterdir()):
                        path.rmdir()
            if handle is not None:
                os.close(handle)

    def begin_anew(self) -> None:
        """Forget what is there."""
        for path in (self.root / _LANDING, *self.journals, self.new):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.new.mkdir()

    def begin_landing(self, key: str, stale: Iterable[str]) -> None:
        """All is made: from here on a run of the same input only brings the files to their places."""
        names = sorted(p.name for p in self.new.iterdir())
        text = json.dumps(asdict(_Landing(key, tuple(names), tuple(sorted(stale)))))
        half = self.root / f"{_LANDING}.half"
        write(half, text.encode())
        settle(self.root)
        rename(half, self.root / _LANDING)
        sync(self.root)

    def landing(self, key: str) -> list[str] | None:
        """Names of all the files, where a run of this input has come so far."""
        said = self._landing()
        return [*said.names] if said.key == key else None

    def _landing(self) -> _Landing:
        file = self.root / _LANDING
        if not file.is_file():
            return _Landing("", (), ())
        try:
            said = made(_Landing, parsed(file.read_bytes()))
            if odd := next((n for n in (*said.names, *said.stale) if not is_name(n)), None):
                raise ValueError(f"{odd!r} is no name of a file")
        except (ValueError, OSError) as error:
            raise FoldError(f"{file} is damaged: {error}; remove {self.root} to begin anew") from None
        return said

    def land(self, names: Iterable[str], head: str) -> None:
        """Bring the files to their places: the head leaves first and comes last.

        Every step can be taken again, so a run that is killed here is ended by the next one. Files that were there wait
        in the hidden directory until all have landed.

        Args:
            names: of the files.
            head: the one that no reader does without.
        """
        stale = self._landing().stale
        old = self.root / _OLD
        old.mkdir(exist_ok=True)
        for name in (head, *sorted({*stale})):
            if (self.out / name).exists() and ((self.new / name).exists() or name != head):
                rename(self.out / name, old / name)
        sync(self.out)
        for name in (*sorted(n for n in names if n != head), head):
            if name == head:
                sync(self.out)
            if (self.new / name).exists():
                rename(self.new / name, self.out / name)
        sync(self.out)
        shutil.rmtree(self.root)
        sync(self.out)
