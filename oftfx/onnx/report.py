"""What an export wrote, and how far it is from the model; as text and as a page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from oftfx.errors import ExportError
from oftfx.files import write_whole
from oftfx.onnx.checks.verify import Verification
from oftfx.onnx.report_page import export_page
from oftfx.pages.html import html
from oftfx.pages.markdown import markdown
from oftfx.pages.page import Page


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far ONNX Runtime's results are from torch's.

    Attributes:
        path: the file.
        inputs: input names with their dynamic axes; also those of swappable adapters.
        outputs: output names.
        opset: opset of the standard operators.
        operators: how often each operator occurs.
        nbytes: size of the file and its external data.
        adapters: adapters in the file, or that a swappable one was checked with; empty for a folded or plain model.
        attention: of a decoder: the operator that a fused one has, or why it has none; empty where none was asked for.
        checks: one `Verification` a shape, and a choice of adapters; empty without ``verify``.

    Examples:
        >>> import oftfx, torch
        >>> model = oftfx.transform(torch.nn.Sequential(torch.nn.Linear(6, 4)), {"*": oftfx.OFT(3)})
        >>> report = oftfx.export_onnx(model, "model.onnx", (torch.randn(5, 6),), adapters="swappable")
        >>> list(report.inputs), report.opset, report.adapters
        (['input', '0.oft.blocks'], 20, ('default',))
        >>> max(check.relative_error for check in report.checks) < 1e-6
        True
    """

    path: Path
    inputs: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    opset: int
    operators: dict[str, int]
    nbytes: int
    adapters: tuple[str, ...]
    checks: tuple[Verification, ...]
    attention: str = ""

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {self.nbytes / 2**20:.1f} MiB, {sum(self.operators.values())} nodes, opset {self.opset}"
        ]
        lines += [f"attention: {self.attention}"] if self.attention else []
        lines += [f"verified in ONNX Runtime on {c}" for c in self.checks]
        return "\n".join(lines)

    def to_json(self) -> str:
        """All figures as JSON text."""
        return json.dumps({**asdict(self), "path": str(self.path)}, indent=1)

    def to_html(self, path: str | Path) -> None:
        """Write the report as one HTML file that needs no other and no network (needs the ``report`` extra).

        Raises:
            ExportError: it cannot be written.
            MissingExtraError: a package of the extra is not installed.
        """
        write_whole(Path(path), html(self._page()).encode(), ExportError)

    def to_markdown(self) -> str:
        """The report as Markdown: all but the charts and long tables."""
        return markdown(self._page())

    def _page(self) -> Page:
        return export_page(
            path=self.path,
            size=self.nbytes,
            opset=self.opset,
            inputs=self.inputs,
            outputs=self.outputs,
            operators=self.operators,
            adapters=self.adapters,
            attention=self.attention,
            checks=self.checks,
        )
