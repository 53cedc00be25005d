"""The plan of an adapter that is made of several: their sites together, in blocks that hold the blocks of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from oftfx.model.site import Site
from oftfx.planning.plans import Plan
from oftfx.planning.site_plan import Producer, SitePlan


@dataclass(frozen=True)
class Member:
    """One site of a blend.

    Attributes:
        entry: its plan in the blend.
        parts: the adapters that rotate it, with their own plans; for the others it is the identity.
    """

    entry: SitePlan
    parts: Mapping[str, SitePlan]

    def on(self, sites: Mapping[str, Site]) -> Member:
        """The same, with what its layer is now: a model may have been cast since the adapters were made."""
        found, site = sites.get(self.entry.fqn), self.entry.site
        same = found is not None and found.is_layer == site.is_layer
        return replace(self, entry=replace(self.entry, site=found)) if same and found is not None else self

    @property
    def remark(self) -> str:
        """For the report, where blocks have become larger."""
        sizes = {part.block_size for part in self.parts.values()}
        several = ", ".join(map(str, sorted(sizes)))
        return f"blocks of {several} are inside blocks of {self.entry.block_size}" if len(sizes) > 1 else ""


def union_of(plans: Mapping[str, Plan], order: Sequence[str]) -> list[Member]:
    """The sites of adapters of one model, in its order.

    Blocks get the least common multiple of the sizes, which divides the axis as each of them does, so nothing is lost.
    Sites share a rotation where they share one in every adapter that rotates any of them.
    """
    entries = {name: {e.fqn: e for e in plan} for name, plan in plans.items()}
    owners: dict[tuple[tuple[str, str], ...], str] = {}
    members = []
    for fqn in order:
        parts = {name: mine[fqn] for name, mine in entries.items() if fqn in mine}
        if parts:
            owner = owners.setdefault(tuple((name, part.owner) for name, part in parts.items()), fqn)
            members.append(Member(_joined(list(parts.values()), owner), parts))
    return members


def plan_of(members: Sequence[Member], plans: Sequence[Plan]) -> Plan:
    """The plan of a blend; what trains whole in one of the adapters does in it."""
    biases = {plan.train_bias for plan in plans}
    return Plan(
        plans[0].model_class,
        tuple(member.entry for member in members),
        trace=plans[0].trace,
        train=_together([p.train for p in plans]),
        train_modules=_together([p.train_modules for p in plans]),
        train_bias=next(b for b in ("all", "oft", "none") if b in biases),
        train_buffers=_together([p.train_buffers for p in plans]),
        brought=_together([p.brought for p in plans]),
    )


def _joined(parts: list[SitePlan], owner: str) -> SitePlan:
    first, size = parts[0], math.lcm(*(p.block_size for p in parts))
    as_asked = all((p.spec.block_size, p.spec.blocks) == (first.spec.block_size, first.spec.blocks) for p in parts)
    spec = replace(
        first.spec if as_asked else replace(first.spec, block_size=size, blocks=None),
        parameterization="cayley",
        terms=5,
        block_share=all(p.spec.block_share for p in parts),
        coft_eps=None,
        dropout=0.0,
        init="identity",
    )
    same = all(p.block_size == size for p in parts)
    tied = {p.tied_blocks if same else () for p in parts}
    producers = {p.producer for p in parts}
    producer: Producer | None = next(iter(producers)) if len(producers) == 1 and len(tied) == 1 and same else None
    return replace(
        first,
        spec=spec,
        blocks=first.blocks * first.block_size // size,
        block_size=size,
        rule=f"a blend: {first.rule}",
        owner=owner,
        same_input=_together([p.same_input for p in parts]),
        local_input=all(p.local_input for p in parts),
        producer=producer,
        producer_reason=first.producer_reason if producer == first.producer else "the blended adapters differ in it",
        tied_blocks=next(iter(tied)) if len(tied) == 1 else (),
    )


def _together(names: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for some in names for n in some))
