"""What a compiled eval graph asks for blocks with: operators that no compiler looks into.

The graph has the product of a rotation in it and no Cayley transform. Both operators are what they seem to be,
functions of their arguments: the blocks of a parameter that has not changed since the last call are just not made
again (`kept`). So no graph is compiled anew after a step of an optimiser, layers of one shape share what is compiled,
and a tensor that nobody knows is turned into blocks as ever.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from oftfx.rotation.autocast import product_dtype, without_autocast
from oftfx.rotation.kept import made, may_be_kept, source_of, states_of
from oftfx.rotation.recipe import read_recipe
from oftfx.rotation.rotate import rotate, rotate_apart

_LIBRARY = torch.library.Library("oftfx", "FRAGMENT")
_LIBRARY.define("turned(Tensor x, Tensor[] sources, str[] recipes) -> Tensor[]")
_LIBRARY.define("blocks(Tensor source, str recipe, ScalarType dtype) -> Tensor")


def in_graph(*tensors: Tensor) -> bool:
    """Whether these operators may stand in what is compiled now: in eval graphs, which have no gradient of theirs.

    Not in what is exported, which holds torch's operators only; nor for what stands in a parameter's place
    (`functional_call`, a shard of FSDP) or is packed or differentiated forward.
    """
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    source, *xs = tensors
    return type(source) in (nn.Parameter, Tensor) and not any(x.is_nested for x in xs)


def rotate_in_graph(x: Tensor, source: Tensor, recipe: str) -> Tensor:
    """`rotate` by the blocks of one tensor."""
    return jointly_in_graph(x, [source], [recipe])[0]


def jointly_in_graph(x: Tensor, sources: list[Tensor], recipes: list[str]) -> list[Tensor]:
    """`rotate_jointly` by those of several, of one shape."""
    # Autocast does not know these operators, and lowers products only where it is asked for one.
    turned: list[Tensor] = torch.ops.oftfx.turned.default(x.to(product_dtype(x)), sources, recipes)
    return turned


def blocks_in_graph(source: Tensor, recipe: str) -> Tensor:
    """Blocks ``(blocks, b, b)`` in float32 or wider."""
    wide = torch.promote_types(source.dtype, torch.float32)
    blocks: Tensor = torch.ops.oftfx.blocks.default(source, recipe, wide)
    return blocks


def _kept(tensors: list[Tensor], recipes: list[str], dtype: torch.dtype) -> Tensor:
    # A skew that is no Parameter is a copy of one, or was written to by what is compiled itself.
    if not all(may_be_kept(t) and (not r or type(t) is nn.Parameter) for t, r in zip(tensors, recipes, strict=True)):
        return made(tensors, recipes, dtype)
    first, *others = sources = [source_of(t) for t in tensors]
    kept = first.kept(tuple(others), tuple(recipes), dtype)
    return kept.read(tensors, states_of(sources, tensors), apart=True)


def _turned(x: Tensor, sources: list[Tensor], recipes: list[str]) -> list[Tensor]:
    blocks = _kept(sources, recipes, x.dtype)
    with without_autocast(x.device):
        return [rotate(x, blocks).contiguous()] if len(sources) == 1 else rotate_apart(x, blocks)


def _blocks(source: Tensor, recipe: str, dtype: torch.dtype) -> Tensor:
    return _kept([source], [recipe], dtype).clone()  # a compiler may write into what an operator has given it


_LIBRARY.impl("turned", _turned, "CompositeExplicitAutograd")
_LIBRARY.impl("blocks", _blocks, "CompositeExplicitAutograd")


@torch.library.register_fake("oftfx::turned", lib=_LIBRARY)
def _(x: Tensor, _sources: list[Tensor], recipes: list[str]) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in recipes]


@torch.library.register_fake("oftfx::blocks", lib=_LIBRARY)
def _(source: Tensor, recipe: str, dtype: torch.dtype) -> Tensor:
    made_by = read_recipe(recipe)
    return source.new_empty((made_by.blocks, made_by.block_size, made_by.block_size), dtype=dtype)


@torch.library.register_vmap("oftfx::turned", lib=_LIBRARY)
def _(_info: Any, dims: tuple[Any, ...], x: Tensor, sources: list[Tensor], recipes: list[str]) -> Any:
    turned = jointly_in_graph(x.movedim(dims[0], 0), sources, recipes)
    return turned, [0] * len(turned)
