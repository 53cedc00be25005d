"""What a plan says of one site, of what it leaves out, and of the recording it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from oftfx.model.site import Site
from oftfx.rotation.module import skew_rows
from oftfx.rotation.skew import skew_size
from oftfx.rotation.spec import OFT


@dataclass(frozen=True)
class Producer:
    """The layer whose output rows a site's rotation can be pushed into.

    Attributes:
        fqn: its path.
        starts: for each block of the rotation, the first of the rows of the producer that it turns.
    """

    fqn: str
    starts: tuple[int, ...]


@dataclass(frozen=True)
class SitePlan:
    """One site and what happens to it.

    Attributes:
        site: the layer.
        spec: how it is rotated.
        blocks: number of blocks; of an own rotation for each expert, of all of them.
        block_size: their size; ``blocks * block_size == site.in_features * copies``.
        rule: the target of the rule that chose it.
        owner: path of the site that holds the rotation; the site itself unless it shares another's.
        same_input: other planned sites of the same parent that read the same tensor.
        placement: where the rotation acts: ``"activation"`` or ``"weight"``.
        local_input: whether the layer around the site makes the tensor that it reads, so that it can be handed out
            under ``torch.compile`` as well.
        producer: the layer that `oftfx.fold` can put the rotation into with ``into="producer"``, or None.
        producer_reason: why there is none.
        tied_blocks: for each block its row of the skew, where blocks share rows; see `Rotation`.
        kernel: how a quantized layer multiplies: ``"native"`` or ``"exact"``; see `oftfx.formats.exact`.
        notes: what a user should know about this site.
    """

    site: Site
    spec: OFT
    blocks: int
    block_size: int
    rule: str
    owner: str
    same_input: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    placement: str = "activation"
    local_input: bool = False
    producer: Producer | None = None
    producer_reason: str = "not recorded"
    tied_blocks: tuple[int, ...] = ()
    kernel: str = "native"

    @property
    def copies(self) -> int:
        """Rotations in a row: one for each expert where the spec asks for that."""
        return self.site.experts if self.each else 1

    @property
    def each(self) -> bool:
        """Whether every expert has a rotation of its own."""
        return self.spec.experts == "each" and self.site.experts > 0

    @property
    def rows(self) -> int:
        """Rows of the skew that this site needs."""
        return skew_rows(self.spec, self.blocks // self.copies, self.copies, self.tied_blocks)

    @property
    def fqn(self) -> str:
        """Module path of the site."""
        return self.site.fqn

    @property
    def trainable(self) -> int:
        """Trainable numbers this site adds; 0 where it shares another's rotation."""
        if self.owner != self.fqn:
            return 0
        return self.rows * skew_size(self.block_size)


@dataclass(frozen=True)
class Skipped:
    """A module that a rule reached and that is not rotated, and why."""

    fqn: str
    module_class: str
    reason: str


@dataclass(frozen=True)
class TraceInfo:
    """How the model's program was captured.

    Attributes:
        rung: ``"graph"`` (recorded on fake tensors), ``"analysis"`` (recorded on real values: for analysis only) or
            ``"tree"`` (module tree alone: no sharing).
        reason: why not a higher rung; empty on the highest.
        nodes: nodes of the recorded graph.
        never_called: planned sites that the recorded forward did not reach.
    """

    rung: str = "tree"
    reason: str = "not traced"
    nodes: int = 0
    never_called: tuple[str, ...] = ()
