"""A rotated weight belongs to one call: nothing else ever reads it, and nothing of it stays."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT
from oftfx.placement.calls import Parameters
from oftfx.placement.find import rotated_sites
from tests.reference import randomize, rel


class Layer(nn.Conv2d):
    """Calls a function in the middle of its forward."""

    between = None

    def forward(self, x):
        first = super().forward(x)
        if self.between is not None:
            self.between(self)
        assert torch.equal(super().forward(x), first)
        return first


def make():
    torch.manual_seed(0)
    base = nn.Sequential(Layer(4, 4, 3, padding=1)).eval().requires_grad_(False)
    return base, randomize(oftfx.transform(base, {"*": OFT(6)}), std=0.3).eval(), torch.randn(1, 4, 5, 5)


def is_clean(model):
    weight = dict(model.named_parameters())["0.weight"]
    return model[0].weight is weight and "weight" not in vars(model[0])


def test_a_call_inside_a_call_has_its_own_adapters():
    base, model, x = make()
    oftfx.add_adapter(model, "second", {"*": OFT(6)})
    randomize(model, std=0.3, seed=1)
    expected = {}
    with torch.no_grad():
        for name in ("default", "second", None):
            oftfx.set_adapter(model, name)
            expected[name] = model(x)
        assert torch.equal(expected[None], base(x))
        found = {}

        def again(layer):
            layer.between = None
            for name in ("second", None, "default"):
                oftfx.set_adapter(model, name)
                found[name] = layer(x)

        oftfx.set_adapter(model, "default")
        model[0].between = again
        found["outer"] = model(x)
    assert torch.equal(found.pop("outer"), expected["default"])
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert rel(expected["default"], expected["second"]) > 1e-2
    assert is_clean(model)


class Stop(BaseException):
    """What torch's hooks are not told of, like KeyboardInterrupt."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("place", ["forward", "inner call", "later hook"])
def test_an_exception_leaves_nothing(error, place):
    base, model, x = make()
    layer = model[0]

    def fail(*_):
        raise error

    def inner(module):
        module.between = fail
        with pytest.raises(error):
            module(x)

    handle = layer.register_forward_pre_hook(fail) if place == "later hook" else None
    layer.between = {"forward": fail, "inner call": inner}.get(place)
    with torch.no_grad():
        if place == "inner call":
            model(x)
        else:
            with pytest.raises(error) as raised:
                model(x)
            assert raised.traceback  # whose frames are still there
        assert is_clean(model)
        layer.between = None
        if handle is not None:
            handle.remove()
        with oftfx.disable_adapters(model):
            assert torch.equal(model(x), base(x))
        after = model(x)
        assert is_clean(model)
        assert rel(after, base(x)) > 1e-2
        assert rel(oftfx.fold(model).model(x), after) < 2e-6


def test_others_meet_the_parameter_also_during_a_call():
    _, model, x = make()
    weight, seen = model[0]._parameters["weight"], []

    def look(layer):
        seen.append(layer.weight)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied.weight, weight)
        for found in (
            layer._parameters["weight"],
            dict(layer.named_parameters())["weight"],
            layer.get_parameter("bias"),
        ):
            assert type(found) is nn.Parameter
        assert layer._parameters["weight"] is weight
        assert torch.equal(layer.state_dict()["weight"], weight)

    model[0].between = look
    with torch.no_grad():
        model(x)
    assert rel(seen[0], weight) > 1e-2
    assert is_clean(model)


def test_a_shallow_copy_of_a_layer_reads_what_its_own_call_makes():
    _, model, x = make()
    with torch.no_grad():
        assert torch.equal(copy.copy(model[0])(x), model(x))


def test_a_layer_without_rotations_is_as_it_was():
    base, model, x = make()
    assert type(model[0]._parameters) is Parameters
    freed = copy.deepcopy(model)
    oftfx.remove_adapter(freed, "default")
    for plain in (oftfx.fold(model).model, freed):
        assert type(plain[0]._parameters) is dict
        assert list(plain.state_dict()) == list(base.state_dict())
    again = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        plain_dict = again[0]._parameters = dict(again[0]._parameters)  # as some tools do that copy modules
        assert torch.equal(again(x), model(x))
    assert again[0]._parameters.keys() == plain_dict.keys()


def test_weights_of_one_layer_are_given_back_one_by_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, q, k, v):
            return self.attention(q, k, v)

    model = oftfx.transform(Net(), {"*": OFT(2)})
    parameters = model.attention._parameters
    assert set(parameters.owners) == {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    for number, (_, placement) in enumerate(list(rotated_sites(model))):
        placement.drop()
        left = {p.parameter for _, p in rotated_sites(model) if p.module is model.attention}
        assert set(getattr(model.attention._parameters, "owners", ())) == left, number
    assert type(model.attention._parameters) is dict


class Checkpointed(nn.Module):
    """Reads two weights in a part that is run again in backward."""

    reentrant = None

    def __init__(self):
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(16, 16)), nn.Linear(16, 16)

    def part(self, x):
        return F.linear(F.linear(x, self.w).tanh(), self.inner.weight)

    def forward(self, x):
        return self.part(x) if self.reentrant is None else checkpoint(self.part, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_a_reader_has_the_gradients_of_the_plain_forward(reentrant):
    torch.manual_seed(0)
    x = torch.randn(6, 16, requires_grad=True)
    base = nn.Sequential(Checkpointed()).requires_grad_(False)
    model = randomize(oftfx.transform(base, {"*": OFT(4)}, example_inputs=(x,)), std=0.2)
    found = []
    for mode in (None, reentrant):
        model[0].reentrant = mode
        loss = model(x).square().sum()
        worker = ThreadPoolExecutor(1)  # where there is a device, its own thread runs backward
        worker.submit(loss.backward).result()
        found.append([t.grad.clone() for t in (x, *oftfx.adapter_parameters(model))])
        for tensor in (x, *oftfx.adapter_parameters(model)):
            tensor.grad = None
    assert len(found[0]) == 3
    assert all(rel(a, b) < 1e-6 for a, b in zip(*found[:2], strict=True))
    with oftfx.disable_adapters(model):
        for each in (model, base):
            each(x).square().sum().backward()
            found.append(x.grad)
            x.grad = None
    assert torch.equal(*found[2:])


def test_a_checkpoint_inside_a_reader_and_dropout_are_refused():
    x = torch.randn(6, 16, requires_grad=True)
    model = oftfx.transform(nn.Sequential(Checkpointed()), {"*": OFT(4, dropout=0.5)}, example_inputs=(x,)).train()
    model[0].reentrant = False
    with pytest.raises(oftfx.OftfxError, match="around the module"):
        model(x).square().sum().backward()


@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_that_is_compiled_without_its_hooks_is_refused(where):
    class Compiled(nn.Conv2d):
        forward = torch.compile(nn.Conv2d.forward, backend="eager") if where == "class" else nn.Conv2d.forward

    model = oftfx.transform(nn.Sequential(Compiled(4, 4, 3)), {"*": OFT(6)})
    if where == "instance":
        model[0].forward = torch.compile(model[0].forward, backend="eager")
    with pytest.raises(oftfx.OftfxError, match="compile the module"):
        model(torch.randn(1, 4, 5, 5))
