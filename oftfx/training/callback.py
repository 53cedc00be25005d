"""For transformers' Trainer: the adapter beside each checkpoint, so that none has to be taken out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oftfx.adapter.save import save_adapter
from oftfx.errors import MissingExtraError


def adapter_callback(*, adapter: str = "default", convention: str = "peft") -> Any:
    """A ``TrainerCallback`` that writes ``checkpoint-<step>/adapter`` whenever the Trainer saves.

    A checkpoint of the Trainer holds the whole model, and ``from_pretrained`` of it drops the rotations;
    ``oftfx.load_adapter(base, "checkpoint-<step>/adapter")`` does not.

    Args:
        adapter: which adapter.
        convention: as of `oftfx.save_adapter`.

    Returns:
        For ``Trainer(callbacks=[...])``.

    Raises:
        MissingExtraError: transformers is not installed.

    Examples:
        >>> import oftfx
        >>> type(oftfx.adapter_callback()).__mro__[1].__name__
        'TrainerCallback'
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", "A callback for its Trainer") from error

    class AdapterCallback(TrainerCallback):
        """Writes the adapter when the Trainer has written a checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
            if state.is_world_process_zero:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter"
                save_adapter(model, place, adapter=adapter, convention=convention)

    return AdapterCallback()
