"""What a fold does to quantized weights: policies by name, by site, or by an error budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oftfx.errors import FoldError
from oftfx.model.site import Site

POLICIES = ("keep", "requantize", "calibrate", "reference", "float")


@dataclass(frozen=True)
class Budget:
    """For each site the first policy whose relative error is small enough; the last one otherwise.

    Args:
        error: largest relative error. Of the layer's output on the calibration inputs where there are any,
            ``|X (W_folded - W')^T| / |X W'^T|``; else of the weight, ``|W_folded - W'| / |W'|``.
        policies: tried in this order; the last one is taken as it is. ``"calibrate"`` is passed over without
            calibration inputs.

    Raises:
        FoldError: an unknown policy, none, or an error that is not positive.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> budgets = [oftfx.Budget(error) for error in (1e-1, 1e-6)]
        >>> [site.action for budget in budgets for site in oftfx.fold(model, quantized=budget).report]
        ['requantized', 'kept']
    """

    error: float
    policies: tuple[str, ...] = ("requantize", "calibrate", "keep")

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if not isinstance(self.error, (int, float)) or not self.error > 0:
            raise FoldError(f"Budget: error={self.error!r} is not a number > 0")
        if not self.policies:
            raise FoldError("Budget: no policies to choose from")
        for policy in self.policies:
            check_policy(policy, "Budget")


Policy = str | Budget | Callable[[Site], "str | Budget"]


def check_policy(policy: object, where: str) -> None:
    """Refuse what is no policy.

    Raises:
        FoldError: it names the ones there are.
    """
    if isinstance(policy, Budget):
        return
    if policy not in POLICIES:
        raise FoldError(f"{where}: got {policy!r}, expected a Budget or one of {', '.join(POLICIES)}")


def choices(policy: str | Budget) -> tuple[str, ...]:
    """The policies that may be applied."""
    return policy.policies if isinstance(policy, Budget) else (policy,)
