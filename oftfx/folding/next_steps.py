"""What a user does after a fold, by what came of it."""

from __future__ import annotations

from oftfx.folding.facts import FoldFacts
from oftfx.pages.page import Code, Part, Text

_SAVE = 'result.save("folded")                                    # checkpoint, report, checksums\n'
_EXPORT = 'oftfx.export_onnx(result.model, "model.onnx", inputs)    # or an ONNX file, checked in ONNX Runtime'
_BETTER = """result = oftfx.fold(model, quantized="calibrate", calibration=batches, distil=2)    # stays quantized
result = oftfx.fold(model, quantized="keep")     # exact: the rotation stays in front
result = oftfx.fold(model, quantized="float")    # exact: the layers become float ones"""


def next_steps(facts: FoldFacts) -> tuple[Part, ...]:
    """In words, and as lines to copy."""
    state = facts.verdict.state
    if state == "nothing":
        told = "The rotations do nothing yet. Train them, or load an adapter that was trained, and fold again."
        return Text((told,)), Code('oftfx.load_adapter(model, "adapter-directory")\nresult = oftfx.fold(model)')
    if state in ("amber", "red"):
        told = "Fold again in a way that loses less, and compare the reports before the model is deployed."
        return Text((told,)), Code(_BETTER)
    told = "Save the folded model, or export it."
    more = []
    if state == "unknown" and not facts.rounded_only:
        told = "Run the folded model on real inputs beside the unfolded one before it is deployed."
    elif facts.measured is None and any(s.relative_error > 0 for s in facts.sites):
        more.append(
            "The whole model was not measured: fold with calibration=[inputs, ...] to see what its outputs lose."
        )
    if any(s.action == "kept" for s in facts.sites):
        more.append(
            "Rotations stay in front of quantized weights: load the directory with oftfx.load_folded. from_pretrained "
            "alone drops them, and is the base model then."
        )
    return Text((told, *more)), Code(_SAVE + _EXPORT)
