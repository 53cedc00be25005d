"""The nearest codes of the rotated weight, computed anew in every forward; gradients go straight through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from oftfx.grids import Codes
from oftfx.placement.aware import Aware, Product
from oftfx.placement.base import Placement
from oftfx.placement.frozen import product_of, together
from oftfx.rotation.autocast import without_autocast
from oftfx.rotation.caching import caching
from oftfx.rotation.frozen import FrozenRotation
from oftfx.rotation.ieee import ieee_products
from oftfx.rotation.module import Rotation
from oftfx.rotation.rotate import rotate


class AwareNearest(Aware):
    """``W_folded = Q(W @ blockdiag(R)^T)``; what `Requantize` and `FromReference` write.

    Gradients go straight through to the rotation, as if it stood in front of the weight that is in effect:
    ``y = x @ blockdiag(R) @ A^T`` with ``A = W_folded @ blockdiag(R)`` held fixed, which is W but for the rounding.
    Those of ``W @ blockdiag(R)^T`` with ``dQ/dW = 1`` train no better (SmolLM2 in NF4, 60 steps) and cost a product of
    the layer's own size more.

    Nothing but codes and scales is kept from one forward to the next, and that in eval mode only.

    Args:
        placement: of the site.
        names: the adapters.
        original: gives the float weight ``(out, in)`` to be rotated instead of the layer's own.

    Source: the straight-through estimator of Bengio, Leonard and Courville, arXiv 1308.3432.
    """

    how = "requantize"
    turns = True

    def __init__(
        self, placement: Placement, names: Sequence[str], original: Callable[[], Tensor] | None = None
    ) -> None:
        super().__init__(placement, names)
        self.original = original
        self._cached: tuple[Any, Codes] | None = None

    def _chain(self) -> list[Rotation | FrozenRotation]:
        return self.__dict__["placement"].in_effect(self.names)

    def _base(self) -> Tensor:
        if self.original is None:
            return self.format.dequantize(self.layer)
        return self.original().to(self._chain()[0].device)

    @staticmethod
    def _seen(tensor: Tensor) -> tuple[int, int]:
        """What tells a stored tensor from another, and from itself after a change."""
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

    def coded(self, inputs: Sequence[Tensor] | None = None) -> Codes:
        """The nearest codes; kept in eval mode while no rotation changes."""
        chain = self._chain()
        states = [r.state() for r in chain]
        stays = None not in states and caching()
        key = (*states, *(self._seen(t) for t in (*self.layer.parameters(False), *self.layer.buffers(False))))
        cached = self._cached
        if stays and cached is not None and cached[0] == key:
            return cached[1]
        with torch.inference_mode(False), torch.no_grad():
            layout = self.format.layout(self.layer)
            base = self._base()
            # Laid out as a fold has them: products of other layouts may differ in their last bits.
            made = product_of(chain) if inputs is None else together([b.contiguous() for b in inputs])
            blocks = [b.to(base.device) for b in made]
            coded = self.format.nearest(layout.turned_now(base, blocks), self.layer)
        self._cached = (key, coded) if stays else None
        return coded

    def inputs(self) -> list[Tensor]:
        """The blocks of each rotation."""
        return [r.matrices() if isinstance(r, Rotation) else r.blocks for r in self._chain()]

    def gradients(self, product: Product, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the blocks of ``x @ R1 @ R2 @ A^T``; neither the base nor a gradient of a weight is needed."""
        dtype = torch.promote_types(product.to_x.dtype, torch.float32)
        with torch.enable_grad(), without_autocast(product.x.device), ieee_products():
            blocks = [b.detach().requires_grad_() for b in inputs]
            turned, to_turned = product.x.to(dtype), product.to_x.to(dtype)
            for each in together(blocks):
                each = each.to(turned)
                turned, to_turned = rotate(turned, each), rotate(to_turned, each.detach())
            return list(torch.autograd.grad(turned, blocks, to_turned))

    def weight(self) -> Tensor:
        """``A R^T + (W_folded - A R^T)`` with the bracket, and A, constants."""
        layout, chain = self.format.layout(self.layer), together(self.inputs())
        with torch.no_grad():
            target = layout.turned_by(self._base(), chain)
            held = folded = self.format.grid(self.layer).values(self.format.nearest(target, self.layer))
            for blocks in chain:  # W_folded R1 R2
                held = layout.turned(held, blocks.transpose(1, 2))
        again = layout.turned_by(held, chain)
        return again + (folded - again).detach()

    def _apply(self, fn: Any, recurse: bool = True) -> AwareNearest:
        self._cached = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}
