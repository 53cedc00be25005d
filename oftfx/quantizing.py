"""Round a float model to integers, by what its layers read: so a fold to floats becomes a model that servers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn

from oftfx.errors import FoldError
from oftfx.folding.inputs import batches_of
from oftfx.folding.measure import measure, see
from oftfx.folding.provenance import command_line, provenance_of
from oftfx.folding.record import SiteFold
from oftfx.folding.report import FoldReport
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folds import FoldResult
from oftfx.formats.compressed_tensors import make_compressed
from oftfx.formats.registry import format_named, format_of
from oftfx.model.sites import output_head
from oftfx.model.structure import replace_module, structural_copy
from oftfx.passes.quantized.calibrate import NOT_REACHED, in_running_order
from oftfx.passes.quantized.policy import check_finite_inputs, rounded
from oftfx.passes.quantized.roundings import are_few, best_rounding
from oftfx.placement.find import rotated_sites
from oftfx.rotation.ieee import ieee_products
from oftfx.terminal import bar

_MEASURED = 8


def quantize(
    model: nn.Module,
    *,
    bits: int = 4,
    group_size: int = 32,
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> FoldResult:
    """Round every linear layer of a float model but its output head: ``W = code * scale`` in groups of columns.

    For a base in a format that a server does not read (NF4 in vLLM): fold the adapter to floats, which is exact, and
    round those: ``oftfx.quantize(oftfx.fold(model, quantized="float").model, calibration=...)``.

    With inputs each layer is rounded for what the float model gives from *its* inputs, as by ``quantized="calibrate"``
    of `oftfx.fold`: the layers before it are rounded already, and their errors are made up for. Without, to the
    nearest codes. Symmetric, without zero points.

    Args:
        model: float, without rotations. It is not changed.
        bits: 4 or 8.
        group_size: columns of a group; it has to divide the inputs of each layer. -1: all of them.
        calibration: inputs, each a dict or a tuple of arguments; thousands of tokens.
        progress: True for a progress bar (needs the ``report`` extra), or a function of (layers done, all layers).

    Returns:
        A model with layers of compressed-tensors, and a report. ``.save(directory, save_as="compressed-tensors")``
        writes what transformers and vLLM read.

    Raises:
        FoldError: the model has rotations or quantized layers, no linear ones, or one that the groups do not divide.
        MissingExtraError: compressed-tensors is not there.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> inputs = [(torch.randn(400, 64),)]
        >>> result = oftfx.quantize(base, calibration=inputs)
        >>> [(site.fqn, site.action, site.output_error < 0.25) for site in result.report]
        [('0', 'calibrated', True), ('2', 'calibrated', True)]
    """
    batches, layers = batches_of(calibration), _chosen(model)
    if bits not in (4, 8):
        raise FoldError(f"bits={bits!r}; 4 or 8")
    for path, layer in layers.items():
        if group_size != -1 and (group_size < 1 or layer.in_features % group_size):
            raise FoldError(
                f"{path} has {layer.in_features} inputs, no whole groups of {group_size}; choose another group_size, "
                "or -1"
            )
    fellow = structural_copy(model)  # whatever the user does to the model afterwards
    target = structural_copy(model)
    scheme: dict[str, Any] = {"num_bits": bits, "symmetric": True}
    scheme |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    made = {path: make_compressed(target.get_submodule(path), compress=False, **scheme) for path in layers}  # type: ignore[arg-type]
    for path, layer in made.items():
        replace_module(target, target.get_submodule(path), layer)
    paths, rows = {layer: path for path, layer in made.items()}, dict[str, SiteFold]()
    with bar("quantize") if progress is True else nullcontext(progress or None) as show:

        def round_one(layer: nn.Module, shown: Shown | None) -> None:
            path = paths[layer]
            with ieee_products():
                rows[path] = _rounded(path, layer, fellow.get_submodule(path), shown, bits)
            if shown is None and batches:
                rows[path] = replace(rows[path], note=NOT_REACHED)
            if show is not None:
                show(len(rows), len(made))

        if batches:
            beside = [fellow.get_submodule(path) for path in made]
            in_running_order(target, [*made.values()], batches, round_one, (fellow, beside), leave=lambda *_: None)
        else:
            for layer in made.values():
                round_one(layer, None)
    some = batches[:_MEASURED]
    measured = None
    if some:
        measured = measure(((seen, seen) for seen in (see(fellow, b) for b in some)), target, some)
    if measured is not None:
        measured = replace(measured, effect=None, perplexity_base=None)
    lines = tuple(rows[path] for path in layers)
    return FoldResult(
        target,
        FoldReport(
            lines, measured=measured, provenance=provenance_of(model, lines, {}, batches, command=command_line())
        ),
    )


def _chosen(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by path."""
    if fqn := next((fqn for fqn, _ in rotated_sites(model)), None):
        raise FoldError(f"{fqn} has a rotation; fold with quantized='float' first")
    found: dict[str, nn.Linear] = {}
    head = output_head(model)
    for path, module in model.named_modules():
        known = format_of(module)
        if known is not None and not known.lossless:
            raise FoldError(f"{path} is quantized already ({known.name}); fold with quantized='float' first")
        if type(module) is nn.Linear and module is not head:
            found[path] = module
    if not found:
        raise FoldError(f"this {type(model).__name__} has no linear layer to be rounded")
    return found


@torch.no_grad()
def _rounded(path: str, layer: nn.Module, plain: nn.Module, shown: Shown | None, bits: int) -> SiteFold:
    """Round one layer, and what came of it."""
    stored: Any = format_named("compressed_tensors")
    weight = plain.weight.detach().float()  # type: ignore[union-attr]
    before = plain.weight.numel() * plain.weight.element_size()  # type: ignore[union-attr, operator]
    here: Any = SimpleNamespace(module=layer)
    site = Turned(path, here, stored, stored.layout(layer), weight, [], weight, 0.0, 0.0, before, "")
    line: dict[str, Any]
    if shown is None:
        state, line = rounded(site, weight, None), {"action": "requantized"}
    else:
        check_finite_inputs(site, shown)
        best = best_rounding(site, shown)
        state, few = best.state, are_few(shown)
        note = f"{shown.tokens} tokens for {shown.width} input features are few" if few else ""
        line = {"action": "calibrated", "output_error": best.judged.error, "tokens": shown.tokens, "few_tokens": few}
        line |= {"note": note}
    stored.write(layer, state)
    got = site.arrived(stored, layer)
    site.check_finite(got, stored.dtype(layer))
    # What its files hold: here it keeps the weight in floats, by which layers of compressed-tensors compute.
    scales = layer._parameters["weight_scale"]
    after = weight.numel() * bits // 8 + scales.numel() * scales.element_size()  # type: ignore[union-attr, operator]
    return SiteFold(path, "dense", relative_error=got.error, bytes_before=before, bytes_after=after, **line)
