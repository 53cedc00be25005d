"""An export as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from oftfx.onnx.checks.verify import Verification
from oftfx.pages.charts import bars
from oftfx.pages.figures import nbytes, written
from oftfx.pages.page import Banner, Cell, Code, Column, Page, Part, Section, Table, Terms, Text, Tile, Tiles
from oftfx.planning.plan_table import pattern, ranges
from oftfx.version import __version__

_GLOSSARY = (
    ("Relative error", "|ONNX Runtime's output - torch's| / |torch's|, the largest over the outputs."),
    ("Adapter's effect", "the same of the outputs without the adapter: what an error is to be compared with."),
    ("Opset", "version of the ONNX operators that the file uses; a runtime has to know it."),
    ("Dynamic axis", "an axis whose length a caller chooses; it has a name instead of a number."),
    ("Operator", "one kind of node in the file; those without a known domain are of the ONNX standard."),
)
_LARGE, _ROUNDING = 0.5, 1e-2
_BLOCKS = ".oft.blocks"


def export_page(
    path: Path,
    size: int,
    opset: int,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
    operators: Mapping[str, int],
    adapters: Sequence[str],
    attention: str,
    checks: Sequence[Verification],
) -> Page:
    """Whether the file computes what the model does, what is in it, and how to run it."""
    worst = max((c.relative_error for c in checks), default=None)
    tiles = (
        Tile("Largest relative error", None if worst is None else written(worst), _against(checks)),
        Tile("Size", nbytes(size), "with external data"),
        Tile("Nodes", f"{sum(operators.values()):,}", f"{len(operators)} operators, opset {opset}"),
        Tile("Adapters", ", ".join(adapters) or "none", "in the file, or checked with it" if adapters else ""),
    )
    most = sorted(operators.items(), key=lambda o: -o[1])
    shown = [(n, float(c)) for n, c in most[:15]]
    chart = bars("operators", "The commonest operators", shown, measure="nodes", style="count")
    listed = Table(
        "All operators.", (Column("operator", "code"), Column("nodes", "count")), tuple(most), tools=len(most) > 15
    )
    sections = [
        Section("The file", (Tiles(tiles),)),
        Section("Verified", _checks(checks)),
        Section("Inputs and outputs", (_inputs(inputs), Terms((("Outputs", ", ".join(outputs)),)))),
        Section("Operators", (chart, listed) if operators else ()),
        Section("Provenance", (Terms((("File", path.name), ("Attention", attention or "as exported"), _versions())),)),
        Section("Next step", _next(path, inputs)),
        Section("Glossary", (Terms(_GLOSSARY),)),
    ]
    return Page(
        title="Export report",
        subtitle=f"{path.name}: {nbytes(size)}, opset {opset}",
        banner=_banner(checks),
        notices=(),
        sections=tuple(s for s in sections if s.parts),
        made_by=f"oftfx {__version__}",
    )


def _banner(checks: Sequence[Verification]) -> Banner:
    if not checks:
        return Banner(
            "amber",
            "Not verified",
            "The export ran with verify=False: whether the file computes what the model does is not known.",
        )
    worst = max(checks, key=lambda c: c.relative_error)
    count = f"{len(checks)} inputs of other shapes" if len(checks) > 1 else "an input of another shape"
    told = f"ONNX Runtime's outputs differ from torch's by a relative {worst.relative_error:.1e} at most, on {count}."
    effects = [c for c in checks if c.adapter_effect]
    if any(c.relative_error > _LARGE * (c.adapter_effect or 1.0) for c in effects):
        return Banner("red", "Its error is larger than half of what the adapter does", told)
    if worst.relative_error > _ROUNDING:  # which only a quantized file, or an accuracy level, is allowed
        return Banner("amber", "The file computes nearly what the model does", told)
    return Banner("green", "The file computes what the model does", told)


def _against(checks: Sequence[Verification]) -> str:
    if not checks:
        return "export with verify=True"
    effects = [c.adapter_effect for c in checks if c.adapter_effect is not None]
    return f"the adapter's effect is {written(min(effects))} at least" if effects else "no adapter acts"


def _checks(checks: Sequence[Verification]) -> tuple[Part, ...]:
    if not checks:
        return ()
    columns = (
        Column("inputs"),
        Column("adapters"),
        Column("relative error", "number"),
        Column("largest difference", "number"),
        Column("adapter's effect", "number"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            ", ".join(f"{n} {s}" for n, s in c.shapes.items()),
            c.case,
            c.relative_error,
            c.max_abs_error,
            c.adapter_effect,
        )
        for c in checks
    ]
    return (Table("One row a comparison of ONNX Runtime with torch; a dash: no adapter acts.", columns, tuple(rows)),)


def _inputs(inputs: Mapping[str, Mapping[int, str]]) -> Table:
    """One row for all that differ in a number of their name only."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, axes in inputs.items():
        told = ", ".join(f"{i}: {a}" for i, a in axes.items()) or "none: fixed"
        alike.setdefault((pattern(name), told), []).append(name)
    columns = Column("input", "code"), Column("inputs", "count"), Column("dynamic axes")
    rows = tuple((ranges(names), len(names), told) for (_, told), names in alike.items())
    return Table(f"{len(inputs)} inputs; those of equal layers in one row.", columns, rows)


def _versions() -> tuple[str, str]:
    found = [f"oftfx {__version__}"]
    for name in ("torch", "onnx", "onnxruntime", "onnxscript"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return "Versions, now", ", ".join(found)


def _next(path: Path, inputs: Mapping[str, Mapping[int, str]]) -> tuple[Part, ...]:
    told = ["Run it, or serve it with Triton or MLServer: oftfx repository writes what they read."]
    own = [n for n in inputs if not n.endswith(_BLOCKS)]
    if len(own) < len(inputs):
        told.append(
            f"The inputs that end in {_BLOCKS} are the rotations of an adapter; oftfx.export_onnx_adapter writes them."
        )
    given = ", ".join([f'"{n}": ...' for n in own[:4]] + (["..."] if len(own) > 4 else []))
    code = f'session = onnxruntime.InferenceSession("{path.name}")\noutputs = session.run(None, {{{given}}})'
    return Text(tuple(told)), Code(code)
