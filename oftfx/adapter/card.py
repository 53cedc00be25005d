"""A model card for the Hugging Face Hub, with the figures that the fold measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.folded import NOTE
from oftfx.errors import AdapterFileError, FoldError
from oftfx.folding.fold_page import banner_of, before_and_after, origin
from oftfx.folding.fold_tables import worst_ten
from oftfx.folding.report import FoldReport, report_from
from oftfx.folding.summary import actions
from oftfx.pages.markdown import banner as banner_text
from oftfx.pages.markdown import escaped, section
from oftfx.pages.page import Code, Section, Terms, Text
from oftfx.typed_json import read_object


def model_card(
    directory: str | Path,
    *,
    title: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> str:
    """A README.md for a folded model: YAML front matter for the Hub, what was measured, and how to load it.

    What was not measured says so; nothing is made up. Metadata that is not given is left out.

    Args:
        directory: of `oftfx.FoldResult.save`, `oftfx.fold_checkpoint` or ``oftfx fold``: its ``oftfx_fold.json`` is
            read, and whether it has rotations.
        title: heading; the directory's name by default.
        base_model: the base's name on the Hub.
        license: its short name there, ``"apache-2.0"``.
        language: codes of languages, ``["en"]``.
        datasets: names of datasets on the Hub that the adapter was trained on.
        tags: further ones.

    Returns:
        The text; writing it to ``README.md`` is left to the caller.

    Raises:
        AdapterFileError: there is no ``oftfx_fold.json``, or it is damaged.

    Examples:
        >>> import oftfx, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> card = oftfx.model_card(oftfx.fold(model).save("folded"), license="apache-2.0")
        >>> print(card[: card.index("## ")])
        ---
        license: apache-2.0
        tags:
        - oft
        - oftfx
        ---
        <BLANKLINE>
        # folded
        <BLANKLINE>
        > ✅ **The adapter arrived.** 100.0% of its update is in the weights.
        <BLANKLINE>
        The adapter *default* (OFT) is folded into the weights of 1 layers: 1 folded.
        <BLANKLINE>
        <BLANKLINE>
    """
    directory = Path(directory)
    note = _note(directory / NOTE)
    report = _report(directory, note)
    names = ", ".join(f"*{escaped(a)}*" for a in report.adapters) or "none"
    of = f" of {escaped(base_model)}" if base_model else ""
    told = f"The adapter {names} (OFT) is folded into the weights of {len(report)} layers{of}: {actions(report)}."
    if report.rounded_only:
        told = f"{len(report)} layers{of} are rounded: {actions(report)}."
    provenance = report.provenance
    parts = [
        _front_matter(base_model, license, language, datasets, tags),
        f"# {escaped(title or directory.resolve().name)}",
        banner_text(banner_of(report.verdict)),
        told,
        "\n".join(f"- {escaped(w)}" for w in report.warnings[report.verdict.state in ("amber", "red", "nothing") :]),
        section(Section("What was measured", before_and_after(report))),
        section(Section("Least kept", worst_ten(report))),
        section(Section("How to load it", _loading(directory, note))),
        section(Section("Provenance", (origin(provenance, report.adapters, report.dropped),))),
        section(Section("Words", (Terms(_WORDS),))),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


_WORDS = (
    (
        "Arrived",
        "1 - error² / effect² of the model's outputs, the effect being what the adapter does to them; without "
        "calibration inputs, the survival of the update.",
    ),
    (
        "Survival",
        "the share of the adapter's update of a weight, or of a layer's outputs, that is there after the fold.",
    ),
)


def _note(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterFileError(
            f"there is no {NOTE} in {str(file.parent)!r}; FoldResult.save and `oftfx fold` write it: name "
            "their directory"
        )
    note = read_object(file)
    if not isinstance(note.get("report"), dict):
        raise AdapterFileError(f"{file} is damaged: it has no report; fold again")
    return note


def _report(directory: Path, note: dict[str, Any]) -> FoldReport:
    try:
        return report_from(note)
    except FoldError as error:
        raise AdapterFileError(f"{directory / NOTE} is damaged: {error}") from None


def _front_matter(
    base_model: str | None,
    license: str | None,
    language: Sequence[str],
    datasets: Sequence[str],
    tags: Sequence[str],
) -> str:
    """YAML; strings that could be read as something else are quoted, which JSON's strings are in YAML too."""
    lines = ["---"]
    lines += [
        f"{name}: {_scalar(value)}" for name, value in (("base_model", base_model), ("license", license)) if value
    ]
    for name, values in (("language", language), ("datasets", datasets), ("tags", ("oft", "oftfx", *tags))):
        if values:
            lines += [f"{name}:", *(f"- {_scalar(v)}" for v in dict.fromkeys(values))]
    return "\n".join([*lines, "---"])


def _scalar(value: str) -> str:
    plain = value.replace("-", "").replace("/", "").replace("_", "").replace(".", "")
    words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    sure = plain.isascii() and plain.isalnum() and value[0].isalpha() and value.lower() not in words
    return value if sure else json.dumps(value, ensure_ascii=False)


def _loading(directory: Path, note: dict[str, Any]) -> tuple[Text | Code, ...]:
    rotations = (directory / ROTATIONS).is_file()
    ours = 'import oftfx\n\nmodel = oftfx.load_folded("path/to/this/directory")'
    if rotations:
        told = (
            f"Rotations stay in front of quantized weights ({ROTATIONS}): load the directory with oftfx. Other loaders "
            "drop them, and give the base model then."
        )
        return Text((told,)), Code(ours)
    name = note.get("facts", {}).get("class") if isinstance(note.get("facts"), dict) else None
    if note.get("way") == "transformers" and isinstance(name, str) and name.isidentifier():
        told = "It is an ordinary checkpoint; oftfx is not needed."
        return Text((told,)), Code(
            f'from transformers import {name}\n\nmodel = {name}.from_pretrained("path/to/this/directory")'
        )
    return Text(("Nothing stays in front of its weights.",)), Code(ours)
