"""What a fold does to quantized weights: policies by name, by site, or by an error budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oftfx.errors import FoldError
from oftfx.folding.arrived import Arrived
from oftfx.model.site import Site

POLICIES = ("keep", "requantize", "calibrate", "reference", "float")


@dataclass(frozen=True)
class Budget:
    """For each site the first policy that is good enough; the last one otherwise.

    Updates are often of a percent, so an ``error`` of two percent would allow to lose them whole: ``survival`` measures
    against the update. Both together: both have to hold.

    Args:
        error: largest relative error. Of the layer's output on the calibration inputs where there are any,
            ``|X (W_folded - W')^T| / |X W'^T|``; else of the weight, ``|W_folded - W'| / |W'|``.
        survival: smallest share of the update that arrives, in the output or the weight as above; see `SiteFold`.
        policies: tried in this order; the last one is taken as it is. ``"calibrate"`` is passed over without
            calibration inputs.

    Raises:
        FoldError: an unknown policy, none, neither bound, or one that is out of range.

    Examples:
        >>> import oftfx, torch
        >>> from oftfx.formats import format_named
        >>> base = torch.nn.Sequential(format_named("bnb8").make_tiny(66, 10))
        >>> model = oftfx.transform(base, {"*": oftfx.OFT(3, init="normal")})
        >>> budgets = [oftfx.Budget(error) for error in (1e-1, 1e-6)]
        >>> [site.action for budget in budgets for site in oftfx.fold(model, quantized=budget).report]
        ['requantized', 'kept']
        >>> [site.action for site in oftfx.fold(model, quantized=oftfx.Budget(survival=0.9)).report]
        ['requantized']
    """

    error: float | None = None
    policies: tuple[str, ...] = ("requantize", "calibrate", "keep")
    survival: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))
        if self.error is None and self.survival is None:
            raise FoldError("Budget: give survival=, a share of the update, or error=, of the whole weight or output")
        if self.error is not None and (not isinstance(self.error, (int, float)) or not self.error > 0):
            raise FoldError(f"Budget: error={self.error!r} is not a number > 0")
        if self.survival is not None and (not isinstance(self.survival, (int, float)) or not 0 < self.survival <= 1):
            raise FoldError(f"Budget: survival={self.survival!r} is not a share in (0, 1]")
        if not self.policies:
            raise FoldError("Budget: no policies to choose from")
        for policy in self.policies:
            check_policy(policy, "Budget")

    def allows(self, got: Arrived) -> bool:
        """Whether what has arrived is enough."""
        error = got.error if got.output_error is None else got.output_error
        survival = got.survival if got.output_survival is None else got.output_survival
        return (self.error is None or error <= self.error) and (self.survival is None or survival >= self.survival)


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
