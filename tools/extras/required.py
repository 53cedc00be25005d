"""What `pyproject.toml` asks for, extra by extra."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tools.extras.jobs import README

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def required(extra):
    """The package's own requirements and those of an extra of `jobs.JOBS`, with those of extras that it names."""
    names = README.split(",") if extra == "readme" else [extra] if extra in EXTRAS else []
    return [*map(Requirement, PROJECT["dependencies"]), *(r for name in names for r in _of(name))]


def _of(extra):
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            for other in sorted(requirement.extras):
                yield from _of(other)
        else:
            yield requirement


def floors(extra):
    """By package, the lower bound, or the one version that is allowed; of two, the higher.

    Of an extra without safetensors, which the packages that it asks for may need newer than the core does.
    """
    found = {}
    for requirement in required(extra):
        if requirement.name == "safetensors" and extra not in ("none", "core"):
            continue
        (floor,) = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        found[requirement.name] = max(found.get(requirement.name, floor), floor, key=_numbers)
    return found


def _numbers(version):
    return [int(n) for n in version.split(".") if n.isdigit()]
