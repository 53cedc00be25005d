"""Nothing in a training step or a decoded token asks a device for a number, for which a GPU would have to be waited."""

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import OFT
from tests.reference import randomize

WAITS = ("_local_scalar_dense", "_linalg_check_errors", "nonzero", "equal", "is_nonzero", "item")


class NoSync(TorchDispatchMode):
    """Forbids what has to know a number."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        if name in ("_to_copy", "copy_", "index", "lift_fresh"):  # of a list, or from one device to another
            assert not any(type(a) is list and a and not isinstance(a[0], (torch.Tensor, type(None))) for a in args)
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.table, self.conv = nn.Embedding(20, 16), nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.o(torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1) @ self.v(x))


SPECS = {
    "neumann": OFT(4),
    "cayley": OFT(4, parameterization="cayley"),
    "coft": OFT(4, coft_eps=0.5),
    "shared blocks": OFT(4, block_share=True),
    "shared input": OFT(4, share_input=True),
    "dropout": OFT(4, dropout=0.3),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_step_and_a_token(spec):
    tokens = torch.randint(0, 20, (2, 5))
    model = randomize(oftfx.transform(Attention(), {"*": spec}, example_inputs=(tokens,)), std=0.1)
    with NoSync():
        model.train()(tokens).square().sum().backward()
        model.eval()
        with torch.no_grad():
            for length in (5, 1, 1):
                model(tokens[:1, :length])
    assert all(p.grad is not None for p in oftfx.adapter_parameters(model))


@pytest.mark.needs("bitsandbytes")
def test_after_a_fold_that_keeps_the_rotation_nothing_is_cast_again():
    from oftfx.formats import format_named

    layer = format_named("bnb8").make_tiny(64, 16).half()
    model = oftfx.transform(nn.Sequential(layer), {"*": OFT(8, init="normal")})
    folded = oftfx.fold(model, quantized="keep").model.eval()
    rotation = next(m for m in folded.modules() if type(m).__name__ == "FrozenRotation")
    x = torch.randn(1, 64).half()
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "_to_copy":
                casts.append(tuple(args[0].shape))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        first = rotation(x)
        with Casts():
            assert torch.equal(rotation(x), first)
    assert rotation.blocks.dtype == torch.float32
    assert not casts
    rotation.blocks.mul_(2)
    with torch.no_grad():
        assert torch.equal(rotation(x), 2 * first)
        assert torch.equal(rotation(x.float()), rotation(x.float()).clone())
