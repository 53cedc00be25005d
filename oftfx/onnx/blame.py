"""Say which module keeps a model from being exported, and why."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn as nn

_OPERATOR = re.compile(r"<OpOverload\(op='([\w:.]+)', overload='(\w+)'\)>")


def blame(module: nn.Module, kwargs: dict[str, Any], shapes: Any, error: Exception) -> str:
    """Module path, class and reason of a failed export, as far as they can be told.

    Either the program cannot be recorded: then the module whose forward was running is named. Or it can, and one of its
    operators has no translation: then the operator, and the module that calls it.
    """
    running: list[str] = []
    names = {m: n for n, m in module.named_modules()}

    def enter(m: nn.Module, *_: Any) -> None:
        running.append(names[m])

    def leave(*_: Any) -> None:
        running.pop()

    handles = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    try:
        program = torch.export.export(module, (), kwargs, dynamic_shapes=_dimensions(shapes), strict=False)
    except Exception as cause:  # whatever the model's own code raises
        where = running[-1].removeprefix("model").removeprefix(".") if running else ""
        at = f"{where} ({type(module.get_submodule(running[-1])).__name__}): " if where else ""
        return f"{at}{type(cause).__name__}: {_first_lines(cause)}"
    finally:
        for handle in handles:
            handle.remove()
    chain: list[BaseException] = []
    cause_: BaseException | None = error
    while cause_ is not None and cause_ not in chain:
        chain.append(cause_)
        cause_ = cause_.__cause__ or cause_.__context__
    for raised in reversed(chain):
        if found := _OPERATOR.search(str(raised)):
            name = f"{found[1]}.{found[2]}".replace("::", ".")
            return _untranslated(program, name)
    return f"{type(error).__name__}: {_first_lines(error)}"


def _untranslated(program: Any, operator: str) -> str:
    for candidate in (program, program.run_decompositions()):
        for node in candidate.graph.nodes:
            if str(node.target) == operator and (stack := node.meta.get("nn_module_stack")):
                path, kind = list(stack.values())[-1]
                path = path.removeprefix("model").removeprefix(".")
                called = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
                return (
                    f"{path} ({called}) calls {operator}, which ONNX has no operator for"
                    if path
                    else (f"{called} calls {operator}, which ONNX has no operator for")
                )
    return f"it calls {operator}, which ONNX has no operator for"


def _dimensions(shapes: Any) -> Any:
    if shapes is None:
        return None
    return {
        part: {n: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for n, axes in inputs.items()}
        for part, inputs in shapes.items()
    }


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).strip().splitlines()[:3])[:600]
