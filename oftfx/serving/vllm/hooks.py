"""What is replaced in vLLM: how a directory is read, how an adapter is checked, and the classes of the layers."""

from __future__ import annotations

import difflib
from functools import wraps
from typing import Any

import torch

from oftfx.errors import AdapterFileError, OftfxError
from oftfx.serving.vllm.contract import named
from oftfx.serving.vllm.layers import Turns, room_for, turning
from oftfx.serving.vllm.turns import Turn, is_oft, read_turns

_MARK = "oftfx_turns"
"""Attribute of what vLLM hands on of an OFT adapter: its rotations."""


def install() -> None:
    """Replace it, in this process."""
    room_for()  # a server that cannot say for what it has room does not start
    _read_directories()
    _build_adapters()
    _check_adapters()
    _turn_layers()
    _mend_transforms()


def install_refusal(why: str) -> None:
    """Where the rest does not fit: an OFT adapter is an error that says so, never the base model."""
    helper = named("vllm.lora.peft_helper:PEFTHelper")
    own = getattr(helper, "from_local_dir", None)
    if own is None:
        return

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        if is_oft(lora_path):
            raise ValueError(why)
        return own.__func__(cls, lora_path, *args, **kwargs)

    helper.from_local_dir = classmethod(from_local_dir)


def _read_directories() -> None:
    helper = named("vllm.lora.peft_helper:PEFTHelper")
    own = helper.from_local_dir.__func__

    @wraps(own)
    def from_local_dir(cls: Any, lora_path: str, max_position_embeddings: int | None) -> Any:
        if not is_oft(lora_path):
            return own(cls, lora_path, max_position_embeddings)
        try:
            turns = read_turns(lora_path)
        except OftfxError as error:
            raise ValueError(str(error)) from error  # which a server answers with, and goes on
        made = cls(r=1, lora_alpha=1, target_modules=sorted(turns))
        setattr(made, _MARK, turns)
        return made

    helper.from_local_dir = classmethod(from_local_dir)


def _build_adapters() -> None:
    model, weights = named("vllm.lora.lora_model:LoRAModel"), named("vllm.lora.lora_weights:LoRALayerWeights")
    own = model.from_local_checkpoint.__func__

    @wraps(own)
    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, **options: Any
    ) -> Any:
        turns: dict[str, Turn] | None = getattr(peft_helper, _MARK, None)
        if turns is None:
            return own(cls, lora_dir, expected_lora_modules, peft_helper, **options)
        mapper, made = options.get("weights_mapper"), {}
        for site, turn in turns.items():
            path = site if mapper is None else mapper._map_name(f"{site}.weight").removesuffix(".weight")
            made[path] = weights(path, 1, 1, turn.blocks, torch.zeros(1, 1))
            setattr(made[path], _MARK, turn)
        number = options.get("lora_model_id") or named("vllm.lora.utils:get_lora_id")()
        result = cls(number, 1, made)
        setattr(result, _MARK, True)
        return result

    model.from_local_checkpoint = classmethod(from_local_checkpoint)


def _check_adapters() -> None:
    worker = named("vllm.lora.worker_manager:WorkerLoRAManager")
    own = worker._load_adapter

    @wraps(own)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        adapter = own(self, lora_request)
        if getattr(adapter, _MARK, False):
            fit(adapter, self._adapter_manager, f"{lora_request.lora_name} ({lora_request.lora_path})")
        return adapter

    worker._load_adapter = _load_adapter


def fit(adapter: Any, manager: Any, where: str) -> None:
    """Bring every rotation into the form of the layer that is to keep it, before any of them is there.

    Raises:
        ValueError: a layer that the server does not have or cannot turn, or a rotation that does not fit.
    """
    layers = dict(manager.modules)
    for whole, parts in manager.packed_modules.items():
        if whole in manager.modules:
            # Seen here, an adapter that a layer joins in another way is refused before it has a slot.
            fits = getattr(manager.modules[whole], "n_slices", 0) == len(parts)
            layers |= dict.fromkeys(parts, manager.modules[whole] if fits else None)
    for path, weights in adapter.loras.items():
        layer = layers.get(path)
        if not isinstance(layer, Turns):
            kind = "is not a layer of this server's model" if path not in layers else f"is a {type(layer).__name__}"
            if path in layers and layer is None:
                kind = "is in a layer that vLLM makes of other parts"
            close = difflib.get_close_matches(path, layers, 1)
            nearest = f"; nearest: {close[0]}" if close and path not in layers else ""
            raise ValueError(f"OFT adapter {where}: {path} {kind}, and cannot be turned here{nearest}")
        try:
            weights.lora_a = layer.fitted(getattr(weights, _MARK), manager.lora_config.lora_dtype)
        except AdapterFileError as error:
            raise ValueError(f"OFT adapter {where}: {path}: {error}") from error
        delattr(weights, _MARK)


def _mend_transforms() -> None:
    """Let a CPU apply the transforms of compressed-tensors, in which rotations that stay can be saved.

    vLLM 0.32 multiplies there by an attribute that it gives to layers and not to transforms, and stops with an
    ``AttributeError``. Other devices do not ask for it.
    """
    transform = named("vllm.model_executor.layers.quantization.compressed_tensors.transform.module:HadamardTransform")
    if transform is not None and not hasattr(transform, "cpu_linear"):
        transform.cpu_linear = staticmethod(torch.nn.functional.linear)


def _turn_layers() -> None:
    utils = named("vllm.lora.utils")
    linear = named("vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA")
    utils._all_lora_classes = tuple(turning(c) if issubclass(c, linear) else c for c in utils._all_lora_classes)
