"""Whether what a user gives is a model, and what to do where it is something else that looks like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.errors import AdapterError


def check_given(model: Any) -> None:
    """Refuse what is no model, or one that another library has taken over.

    Raises:
        AdapterError: it is a `FoldResult`, a path, a model of PEFT, or no module at all; the message says what to pass.
    """
    if isinstance(model, nn.Module):
        if any(c.__name__ == "PeftModel" and c.__module__.startswith("peft") for c in type(model).__mro__):
            raise AdapterError(
                f"this is PEFT's own {type(model).__name__}, whose layers are PEFT's; save its adapter, "
                "model.save_pretrained(directory), and load that into the base: oftfx.load_adapter(base, directory)"
            )
        return
    if type(model).__name__ == "FoldResult" and isinstance(getattr(model, "model", None), nn.Module):
        raise AdapterError("this is the result of a fold; the folded model is its .model")
    if isinstance(model, (str, Path)):
        raise AdapterError(
            f"got {str(model)!r}, expected a model; load it first, with from_pretrained of its class, say"
        )
    raise AdapterError(f"got a {type(model).__name__}, expected a torch.nn.Module")
