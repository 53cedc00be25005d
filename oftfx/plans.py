"""What will be done: rules resolved to sites, as pure data. Printable, and JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from oftfx.coverage import Coverage, Unreached
from oftfx.errors import RuleError
from oftfx.formats.layout import Layout
from oftfx.model.site import Site
from oftfx.rotation.module import skew_rows
from oftfx.rotation.skew import skew_size
from oftfx.rotation.spec import OFT

VERSION = 1


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


@dataclass(frozen=True)
class Plan:
    """Rules resolved to sites. Iterates over its `SitePlan`; ``print(plan)`` shows a table.

    Attributes:
        model_class: class of the model it was made for.
        entries: the sites that are rotated.
        skipped: what rules reached without effect, with reasons.
        trace: how the program was captured.
        train: names of parameters, other than rotations, that train whole and are saved with the adapter.
        train_modules: the modules that were asked for by ``train``.
        train_bias: the biases that were asked for: ``"none"``, ``"all"`` or ``"oft"``.
        coverage: bytes of weight matrices that are rotated, and which are not.
    """

    model_class: str
    entries: tuple[SitePlan, ...]
    skipped: tuple[Skipped, ...] = ()
    trace: TraceInfo = TraceInfo()
    train: tuple[str, ...] = ()
    train_modules: tuple[str, ...] = ()
    train_bias: str = "none"
    coverage: Coverage = field(default_factory=Coverage)

    def __iter__(self) -> Iterator[SitePlan]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, fqn: str) -> SitePlan:
        for entry in self.entries:
            if entry.fqn == fqn:
                return entry
        raise KeyError(fqn)

    @property
    def trainable(self) -> int:
        """Trainable numbers of all rotations."""
        return sum(e.trainable for e in self.entries)

    @property
    def rotations(self) -> int:
        """Number of distinct rotations."""
        return sum(e.owner == e.fqn for e in self.entries)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        data = asdict(self)
        for entry, source in zip(data["entries"], self.entries, strict=True):
            entry["spec"] = source.spec.to_dict()
        return json.dumps({"oftfx_plan": VERSION, **data}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of `to_json`.

        Raises:
            RuleError: not a plan, or one of another version.
        """
        try:
            data = json.loads(text)
            version = data.pop("oftfx_plan")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RuleError("this text is not an oftfx plan; expected what Plan.to_json() wrote") from None
        if version != VERSION:
            raise RuleError(f"this plan has version {version}; this oftfx reads version {VERSION}")
        try:
            return cls(
                model_class=data["model_class"],
                entries=tuple(_entry(e) for e in data["entries"]),
                skipped=tuple(Skipped(**s) for s in data["skipped"]),
                trace=TraceInfo(**_tuples(data["trace"])),
                train=tuple(data["train"]),
                train_modules=tuple(data["train_modules"]),
                train_bias=data["train_bias"],
                coverage=_coverage(data.get("coverage", {})),
            )
        except (KeyError, TypeError) as error:
            raise RuleError(f"this text is a damaged oftfx plan: {type(error).__name__}: {error}") from None

    def table(self, *, full: bool = False) -> str:
        """The plan as a table (needs the ``report`` extra).

        Args:
            full: one row a site; otherwise layers that differ only in their number share a row.
        """
        from oftfx.report.plan_table import plan_table

        return plan_table(self, full=full)

    def __str__(self) -> str:
        from oftfx.report.plan_table import plan_text

        return plan_text(self)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _coverage(values: dict[str, Any]) -> Coverage:
    unreached = tuple(Unreached(**_tuples(u)) for u in values.get("unreached", ()))
    return Coverage(**{**values, "unreached": unreached})


def _entry(values: dict[str, Any]) -> SitePlan:
    fields = _tuples(values)
    site = _tuples(fields["site"])
    site["layout"] = Layout(**site.get("layout", {}))
    fields["site"] = Site(**site)
    if producer := fields.get("producer"):
        fields["producer"] = Producer(**_tuples(producer))
    fields["spec"] = OFT.from_dict(fields["spec"])
    return SitePlan(**fields)
