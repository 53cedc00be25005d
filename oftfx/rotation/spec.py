"""How a site is rotated: the fields of an `OFT`, and block sizes that divide."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from oftfx.errors import RuleError
from oftfx.rotation.cayley import PARAMETERIZATIONS, Parameterization


@dataclass(frozen=True)
class OFT:
    """How one site is rotated.

    Args:
        block_size: ``b``, the side of each orthogonal block; ``blocks * b == in_features``. 32 where neither this nor
            ``blocks`` is given.
        blocks: number of blocks instead of their size (PEFT's ``r``).
        parameterization: ``"cayley_neumann"`` (series, cheap, orthogonal only near the identity), ``"cayley"``
            (exact), or ``"cayley_neumann_016"`` (what PEFT 0.16 and 0.17 computed). See `oftfx.rotation.cayley`.
        terms: terms of the series.
        block_share: one block of parameters for all blocks of a site.
        coft_eps: constrained OFT: clip the norm of each skew block to ``coft_eps / sqrt(blocks)``.
        dropout: probability that a block is replaced by the identity, drawn for each block in every training forward.
        share_input: sites of one parent module that read the same tensor get one rotation.
        placement: ``"activation"`` rotates what a layer reads, ``"weight"`` the weight it reads it with; ``"auto"`` is
            the better one for each kind of layer. The results are the same; not every site can do both.
        experts: of a layer of experts, ``"shared"``: one rotation for all of them, or ``"each"``: one for every.
        into: ``"producer"``: make the rotation so that `oftfx.fold` can put it into the layer before the site, exactly;
            blocks of grouped heads that read the same rows then share their parameters. See `passes.find_producers`.
        kernel: of a quantized layer, ``"native"``: its package's own forward, ``"exact"``: its dequantized weight;
            ``"auto"`` takes the package's own unless gradients or outputs of it cannot be relied on where the layer is.
        init: ``"identity"`` (skew 0: the model starts unchanged) or ``"normal"`` (std 0.1).
        on_indivisible: ``"error"``, or ``"nearest"``: take the divisor nearest to the size asked for, as PEFT does.

    Raises:
        RuleError: a field is out of range.

    Examples:
        >>> import oftfx
        >>> spec = oftfx.OFT(8, terms=3)
        >>> spec.geometry(24, "head")
        (3, 8)
        >>> spec.to_dict()
        {'block_size': 8, 'terms': 3}
    """

    block_size: int | None = None
    _: KW_ONLY
    blocks: int | None = None
    parameterization: Parameterization = "cayley_neumann"
    terms: int = 5
    block_share: bool = False
    coft_eps: float | None = None
    dropout: float = 0.0
    share_input: bool = False
    placement: Literal["auto", "activation", "weight"] = "auto"
    experts: Literal["shared", "each"] = "shared"
    into: Literal["site", "producer"] = "site"
    kernel: Literal["auto", "native", "exact"] = "auto"
    init: Literal["identity", "normal"] = "identity"
    on_indivisible: Literal["error", "nearest"] = "error"

    def __post_init__(self) -> None:
        if self.block_size is None and self.blocks is None:
            object.__setattr__(self, "block_size", 32)
        if self.block_size is not None and self.blocks is not None:
            raise RuleError(
                f"OFT got both block_size={self.block_size} and blocks={self.blocks}; their product is in_features, "
                "so give one of them"
            )
        self._check("block_size", self.block_size is None or _is_int(self.block_size, 1), "an integer >= 1")
        self._check("blocks", self.blocks is None or _is_int(self.blocks, 1), "an integer >= 1")
        self._check(
            "parameterization",
            self.parameterization in PARAMETERIZATIONS,
            f"one of {list(PARAMETERIZATIONS)}",
        )
        self._check("terms", _is_int(self.terms, 1), "an integer >= 1")
        self._check(
            "coft_eps", self.coft_eps is None or (_is_number(self.coft_eps) and self.coft_eps > 0), "a number > 0"
        )
        self._check("dropout", _is_number(self.dropout) and 0.0 <= self.dropout < 1.0, "a number in [0, 1)")
        self._check("block_share", isinstance(self.block_share, bool), "true or false")
        self._check("share_input", isinstance(self.share_input, bool), "true or false")
        self._check("placement", self.placement in ("auto", "activation", "weight"), '"auto", "activation" or "weight"')
        self._check("experts", self.experts in ("shared", "each"), '"shared" or "each"')
        self._check("into", self.into in ("site", "producer"), '"site" or "producer"')
        self._check("kernel", self.kernel in ("auto", "native", "exact"), '"auto", "native" or "exact"')
        self._check("init", self.init in ("identity", "normal"), '"identity" or "normal"')
        self._check("on_indivisible", self.on_indivisible in ("error", "nearest"), '"error" or "nearest"')

    def _check(self, field: str, fine: bool, expected: str) -> None:
        if not fine:
            raise RuleError(f"OFT: {field}={getattr(self, field)!r} is not {expected}")

    @property
    def asked(self) -> int:
        """The size of blocks, or their number, whichever was given."""
        return next(v for v in (self.blocks, self.block_size) if v is not None)

    def geometry(self, in_features: int, where: str, made_of: str = "") -> tuple[int, int]:
        """``(blocks, block_size)`` for an axis of ``in_features``.

        Args:
            in_features: length of the rotated axis.
            where: module path, for the message.
            made_of: what the axis is, where its length alone does not show it.

        Raises:
            RuleError: the size does not divide ``in_features``; the message lists the divisors.
        """
        asked = self.asked
        if in_features % asked or asked > in_features:
            if self.on_indivisible == "error":
                what = "block_size" if self.blocks is None else "blocks"
                raise RuleError(
                    f"{where}: {what} {asked} does not divide in_features {in_features}{made_of}. Divisors: "
                    f"{', '.join(map(str, divisors(in_features)))}. Choose one, or OFT(on_indivisible='nearest')"
                )
            asked = nearest_divisor(in_features, asked)
        return (in_features // asked, asked) if self.blocks is None else (asked, in_features // asked)

    def to_dict(self) -> dict[str, Any]:
        """Fields that differ from the defaults, and always the size: JSON and TOML friendly."""
        values = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if v is not None and (k == "block_size" or v != defaults[k])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OFT:
        """Inverse of `to_dict`.

        Raises:
            RuleError: an unknown field, with the known ones.
        """
        return cls(**values)


_WORDS = {
    "r": "blocks, their number",
    "oft_block_size": "block_size",
    "module_dropout": "dropout",
    "coft": "coft_eps, a number, which switches it on",
    "eps": "coft_eps",
    "use_cayley_neumann": 'parameterization: "cayley_neumann" or "cayley"',
    "num_cayley_neumann_terms": "terms",
    "target_modules": "the rules: oftfx.transform(model, {name: OFT(...)}), or a list of names",
    "modules_to_save": "oftfx.transform(..., train=[...])",
    "bias": "oftfx.transform(..., train_bias=...)",
    "rank": "blocks or block_size; a rotation has no rank",
    "init_weights": 'init: "identity" or "normal"',
}
"""PEFT's words for fields, and ours."""


def _answering(make: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that answers words of PEFT with ours, instead of saying that it does not know them."""
    known = set(inspect.signature(make).parameters)

    @functools.wraps(make)
    def checked(self: OFT, *arguments: Any, **options: Any) -> None:
        if unknown := sorted(set(options) - known):
            said = f"PEFT's {unknown[0]} is {_WORDS[unknown[0]]} here" if unknown[0] in _WORDS else ""
            fields = ", ".join(f.name for f in dataclasses.fields(OFT))
            raise RuleError(f"OFT has no field {unknown[0]!r}; {said or f'its fields are {fields}'}")
        make(self, *arguments, **options)

    return checked


OFT.__init__ = _answering(OFT.__init__)  # type: ignore[method-assign]


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of ``n`` nearest to ``wanted``; the smaller one of a tie (PEFT's choice)."""
    return min(divisors(n), key=lambda d: (abs(d - wanted), d))
