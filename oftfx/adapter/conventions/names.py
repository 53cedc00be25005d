"""Which layer of a model a name in a file means, where dots have become underscores and models have prefixes."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from oftfx.adapter.conventions.base import Outgoing, Target
from oftfx.adapter.conventions.source import Source
from oftfx.errors import AdapterError, AdapterFileError


def flat(path: str) -> str:
    """A path as such files have it."""
    return path.replace(".", "_")


def resolve(
    source: Source, names: Iterable[str], target: Target, prefixes: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The layer for each name.

    Args:
        source: where the names are from.
        names: what stands before the part of a key that says which tensor it is.
        target: the model.
        prefixes: what may stand before a path, ``"lora_unet_"`` or ``"unet."``, each for another model in the file.

    Returns:
        ``{name: path of the layer}`` of this model's part, and remarks on what is left.

    Raises:
        AdapterError: a name that is no layer here, or that could be several.
        AdapterFileError: several parts of the file fit the model.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    wanted = None if target.part is None else _spelled(target.part, prefixes)
    for name in names:
        prefix = next((p for p in sorted(wanted or prefixes, key=len, reverse=True) if name.startswith(p)), None)
        if prefix is None and wanted is not None:
            continue
        groups[prefix or ""].append(name)
    if not groups and target.part is None:
        raise AdapterFileError(f"{source.path}: no rotation in it")
    if not groups:
        raise AdapterFileError(f"{source.path}: no key begins with part={target.part!r}")
    paths = _paths(target)
    fitting = {p: [n for n in found if _path(n, p) in paths] for p, found in groups.items()}
    mine = [p for p, found in fitting.items() if found]
    if not mine:
        name = next(iter(next(iter(groups.values()))))
        raise AdapterError(f"{source.path}: rotates {name}, {_unknown(name, groups, paths, target)}")
    if len(mine) > 1:
        raise AdapterFileError(
            f"{source.path}: several parts of this file fit {target.model}: {', '.join(repr(p) for p in mine)}. Choose "
            f"one: load_adapter(..., part={mine[0]!r})"
        )
    (prefix,) = mine
    if missing := [n for n in groups[prefix] if n not in fitting[prefix]]:
        raise AdapterError(f"{source.path}: rotates {missing[0]}, {_unknown(missing[0], groups, paths, target)}")
    chosen = {n: _one(source, n, paths[_path(n, prefix)]) for n in groups[prefix]}
    left = {p: len(found) for p, found in groups.items() if p != prefix}
    remarks = tuple(
        f"{source.path.name} also rotates {count} layers of another model ({p}*), which {target.model} does not have; "
        "load it into that model as well"
        for p, count in left.items()
    )
    return chosen, remarks


def written_name(adapter: Outgoing, path: str, usual: str, prefixes: Sequence[str], taken: Mapping[str, object]) -> str:
    """What stands for a path in a file; with dots where the prefix ends with one, or is empty.

    Args:
        adapter: what is written, and the prefix that was asked for.
        path: of the layer.
        usual: the prefix otherwise.
        prefixes: those that the convention knows.
        taken: the names that are in the file already.

    Raises:
        AdapterError: another path has the same name.
    """
    prefix = usual if adapter.part is None else _spelled(adapter.part, prefixes)[0]
    name = prefix + (path if prefix.endswith(".") or not prefix else flat(path))
    if name in taken:
        raise AdapterError(f"{path}: another path has the same name without dots, {name}; rename one of the modules")
    return name


def _spelled(part: str, prefixes: Sequence[str]) -> list[str]:
    known = [p for p in prefixes if part in (p, p.rstrip("_."))]
    return known or [part]


def _path(name: str, prefix: str) -> str:
    """What is looked up: the path itself where the file has dots, else its flat form behind a mark that no path has."""
    path = name.removeprefix(prefix)
    return path if prefix.endswith(".") or "." in path else f"_.{path}"


def _paths(target: Target) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for fqn, site in target.sites.items():
        for path in dict.fromkeys((fqn, *site.aliases)):
            for key in (path, f"_.{flat(path)}"):
                if fqn not in found[key]:
                    found[key].append(fqn)
    return dict(found)


def _one(source: Source, name: str, paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    raise AdapterError(
        f"{source.path}: {name} could be any of {', '.join(paths)}: their paths differ in dots only, which this file "
        "does not have. Rename the modules, or the keys of the file"
    )


def _unknown(name: str, groups: Mapping[str, Sequence[str]], paths: Mapping[str, object], target: Target) -> str:
    prefix = next((p for p, found in groups.items() if name in found), "")
    close = [p.removeprefix("_.") for p in difflib.get_close_matches(_path(name, prefix), paths, 2, 0.5)]
    nearest = f" Nearest: {', '.join(close)}." if close else ""
    return (
        f"which is no layer of {target.model} that can be rotated.{nearest} The names have to be those of the "
        "modules in torch; files for original implementations of a model have others"
    )
