"""The packages that oftfx and its extras ask for: which are here, and between which versions each was tested."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from torch.torch_version import TorchVersion

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[(?P<extras>[^]]*)\])?\s*(?P<bounds>[^;]*)(?:;(?P<marker>.*))?")
_BOUND = re.compile(r"(?:>=|==)\s*([\w.]+)")
_EXTRA = re.compile(r"""extra == ['"]([\w-]+)['"]""")


@dataclass(frozen=True)
class Package:
    """One package.

    Attributes:
        name: of the distribution.
        extras: of oftfx that ask for it; empty: oftfx itself does.
        here: the version that is installed; empty: none is.
        allowed: the lower bound; the lowest, where extras differ.
        oldest: the oldest version that a release was tested with; empty: none was.
        newest: the newest one.
        remark: where the version that is here was not between them; empty where it was.
    """

    name: str
    extras: tuple[str, ...]
    here: str
    allowed: str
    oldest: str
    newest: str
    remark: str


def packages() -> tuple[Package, ...]:
    """As they are here: oftfx's own requirements first, then those of its extras."""
    return compared(metadata.requires("oftfx") or (), _version, tested())


def tested() -> dict[str, dict[str, str]]:
    """Of each package, the ``oldest`` and the ``newest`` version that `tools/extras` ran a job with."""
    return json.loads(Path(__file__).with_name("tested.json").read_text(encoding="utf-8"))


def compared(
    requirements: Iterable[str], version: Callable[[str], str], ranges: Mapping[str, Mapping[str, str]]
) -> tuple[Package, ...]:
    """What is required, beside what is installed and what was tested.

    Args:
        requirements: as the metadata of a distribution has them: ``"torch>=2.7"``, ``'rich>=13; extra == "cli"'``.
        version: of a package's name, the installed version, or an empty string.
        ranges: by name, ``oldest`` and ``newest``.

    Examples:
        >>> from oftfx.inspecting.packages import compared
        >>> known = {"rich": {"oldest": "13.0.0", "newest": "14.1"}}
        >>> (found,) = compared(['rich>=13; extra == "cli"'], lambda name: "15.0", known)
        >>> found.extras, found.allowed, found.remark
        (('cli',), '13', 'newer than tested')
    """
    extras: dict[str, set[str]] = {}
    allowed: dict[str, str] = {}
    for requirement in requirements:
        read = _REQUIREMENT.match(requirement.strip())
        if read is None or read["name"] == "oftfx":  # an extra that names others
            continue
        bound, name, asking = _BOUND.search(read["bounds"]), read["name"], _EXTRA.findall(read["marker"] or "")
        if asking and extras.get(name) == set():
            continue  # oftfx itself asks for it, with a bound of its own; metadata has those first
        extras.setdefault(name, set()).update(asking)
        floor = bound[1] if bound else ""
        allowed[name] = min(allowed.get(name, ""), floor, key=TorchVersion) if allowed.get(name) else floor
    rows = []
    for name, floor in allowed.items():
        here, known = version(name), ranges.get(name, {})
        oldest, newest = known.get("oldest", ""), known.get("newest", "")
        remark = _remark(here.partition("+")[0], floor, oldest, newest)
        rows.append(Package(name, tuple(sorted(extras[name])), here, floor, oldest, newest, remark))
    return tuple(rows)


def _remark(here: str, allowed: str, oldest: str, newest: str) -> str:
    if not here:
        return ""
    if allowed and TorchVersion(here) < allowed:
        return "older than allowed"
    if not oldest:
        return "never tested"
    if TorchVersion(here) < oldest:
        return "older than tested"
    return "newer than tested" if TorchVersion(here) > newest else ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
