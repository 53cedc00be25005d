"""Quantized bits and the rotations in front of them as compressed-tensors' transforms, which vLLM applies by itself.

``transform_config`` names for each rotation a scheme and the layers whose input it turns; with ``head_dim`` one block
``b x b`` turns every ``b`` inputs, without it a matrix ``n x n`` turns all of them. vLLM 0.32 divides a stored matrix
by the root of its size, takes one rotation for the layers that it joins (q, k and v; gate and up), and no bias. On a
CPU it lacks an attribute (`HadamardTransform.cpu_linear`), which the plugin of oftfx gives it. transformers 5.24 does
not read transforms.
Source: ``vllm/model_executor/layers/quantization/compressed_tensors/transform`` of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.as_compressed import Compressed, as_compressed
from oftfx.adapter.checkpoints import ONLY, Facts, quantized_layers
from oftfx.adapter.kept_blocks import blocks_in_front, refuse
from oftfx.folding.report import FoldReport

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers under one parent that vLLM computes as one."""
_LARGEST = 2048
"""Inputs of a site whose blocks differ: its matrix has the square of this many numbers, 8 MiB in 16 bits."""
_ADVICE = (
    "fold these with another policy (quantized=lambda site: ...), train them with OFT(block_share=True, "
    "share_input=True), or save with rotations='code', which takes any rotation"
)


class WithTransforms(Compressed):
    """compressed-tensors with a ``transform_config``."""

    rotations_inside = True

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:  # noqa: ARG002
        """Checkpoint, configuration, generation configuration."""
        layers = quantized_layers(model)
        blocks = blocks_in_front(model, layers)
        refuse(_faults(blocks, layers), _ADVICE)
        made, state = as_compressed(model)
        schemes, matrices = _transforms(blocks)
        state.update(matrices)
        made.config.quantization_config["transform_config"] = {"config_groups": schemes}
        return {**self.write_as(made, directory, state_dict=state), ONLY: "vLLM"}


def _faults(blocks: Mapping[str, list[Tensor]], layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why vLLM would not apply a site's rotation."""
    wrong: dict[str, str] = {}
    for path, found in blocks.items():
        others = [other for other in _joined(path) if other in layers]
        width = found[0].shape[0] * found[0].shape[1]
        if apart := [other for other in others if not _same(found, blocks.get(other))]:
            wrong[path] = f"vLLM computes it together with {apart[0]}, which is not rotated in the same way"
        elif getattr(layers[path], "bias", None) is not None:
            wrong[path] = "it has a bias, which vLLM does not add behind a transform"
        elif width > _LARGEST and _one_block(found) is None:
            wrong[path] = f"its blocks differ, and a matrix of {width} x {width} would stand for them"
    return wrong


def _transforms(blocks: Mapping[str, list[Tensor]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Schemes by name, and the tensors that they name; layers that vLLM joins have one scheme."""
    schemes: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[str, ...], str] = {}
    for path, found in blocks.items():
        name = names.setdefault(_joined(path), f"oft{len(names)}")
        block = _one_block(found)
        matrix = _product(found) if block is None else block
        scheme = schemes.setdefault(
            name,
            {
                "type": "random-matrix",
                "head_dim": None if block is None else len(block),
                "apply": [{"location": "input", "targets": []}],
            },
        )
        scheme["apply"][0]["targets"].append(path)
        tensors[f"{path}.{name}_input.weight"] = matrix.float() * len(matrix) ** 0.5
    return schemes, tensors


def _one_block(found: list[Tensor]) -> Tensor | None:
    """The block ``(b, b)`` that turns every part of the input; None where parts differ."""
    if len({each.shape[-1] for each in found}) > 1 or any(not torch.equal(b, b[:1].expand_as(b)) for b in found):
        return None
    product = found[0][0]
    for each in found[1:]:
        product = product @ each[0]
    return product


def _product(found: list[Tensor]) -> Tensor:
    """All of it as one matrix ``(n, n)``."""
    product = torch.block_diag(*found[0])
    for each in found[1:]:
        product = product @ torch.block_diag(*each)
    return product


def _joined(path: str) -> tuple[str, ...]:
    """A layer, or all those that vLLM computes together with it."""
    parent, _, own = path.rpartition(".")
    fellows = next((names for names in _JOINED if own in names), (own,))
    return tuple(f"{parent}.{name}" for name in fellows)


def _same(one: list[Tensor], other: list[Tensor] | None) -> bool:
    return other is not None and len(one) == len(other) and all(map(torch.equal, one, other))
