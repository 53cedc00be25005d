"""Keep a model of compressed-tensors compressed: its own hook would decompress all of it at the first forward."""

from __future__ import annotations

import torch.nn as nn

from oftfx.errors import FormatError
from oftfx.formats.exact import use_exact
from oftfx.formats.packing.compressed_layers import scheme_of
from oftfx.formats.registry import format_named

_HANDLE = "ct_decompress_hook"


def keep_compressed(model: nn.Module, *, strict: bool = True) -> None:
    """Take the hook out of ``model`` and let every compressed layer multiply exactly, rotated or not.

    Args:
        model: changed in place; of a copy the original keeps its hook.
        strict: refuse a model with a compressed module that nothing here reads; otherwise that module cannot run.

    Raises:
        FormatError: there is one; nothing is changed.
    """
    found = [m for m in model.modules() if _HANDLE in vars(m)]
    if not found:
        return
    known = format_named("compressed_tensors")
    quantized = {n: m for n, m in model.named_modules() if (s := scheme_of(m)) is not None and s.weights is not None}
    readable = {n: m for n, m in quantized.items() if known.matches(m) and not known.refuses(m)}
    unread = next((n for n in quantized if n not in readable), None)
    if unread is not None and strict:
        reason = known.refuses(quantized[unread]) if known.matches(quantized[unread]) else None
        raise FormatError(
            f"{unread} is compressed, and {reason or f'no format here reads a {type(quantized[unread]).__name__}'}; "
            "decompress the model first: model.hf_quantizer.compressor.decompress_model(model)"
        )
    for module in found:
        # By its number: the handle in a copied model may still refer to the hooks of the original.
        number = vars(module).pop(_HANDLE).id
        module._forward_pre_hooks.pop(number, None)
        module._forward_pre_hooks_with_kwargs.pop(number, None)
    for module in readable.values():
        if known.native_fault(module) is not None:
            use_exact(module)


def check_not_offloaded(model: nn.Module) -> None:
    """Refuse a model whose parameters are no longer in dictionaries.

    Where accelerate has placed a model (``device_map``), the package's hook also moves all parameters, at the first
    forward, into caches of its own, which give out another object each time.

    Raises:
        FormatError: it is one.
    """
    path = next((n for n, m in model.named_modules() if not isinstance(m._parameters, dict)), None)
    if path is not None:
        kind = type(model.get_submodule(path)._parameters).__name__
        raise FormatError(
            f"the parameters of {path or type(model).__name__} are in a {kind}: a model that accelerate placed "
            "(device_map) was run, and compressed-tensors has moved them. Load it again and use it here before it "
            "runs, or call compressed_tensors.offload.module.remove_module_offload on each of its modules"
        )
