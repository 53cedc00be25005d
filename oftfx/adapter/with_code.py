"""Quantized bits and the rotations in front of them in one checkpoint, with the code that rotates.

The weights are compressed-tensors' (`as_compressed`), the code is ``modeling_rotated.py`` beside them, by transformers'
``auto_map``. vLLM's Transformers backend builds a model by such code and replaces its linear layers by its own, the
quantized ones included; whoever serves it says so with ``--trust-remote-code``. oftfx is not needed there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.as_compressed import Compressed, as_compressed
from oftfx.adapter.checkpoints import ONLY, Facts, quantized_layers
from oftfx.adapter.kept_blocks import blocks_in_front
from oftfx.errors import FoldError
from oftfx.folding.report import FoldReport

CODE = "modeling_rotated.py"
_COPIED = Path(__file__).with_name("copied") / CODE


class WithCode(Compressed):
    """compressed-tensors whose layers have names of their own under a rotation."""

    rotations_inside = True

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:  # noqa: ARG002
        """Checkpoint, configuration, generation configuration, code."""
        classes = _classes(model)
        blocks = blocks_in_front(model, quantized_layers(model))
        made, state = as_compressed(model)
        facts = self.write_as(made, directory, state_dict=_renamed(state, blocks))
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config["architectures"] = [f"Rotated{classes['AutoModelForCausalLM']}"]
        config["auto_map"] = {auto: f"{_COPIED.stem}.Rotated{name}" for auto, name in classes.items()}
        config["rotations"] = {path: [[*b.shape[:2]] for b in found] for path, found in blocks.items()}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        own = "\n".join(f'Rotated{name} = rotating("{name}")' for name in classes.values())
        (directory / CODE).write_text(f"{_COPIED.read_text(encoding='utf-8')}\n\n{own}\n", encoding="utf-8")
        return {**facts, ONLY: "vLLM (and transformers, by AutoModelForCausalLM with trust_remote_code=True)"}


def _classes(model: Any) -> dict[str, str]:
    """Classes of transformers by what loads them.

    Raises:
        FoldError: the code could not build on them, or vLLM not run them.
    """
    kind = type(model).__name__
    known = type(model).__module__.startswith("transformers.models.") and kind.endswith("ForCausalLM")
    if not known or model.config.get_text_config() is not model.config or hasattr(model.config, "auto_map"):
        raise FoldError(
            f"{kind} is no language model of transformers itself, on which the code beside the weights could build. "
            "Serve base and adapter with the plugin (see the guide on vLLM), or fold with another policy than 'keep'"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise FoldError(
            f"the attention of {kind} cannot be exchanged, so vLLM's Transformers backend does not run it. Serve base "
            "and adapter with the plugin (see the guide on vLLM), or fold with another policy than 'keep'"
        )
    return {"AutoModel": type(model.base_model).__name__, "AutoModelForCausalLM": kind}


def _renamed(state: dict[str, Tensor], blocks: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The layers under their rotations."""
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path, _, own = name.rpartition(".")
        made[f"{path}.layer.{own}" if path in blocks else name] = tensor
    for path, found in blocks.items():
        for place, each in enumerate(found):  # sites that share a rotation have it each
            made[f"{path}.turn_{place}"] = each.to(torch.float32).clone()
    return made
