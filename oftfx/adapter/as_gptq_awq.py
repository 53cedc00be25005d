"""Quantized layers of any format of integers as GPTQ's or AWQ's files hold them, to the bit or not at all.

Both have ``W = (code - zero) * scale`` in groups of columns, one size for all layers, scales in float16. GPTQ:
``qweight`` int32 with codes along the input, ``qzeros`` along the output, ``scales (groups, out)``, ``g_idx (in,)``;
files of version 1 hold ``zero - 1``. AWQ (GEMM): ``qweight (in, words)`` and ``qzeros (groups, words)`` along the
output, eight codes a word in the order 0 2 4 6 1 3 5 7, and no version.
Sources: the formats of https://github.com/AutoGPTQ/AutoGPTQ and https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.checkpoints import Facts, Transformers
from oftfx.adapter.integer_layers import Bare, IntegerLayer, bare_of, integers_of
from oftfx.errors import FoldError
from oftfx.folding.report import FoldReport
from oftfx.formats.packing.words import to_interleaved, to_stream

_SCALES = torch.float16


class _Grouped(Transformers):
    """A model of transformers with its quantized layers in a form that says once for all how they are grouped."""

    form: ClassVar[str]

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:  # noqa: ARG002
        """Checkpoint, configuration, generation configuration."""
        if not self.takes(model):
            raise FoldError(f"a {type(model).__name__} is no model of transformers, which reads {self.form}")
        bare = bare_of(model, self.form)
        found = {path: integers_of(path, layer, self.form) for path, layer in bare.layers.items()}
        bits, group = self._alike(found)
        config, pack = self._said(bare, found, bits, group)
        for path, layer in found.items():
            layer.check(path, _SCALES, self.form)
            bare.state.update({f"{path}.{name}": tensor for name, tensor in pack(layer).items()})
        bare.model.config.quantization_config = config
        return self.write_as(bare.model, directory, state_dict=bare.state)

    def _alike(self, found: dict[str, IntegerLayer]) -> tuple[int, int]:
        """Bits and columns of a group of all layers; -1 where each row is one group."""
        rows = all(layer.group == layer.codes.shape[1] for layer in found.values())
        kinds = {(layer.bits, -1 if rows else layer.group): path for path, layer in found.items()}
        if len(kinds) > 1:
            (one, a), (other, b) = [*kinds.items()][:2]
            raise FoldError(
                f"{a} has {one[0]} bits in groups of {one[1]}, {b} {other[0]} in groups of {other[1]}, and {self.form} "
                "has one of each for a model. Save it as 'compressed-tensors', which has a scheme for each"
            )
        for path, layer in found.items():
            per = 32 // layer.bits
            if any(n % per for n in layer.codes.shape):
                raise FoldError(
                    f"{path} is {tuple(layer.codes.shape)}, and {self.form} puts {per} codes or zeros in a word both "
                    "ways. Save it as 'compressed-tensors'"
                )
        return next(iter(kinds))

    @abstractmethod
    def _said(
        self, bare: Bare, found: dict[str, IntegerLayer], bits: int, group: int
    ) -> tuple[dict[str, Any], Callable[[IntegerLayer], dict[str, Tensor]]]:
        """The quantization config, and how a layer is packed.

        Raises:
            FoldError: the form cannot say it.
        """


class AsGptq(_Grouped):
    """GPTQ, symmetric where every zero of the model is in the middle; version 1 unless a zero is 0."""

    form = "GPTQ"

    def _said(
        self, bare: Bare, found: dict[str, IntegerLayer], bits: int, group: int
    ) -> tuple[dict[str, Any], Callable[[IntegerLayer], dict[str, Tensor]]]:
        head = bare.model.get_output_embeddings()
        plain = [n for n in bare.floats if bare.model.get_submodule(n) is not head]
        if plain:
            raise FoldError(
                f"{plain[0]} is a float layer among quantized ones, which a GPTQ config does not say. Save it as 'awq' "
                "or 'compressed-tensors'"
            )
        less = 0 if any(bool((layer.zeros == 0).any()) for layer in found.values()) else 1
        version = "gptq" if less else "gptq_v2"
        config = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "sym": all(layer.symmetric for layer in found.values()),
            "desc_act": False,
            "checkpoint_format": version,
            "format": version,
        }

        def packed(layer: IntegerLayer) -> dict[str, Tensor]:
            return {
                "qweight": to_stream(layer.codes, bits).T.contiguous(),
                "qzeros": to_stream((layer.zeros.T - less).contiguous(), bits),
                "scales": layer.scales.T.to(_SCALES).contiguous(),
                "g_idx": (torch.arange(layer.codes.shape[1]) // layer.group).to(torch.int32),
            }

        return config, packed


class AsAwq(_Grouped):
    """AWQ in the GEMM packing, 4 bits."""

    form = "AWQ"

    def _said(
        self, bare: Bare, found: dict[str, IntegerLayer], bits: int, group: int
    ) -> tuple[dict[str, Any], Callable[[IntegerLayer], dict[str, Tensor]]]:
        first = next(iter(found))
        if bits != 4:
            raise FoldError(f"{first} has {bits} bits, AWQ has 4; save it as 'gptq' or 'compressed-tensors'")
        if group == -1:
            raise FoldError(
                f"{first}: each row is one group, and AWQ has one number of columns for the groups of all layers; save "
                "it as 'gptq' or 'compressed-tensors'"
            )
        config = {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": bare.floats or None,
        }

        def packed(layer: IntegerLayer) -> dict[str, Tensor]:
            return {
                "qweight": to_interleaved(layer.codes.T.contiguous()),
                "qzeros": to_interleaved(layer.zeros.T.contiguous()),
                "scales": layer.scales.T.to(_SCALES).contiguous(),
            }

        return config, packed
