"""Combine adapters of a model into a new one, on the manifold of rotations."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.contents import rotation_by_site
from oftfx.adapter.insert import insert
from oftfx.adapter.store import AdapterStore, check_name
from oftfx.adapter.switch import switchable
from oftfx.blending.blend_report import BlendReport, SiteBlend
from oftfx.blending.turns import check_departure, log_of, rotations_of, turn_of
from oftfx.blending.union import Member, plan_of, union_of
from oftfx.blending.whole_parts import blend_whole
from oftfx.errors import AdapterError
from oftfx.passes.insert_rotations import skew_dtype
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import check_no_rows
from oftfx.planning.program import Program
from oftfx.rotation.cayley import cayley
from oftfx.rotation.logarithm import NEAREST_PI, cayley_root, joined
from oftfx.rotation.module import Rotation
from oftfx.rotation.skew import skew_vector

_ROUNDING = 1e-4
"""How far rounding a skew to its dtype may move a block: near pi its entries are large, and so are their errors."""


def blend(model: nn.Module, weights: Mapping[str, float], *, into: str, bound: float = 0.01) -> BlendReport:
    """Make a new adapter of adapters that are in the model: ``log R = sum_i w_i log R_i``, block by block.

    The sum is taken in so(b), the skew-symmetric matrices, in float64, and written back as an exact Cayley skew
    (``parameterization="cayley"``) in the dtype of the model's rotations; so the result is a rotation for any weights.
    One adapter with weight w turns by w times its angles, along the same planes: 0.5 is half strength, 0 nothing, -1
    the inverse, 2 twice as far. Rotations that commute add their angles; of others the result is the one that
    treats them alike, in no order.

    The new adapter acts once `set_adapter` names it, does not train, and is folded, saved and exported as any other:

        oftfx.load_adapter(model, "news")
        oftfx.blend(model, {"default": 0.5}, into="mild")
        oftfx.set_adapter(model, "mild")

    Block sizes may differ: blocks of 16 and 32 become blocks of 32. At a site that an adapter does not rotate, it is
    the identity. What trains whole (modules, biases, their buffers) becomes ``base + sum_i w_i (own_i - base)``.

    Args:
        model: a transformed model; it is changed in place.
        weights: of each adapter that takes part.
        into: name of the new adapter.
        bound: the most by which blocks of an adapter may stretch a vector. ``cayley_neumann`` is a truncated series, so
            its blocks are only nearly orthogonal; the nearest rotation is taken (the polar factor), and what stretches
            is left out. The report has the figure for each site.

    Returns:
        For each site the blocks, the largest angle, and what was left out or rounded.

    Raises:
        AdapterError: an unknown adapter, a name that is taken, weights that are no finite numbers; a rotation by pi,
            which has no unique logarithm, before or after; blocks further from a rotation than ``bound``; statistics
            that would get negative. Raised before anything changes.

    Source: logarithm and exponential of so(n); merging OFT adapters in so(n) is OrthoMerge's, arXiv 2602.05943, which
    adds up Cayley parameters (whose angles do not add up) and scales the sum to the mean of the norms.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")}, adapter="news")
        >>> report = oftfx.blend(model, {"news": 0.5}, into="mild", bound=0.1)
        >>> whole, mild = (oftfx.rotation_angles(model, name)["0"].largest for name in ("news", "mild"))
        >>> round(mild / whole, 5), list(oftfx.adapters(model)), oftfx.active_adapters(model)
        (0.5, ['news', 'mild'], ('news',))
    """
    check_name(into)
    root, store = switchable(model)
    check_no_rows(root, "a blend")
    weights = _checked(weights)
    store.require(*weights)
    if into in store.adapters:
        raise AdapterError(f"the model already has an adapter {into!r}; it has {', '.join(store.adapters)}")
    rotations = {name: rotations_of(root, store, name) for name in weights}
    store.take_back(root)
    others = blend_whole(store, weights)
    plans = {name: store.adapters[name].plan for name in weights}
    program = Program.of(root)
    sites = {s.fqn: s for s in program.sites}
    members = [m.on(sites) for m in union_of(plans, [fqn for fqn, _ in rotated_sites(root)])]
    skews, lines = dict[str, Tensor](), list[SiteBlend]()
    for member in members:
        if member.entry.owner == member.entry.fqn:
            mine = {name: rotations[name][member.entry.fqn] for name in member.parts}
            skews[member.entry.fqn], line = _blended(member, mine, weights, bound)
            lines.append(line)
    insert(root, program.with_(plan=plan_of(members, list(plans.values()))), into, trainable=False)
    _fill(root, store, into, skews, others)
    store.activate(root, store.active)
    return BlendReport(into, tuple(weights.items()), tuple(lines))


def _checked(weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights: got {weights!r}, expected a number for each adapter, e.g. {{'default': 0.5}}")
    for name, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise AdapterError(f"weights: got {weight!r} for adapter {name!r}, expected a finite number")
    return {name: float(weight) for name, weight in weights.items()}


@torch.no_grad()
def _blended(
    member: Member, rotations: Mapping[str, Rotation], weights: Mapping[str, float], bound: float
) -> tuple[Tensor, SiteBlend]:
    """The skew of one site, a row for each row of its parameter, and its line of the report."""
    entry, total, departure = member.entry, None, 0.0
    for name, rotation in rotations.items():
        turn, stretch = turn_of(rotation, entry.fqn, name)
        check_departure(stretch, bound, entry.fqn, name)
        departure = max(departure, stretch)
        log = joined(log_of(turn, entry.fqn, name), entry.block_size) * weights[name]
        total = log if total is None else total + log
    assert total is not None
    rows = total[_first_blocks(member)]
    root, angles = cayley_root(rows)
    largest = _check_angles(angles, entry.fqn, weights)
    exact = skew_vector(root)
    skew = exact.to(skew_dtype(entry.site))
    moved = [cayley(s.double(), entry.block_size, "cayley") for s in (skew, exact)]
    error = float(torch.linalg.matrix_norm(moved[0] - moved[1]).max())
    if error > _ROUNDING:
        raise AdapterError(
            f"{entry.fqn}: by weights {dict(weights)} a block turns by {largest:.5f}, so near pi that its skew in "
            f"{skew.dtype} is off by {error:.1e}. Use smaller weights"
        )
    others = tuple(name for name in weights if name not in rotations)
    shown = (entry.fqn, entry.blocks, entry.block_size, tuple(rotations), others)
    return skew, SiteBlend(*shown, largest, departure, error, member.remark)


def _check_angles(largest: Tensor, fqn: str, weights: Mapping[str, float]) -> float:
    """The largest angle of all blocks.

    Raises:
        AdapterError: one is pi, which no Cayley transform reaches.
    """
    if bool((largest > math.pi - NEAREST_PI).any()):
        raise AdapterError(
            f"{fqn}: by weights {dict(weights)} block {int(largest.argmax())} turns by {float(largest.max()):.7f}, "
            "which is pi, and no Cayley transform reaches that. Use other weights"
        )
    return float(largest.max())


def _first_blocks(member: Member) -> list[int]:
    """For each row of the skew a block that is made from it."""
    entry = member.entry
    if entry.spec.block_share:
        return list(range(0, entry.blocks, entry.blocks // entry.copies))
    if entry.tied_blocks:
        return [entry.tied_blocks.index(row) for row in range(entry.rows)]
    return list(range(entry.blocks))


@torch.no_grad()
def _fill(
    root: nn.Module, store: AdapterStore, into: str, skews: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> None:
    rotations = rotation_by_site(root, store, into)
    for fqn, skew in skews.items():
        rotations[fqn].skew.copy_(skew)
    for name, tensor in others.items():
        if name in store.trained[into]:
            store.trained[into][name].copy_(tensor)
        else:
            store.buffers.fill(into, name, tensor)
