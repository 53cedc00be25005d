import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.streaming import resident
from oftfx.streaming.resident import Resident, room_of


class Net(nn.Module):
    """Layers in a row, in a container that has a parameter of its own."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


@pytest.fixture
def parts(monkeypatch):
    """A model, its twin without weights, what brings these, and who has some."""
    monkeypatch.setattr(resident, "_AROUND", 0)
    torch.manual_seed(0)
    whole = Net(6)
    with torch.device("meta"):
        empty = Net(6)
    brought = []

    def bring(path, layer):
        brought.append(path)
        source = whole.get_submodule(path)
        for name, parameter in source._parameters.items():
            layer._parameters[name] = parameter

    def here():
        return [
            n for n, m in empty.named_modules() if m._parameters and not any(p.is_meta for p in m.parameters(False))
        ]

    return whole, empty, bring, brought, here


def size(layer):
    return sum(p.nbytes for p in layer.parameters(False))


def test_so_many_as_there_is_room_for(parts):
    whole, empty, bring, brought, here = parts
    layers = {n: m for n, m in empty.named_modules() if m._parameters}
    sizes = {n: size(m) for n, m in layers.items()}
    weights = Resident(layers, bring, sizes, 2 * size(whole.layers[0]) + sizes[""])
    seen = []
    for layer in empty.layers:
        layer.register_forward_hook(lambda *_: seen.append(here()))
    x = torch.randn(3, 8)
    assert torch.equal(empty(x), whole(x))
    # The container stays, for its forward is under way.
    assert seen == [["", *(f"layers.{i}" for i in range(max(0, n - 1), n + 1))] for n in range(6)]
    assert torch.equal(empty(x), whole(x))
    assert len(brought) == 1 + 2 * 6  # the last two of a run are not the first of the next
    weights.take(empty.layers[5])
    weights.take(empty.layers[5])
    assert here() == ["", "layers.4"]
    weights.take_all()
    assert here() == []
    assert torch.equal(empty(x), whole(x))


def test_rotations_and_hooks_stay_when_weights_go(parts):
    whole, empty, bring, *_ = parts
    model = oftfx.transform(empty, {"layers.*": OFT(4)})
    for layer in model.layers:
        layer.oft.default.skew = nn.Parameter(torch.full((2, 6), 0.1), requires_grad=False)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    layers = {f"layers.{i}": m for i, m in enumerate(model.layers)} | {"": model}
    weights = Resident(layers, bring, {n: size(m) for n, m in layers.items()}, 1)
    twin = oftfx.transform(whole, {"layers.*": OFT(4)})
    for layer in twin.layers:
        layer.oft.default.skew.data.fill_(0.1)
    x = torch.randn(3, 8)
    for _ in range(2):
        assert torch.allclose(model(x), twin(x))
        weights.take_all()
    assert calls == [1, 1]
    assert sorted(model.state_dict()) == sorted(twin.state_dict())


def test_room_is_that_of_the_largest_repeated_part():
    sizes = {"model.embed": 900, "model.layers.0.q": 10, "model.layers.0.mlp.up": 30, "model.layers.1.q": 50, "head": 7}
    assert room_of(sizes) == 50
    assert room_of({"a": 5}) == 0
