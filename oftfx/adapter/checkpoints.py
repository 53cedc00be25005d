"""How a folded model's own weights get into a directory and back: by transformers, by hqq, or as a state_dict."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter.fixed_rotations import SavesRotations
from oftfx.adapter.gptq_state import as_published
from oftfx.adapter.mxfp4_state import as_mxfp4, on_grid
from oftfx.errors import AdapterFileError, FoldError, MissingExtraError
from oftfx.folding.checkpoint import ROTATION
from oftfx.folding.report import FoldReport
from oftfx.formats.base import WeightFormat
from oftfx.formats.registry import format_of
from oftfx.model.huggingface import can_except
from oftfx.model.structure import replace_module, structural_copy
from oftfx.placement.find import rotated_sites

Facts = Mapping[str, Any]
"""What a reader has to know besides the files, as JSON."""


ONLY = "only"
"""The fact that names the only program which reads a directory."""


class Checkpoint(ABC):
    """One way to write a model's weights and to read them again; rotations in front of them do not count."""

    name: ClassVar[str]
    rotations_inside: ClassVar[bool] = False
    """Whether what it writes has the rotations in it, so that no file of theirs is to stand beside it."""

    @classmethod
    @abstractmethod
    def takes(cls, model: nn.Module) -> bool:
        """Whether this is the way for ``model``."""

    @abstractmethod
    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:
        """Write into an empty directory.

        Raises:
            FoldError: what is written could not be read again.
        """

    @abstractmethod
    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """The model. One that is given was loaded by the caller, or is to be filled; see `Plain`."""


class Hqq(Checkpoint):
    """Models that hqq quantized itself: it writes and reads them, and no config says how."""

    name = "hqq"
    _FILE = "qmodel.pt"

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """Marked by hqq, and not by transformers; with float layers only it is transformers' again."""
        marked = bool(getattr(model, "hqq_quantized", False)) and _quantization(model) is None
        return marked and bool(quantized_layers(model))

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:  # noqa: ARG002
        """``qmodel.pt`` and ``config.json``."""
        dtypes = {str(m.compute_dtype) for m in quantized_layers(model).values()}
        if len(dtypes) > 1:
            raise FoldError(f"hqq reads all layers of a model with one compute_dtype; this one has {sorted(dtypes)}")
        bare = structural_copy(model)
        for _, placement in [*rotated_sites(bare)]:
            placement.drop()  # hqq leaves out layers that have children
        _hqq().save_quantized(bare, str(directory))
        return {"compute_dtype": dtypes.pop().removeprefix("torch.")}

    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """With the dtype it had, on a GPU where there is one."""
        if model is not None:
            return model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, facts["compute_dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise AdapterFileError(f"{directory}: compute_dtype is {facts['compute_dtype']!r}, expected a torch dtype")
        check_pickled(directory / self._FILE)
        known = {"device": device, "compute_dtype": dtype}
        return _hqq().from_quantized(str(directory), **{**known, **options}).eval()


class Transformers(Checkpoint):
    """``save_pretrained`` and ``from_pretrained``."""

    name = "transformers"

    @classmethod
    def takes(cls, model: nn.Module) -> bool:
        """By the class it descends from; nothing is imported."""
        classes = type(model).__mro__
        return any(c.__name__ == "PreTrainedModel" and c.__module__ == "transformers.modeling_utils" for c in classes)

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:
        """Checkpoint, configuration, generation configuration."""
        config = _quantization(model)
        if (layers := quantized_layers(model)) and config is None:
            raise FoldError(
                f"{next(iter(layers))} is quantized, but the configuration of {type(model).__name__} does not say so, "
                "and from_pretrained would put a float layer there. Load the base with quantization_config=..., or "
                "fold with quantized='float'"
            )
        floats = _float_sites(report)
        if layers and floats and not can_except(config):
            raise FoldError(
                f"{floats[0]} became a float layer among quantized ones, which a {type(config).__name__} cannot say, "
                "so from_pretrained would not find its weight. Fold all layers with quantized='float', or none"
            )
        published = as_published(model)
        if on_grid(report):
            with as_mxfp4(model) as state:
                return self.write_as(published, directory, state_dict=state, **_WITHOUT_REVERSE)
        try:
            unread = config is None and _was_dequantized(model)
            return self.write_as(published, directory, **_WITHOUT_REVERSE if unread else {})
        except NotImplementedError:
            # Of a model that was read from a quantized file, transformers cannot undo what it did while reading.
            return self.write_as(published, directory, **_WITHOUT_REVERSE)

    def write_as(self, model: Any, directory: Path, **options: Any) -> Facts:
        """By its own ``save_pretrained``, past ours, which writes rotations as well."""
        own = vars(model).get("save_pretrained")
        save: Any = own.write if isinstance(own, SavesRotations) else model.save_pretrained
        save(str(directory), **options)
        return {"class": type(model).__name__}

    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """By the class that the configuration names."""
        if model is not None:
            return model
        if ONLY in facts:
            raise AdapterFileError(f"{directory} was saved for {facts[ONLY]}; load_folded does not read it")
        try:
            transformers: Any = import_module("transformers")
        except ImportError as error:
            raise MissingExtraError("transformers", "hf", f"Reading {directory}") from error
        maker: Any = getattr(transformers, facts["class"], None)
        if not _is_class(maker, transformers.PreTrainedModel):
            raise AdapterFileError(
                f"{directory}: transformers has no model {facts['class']}; load the model with its own "
                "from_pretrained and pass it: oftfx.load_folded(directory, model)"
            )
        with _no_load_report():
            loaded, found = maker.from_pretrained(
                directory, output_loading_info=True, **{"use_safetensors": True, "local_files_only": True, **options}
            )
        wrong = [n for n in found["unexpected_keys"] if not ROTATION.search(n)]
        wrong += [*found["missing_keys"], *map(str, found["mismatched_keys"])]
        if wrong:
            raise AdapterFileError(
                f"{directory}: {facts['class']}.from_pretrained did not find the model that was saved: {wrong[0]}"
                + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
            )
        return loaded.eval()


class Plain(Checkpoint):
    """Any other module: its ``state_dict``, which fills a module of the same making.

    A layer that the fold made a float one is exchanged there as well. Layers that do not take all of their weight from
    a state_dict are found out by the numbers that they have afterwards.
    """

    name = "state_dict"
    _FILE = "model.safetensors"

    @classmethod
    def takes(cls, model: nn.Module) -> bool:  # noqa: ARG003
        """Every model."""
        return True

    def write(self, model: nn.Module, report: FoldReport, directory: Path) -> Facts:
        """``model.safetensors``."""
        from safetensors.torch import save_file

        state = {k: v for k, v in model.state_dict().items() if not ROTATION.search(k)}
        if foreign := [k for k, v in state.items() if not isinstance(v, Tensor)]:
            raise FoldError(f"{foreign[0]} of the state_dict is a {type(state[foreign[0]]).__name__}, not a tensor")
        taken: set[int] = set()
        tensors: dict[str, Tensor] = {}
        for name, value in state.items():
            tensor = value.detach().cpu().contiguous()
            place = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if place in taken else tensor  # two names of a file's tensors share nothing
            taken.add(place)
        save_file(tensors, directory / self._FILE, metadata={"format": "pt"})
        digests = {name: _weight_digest(layer) for name, layer in quantized_layers(model).items()}
        return {"class": type(model).__name__, "floats": _float_sites(report), "quantized": digests}

    def read(self, directory: Path, facts: Facts, model: nn.Module | None, options: dict[str, Any]) -> nn.Module:
        """Fill ``model``."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if model is None or options:
            raise AdapterFileError(
                f"{directory} holds the state_dict of a {facts.get('class')}: make one and pass it, "
                "oftfx.load_folded(directory, model), and nothing else"
            )
        try:
            state = load_file(directory / self._FILE)
        except (SafetensorError, KeyError, OSError) as error:
            raise AdapterFileError(f"{directory / self._FILE} is damaged or not there: {error}") from None
        layers = quantized_layers(model)
        parts = {name: _taken(state, name) for name in layers}
        apart = {path: _taken(state, path) for path in self._apart(facts, model)}
        self._check_apart(model, apart, facts, directory)
        self._check(model, state, [*layers, *apart], directory)
        self._fill(model, apart, facts, directory)
        model.load_state_dict(state, strict=False)
        try:
            for name, layer in layers.items():
                if name in facts["floats"]:
                    made = _format(layer).float_module(layer, parts[name]["weight"])
                    made.load_state_dict(parts[name])
                    replace_module(model, layer, made)
                else:
                    _format(layer).load_state(layer, parts[name])
                    if _weight_digest(layer) != facts["quantized"].get(name):
                        raise AdapterFileError(
                            f"{directory}: {name}: this {type(layer).__name__} lacks the weight that was saved. "
                            "Its package does not put all of it into the state_dict; fold with quantized='float'"
                        )
        except AdapterFileError:
            raise
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise AdapterFileError(f"{directory}: {name} does not take what was saved of it: {error}") from None
        return model

    def _apart(self, facts: Facts, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        """Paths of parameters that are not filled by ``load_state_dict``."""
        return ()

    def _check_apart(
        self, model: nn.Module, parts: Mapping[str, dict[str, Tensor]], facts: Facts, directory: Path
    ) -> None:
        """Whether the model takes them, before anything changes."""

    def _fill(self, model: nn.Module, parts: Mapping[str, dict[str, Tensor]], facts: Facts, directory: Path) -> None:
        """Put them in."""

    def _check(self, model: nn.Module, state: dict[str, Tensor], apart: list[str], directory: Path) -> None:
        """Names, shapes and dtypes of all the others, before anything changes."""
        inside = tuple(f"{name}." for name in apart)
        here = {k: v for k, v in model.state_dict().items() if k not in apart and not k.startswith(inside)}
        if odd := sorted(set(here) ^ set(state)):
            side = "the model" if odd[0] in here else "the file"
            raise AdapterFileError(f"{directory}: {odd[0]} is only in {side}; is it another model?")
        for name, tensor in state.items():
            if (tensor.shape, tensor.dtype) != (here[name].shape, here[name].dtype):
                raise AdapterFileError(
                    f"{directory}: {name} is {tuple(tensor.shape)} {tensor.dtype} in the file, "
                    f"{tuple(here[name].shape)} {here[name].dtype} in the model"
                )


def _taken(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """What a state_dict has of a module or parameter, taken out; a parameter's own value under the empty name."""
    own = [k for k in state if k == path or k.startswith(f"{path}.")]
    return {k[len(path) + 1 :]: state.pop(k) for k in own}


_WITHOUT_REVERSE = {"save_original_format": False}


def _was_dequantized(model: nn.Module) -> bool:
    """Whether transformers made floats of a quantized file while reading it.

    It would write them under the names of the codes (transformers 5.23, gpt-oss: ``down_proj_blocks``), and not find
    them again.
    """
    conversions = vars(model).get("_weight_conversions") or ()
    steps = (step for c in conversions for step in getattr(c, "operations", ()))
    return any(type(step).__name__.endswith("Dequantize") for step in steps)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of lossy formats by path."""
    found = ((n, m, format_of(m)) for n, m in model.named_modules())
    return {n: m for n, m, f in found if f is not None and not f.lossless}


def _hqq() -> Any:
    try:
        from hqq.models.hf.base import AutoHQQHFModel
    except ImportError as error:
        raise MissingExtraError("hqq", "hqq", "A model that hqq quantized") from error
    return AutoHQQHFModel


def _is_class(value: object, above: type) -> bool:
    return isinstance(value, type) and issubclass(value, above)


def check_pickled(file: Path) -> None:
    """Let a pickle that hqq wrote hold tensors and plain values only, whatever the package would do with others.

    ``qmodel.pt`` is hqq's own file, written by ``torch.save``, and no other program has its numbers. torch's reader of
    weights makes no object but those that a table of its own lists, and runs nothing; hqq reads the file the same way
    from 0.2.8 on, of which an older one, or a changed one, need not know.

    Raises:
        AdapterFileError: it is not there, damaged, or asks for anything else.
    """
    try:
        torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # zip files, pickles and storages each have their own
        raise AdapterFileError(
            f"{file} is not read: it is damaged, or a pickle that asks for more than tensors and could run any program "
            f"({type(error).__name__}); save the model again by a program that you trust"
        ) from None


def _format(layer: nn.Module) -> WeightFormat:
    found = format_of(layer)
    if found is None:
        raise FoldError(f"no known weight format reads this {type(layer).__name__} any more")
    return found


def _quantization(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "quantization_config", None)


def _float_sites(report: FoldReport) -> list[str]:
    return [s.fqn for s in report if s.action == "dequantized"]


def _weight_digest(layer: nn.Module) -> str:
    weight = _format(layer).dequantize(layer).detach().cpu().contiguous()
    return hashlib.sha256(weight.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Not the warning that the rotations in a checkpoint can be ignored; what else it says is looked at here."""

    def chosen(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{n}") for n in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(chosen)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(chosen)
