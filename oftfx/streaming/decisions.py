"""What is to become of every rotated weight, decided before any is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oftfx.adapter.from_file import AdapterFiles
from oftfx.errors import FoldError
from oftfx.folding.turned import is_identity
from oftfx.formats.mxfp4_experts import BLOCKS, Mxfp4Experts
from oftfx.formats.registry import format_of
from oftfx.model.huggingface import can_except
from oftfx.model.site import Site
from oftfx.model.sites import format_at
from oftfx.passes.insert_rotations import rotation_for
from oftfx.passes.quantized.calibrate_experts import UNSEEN
from oftfx.placement.frozen import product_of
from oftfx.planning.plans import Plan
from oftfx.planning.site_plan import SitePlan
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.transformers_loader import ties

Action = Literal["folded", "keep", "float", "requantize", "reference", "calibrate", "untouched"]
Choice = str | Callable[[Site], str]
_SEEN = 1e-4
_POLICIES = ("keep", "float", "requantize", "reference", "calibrate")
_SHARED = "its weight was shared with another module and is now its own"


@dataclass(frozen=True)
class Decision:
    """One site.

    Attributes:
        entry: of the plan.
        action: what is done.
        remark: for the report.
        bytes: of its weight now.
        format: how it is stored.
    """

    entry: SitePlan
    action: Action
    remark: str
    bytes: int
    format: str

    @property
    def changes(self) -> bool:
        """Whether its weight is written anew."""
        return self.action in ("folded", "float", "requantize", "reference", "calibrate")


@dataclass(frozen=True)
class Means:
    """What policies can ask for, besides the checkpoint.

    Attributes:
        reference: whether there are original float weights.
        calibration: whether there are inputs of the model.
    """

    reference: bool = False
    calibration: bool = False


@dataclass(frozen=True)
class Kept:
    """A rotation that stays in front of its weight; its blocks are made when they are written.

    Attributes:
        entry: of the plan.
        skew: of the file.
    """

    entry: SitePlan
    skew: Tensor

    @property
    def kind(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of the blocks."""
        made = rotation_for(self.entry, torch.device("meta"))
        return made.skew.dtype, (*made.shape, made.block_size)

    @property
    def nbytes(self) -> int:
        """Of the blocks."""
        dtype, shape = self.kind
        return math.prod(shape) * dtype.itemsize

    def blocks(self) -> Tensor:
        """``(blocks, b, b)``."""
        rotation = rotation_for(self.entry, torch.device("cpu")).eval()
        with torch.no_grad():
            rotation.set_every_skew(self.skew)
        (found,) = product_of([rotation])
        return found


@dataclass(frozen=True)
class Decisions:
    """All sites of an adapter.

    Attributes:
        plan: of the adapter.
        sites: in the order of the report.
        kept: the rotations that stay, by the path of the site that holds them.
        whole: what the adapter trained whole, by its name in the model.
        untied: names of weights that are their own from now on, because one of them is rotated.
    """

    plan: Plan
    sites: tuple[Decision, ...]
    kept: Mapping[str, Kept]
    whole: Mapping[str, Tensor]
    untied: frozenset[str]

    @classmethod
    def of(
        cls, skeleton: Skeleton, plan: Plan, files: AdapterFiles, quantized: Choice | None, means: Means
    ) -> Decisions:
        """Decide.

        Raises:
            FoldError: a policy that is not there, or that a site cannot take.
        """
        if isinstance(quantized, str):
            _check_policy(quantized, "quantized", means)
        sites, kept = list[Decision](), dict[str, Kept]()
        order = {path: index for index, (path, _) in enumerate(skeleton.model.named_modules())}
        for entry in sorted(plan, key=lambda e: order[e.site.called]):  # as a fold in memory finds them
            layer = skeleton.model.get_submodule(entry.site.module)
            found = format_of(layer) if entry.site.is_layer else format_at(layer, entry.site, each=entry.each)
            if found is None:
                raise FoldError(f"{entry.fqn}: no known weight format reads this {type(layer).__name__}")
            stored_as = Mxfp4Experts.name if _in_mxfp4(skeleton, entry.site) else found.name
            action: Action = "folded" if found.lossless else _policy(quantized, entry.site, means)
            if stored_as == Mxfp4Experts.name:
                action = _rounding(quantized, entry.site, means)
            skew = files.skews[entry.fqn]
            if not _surely_turns(entry, skew) and is_identity(Kept(entry, skew).blocks()):
                action = "untouched"
            remarks = [_SHARED] if skeleton.tied(entry.site.weight_name) and action != "untouched" else []
            if action == "calibrate" and not entry.site.is_layer:
                action = "requantize"
                remarks.append(UNSEEN)
            if action == "keep":
                kept.setdefault(entry.owner, Kept(entry, skew))
            sites.append(Decision(entry, action, "; ".join(remarks), found.nbytes(layer), stored_as))
        names = {*plan.train, *plan.brought, *plan.train_buffers}
        whole = {n: t for n, t in files.others.items() if n in names}
        _check_floats(skeleton, sites)
        _check_together(sites)
        return cls(plan, tuple(sites), kept, whole, _untied(skeleton, sites))


def _surely_turns(entry: SitePlan, skew: Tensor) -> bool:
    """Whether a rotation cannot be the identity, known without computing it: ``R = I + 2 A`` and smaller terms."""
    return entry.spec.coft_eps is None and float(skew.abs().max()) > _SEEN


def _policy(quantized: Choice | None, site: Site, means: Means) -> Any:
    found = "keep" if quantized is None else quantized(site) if callable(quantized) else quantized
    _check_policy(found, site.fqn, means)
    return found


def _in_mxfp4(skeleton: Skeleton, site: Site) -> bool:
    """Whether the file has codes of what the loader makes floats of: the experts of gpt-oss."""
    return any(t.name.endswith(f"{site.parameter}{BLOCKS}") for t in skeleton.sources(site.weight_name))


def _rounding(quantized: Choice | None, site: Site, means: Means) -> Any:
    found = _policy(quantized, site, means)
    if found not in ("requantize", "reference", "calibrate"):
        raise FoldError(
            f"{site.fqn}: the checkpoint has these experts in MXFP4, which a fold of files rounds to again: "
            "quantized='requantize', 'calibrate' or 'reference'. For floats load the model, use oftfx.fold and "
            "FoldResult.save"
        )
    return found


def _check_policy(policy: object, where: str, means: Means) -> None:
    if policy not in _POLICIES:
        raise FoldError(
            f"{where}: a fold of files has the policies {', '.join(_POLICIES)}, got {policy!r}. Load the model and use "
            "oftfx.fold for a Budget and distil"
        )
    if policy == "reference" and not means.reference:
        raise FoldError(f"{where}: policy 'reference' needs reference=, the directory of the original float model")
    if policy == "calibrate" and not means.calibration:
        raise FoldError(f"{where}: policy 'calibrate' needs calibration=, an iterable of the model's inputs")


def _check_together(sites: list[Decision]) -> None:
    """The model that runs has the classes of the checkpoint."""
    actions = {s.action for s in sites}
    if {"calibrate", "float"} <= actions:
        raise FoldError(
            "a fold of files cannot both calibrate layers and make floats of others, for it runs the model as its "
            "configuration says; load the model and use oftfx.fold"
        )


def _check_floats(skeleton: Skeleton, sites: list[Decision]) -> None:
    """Float layers among quantized ones have to be named in the configuration."""
    floats = [s.entry.fqn for s in sites if s.action == "float"]
    if not floats or not stays_quantized(skeleton, floats):
        return
    config = skeleton.model.config.quantization_config
    if not can_except(config):
        raise FoldError(
            f"{floats[0]} became a float layer among quantized ones, which a {type(config).__name__} cannot say, "
            "so from_pretrained would not find its weight. Fold all layers with quantized='float', or none"
        )


def stays_quantized(skeleton: Skeleton, floats: list[str]) -> bool:
    """Whether a layer is still quantized when these are floats."""
    made = set(floats)
    known = ((n, format_of(m)) for n, m in skeleton.model.named_modules())
    return any(f is not None and not f.lossless and n not in made for n, f in known)


def _untied(skeleton: Skeleton, sites: list[Decision]) -> frozenset[str]:
    tied = ties(skeleton.model)
    names = {*tied, *tied.values()}
    folded = {s.entry.site.weight_name for s in sites if s.action == "folded"}
    if not folded & names:
        return frozenset(folded)
    return frozenset(folded | names if getattr(skeleton.model.config, "tie_word_embeddings", False) else folded)
