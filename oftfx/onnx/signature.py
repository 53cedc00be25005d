"""How a graph's flat, named tensors stand for a call of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from oftfx.errors import ExportError
from oftfx.onnx.inputs import DynamicShapes, flat_outputs, resized


class Signature:
    """What a graph takes and gives: keyword arguments in, the tensors of the result out.

    Attributes:
        inputs: examples, in the order of the graph's inputs.
        shapes: names of the dynamic axes of each input.
    """

    def __init__(self, inputs: Mapping[str, Tensor], shapes: DynamicShapes, vocabulary: int | None = None) -> None:
        self.inputs, self.shapes, self.vocabulary = dict(inputs), shapes, vocabulary

    def run(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call the model; its tensors by their names in the graph."""
        return dict(flat_outputs(model(**inputs), tuple(inputs)))

    def outputs(self, model: Callable[..., Any]) -> tuple[str, ...]:
        """Names of the outputs.

        Raises:
            ExportError: an output is an input, or another output; such a graph has no value of that name.
        """
        found = self.run(model, self.inputs)
        if not found:
            kind = type(model(**self.inputs)).__name__
            raise ExportError(f"the model returns a {kind}, in which no tensor is found; a graph needs an output")
        seen = {id(t): f"input {n}" for n, t in self.inputs.items()}
        for name, tensor in found.items():
            if id(tensor) in seen:
                raise ExportError(
                    f"output {name} is the same tensor as {seen[id(tensor)]}; let the model return a clone"
                )
            seen[id(tensor)] = f"output {name}"
        return tuple(found)

    def fresh(self, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Random inputs whose dynamic axes have these sizes."""
        return resized(self.inputs, self.shapes, sizes, seed, self.vocabulary)

    def comparable(self, name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """The part of an output that means something, and has to be equal, on these inputs."""
        return value

    def sizes(self) -> list[dict[str, int]]:
        """Sizes to check a file at: larger than the example in every axis, and a batch of one."""
        example = {
            name: self.inputs[i].shape[axis]
            for i, axes in self.shapes.items()
            if i in self.inputs
            for axis, name in axes.items()
        }
        if not example:
            return [{}]
        # Each by another number: two axes that are equally long in the example must not have become one in the graph.
        other = {n: s + (1 if n == "batch" else 2 + i) for i, (n, s) in enumerate(example.items())}
        single = {n: 1 if n == "batch" else s for n, s in example.items()}
        return [other, single]

    @property
    def batch(self) -> str | None:
        """Name of the axis of requests: the first dynamic axis 0."""
        return next((axes[0] for axes in self.shapes.values() if 0 in axes), None)

    def rows(self, inputs: Mapping[str, Tensor]) -> int:
        """Length of that axis."""
        name = next(n for n, axes in self.shapes.items() if axes.get(0) == self.batch and n in inputs)
        return inputs[name].shape[0]

    def row(self, inputs: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
        """One request out of a batch."""
        return {
            n: v[index : index + 1] if self.shapes.get(n, {}).get(0, "") == self.batch else v for n, v in inputs.items()
        }
