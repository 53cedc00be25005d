"""Write the update of an adapter as LoRA, for whoever takes nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.contents import check_in_place, whole_tensors
from oftfx.adapter.packed import packed
from oftfx.adapter.peft_files import CONFIG_FILE, WEIGHT_FILE
from oftfx.adapter.save import PLAN_FILE
from oftfx.adapter.scales import SCALE_FILE
from oftfx.adapter.store import AdapterStore, located
from oftfx.errors import AdapterError, AdapterFileError
from oftfx.files import check_place, landing, write
from oftfx.folding.inputs import batches_of
from oftfx.folding.lockstep import Lockstep
from oftfx.folding.still import held_still
from oftfx.formats.sharded import is_sharded
from oftfx.lora.fit import Fit, energy_of, raised, rank_for
from oftfx.lora.peft_layout import config_for, tensors_of, unable
from oftfx.lora.report import LoraReport, SiteLora
from oftfx.lora.seen import Seen, see
from oftfx.model.running import Inputs
from oftfx.model.site import Site
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.rows import check_no_rows
from oftfx.planning.plans import Plan
from oftfx.rotation.module import Rotation, whole

UNSEEN = "no calibration input reached this layer, or only zeros, so all inputs count alike"


def to_lora(
    model: nn.Module,
    path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    adapter: str = "default",
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    bound: float = 0.1,
) -> LoraReport:
    """Write an adapter as PEFT's LoRA: at each site the best low-rank approximation of ``D = W R^T - W``.

    ``B A`` of the rank asked for is the one that keeps most of ``|X D^T|``, with X what the layer reads on the
    calibration inputs (a whitened singular value decomposition); without them, of ``|D|``. The update of a rotation has
    full rank in general, so a small rank loses some of it: the report says how much at each site, and where more than
    ``bound`` would be lost nothing is written. Quantized weights count as what they dequantize to.

    What the adapter trains whole (modules, biases) is written as PEFT's ``modules_to_save`` and ``bias``.

    Besides the model, memory holds the factors of all sites, and of one site its update, some square matrices of its
    shorter side, and the moments ``(in, in)`` in float64.

    Args:
        model: a transformed model; it is not changed.
        path: a directory, with ``adapter_config.json`` and ``adapter_model.safetensors`` afterwards.
        rank: of every site, or the most where ``energy`` is given; never more than the update has.
        energy: the share of each update's energy ``|X D^T|^2`` to keep, in (0, 1]: ranks then differ by site.
        adapter: which one.
        calibration: inputs of the model, dicts of keyword arguments or tuples.
        bound: the largest share of an update's energy that may be lost at a site.

    Returns:
        Rank and loss of each site.

    Raises:
        AdapterError: neither ``rank`` nor ``energy``; a site that PEFT's LoRA cannot do, by name; a loss over
            ``bound``, with the worst site and the rank that would do.
        AdapterFileError: the files cannot be written; what was there is as it was.
        FoldError: ``calibration`` is no iterable of inputs.

    Source: LoRA, arXiv 2106.09685; SVD-LLM, arXiv 2403.07378, for the weighting.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> report = oftfx.to_lora(model, "lora", energy=0.95, calibration=[(torch.randn(50, 6),)])
        >>> report.loss <= 0.05, report.sites[0].rank < report.sites[0].full_rank, report.sites[0].tokens
        (True, True, 50)
    """
    root, store = located(model)
    check_no_rows(root, "a conversion")
    _check_asked(rank, energy, bound)
    job = _Job.of(root, store, adapter, rank, energy)
    batches = batches_of(calibration)
    directory = Path(path)
    check_place(directory / CONFIG_FILE, AdapterFileError)
    if batches:
        job.with_inputs(batches)
    for module in list(job.left):
        job.convert(module, None, UNSEEN if batches else "")
    lines = tuple(job.lines[e.fqn] for e in job.plan)
    _check_loss(lines, job.needed(bound), bound)
    tensors = {k: t for e in job.plan for k, t in job.tensors[e.fqn].items()}
    count = sum(t.numel() for t in tensors.values())
    tensors |= {
        k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in whole_tensors(root, store, adapter)
    }
    config = config_for(job.plan, root, {line.fqn: line.rank for line in lines})
    with landing(directory, CONFIG_FILE, AdapterFileError, stale=[PLAN_FILE, SCALE_FILE]) as made:
        write(made / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())
        write(made / WEIGHT_FILE, packed(tensors, {"format": "pt"}))
    return LoraReport(str(directory), adapter, lines, count)


@dataclass(frozen=True, eq=False)
class _Job:
    """The sites of one adapter, those that are done, and what is known of them."""

    root: nn.Module
    store: AdapterStore
    adapter: str
    plan: Plan
    rank: int | None
    energy: float | None
    left: dict[nn.Module, tuple[Site, Placement]]
    lines: dict[str, SiteLora]
    tensors: dict[str, dict[str, Tensor]]
    energies: dict[str, Tensor]

    @classmethod
    def of(cls, root: nn.Module, store: AdapterStore, adapter: str, rank: int | None, energy: float | None) -> _Job:
        store.require(adapter)
        check_in_place(root, store, adapter)
        plan, found = store.adapters[adapter].plan, dict(rotated_sites(root))
        left = dict[nn.Module, tuple[Site, Placement]]()
        for entry in plan:
            placement = found[entry.fqn]
            if any(adapter in names for names in placement.through):
                raise AdapterError(
                    f"adapter {adapter!r} is fold-aware: {entry.fqn} computes with the weight that its fold will "
                    "write, not with its rotation. Let the rotations act again first: oftfx.fold_aware(model, None)"
                )
            reason = unable(entry.site, placement)
            if is_sharded(placement.module._parameters.get(placement.parameter)):
                reason = "FSDP has sharded its weight"
            if reason:
                raise AdapterError(
                    f"{entry.fqn} ({entry.site.module_class}) cannot be LoRA: {reason}. Fold the adapter instead "
                    "(oftfx.fold), or leave this site out of it"
                )
            left[placement.module] = entry.site, placement
        return cls(root, store, adapter, plan, rank, energy, left, {}, {}, {})

    def with_inputs(self, batches: Sequence[Inputs]) -> None:
        """Convert each layer when the model runs, with what it reads then; those that are not reached are left."""

        def show(module: nn.Module, inputs: list[Tensor], _: list[Tensor | None]) -> None:
            seen = see(self.left[module][0], module, inputs)
            if seen is not None:
                self.convert(module, seen, "")

        active, ran = self.store.active, {p: p.ran for _, p in rotated_sites(self.root)}
        self.store.activate(self.root, (self.adapter,))
        try:
            with held_still(self.root):
                Lockstep(self.root, list(self.left)).run(batches, show)
        finally:
            self.store.activate(self.root, active)
            for placement, had in ran.items():  # forwards end before the last layer, which is no sign of anything
                placement.ran = had

    @torch.no_grad()
    def convert(self, module: nn.Module, seen: Seen | None, note: str) -> None:
        """Make the factors of one layer, and its line."""
        site, placement = self.left.pop(module)
        weight_format = placement.weight_format()
        rotation = placement.rotations[self.adapter]
        if weight_format is None:
            raise AdapterError(f"{site.fqn}: no known format reads the weight of this {type(module).__name__} any more")
        weight = weight_format.borrow(module)
        update = weight_format.layout(module).turned_now(weight, [_less_identity(rotation, weight.device)])
        if not bool(torch.isfinite(update).all()):
            raise AdapterError(f"{site.fqn}: the rotated weight is not finite; look at the adapter's values there")
        if site.kind == "embedding":  # what it gives out are rows
            weight, update = weight.T, update.T
        moments = None if seen is None else seen.moments.to(update.device)
        fit = Fit.of(update, moments)
        rank = max(1, min(v for v in (self.rank, self._by_energy(fit), fit.full) if v is not None))
        loss = fit.loss(rank)
        size = energy_of(weight + update, None if moments is None else raised(moments))
        error = (loss * float(fit.energies.sum()) / size) ** 0.5 if size else 0.0
        tokens = None if seen is None else seen.tokens
        self.lines[site.fqn] = SiteLora(site.fqn, weight_format.name, rank, fit.full, loss, error, tokens, note)
        self.energies[site.fqn] = fit.energies.cpu()
        dtype = weight_format.dtype(module)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a, b = (t.to("cpu", wide).contiguous() for t in fit.factors(rank))
        self.tensors[site.fqn] = tensors_of(site, module, a, b)

    def needed(self, loss: float) -> dict[str, int]:
        """The rank at which each site loses no more than that."""
        return {fqn: rank_for(energies, loss) for fqn, energies in self.energies.items()}

    def _by_energy(self, fit: Fit) -> int | None:
        return None if self.energy is None else rank_for(fit.energies, 1 - self.energy)


def _less_identity(rotation: Rotation, device: torch.device) -> Tensor:
    """``R - I`` of each block in float64: its digits are those of the update."""
    blocks = rotation.recipe(whole(rotation.skew).detach().double())
    return (blocks - torch.eye(rotation.block_size, dtype=blocks.dtype, device=blocks.device)).to(device)


def _check_asked(rank: int | None, energy: float | None, bound: float) -> None:
    if rank is None and energy is None:
        raise AdapterError("give rank=, e.g. 64, or energy=, e.g. 0.95: the share of each update to keep")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise AdapterError(f"rank: got {rank!r}, expected an integer >= 1")
    if energy is not None and not 0 < energy <= 1:
        raise AdapterError(f"energy: got {energy!r}, expected a number in (0, 1]")
    if not bound >= 0:
        raise AdapterError(f"bound: got {bound!r}, expected a number >= 0")
    if energy is not None and 1 - energy > bound + 1e-9:
        raise AdapterError(
            f"energy={energy:g} may lose {1 - energy:.1%} of an update, over bound={bound:g}; give a larger bound as "
            "well, or more energy"
        )


def _check_loss(lines: Sequence[SiteLora], needed: Mapping[str, int], bound: float) -> None:
    worst = max(lines, key=lambda line: line.loss)
    if worst.loss <= bound + 1e-9:
        return
    over = sum(line.loss > bound + 1e-9 for line in lines)
    raise AdapterError(
        f"{over} of {len(lines)} sites lose more than bound={bound:g} of their update's energy; the worst is "
        f"{worst.fqn}: {worst.loss:.1%} at rank {worst.rank}. Rank {needed[worst.fqn]} would do there, "
        f"{max(needed.values())} everywhere; nothing was written. Give that rank, energy={1 - bound:g} for ranks by "
        "site, or a larger bound"
    )
