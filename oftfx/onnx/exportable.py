"""A model as an ONNX program: called with flat, named tensors, by torch's exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import ExportError
from oftfx.onnx.adapters import AdapterMode
from oftfx.onnx.blame import blame
from oftfx.onnx.signature import Signature

PREFIX = "model."
"""Of every parameter's name in the exported program."""


class Exportable(nn.Module):
    """A model, how it is called, and what its adapters read from the graph's inputs.

    Args:
        model: the lowered model.
        signature: how it is called.
        mode: what its adapters read.
        taps: modules whose results are outputs as well, by path; see `oftfx.onnx.checks.bisect`.
    """

    def __init__(
        self, model: nn.Module, signature: Signature, mode: AdapterMode, taps: Mapping[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.model, self._signature, self._mode = model, signature, mode
        self._tapped: dict[str, Tensor] = {}
        for name, module in (taps or {}).items():
            module.register_forward_hook(self._tap(name))
        self.train(model.training)

    def forward(self, inputs: dict[str, Tensor], adapters: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The model's outputs, and those of the taps."""
        found = self._signature.run(self._mode.caller(self.model, adapters or {}), inputs)
        if not self._tapped:
            return found
        taken = dict(self._tapped)
        self._tapped.clear()
        return {**found, **taken}

    def call(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
        """Keyword arguments of `forward` to trace it with, and their dynamic axes."""
        kwargs = {"inputs": dict(self._signature.inputs)}
        shapes: dict[str, Any] = {"inputs": {n: dict(self._signature.shapes.get(n, {})) for n in kwargs["inputs"]}}
        if given := self._mode.inputs(self._signature):
            kwargs["adapters"], shapes["adapters"] = given, self._mode.shapes(self._signature)
        return kwargs, shapes if any(axes for part in shapes.values() for axes in part.values()) else None

    def _tap(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                # A copy: two outputs of a graph cannot be one value.
                self._tapped.setdefault(name, output.clone())

        return hook


def onnx_program(module: Exportable, outputs: tuple[str, ...], opset: int) -> Any:
    """The ``torch.onnx.ONNXProgram`` of a model, its parameters under their own names, not optimised.

    Raises:
        ExportError: it cannot be exported; with the module and the reason, where they can be told.
    """
    kwargs, shapes = module.call()
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                kwargs=kwargs,
                input_names=[name for part in kwargs.values() for name in part],
                output_names=list(outputs),
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                optimize=False,  # oftfx.onnx.optimize does it
                verbose=False,
            )
    except Exception as error:
        with quiet():
            reason = blame(module, kwargs, shapes, error)
        raise ExportError(f"{type(module.model).__name__} cannot be exported: {reason}") from error
    initializers = program.model.graph.initializers
    for name, value in list(initializers.items()):
        if name.startswith(PREFIX):
            del initializers[name]
            value.name = name.removeprefix(PREFIX)
            initializers[value.name] = value
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals; what matters raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
