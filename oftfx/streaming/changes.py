"""What the result has other than the checkpoint: names, dtypes and shapes, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oftfx.errors import FoldError
from oftfx.formats.mxfp4_experts import Mxfp4Experts
from oftfx.passes.quantized.dequantize import activation_dtype
from oftfx.streaming.decisions import Decision, Decisions
from oftfx.streaming.directory import Stored
from oftfx.streaming.maps import NAMES
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.transformers_loader import module_path

Made = dict[str, tuple[str | None, str, tuple[int, ...]]]
"""New tensors: the file they go into (None: the last), dtype and shape."""


@dataclass(frozen=True)
class Folding:
    """A layer that is folded, and the names of what it gives."""

    path: str
    sites: tuple[Decision, ...]
    stored: tuple[Stored, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What the result has other than the checkpoint.

    Attributes:
        folds: layers.
        whole: names in the checkpoint of what the adapter brings, with those in the adapter.
        clones: new names of tensors that were shared, with what they were.
        gone: names that vanish.
        made: dtype and shape of new tensors, by the file that they go into.
    """

    folds: tuple[Folding, ...]
    whole: Mapping[str, str]
    clones: Mapping[str, Stored]
    gone: frozenset[str]
    made: Mapping[str, tuple[str | None, str, tuple[int, ...]]]

    @classmethod
    def of(cls, skeleton: Skeleton, decisions: Decisions) -> Changes:
        """Of all decisions.

        Raises:
            FoldError: the checkpoint lacks what a site needs, or cannot say what it becomes.
        """
        folds, gone = list[Folding](), set[str]()
        made: Made = {}
        layers: dict[str, list[Decision]] = {}
        for site in decisions.sites:
            if site.changes:
                layers.setdefault(site.entry.site.module, []).append(site)
        for path, sites in layers.items():
            stored = skeleton.stored.get(path, ())
            if sites[0].action == "folded" or sites[0].format == Mxfp4Experts.name:
                stored, names = _dense(skeleton, sites, stored, made)
            else:
                names = tuple(t.name for t in stored if not _is_bias(skeleton, t))
            if sites[0].action == "float":
                names = _floats(skeleton, path, sites, stored, made)
                gone |= {t.name for t in stored} - {*names}
            folds.append(Folding(path, tuple(sites), stored, names))
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
    made: Made,
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
    made: Made,
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
