"""vLLM's layers with LoRA, made to turn their input first: each token by the rotation of its request."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from oftfx.errors import AdapterFileError
from oftfx.serving.vllm.turns import Turn

BLOCK_SIZE = "OFTFX_VLLM_BLOCK_SIZE"


def room_for() -> tuple[int, ...]:
    """The sizes of blocks that a server has room for, from its environment.

    Raises:
        ValueError: they are no such sizes.
    """
    text = os.environ.get(BLOCK_SIZE, "32")
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{BLOCK_SIZE}={text!r}: sizes of blocks, 32 or 32,72")
    return sizes


def block_of(width: int, sizes: Sequence[int]) -> int:
    """The size of the blocks in which a layer of ``width`` inputs keeps rotations: all that divide it fit in."""
    return math.lcm(*(size for size in sizes if width % size == 0))


class Turns:
    """In front of a layer class with LoRA: ``y = layer(x R)`` for tokens whose adapter is OFT.

    Slots are vLLM's: adapter ``i`` of the layer's stacked LoRA weights is row ``i`` of the blocks, and the last row is
    the identity, of the base model and of LoRA adapters. No shape depends on the requests where code is compiled or
    captured, so a replayed graph is right for other requests.

    Attributes:
        turns: ``(slots + 1, slices, blocks, b, b)`` of this rank's inputs.
        room: ``b``.
        alike: for each slot, whether its slices turn alike.
        turning: for each slot, whether it has a rotation; ``adding``: whether it has a LoRA.
        silent: while LoRA adds nothing.
    """

    base_layer: Any
    n_slices: int
    output_slices: tuple[int, ...]
    punica_wrapper: Any
    device: torch.device
    input_size: int
    tp_rank: int

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """And room for rotations, all the identity."""
        # On a CPU vLLM 0.32 takes the slot of a token without an adapter, -1, for the last one, and gives requests of
        # the base model its LoRA once every slot is taken (tried without this plugin). A slot more is never taken.
        spare = 1 if self.device.type == "cpu" else 0
        super().create_lora_weights(max_loras + spare, lora_config, model_config)  # type: ignore[misc]
        width = self.whole_width
        self.room = block_of(width, room_for())
        if self.input_size % self.room:
            raise ValueError(
                f"a tensor-parallel rank has {self.input_size} of a layer's {width} inputs, no whole blocks of "
                f"{self.room}; set {BLOCK_SIZE} to a size that divides them"
            )
        self.unturned = torch.eye(self.room, dtype=lora_config.lora_dtype, device=self.device)
        self.turns = self.unturned.repeat(max_loras + 1, self.n_slices, self.input_size // self.room, 1, 1)
        self.alike = [True] * (max_loras + 1)
        self.turning, self.adding = ([False] * (max_loras + 1) for _ in range(2))
        self.silent = False
        # Sharded LoRA, and one on a stream of its own, do not go through `_apply_lora_to_output`.
        self.adds_lora_here = not (lora_config.fully_sharded_loras or getattr(self, "_enable_aux_cuda_stream", False))

    @property
    def whole_width(self) -> int:
        """Inputs of the layer, of all ranks."""
        return int(self.base_layer.input_size)

    def fitted(self, turn: Turn, dtype: torch.dtype) -> Tensor:
        """A rotation as it is kept here, all ranks' blocks.

        Raises:
            AdapterFileError: it does not fit.
        """
        return turn.in_blocks_of(self.room, self.whole_width).to(dtype)

    def reset_lora(self, index: int) -> None:
        """The base model in a slot."""
        super().reset_lora(index)  # type: ignore[misc]
        self.turns[index] = self.unturned
        self.alike[index], self.turning[index], self.adding[index] = True, False, False

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter of either kind into a slot; blocks are told from LoRA's matrices by their dimensions."""
        parts = lora_a if isinstance(lora_a, list) else [lora_a]
        if all(part is None or part.dim() != 3 for part in parts):
            self.reset_lora(index)
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
            self.adding[index] = True
            return
        if len(parts) != self.n_slices:
            raise AdapterFileError(f"{len(parts)} rotations for a layer of {self.n_slices} parts")
        self.reset_lora(index)
        here = self.turns.shape[2]
        first = self.tp_rank * here if here * self.room != self.whole_width else 0
        for place, blocks in enumerate(parts):
            if blocks is not None:
                self.turns[index, place].copy_(blocks[first : first + here])
        self.alike[index] = bool((self.turns[index] == self.turns[index, :1]).all())
        self.turning[index] = True

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with what turns in front of it, once for each way in which its parts turn."""
        apply = super().apply  # type: ignore[misc]
        rows = x.flatten(0, -2)
        if rows.device.type != "cpu" or torch.compiler.is_compiling():
            turned, alike, has_lora = *self._static(rows), True
        else:
            turned, alike, has_lora = self._sorted(rows)
        if alike:
            with self._silent(not has_lora):
                return apply(turned(0).view_as(x), bias)
        # LoRA's tokens are not turned, so its part is the same for every product and is added to them all at once;
        # where vLLM adds it in another way, each product has it, and keeps its own columns of it.
        at_once = not torch.compiler.is_compiling() and self.adds_lora_here
        with self._silent(at_once):
            whole = [apply(turned(part).view_as(x), bias) for part in range(self.n_slices)]
        made = torch.cat([w.split(self.output_slices, -1)[part] for part, w in enumerate(whole)], -1)
        return self._apply_lora_to_output(x, made) if at_once and has_lora else made

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """What LoRA adds; nothing where no request of the batch has one, or somebody else adds it."""
        if self.silent:
            return output
        return super()._apply_lora_to_output(x, output)  # type: ignore[misc]

    @contextmanager
    def _silent(self, silent: bool) -> Iterator[None]:
        if not silent or torch.compiler.is_compiling():
            yield
            return
        self.silent = True
        try:
            yield
        finally:
            self.silent = False

    def _static(self, rows: Tensor) -> tuple[Callable[[int], Tensor], bool]:
        """Every slot turns every token, and each token takes its own: nothing depends on the requests."""
        index = self.punica_wrapper._token_lora_indices[: len(rows)]

        def turned(part: int) -> Tensor:
            made = rows
            for slot in range(len(self.turns) - 1):
                made = torch.where((index == slot).unsqueeze(1), _product(rows, self.turns[slot, part]), made)
            return made

        return turned, self.n_slices == 1

    def _sorted(self, rows: Tensor) -> tuple[Callable[[int], Tensor], bool, bool]:
        """Each slot turns its own tokens; and whether a slot of the batch has a LoRA."""
        slots = tokens_of(self.punica_wrapper, len(rows))
        tokens = {slot: at for slot, at in slots.items() if self.turning[slot]}

        def turned(part: int) -> Tensor:
            made = rows
            for slot, at in tokens.items():
                blocks = self.turns[slot, part]
                if len(at) == len(rows):
                    return _product(rows, blocks)
                made = made.index_copy(0, at, _product(rows.index_select(0, at), blocks))
            return made

        alike = self.n_slices == 1 or all(self.alike[slot] for slot in tokens)
        return turned, alike, any(self.adding[slot] for slot in slots)


def tokens_of(wrapper: Any, count: int) -> dict[int, Tensor]:
    """The tokens of each slot in the batch, without those of the base model; looked up once a batch."""
    index: Tensor = wrapper._token_lora_indices
    key = None if index.is_inference() else (index._version, count)
    known = vars(wrapper).get(_TOKENS)
    if key is not None and known is not None and known[0] == key:
        return known[1]
    index = index[:count]
    found = {s: (index == s).nonzero().squeeze(1) for s in index.unique().tolist() if s >= 0}
    setattr(wrapper, _TOKENS, (key, found))
    return found


_TOKENS = "oftfx_tokens"


def _product(rows: Tensor, blocks: Tensor) -> Tensor:
    """``rows @ blockdiag(blocks)``, ``(tokens, n)``, in the dtype of the blocks."""
    count, size = blocks.shape[:2]
    parts = rows.to(blocks.dtype).view(-1, count, size).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).reshape(rows.shape).to(rows.dtype)


def turning(cls: type) -> type:
    """A layer class with LoRA that turns its input as well; it keeps its name, which vLLM asks for."""
    return type(cls.__name__, (Turns, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
