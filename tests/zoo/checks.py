"""What has to hold for every model: each check measures; `tests/zoo/test_zoo.py` judges."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import oftfx
from oftfx.errors import OftfxWarning
from oftfx.trace.record import record
from tests.reference import randomize, rel
from tests.zoo.architectures import Architecture
from tests.zoo.dense import Reference, parameter_name

RULES = {"*": oftfx.OFT(4, on_indivisible="nearest")}
FOLD, EFFECT = 1e-5, 1e-2
"""A fold may move the outputs by the first; the adapter itself moves them by the second at least."""

RUNGS = ("tree", "analysis", "graph")

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
    nn.MultiheadAttention,
)


def gradient_bound(arch: Architecture) -> float:
    """How far a gradient may be from the reference's: float64 or float32 all through."""
    return 1e-9 if arch.wide else 1e-4


def outputs(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The float tensors of a model's output."""
    leaves = torch.utils._pytree.tree_leaves(model(**inputs))
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


@torch.no_grad()
def results(model: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The same without gradients."""
    return outputs(model, inputs)


def distance(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative difference of two lists of outputs."""
    return max(rel(a, b) for a, b in zip(got, expected, strict=True))


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether two lists of outputs are the same bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def scalar(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One number that depends on every output in its own way; a sum of squares would not see past a normalization."""
    generator = torch.Generator().manual_seed(7)
    return sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in tensors)


def skews(model: nn.Module) -> dict[str, nn.Parameter]:
    """The rotations' parameters by name."""
    ours = {id(p) for p in oftfx.adapter_parameters(model)}
    return {n: p for n, p in model.named_parameters() if id(p) in ours}


@contextmanager
def without_shortcut():
    """Inside, nn.TransformerEncoder computes as its layers say, not in the fused kernel that plain inference takes."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _quiet():
    """Without the warnings of a fold: some layers here are never called, some weights are shared, on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OftfxWarning)
        yield


@dataclass(frozen=True)
class Gradients:
    """Relative error of each skew's gradient, and the skews that the output does not depend on."""

    errors: dict[str, float]
    without_effect: tuple[str, ...]


class Subject:
    """One architecture, transformed at every site of every kind.

    Attributes:
        arch: which.
        base: the model, which nothing may change.
        inputs: for the recording and most checks.
        other: inputs of another size.
    """

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch
        self.base = arch.build()
        self.inputs, self.other = arch.example(), arch.other()
        self.before = results(self.base, self.inputs)
        self.config = _config(self.base)
        self.state = {k: v.clone() for k, v in self.base.state_dict().items()}
        self.modules = [(n, type(m), len(m._forward_pre_hooks)) for n, m in self.base.named_modules()]
        self.trains = [(n, p.requires_grad) for n, p in self.base.named_parameters()]

    @cached_property
    def plan(self) -> oftfx.Plan:
        """What `oftfx.plan` says of the model."""
        return oftfx.plan(self.base, RULES, example_inputs=self.inputs)

    @cached_property
    def model(self) -> nn.Module:
        """The transformed model, its rotations still the identity; checks work on copies."""
        return oftfx.transform(self.base, RULES, example_inputs=self.inputs)

    @cached_property
    def adapted(self) -> nn.Module:
        """A transformed model with random rotations."""
        return randomize(copy.deepcopy(self.model))

    @cached_property
    def executed(self) -> Counter[str]:
        """How often each layer of a kind that can be rotated is called, by hooks of our own on a copy of the base."""
        calls: Counter[str] = Counter()
        model = copy.deepcopy(self.base)
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) or type(module).__name__ == "Conv1D":
                module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        with without_shortcut():
            results(model, self.inputs)
        return calls

    def unaccounted(self) -> list[str]:
        """Layers and raw weights that are neither rotated nor skipped with a reason."""
        named = {e.fqn for e in self.plan} | {s.fqn for s in self.plan.skipped if s.reason}
        missing = [n for n in self.executed if n not in named and not _parts(self.base, n) & named]
        for path, module in self.base.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                whole = f"{path}.{name}".lstrip(".")
                if parameter.dim() in (2, 3) and not {path, whole} & named:
                    missing.append(whole)
        return missing

    def unexpectedly_skipped(self) -> dict[str, str]:
        """What the plan skips although there is an axis to rotate, with its reasons."""
        known = self.arch.skips
        return {s.fqn: s.reason for s in self.plan.skipped if not any(fnmatchcase(s.fqn, g) for g in known)}

    def identity(self) -> bool:
        """Before any training the outputs are the frozen base model's, bit for bit, at both sizes.

        torch takes another kernel for a weight that requires a gradient (where a layer's input is not contiguous), and
        a fused one in nn.TransformerEncoder where no hook is: a frozen copy and no shortcut compare like with like.
        """
        frozen = copy.deepcopy(self.base).requires_grad_(False)
        with without_shortcut():
            return all(equal(results(self.model, i), results(frozen, i)) for i in (self.inputs, self.other))

    def distance_from_base(self) -> float:
        """The same with whatever kernels torch takes: how far apart at most."""
        return max(distance(results(self.model, i), results(self.base, i)) for i in (self.inputs, self.other))

    def gradients(self) -> Gradients:
        """Every skew's gradient against the dense reference; in float64 where the model computes in it."""
        base, inputs = self.base, self.inputs
        if self.arch.wide:
            base = copy.deepcopy(base).double()
            inputs = {k: _double(v) for k, v in inputs.items()}
        model = randomize(oftfx.transform(base, RULES, example_inputs=inputs))
        reference = Reference(base, self.plan, skews(model))
        scalar(outputs(model, inputs)).backward()
        scalar(outputs(reference, inputs)).backward()
        errors, idle = {}, []
        for name, skew in skews(model).items():
            got, expected = skew.grad, reference.skews[name].grad
            if got is None and expected is None:  # a layer that was never called
                continue
            zero = torch.zeros_like(reference.skews[name])
            got, expected = zero if got is None else got, zero if expected is None else expected
            if expected.numel() and not expected.any():
                idle.append(name)
            errors[name] = float((got - expected).norm() / expected.norm().clamp_min(1e-30)) if got.numel() else 0.0
        return Gradients(errors, tuple(idle))

    def distance_from_reference(self) -> float:
        """How far the adapted model is from the dense reference, in float32."""
        reference = Reference(self.base, self.plan, skews(self.adapted))
        return distance(results(self.adapted, self.inputs), results(reference, self.inputs))

    @cached_property
    def folded(self) -> nn.Module:
        """The adapted model, folded."""
        with _quiet():
            return oftfx.fold(self.adapted).model

    def fold_errors(self) -> tuple[float, float]:
        """How far folded is from unfolded: on the example, and on another batch and length."""
        same, other = (distance(results(self.folded, i), results(self.adapted, i)) for i in (self.inputs, self.other))
        return same, other

    def effect(self) -> float:
        """How far the adapter moves the outputs, where it moves them least."""
        pairs = zip(results(self.adapted, self.inputs), self.before, strict=True)
        return min(rel(a, b) for a, b in pairs)

    def graph_error(self) -> float:
        """How far the recorded graph of the adapted model is from the model itself."""
        recorded = record(self.adapted, self.inputs, executable=True)
        return distance(results(recorded.module, self.inputs), results(self.adapted, self.inputs))

    def unfolds(self) -> bool:
        """Unfolding a fold gives the adapted model's outputs back, bit for bit."""
        with _quiet():
            model = oftfx.unfold(oftfx.fold(self.adapted))
        return equal(results(model, self.inputs), results(self.adapted, self.inputs))

    def carries_out(self) -> bool:
        """The plan as JSON, carried out on the base, makes the same model."""
        model = randomize(oftfx.transform(self.base, oftfx.Plan.from_json(self.plan.to_json())))
        return equal(results(model, self.inputs), results(self.adapted, self.inputs))

    def saves(self, directory: Path) -> bool:
        """An adapter that is saved and loaded into a copy of the base computes the same."""
        oftfx.save_adapter(self.adapted, directory, convention="oftfx")
        model = oftfx.load_adapter(copy.deepcopy(self.base), directory)
        return equal(results(model, self.inputs), results(self.adapted, self.inputs))

    def disables(self) -> bool:
        """Without its adapter the model is the frozen base, bit for bit."""
        frozen, model = copy.deepcopy(self.base).requires_grad_(False), copy.deepcopy(self.adapted)
        with without_shortcut(), oftfx.disable_adapters(model):
            return equal(results(model, self.inputs), results(frozen, self.inputs))

    def renamed(self) -> list[str]:
        """Names of the base that are gone, and new ones that do not say what they are."""
        names, old = self.model.state_dict(), self.base.state_dict()
        gone = [n for n in old if n not in names]
        gone += [n for n, _ in self.base.named_parameters() if n not in dict(self.model.named_parameters())]
        strange = [n for n in names if n not in old and ".oft" not in f".{n}"]
        return gone + strange

    def loads_base(self) -> bool:
        """A state_dict of the base loads and counts."""
        model = copy.deepcopy(self.adapted)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.state:
                    parameter.zero_()
        loaded = model.load_state_dict(self.state, strict=False)
        fine = not loaded.unexpected_keys and all(".oft" in f".{n}" for n in loaded.missing_keys)
        return fine and equal(results(model, self.inputs), results(self.adapted, self.inputs))

    def copies_are_independent(self) -> bool:
        """Other rotations in a copy move the copy's outputs and not the original's."""
        before = results(self.adapted, self.inputs)
        other = randomize(copy.deepcopy(self.adapted), seed=3)
        apart = distance(results(other, self.inputs), before) > EFFECT
        return apart and equal(results(self.adapted, self.inputs), before)

    def base_is_untouched(self) -> bool:
        """Structure, values, settings and outputs of the base are what they were before it was transformed."""
        _ = self.folded
        state = self.base.state_dict()
        return (
            self.modules == [(n, type(m), len(m._forward_pre_hooks)) for n, m in self.base.named_modules()]
            and self.trains == [(n, p.requires_grad) for n, p in self.base.named_parameters()]
            and list(state) == list(self.state)
            and all(torch.equal(v, self.state[k]) for k, v in state.items())
            and self.config == _config(self.base)
            and equal(results(self.base, self.inputs), self.before)
        )

    def rotated_parameters(self) -> set[str]:
        """Names of the weights that are rotated."""
        parameters = dict(self.base.named_parameters(remove_duplicate=False))
        return {parameter_name(e.site, parameters) for e in self.plan}

    def coverage(self) -> float:
        """Share of the bytes of all weight matrices that lie in rotated weights; a tied one counts once."""
        named = self.base.named_parameters(remove_duplicate=False)
        parameters = {n: p for n, p in named if p.dim() >= 2 and not n.endswith("bias")}
        sizes = {id(p): p.numel() * p.element_size() for p in parameters.values()}
        rotated = {id(parameters[n]) for n in self.rotated_parameters()}
        return sum(sizes[i] for i in rotated) / sum(sizes.values())


def _parts(model: nn.Module, name: str) -> set[str]:
    """Paths of the parameters of a layer, itself or its children's: a site may be named after one."""
    return {f"{name}.{n}" for n, _ in model.get_submodule(name).named_parameters()}


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", {})
    return copy.deepcopy(dict(config) if isinstance(config, dict) else config.to_dict())


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
