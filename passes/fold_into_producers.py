"""Put rotations into the layers that make what they turn: ``y @ R = x @ (R^T W)^T + b @ R``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from oftfx.folding.angles import angles_of
from oftfx.folding.journal import Journal
from oftfx.folding.probe import has_own_forward
from oftfx.folding.record import Folds, SiteFold, Undo
from oftfx.folding.turned import norm, share
from oftfx.formats.base import WeightFormat, WeightState
from oftfx.model.huggingface import untie
from oftfx.model.index import ModelIndex
from oftfx.passes.protocol import Change, Pass, PassResult
from oftfx.placement.base import Placement
from oftfx.placement.find import rotated_sites
from oftfx.placement.frozen import product_of
from oftfx.planning.program import Program
from oftfx.planning.site_plan import Producer
from oftfx.precision import pieces


class FoldIntoProducers(Pass):
    """Fold the sites whose rotation can be pushed; the others stay for `FoldRotations`, with the reason.

    The site's own weight is not touched. The rows of the producer's weight and bias are turned in float32 (float64 for
    float64) and rounded once. Blocks that turn the same rows (grouped heads) have to be equal.

    What was done is in the result's ``found``, a `Folds`; ``left`` says of every other site why it was not.

    Args:
        producers: for each site its producer, or why it has none; see `FindProducers`.
        journal: notes what was there before each change.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.passes import FoldIntoProducers, Program
        >>> base, x = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Linear(9, 4)), torch.randn(5, 6)
        >>> model = oftfx.transform(base, {"1": oftfx.OFT(3, init="normal")}, example_inputs=(x,))
        >>> producers = {site.fqn: site.producer for site in oftfx.adapters(model)["default"]}
        >>> result = FoldIntoProducers(producers).run(Program.of(model))
        >>> [(site.fqn, site.action) for site in result.found.sites], torch.equal(model[1].weight, base[1].weight)
        ([('1', 'into producer')], True)
    """

    name = "fold_into_producers"
    preserves = "rounding"
    after = ("insert_rotations",)

    def __init__(self, producers: Mapping[str, Producer | str], journal: Journal | None = None) -> None:
        self.producers, self.journal = producers, journal or Journal(keep=False)

    def run(self, program: Program) -> PassResult:
        """Fold, site by site."""
        lines, left = list[SiteFold](), dict[str, str]()
        for fqn, placement in list(rotated_sites(program.index)):
            producer = self.producers.get(fqn, "not recorded")
            done = producer if isinstance(producer, str) else self._push(program.index, fqn, placement, producer)
            if isinstance(done, str):
                left[fqn] = done
            else:
                self.journal.site_done()
                lines.append(done)
        changes = [Change(s.fqn, "fold into producer") for s in lines]
        changes += [Change(fqn, "fold into producer", reason, refused=True) for fqn, reason in left.items()]
        return PassResult(program, bool(lines), tuple(changes), Folds(tuple(lines), left))

    @torch.no_grad()
    def _push(self, index: ModelIndex, fqn: str, placement: Placement, producer: Producer) -> SiteFold | str:
        """Push one site; or why not."""
        chain = product_of(placement.in_effect())
        if len(chain) != 1:
            return "several rotations of different block sizes act here" if chain else "no rotation acts here"
        blocks = _by_start(chain[0], producer)
        if blocks is None:
            return f"grouped heads have different rotations; train with OFT(into='producer') ({producer.fqn})"
        module = index.modules[producer.fqn]
        weight_format = index.format_of(module)
        if weight_format is None or not weight_format.lossless:
            stored = "by no known format" if weight_format is None else f"as {weight_format.name}"
            return f"its producer {producer.fqn} is stored {stored}, where turned rows would be rounded"
        if has_own_forward(module):
            return f"its producer {producer.fqn} ({type(module).__name__}) has a forward of its own"
        own = placement.weight_format()
        nbytes = own.nbytes(placement.module) if own is not None else 0
        if own is not None:
            self.journal.note(Undo.of(index.path(placement.module), placement, own))
        self.journal.note(UndoProducer.of(producer.fqn, module, weight_format))
        before = weight_format.dequantize(module)
        after = _turn_rows(before, blocks)
        weight_format.write(module, weight_format.requantize(after, module))
        bias = module._parameters.get("bias")
        if bias is not None:
            turned = _turn_rows(bias.detach().to(after.dtype).unsqueeze(1), blocks).squeeze(1)
            module._parameters["bias"] = nn.Parameter(turned.to(bias.dtype), requires_grad=bias.requires_grad)
        placement.drop()
        if (untied := untie(index.model, f"{producer.fqn}.weight")) is not None:
            self.journal.note(untied)
        moved = norm(a - b for a, b in pieces(after, before))
        angle, typical = angles_of(chain)
        note = f"its rotation is in {len(blocks) * chain[0].shape[1]} rows of {producer.fqn}"
        return SiteFold(
            fqn,
            own.name if own else "",
            "into producer",
            update=share(moved, norm(b for (b,) in pieces(before))),
            energy=moved**2,
            bytes_before=nbytes,
            bytes_after=nbytes,
            note=note,
            angle=angle,
            typical_angle=typical,
        )


def _by_start(blocks: torch.Tensor, producer: Producer) -> dict[int, torch.Tensor] | None:
    """The block for each group of rows; None where blocks of the same rows differ."""
    found: dict[int, torch.Tensor] = {}
    for start, block in zip(producer.starts, blocks, strict=True):
        if not torch.equal(found.setdefault(start, block), block):
            return None
    return found


def _turn_rows(matrix: torch.Tensor, blocks: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """``M' = R^T M`` on the rows that each block turns; a new tensor."""
    result = matrix.clone()
    size = next(iter(blocks.values())).shape[0]
    rows = torch.tensor([[start + i for i in range(size)] for start in blocks], device=matrix.device)
    stacked = torch.stack(list(blocks.values())).to(matrix)
    result[rows.flatten()] = torch.bmm(stacked.transpose(1, 2), matrix[rows]).flatten(0, 1)
    return result


@dataclass(frozen=True)
class UndoProducer:
    """What a producer was before its rows were turned."""

    fqn: str
    format: WeightFormat
    state: WeightState
    bias: nn.Parameter | None

    @classmethod
    def of(cls, fqn: str, module: nn.Module, weight_format: WeightFormat) -> UndoProducer:
        """The state now."""
        return cls(fqn, weight_format, weight_format.read(module), module._parameters.get("bias"))

    def restore(self, model: nn.Module) -> None:
        """Bring it back."""
        module = model.get_submodule(self.fqn)
        self.format.write(module, self.state)
        if self.bias is not None:
            module._parameters["bias"] = self.bias
