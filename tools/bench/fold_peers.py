"""What people do today: PEFT's own merge into a quantized base, and GPTQ by gptqmodel after merging in floats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from oftfx.formats.gptq import make_gptq
from oftfx.model.structure import replace_module

GROUP = 64


def merged_by_peft(model: nn.Module, adapter: Path) -> nn.Module:
    """A quantized base with PEFT's own merge of an adapter; raises what PEFT raises."""
    from peft import PeftModel

    for layer in model.modules():  # bitsandbytes' CPU repacking off: PEFT's merge would read garbage otherwise
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    wrapped = PeftModel.from_pretrained(model, str(adapter)).eval()
    wrapped.merge_adapter()
    return wrapped


def merged_in_floats(model: nn.Module, adapter: Path) -> nn.Module:
    """A float model with an adapter, merged by PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()  # type: ignore[operator]


class _Stop(Exception):  # noqa: N818
    """The first layer has been reached."""


@torch.no_grad()
def gptq(model: nn.Module, layers: nn.ModuleList, batches: list[dict[str, Any]]) -> nn.Module:
    """Round the Linears of a float model in place, by the class `GPTQ` of gptqmodel and in its order: a layer after the
    other, each for the inputs that it gets from those before it as they are rounded."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise _Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch)
        except _Stop:
            continue
    handle.remove()
    for layer in layers:
        solvers = {m: _solver(m) for m in layer.modules() if type(m) is nn.Linear}
        handles = [m.register_forward_hook(_feed(solver)) for m, solver in solvers.items()]
        for args, kwargs in calls:
            layer(*args, **kwargs)
        for each in handles:
            each.remove()
        for module, solver in solvers.items():
            replace_module(model, module, _packed(module, solver))
        for index, (args, kwargs) in enumerate(calls):
            found = layer(*args, **kwargs)
            calls[index] = ((found[0] if isinstance(found, tuple) else found, *args[1:]), kwargs)
    return model.eval()


def _solver(linear: nn.Linear) -> Any:
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    options = {"desc_act": False, "sym": False, "act_group_aware": False, "offload_to_disk": False}
    config = QuantizeConfig(bits=4, group_size=GROUP, **options)
    solver = GPTQ(NamedModule(linear, name="linear", full_name="linear", layer_index=0), config)
    solver.quantizer.configure(perchannel=True)
    return solver


def _feed(solver: Any) -> Any:
    return lambda module, args, out: solver.add_batch(args[0], out, batch_index=0)  # noqa: ARG005


def _packed(linear: nn.Linear, solver: Any) -> nn.Module:
    """A layer of gptqmodel, packed by the package."""
    weight, scale, zero, index, *_ = solver.quantize()
    plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    plain.weight.data = weight.float()
    if linear.bias is not None:
        plain.bias.data = linear.bias.detach().clone()
    layer: Any = make_gptq(plain.requires_grad_(False), bits=4, group_size=GROUP)
    layer.pack_original(plain, scale, zero, index)
    return layer.train(linear.training)
