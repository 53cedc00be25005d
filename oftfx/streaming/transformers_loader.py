"""transformers' way from a checkpoint's tensors to a model's layers and back, for some layers at a time.

Verified against transformers 5.23 and 5.24; what is used of it that is not public is in this file alone.
"""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.errors import FoldError, MissingExtraError
from oftfx.streaming.directory import CONFIG, CheckpointDirectory
from oftfx.streaming.maps import dtype_of

How = Literal["plain", "format", "model"]
"""How a tensor of the checkpoint becomes one of the model: as it is (renamed at most), as one of several that a format
stores a weight in, or as a part that the loader merges or cuts."""


def meta_model(directory: CheckpointDirectory) -> tuple[Any, Any, torch.dtype]:
    """The model on the meta device with its quantizer's layers, the quantizer or None, and the dtype of its floats.

    Raises:
        MissingExtraError: transformers, or a package that the quantization needs, is not installed.
        FoldError: transformers does not know the model.
    """
    try:
        import transformers
        from transformers.quantizers.auto import get_hf_quantizer
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"Folding {directory.path}") from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(directory.path)
    except (ValueError, OSError, KeyError) as error:
        raise FoldError(f"{directory.path / CONFIG}: transformers cannot make the model of it: {error}") from error
    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise FoldError(
            f"{directory.path / CONFIG}: architectures names {name or 'nothing'}, which is no class of transformers; "
            "load such a model by its own code and use oftfx.load_adapter, oftfx.fold and FoldResult.save"
        )
    try:
        quantizer, config, _ = get_hf_quantizer(config, None, {"": "cpu"}, True, {})
    except ImportError as error:
        raise FoldError(f"{directory.path}: a package of its quantization is missing: {error}") from error
    dtype = getattr(config, "dtype", None) or _first_float(directory)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if quantizer is not None:
        dtype = quantizer.update_dtype(dtype)
    files = [str(directory.path / s.file) for s in directory.shards]
    with torch.device("meta"):
        model: Any = kind._from_config(config, dtype=dtype)
        if quantizer is not None:
            options = {"device_map": {"": "cpu"}, "checkpoint_files": files, "use_kernels": False}
            quantizer.preprocess_model(model=model, dtype=dtype, **options)
            model.hf_quantizer = quantizer
    return model.eval(), quantizer, dtype


def _first_float(directory: CheckpointDirectory) -> torch.dtype:
    known = (dtype_of(t) for t in directory if t.dtype in ("F64", "F32", "F16", "BF16"))
    return next(known, torch.float32)


@dataclass(frozen=True)
class Naming:
    """Where the tensors of a checkpoint go.

    Attributes:
        renamed: by their name in the checkpoint, the name in the model.
        how: what becomes of each.
        mapping: transformers' conversions.
    """

    renamed: Mapping[str, str]
    how: Mapping[str, How]
    mapping: tuple[Any, ...]

    @classmethod
    def of(cls, model: Any, quantizer: Any, directory: CheckpointDirectory) -> Naming:
        """As the loader names them."""
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        mapping = get_model_conversion_mapping(model, None, quantizer)
        renamings = [m for m in mapping if isinstance(m, loading.WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, loading.WeightConverter)]
        bare = get_model_conversion_mapping(model, None, None)
        merging = {p for m in bare if isinstance(m, loading.WeightConverter) for p in m.source_patterns}
        state, prefix = model.state_dict(), model.base_model_prefix
        renamed, how = dict[str, str](), dict[str, How]()
        for stored in directory:
            name = stored.name
            new, pattern = loading.rename_source_key(name, renamings, converters, prefix, state)
            plain, _ = loading.rename_source_key(name, renamings, [], prefix, state)
            if new not in state and name in state:
                new, pattern = loading.rename_source_key(name, [], [], prefix, state)
            renamed[name] = new
            how[name] = "plain" if pattern is None or new == plain else "model" if pattern in merging else "format"
        return cls(renamed, how, tuple(mapping))


def make_buffers(model: Any) -> None:
    """Make the buffers that no checkpoint has (of rotary positions, say) real, as ``from_pretrained`` does.

    Raises:
        FoldError: the model's class does not say what is in one.
    """
    for module in model.modules():
        names = [n for n in module._non_persistent_buffers_set if getattr(module._buffers.get(n), "is_meta", False)]
        made = [_initialized(model, module, names, value) for value in (0, 1)] if names else []
        for name in names:
            if not torch.equal(*(each[name] for each in made)):  # it was not written, or is drawn
                raise FoldError(
                    f"{type(module).__name__}: transformers does not say what is in its {name!r}, which no checkpoint "
                    "has; load the model and use oftfx.fold"
                )


@torch.no_grad()
def _initialized(model: Any, module: nn.Module, names: list[str], before: int) -> dict[str, Tensor]:
    """What a model writes into buffers that are full of a number."""
    for name in names:
        buffer: Any = module._buffers[name]
        module._buffers[name] = torch.full(buffer.shape, before, dtype=buffer.dtype, device="cpu")
    model._init_weights(module)
    return {name: module._buffers[name] for name in names}  # type: ignore[misc]


def load(holder: Any, state: Mapping[str, Tensor], naming: Naming, quantizer: Any, dtype: torch.dtype) -> None:
    """Fill the layers in a holder with a checkpoint's tensors, in the checkpoint's names."""
    from transformers import core_model_loading as loading
    from transformers.modeling_utils import LoadStateDictConfig

    options = LoadStateDictConfig(
        device_map={"": "cpu"}, dtype=dtype, hf_quantizer=quantizer, weight_mapping=list(naming.mapping)
    )
    with quiet():
        info, _ = loading.convert_and_load_state_dict_in_model(
            model=holder, state_dict=dict(state), load_config=options
        )
        wrong = [*map(str, info.mismatched_keys), *info.unexpected_keys, *map(str, info.conversion_errors.items())]
        if wrong:
            raise FoldError(f"transformers cannot load {next(iter(state))} and what belongs to it: {wrong[0]}")
        if quantizer is not None:
            kept = holder.config.quantization_config
            quantizer.postprocess_model(holder)
            holder.config.quantization_config = kept


def tensors_of(holder: Any, quantizer: Any, *, merged: bool) -> dict[str, Tensor]:
    """What a checkpoint has of the layers in a holder; with ``merged`` in the names of the file it was filled from."""
    from transformers import core_model_loading as loading

    state: dict[str, Tensor] | None = None
    if quantizer is not None:
        state, _ = quantizer.get_state_dict_and_metadata(holder)
    if state is None:
        state = holder.state_dict()
    return loading.revert_weight_conversion(holder, state) if merged else state


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and remarks of loaders: there would be one for each layer."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    loggers = [logging.getLogger(n) for n in ("transformers", "gptqmodel", "compressed_tensors")]
    levels = [one.level for one in loggers]
    theirs.disable_progress_bar()
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        if shown:
            theirs.enable_progress_bar()


@contextmanager
def short_collections() -> Iterator[None]:
    """Objects that are there now are no garbage: gptqmodel collects after every layer, and looks at all of them."""
    if gc.get_freeze_count():  # somebody has done so, and may want them to stay so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def ties(model: Any) -> dict[str, str]:
    """Names of the model's weights that others hold as well: the one that is given up, and the one that is kept."""
    found = getattr(model, "all_tied_weights_keys", None)
    return dict(found) if isinstance(found, dict) else {}


def may_lack(model: Any, name: str) -> bool:
    """Whether the model does without a tensor of that name in its checkpoint."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(p, name) for p in patterns)


def module_path(model: nn.Module, name: str) -> str:
    """Path of the module that a tensor of a ``state_dict`` belongs to."""
    path = name.rpartition(".")[0]
    while path:
        try:
            model.get_submodule(path)
        except AttributeError:
            path = path.rpartition(".")[0]
        else:
            return path
    return path
