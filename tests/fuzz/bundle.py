"""Several files as one input of bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_MARK = b"\n\x00=== "


def joined(files: Mapping[str, bytes]) -> bytes:
    """Name and contents of each, behind a mark that no text has."""
    return b"".join(_MARK + name.encode() + b"\n" + data for name, data in files.items())


def parted(data: bytes) -> dict[str, bytes]:
    """Inverse of `joined`, for any bytes."""
    parts = (part.partition(b"\n") for part in data.split(_MARK)[1:])
    return {name.decode(errors="replace"): contents for name, _, contents in parts}


def place(data: bytes, directory: Path, names: tuple[str, ...]) -> None:
    """Write the files whose names a target knows; a name that mutation made would be ours to blame."""
    for name, contents in parted(data).items():
        if name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(contents)


def taken(directory: Path, names: tuple[str, ...]) -> bytes:
    """A seed from the files of a directory."""
    return joined({n: (directory / n).read_bytes() for n in names if (directory / n).is_file()})
