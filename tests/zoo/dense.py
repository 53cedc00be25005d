"""What a rotated model is by definition: the base model with rotated weights, in dense differentiable algebra.

Shares no code with the library. Each rotation is written out as one dense matrix in float64, each weight is multiplied
by it, and ``torch.func.functional_call`` runs an untouched copy of the base model on the products.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn


def rotation(skew: torch.Tensor, size: int) -> torch.Tensor:
    """The whole rotation ``(n, n)``, ``n = blocks * size``; each block is ``R = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4``.

    ``skew (blocks, size (size - 1) / 2)`` has the strictly upper triangle of each ``Q``, row by row. This series is the
    default of `oftfx.OFT`.
    """
    row, column = torch.triu_indices(size, size, 1)
    upper = skew.new_zeros(skew.shape[0], size, size).index_put(
        (torch.arange(skew.shape[0])[:, None], row, column), skew
    )
    q = upper - upper.mT
    square = q @ q
    blocks = torch.eye(size, dtype=skew.dtype) + 2 * q + 2 * square + 2 * square @ q + square @ square
    return torch.block_diag(*blocks)


def rotated(
    weight: torch.Tensor, r: torch.Tensor, kind: str, *, transposed: bool = False, groups: int = 1
) -> torch.Tensor:
    """The weight that does to ``x`` what the layer does to ``x @ r``; an embedding's own output is rotated.

    Args:
        weight: as the layer stores it.
        r: ``(n, n)``, n the length of the rotated axis.
        kind: of the site.
        transposed: whether the weight is ``(..., in, out)``.
        groups: of a transposed convolution; each group of input channels is rotated alike.
    """
    if kind == "embedding":
        return weight @ r
    if kind == "conv_transpose":
        return torch.cat([(r @ part.flatten(1)).reshape(part.shape) for part in weight.chunk(groups)])
    if kind.startswith("conv") and kind != "conv1d_gpt2":
        return (weight.flatten(1) @ r.T).reshape(weight.shape)
    if kind == "conv1d_gpt2" or transposed:
        return r @ weight
    assert kind in ("linear", "functional", "experts"), kind
    return weight @ r.T


class Reference:
    """The base model with the weights that a plan and its skews mean.

    Args:
        base: the model before it was transformed; it is copied.
        plan: what is rotated.
        skews: name to value of each trainable parameter of the rotations; only the values are used.
    """

    def __init__(self, base: nn.Module, plan: Any, skews: Mapping[str, torch.Tensor]) -> None:
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.plan = plan
        self.skews = {k: v.detach().double().requires_grad_() for k, v in skews.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Every rotated weight under its name; weights that are tied in the base model part here."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        result = {}
        for entry in self.plan:
            name = parameter_name(entry.site, parameters)
            owner = self.model.get_submodule(name.rpartition(".")[0])
            weight = result.get(name, parameters[name].double())
            r = rotation(self.skews[skew_name(entry.site, self.skews)], entry.block_size)
            transposed = bool(getattr(owner, "is_transposed", False))
            if entry.site.kind == "functional":  # as it is multiplied; only a square one does not show which way
                transposed = weight.shape[-1] != r.shape[0] or entry.site.layout.stored == "columns"
            groups = getattr(owner, "groups", 1)
            product = rotated(weight, r, entry.site.kind, transposed=transposed, groups=groups)
            result[name] = product.to(parameters[name].dtype)
        return result

    def __call__(self, **inputs: Any) -> Any:
        """Run the model on the rotated weights."""
        return torch.func.functional_call(self.model, self.weights(), kwargs=inputs, tie_weights=False)


def parameter_name(site: Any, parameters: Mapping[str, torch.Tensor]) -> str:
    """The parameter of a site: its path names the parameter itself, or the module that has it."""
    return site.fqn if site.fqn in parameters else f"{site.fqn}.{getattr(site, 'parameter', 'weight')}"


def skew_name(site: Any, skews: Mapping[str, torch.Tensor]) -> str:
    """The trainable parameter of a site: below ``<module>.oft``, or ``<module>.oft_<parameter>`` for other weights."""
    parameter = getattr(site, "parameter", "weight")
    module, child = site.fqn, "oft"
    if parameter != "weight":
        module, child = site.fqn.removesuffix(parameter), f"oft_{parameter}"
    prefix = f"{module.rstrip('.')}.{child}.".lstrip(".")
    found = [n for n in skews if n.startswith(prefix)]
    assert len(found) == 1, f"{site.fqn}: its rotation could be any of {found}"
    return found[0]
