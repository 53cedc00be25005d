"""The words of a fold's report."""

from __future__ import annotations

from collections.abc import Iterable

WORDS = (
    ("Site", "one layer whose weight a rotation stands in front of."),
    ("Update", "how far the rotation moves the weight W: |W' - W| / |W|, with W' the rotated weight that was wanted."),
    (
        "Error",
        "of a weight: |folded - wanted| / |wanted|. Of outputs: the same for what the layer, or the model, gives.",
    ),
    (
        "Survival",
        "the share of a wanted update that is there after the fold: 100% all of it, 0% nothing, negative: the weight "
        "moved the other way. Of the weight, or of the layer's outputs on the calibration inputs.",
    ),
    (
        "Arrived",
        "the verdict's share. Of the model's outputs it is 1 - error² / effect², where the effect is what the adapter "
        "does to them; without calibration inputs, the survival of the update in the layers' outputs or the weights.",
    ),
    (
        "Gain kept",
        "of the log-likelihood that the adapter gains on the calibration inputs, the share the fold has too.",
    ),
    ("Perplexity", "exp of the mean negative log-likelihood of the next token; lower is better."),
    ("Angle", "how far a rotation turns the planes of a block, in degrees; the largest of all blocks of a site."),
)

ACTIONS = (
    ("folded", "a float weight was rotated; exact but for one rounding."),
    ("kept", "the quantized weight is untouched, and the rotation stays in front of it as fixed numbers; exact."),
    ("requantized", "the rotated weight was rounded to the format's nearest codes."),
    ("calibrated", "rounded so that the layer's outputs on calibration inputs change least."),
    ("from reference", "the rotated original float weight was rounded."),
    ("dequantized", "the layer is a float one now; exact, and larger."),
    ("as trained", "has the codes and scales that fold-aware training computed with."),
    ("into producer", "this weight is untouched; the rows of the layer before it were turned instead; exact."),
    ("distilled", "its scales were then trained to give the unfolded model's outputs."),
    ("untouched", "the rotation was exactly the identity."),
)


def glossary(actions: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Names and meanings, of actions those that occur."""
    done = {word for action in actions for word in action.split(", ")}
    return (*WORDS, *((name, text) for name, text in ACTIONS if name in done))
