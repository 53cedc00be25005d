"""Files that are whole or not there, and files that belong together.

All of a set is written and on the disk in a hidden directory beside its place before the first name changes. What is
left then are renames, which need no room, and which an error takes back.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from oftfx.errors import OftfxError, warn

try:
    import fcntl
except ImportError:  # Windows: nobody can tell there whether a process still writes, so its remains stay
    fcntl = None  # type: ignore[assignment]

_HIDDEN, _NEW, _OLD, _STALE = ".oftfx-", "new", "old", "stale"
_ADVICE = {
    errno.EIO: "make room there, or choose another place",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "choose a place that can be written to",
    errno.EPERM: "choose a place that can be written to",
    errno.EEXIST: "a file is where a directory is wanted; choose another place",
    errno.EISDIR: "a directory is where a file is wanted; choose another place",
    errno.ENOTDIR: "a file is where a directory is wanted; choose another place",
}


def write_whole(path: Path, data: bytes, error: type[OftfxError] = OftfxError) -> None:
    """Write a file beside its place and rename it: never a half-written one under the final name.

    Args:
        path: the file; its directory is made.
        data: its bytes.
        error: what is raised where it cannot be written.
    """
    with landing(path.parent, path.name, error) as made:
        write(made / path.name, data)


def write(path: Path, data: bytes) -> None:
    """Write a file into a directory that `landing` gave."""
    try:
        with path.open("wb") as stream:
            put(stream.fileno(), data)
    except OSError as error:
        error.filename = error.filename or str(path)  # which a write does not say, only an open
        raise


def put(file: int, data: bytes) -> None:
    """All bytes into an open file."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


@contextmanager
def written_by(library: str, path: Path) -> Iterator[None]:
    """For a library that writes a file and does not have the system's reason where it cannot: an `OSError` as well."""
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(errno.EIO, f"{library} failed, with {free:,} bytes free there", str(path)) from error


@contextmanager
def landing(directory: Path, head: str, error: type[OftfxError], *, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A hidden directory to write into; on leaving, all that is in it lands in ``directory``, or nothing does.

    A name that is there is replaced, whatever else is there stays. ``head`` is what no reader of the set does without.
    It leaves first and comes last, so whoever reads, and whenever the process is killed, there is the old set, the new
    one, or one without a head; see `remains`.

    Args:
        directory: made where it is not there.
        head: name of one of the files. A set of one file is replaced by a single rename.
        error: what is raised where something cannot be written.
        stale: names that belong to the old set only, and go.

    Raises:
        OftfxError: ``error``, which names the place, the reason and what to do; ``directory`` is as it was. Only a
            single file, once renamed, stays the new one where the disk fails to confirm the rename; the error says so.
    """
    stale = [*stale]
    with staging(directory, head, error) as made:
        new = made / _NEW
        new.mkdir()
        yield new
        settle(new)
        with _alone(directory):
            _land(directory, made, head, stale, error)
        for other in (head, *stale):
            _sweep(directory, other, begun=True)


@contextmanager
def staging(directory: Path, name: str, error: type[OftfxError]) -> Iterator[Path]:
    """A hidden directory inside ``directory``, gone afterwards; so is ``directory`` where it was made for nothing.

    What a process that is no more left there under the same ``name`` goes as well, but for files that it had taken out
    of their places. An `OSError` inside becomes ``error``, and so does what libraries in Rust make of one.
    """
    made, lock = None, -1
    absent = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory, name, begun=False)
        made, lock = _hidden(directory, name)
        yield made
    except Exception as cause:
        refused = _refused(cause)
        if refused is None:
            raise
        raise error(_explained(directory, name, made, refused)) from cause
    finally:
        if made is not None and not _holds(made / _OLD):  # what could not be put back stays in there
            shutil.rmtree(made, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
        for path in absent:
            with suppress(OSError):
                path.rmdir()  # which only takes empty ones


def check_place(path: Path, error: type[OftfxError]) -> None:
    """Raise at once, before long work, what `landing` would raise for a place where no file can be written."""
    if path.is_dir():
        raise error(f"{path} is a directory; name a file in it")
    check_writable(path, error)


def check_writable(path: Path, error: type[OftfxError]) -> None:
    """The same of a place for a file or a directory, which may be there."""
    with staging(path if path.is_dir() else path.parent, path.name, error):
        pass


def said(error: OSError) -> str:
    """What the system refused, where, and what to do; for errors that no `staging` has caught."""
    if of_output(error):
        where = "standard output"
    elif error.filename:
        where = str(_visible(Path(os.fsdecode(error.filename))))
    else:  # in a library's own words, which say where
        return str(error)
    return f"{where}: cannot be written to or read: {error.strerror or error}; {advice(error)}"


def of_output(error: OSError) -> bool:
    """Whether standard output was refused, whose errors have no name of a file."""
    return not error.filename and error.errno in _ADVICE


def advice(error: OSError) -> str:
    """What to do about it."""
    return _ADVICE.get(error.errno or 0, "see the cause")


def remains(directory: Path, *heads: str) -> str:
    """What to do where a head is missing since a process was killed while its files took their places; or ``""``."""
    for head in heads:
        for made in _hidden_ones(directory, head):
            if (made / _OLD).is_dir() and (made / _NEW / head).exists() and not (directory / head).exists():
                return (
                    "a save was killed while its files took their places: save again, or move all that is in "
                    f"{made / _NEW} to {directory}"
                )
    return ""


def finish_landing(directory: Path, *heads: str) -> bool:
    """End what a killed process has begun: all of its new set was on the disk, and some had taken their places.

    For readers, before they look. Nothing is done where a head is there, where the process lives, or where the
    directory cannot be written to; `remains` has the words for the last.

    Returns:
        Whether the new set is in its place now.
    """
    for head in heads:
        for made in _hidden_ones(directory, head):
            handle = lock(made)
            if handle is None:
                continue
            try:
                with _alone(directory):
                    if not (made / _OLD).is_dir() or not (made / _NEW / head).exists() or (directory / head).exists():
                        continue
                    names = sorted(p.name for p in (made / _NEW).iterdir() if p.name != head)
                    for name in (made / _STALE).read_text().split("\n") if (made / _STALE).is_file() else ():
                        if is_name(name) and os.path.lexists(directory / name):
                            rename(directory / name, made / _OLD / name)
                    for name in (*names, head):
                        if name == head:
                            sync(directory)
                        rename(made / _NEW / name, directory / name)
                    sync(directory)
                    shutil.rmtree(made, ignore_errors=True)
                    warn(f"{directory}: a save was killed while its files took their places; they are there now")
                    return True
            except OSError:
                continue
            finally:
                os.close(handle)
    return False


def is_name(text: object) -> bool:
    """Whether a text from a file can only be the name of a file beside it, and no way to another directory."""
    if not isinstance(text, str) or not 0 < len(text.encode(errors="replace")) <= 255:
        return False
    return text not in (".", "..") and not any(c in "/\\\0" or "\ud800" <= c <= "\udfff" for c in text)


def of_version(found: object, read: int) -> str:
    """Words for a file of a layout that is not read: which version it has, which is read, and what to do."""
    newer = isinstance(found, int) and found > read
    advice = "A newer oftfx wrote it: install that" if newer else "An older one wrote it: make it again with this"
    return f"version {found}; this oftfx reads version {read}. {advice}"


def _land(directory: Path, made: Path, head: str, stale: list[str], error: type[OftfxError]) -> None:
    new, old = made / _NEW, made / _OLD
    names = [*sorted(p.name for p in new.iterdir() if p.name != head), head]
    for name in names:
        if (directory / name).is_dir() and not (new / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(directory / name))
    leaving = [n for n in dict.fromkeys([head, *stale, *names]) if os.path.lexists(directory / n)]
    if names == [head] and leaving in ([], [head]) and not (new / head).is_dir():
        _replace(directory / head, new / head, error)
        return
    moves = [(directory / n, old / n) for n in leaving] + [(new / n, directory / n) for n in names]
    # For who ends this where we are killed; by then some of the new names may be in their places.
    (made / _STALE).write_text("\n".join(n for n in stale if n not in names))
    old.mkdir()  # also says that all of the new set is there
    try:
        for source, target in moves:
            if target == directory / head:
                sync(directory)
            rename(source, target)
            if source == directory / head:
                sync(directory)
        sync(directory)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                rename(target, source)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _replace(place: Path, new: Path, error: type[OftfxError]) -> None:
    """Put one file in the place of another by a rename, which is never taken back: the old file is gone with it."""
    sync(place.parent)
    rename(new, place)
    try:
        sync(place.parent)
    except OSError as cause:
        why = cause.strerror or str(cause)
        raise error(f"{place}: is the new file, but the disk did not confirm its name: {why}; save again") from cause


def settle(directory: Path) -> None:
    """Let all that is in a directory reach the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def rename(source: Path, target: Path) -> None:
    """Move a file or directory within its file system, over a file that is there."""
    os.replace(source, target)


def sync(path: Path) -> None:
    """Let a file's bytes, or a directory's names, reach the disk."""
    if path.is_dir() and os.name == "nt":  # has no handle for a directory
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _hidden(directory: Path, name: str) -> tuple[Path, int]:
    """A new hidden directory, and the handle that says that its process lives."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=f"{_HIDDEN}{name}-", dir=directory))
        handle = lock(made)
        if made.exists():  # nobody took it for a dead one's in between
            return made, -1 if handle is None else handle
        if handle is not None:
            os.close(handle)


def _hidden_ones(directory: Path, name: str) -> list[Path]:
    pattern = re.compile(re.escape(f"{_HIDDEN}{name}-") + r"\w{8}")  # as tempfile ends its names
    return [p for p in directory.iterdir() if pattern.fullmatch(p.name)] if directory.is_dir() else []


def _sweep(directory: Path, name: str, *, begun: bool) -> None:
    """Remove hidden directories of processes that are no more; with ``begun`` also such with files of an old set."""
    for made in _hidden_ones(directory, name):
        handle = lock(made)
        if handle is not None:
            if begun or not (made / _OLD).is_dir():
                shutil.rmtree(made, ignore_errors=True)
            os.close(handle)


def _holds(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One process after the other: two sets that land at once would be mixed."""
    handle = lock(directory, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def lock(directory: Path, *, wait: bool = False) -> int | None:
    """A handle that no other process has until this one closes it or ends; None where another has, or nothing locks."""
    try:
        return hold(directory, wait=wait)
    except BlockingIOError:
        return None


def hold(directory: Path, *, wait: bool = False) -> int | None:
    """The same; None where nothing locks (Windows, some network file systems).

    Raises:
        BlockingIOError: another process has it.
    """
    if fcntl is None:
        return None
    handle = -1
    try:
        handle = os.open(directory, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


def _explained(directory: Path, name: str, made: Path | None, cause: OSError) -> str:
    what = cause.strerror or str(cause)
    if not cause.filename:  # a write does not say it
        new = [] if made is None or not (made / _NEW).is_dir() else [*(made / _NEW).iterdir()]
        file = "" if any(p.name != name for p in new) else name
    else:
        file = Path(os.fsdecode(cause.filename)).name
        file = name if file.startswith(_HIDDEN) else file
    which = f" ({file})" if file else ""
    return f"{_visible(directory)}: cannot be written to: {what}{which}; {advice(cause)}. What was there is as it was"


def _visible(path: Path) -> Path:
    """Where a user looks for it: one set may be written inside the hidden directory of another."""
    return next((p.parent for p in reversed([path, *path.parents]) if p.name.startswith(_HIDDEN)), path)


def _refused(error: Exception) -> OSError | None:
    """The system's refusal that an error is, or that a library in Rust (safetensors, tokenizers) tells in words."""
    if isinstance(error, OSError):
        return error
    code = None if isinstance(error, OftfxError) else re.search(r"\(os error (\d+)\)", str(error))
    return None if code is None else OSError(int(code[1]), os.strerror(int(code[1])))
