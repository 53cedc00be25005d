"""Whether what a user gives is a model, and what to do where it is something else that looks like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn as nn

from oftfx.errors import AdapterError


def check_given(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        AdapterError: it is a `FoldResult`, a path, or no module at all; the message says what to pass.
    """
    if isinstance(model, nn.Module):
        return
    if type(model).__name__ == "FoldResult" and isinstance(getattr(model, "model", None), nn.Module):
        raise AdapterError("this is the result of a fold; the folded model is its .model")
    if isinstance(model, (str, Path)):
        raise AdapterError(f"got {str(model)!r}, expected a model; load it first, by from_pretrained of its class")
    raise AdapterError(f"got a {type(model).__name__}, expected a torch.nn.Module")


def check_own(model: nn.Module) -> None:
    """Refuse a model that PEFT has put its layers into: rotations would act inside of those.

    Raises:
        AdapterError: it is one.
    """
    if any(c.__name__ == "PeftModel" and c.__module__.startswith("peft") for c in type(model).__mro__):
        raise AdapterError(
            f"this is a {type(model).__name__}: give the base model, which peft_model.unload() returns, or load it "
            "anew. Its adapter, saved by save_pretrained(directory), is read by oftfx.load_adapter(base, directory)"
        )
