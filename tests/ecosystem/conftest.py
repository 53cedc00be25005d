"""A base model and its transformed twin with random rotations."""

from __future__ import annotations

import pytest

import oftfx
from oftfx import OFT
from tests.reference import randomize


@pytest.fixture
def rotated(tiny_llama):
    """``(base, model)``: a tiny Llama and the same one with a random rotation in front of every linear layer."""

    def make(share=False, std=0.1, dtype=None, **changes):
        base = tiny_llama(**changes)
        base = base if dtype is None else base.to(dtype)
        return base, randomize(oftfx.transform(base, {"all-linear": OFT(16, share_input=share)}), std=std)

    return make


@pytest.fixture
def _accelerate_state():
    """Accelerate keeps its configuration in singletons; each test starts without them."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
