"""A copy is recorded: the model's objects stay as they are, and the graph has the model's own tensors."""

import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint

import oftfx
from oftfx import OFT
from oftfx.errors import TraceError, UnrecordableError
from oftfx.trace.record import record, record_best
from tests.reference import randomize, rel

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Watched(nn.Module):
    """Calls ``look`` in the middle of its forward, and does to itself what forwards do."""

    def __init__(self, look, inner=None):
        super().__init__()
        self.a, self.norm, self.inner = nn.Linear(6, 6), nn.BatchNorm1d(6), inner or nn.Identity()
        self.register_buffer("mean", torch.zeros(6))
        self.look, self.mask = look, None

    def forward(self, x):
        self.mask = torch.ones(6)
        self.mean += x.mean(0)
        self.look()
        return self.inner(self.norm(self.a(x * self.mask)))


def elsewhere(function):
    """What another thread sees, which no mode of this one reaches."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def state(model):
    """Every attribute of every module, with the contents of its dictionaries."""
    return [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("how", [{}, {"training": False}, {"fake": False}, {"bare": True}, {"executable": True}])
def test_nothing_of_the_model_or_the_process_changes_even_for_a_moment(how, rotated):
    seen = []
    model = Watched(lambda: seen.append(elsewhere(look))).train()
    if rotated:
        model = randomize(oftfx.transform(model, {"a": OFT(3)}, inplace=True))

    def look():
        values = {k: v.clone() for k, v in model.state_dict().items()} if "fake" in how else {}
        return state(model), nn.Module.__call__, torch.utils.checkpoint.CheckpointFunction.apply, values

    before = look()
    random = torch.get_rng_state()
    recording = record(model, (X,), **how)
    assert recording.rung == ("analysis" if "fake" in how else "graph")
    functions = [getattr(n.target, "__name__", "") for n in recording.graph.nodes]
    assert functions.count("rotate") == (rotated and "bare" not in how)
    for during in (*seen, look()):
        assert during[:3] == before[:3]
        assert all(torch.equal(v, before[3][k]) for k, v in during[3].items())
    assert torch.equal(torch.get_rng_state(), random)
    assert len(seen) == (2 if how.get("executable") else 1)  # a second time, for what it keeps


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("fake", [True, False])
def test_a_quantized_layer_is_not_held_still_itself(fake):
    from oftfx.formats.bnb4 import make_linear4bit

    layer = make_linear4bit(nn.Linear(6, 64))
    seen = []
    model = Watched(lambda: seen.append(state(layer)), layer).eval()
    before, parameter = state(layer), dict(vars(layer.weight))
    record(model, (X,), fake=fake)
    assert seen == [before]
    assert state(layer) == before
    assert vars(layer.weight) == parameter


def test_a_model_that_cannot_be_copied_is_planned_from_its_tree():
    model = Watched(lambda: None).eval()
    model.lock = threading.Lock()
    recording = record_best(model, (X,))
    assert recording.rung == "tree"
    assert "Watched cannot be copied: cannot pickle '_thread.lock' object" in recording.reason
    assert len(oftfx.plan(model, {"a": OFT(3)}, example_inputs=(X,))) == 1
    with pytest.raises(UnrecordableError, match="Remove that attribute"):
        oftfx.graph(model, (X,))


def test_a_module_that_copies_to_itself_is_named():
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    assert "inner is still the same object" in record_best(Watched(lambda: None, Single(6, 6)), (X,)).reason


def test_what_a_lambda_reads_of_the_model_has_its_name():
    class Lambda(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(6, 6), nn.Parameter(torch.full((6,), 2.0))
            self.extra = [nn.Parameter(torch.full((6,), 3.0))]
            self.act = lambda x: x * self.scale

        def forward(self, x):
            return self.act(self.a(x)) + self.extra[0]

    model = Lambda()
    graph = oftfx.graph(model, (X,))
    assert graph.scale is model.scale
    assert graph._constant_0 is model.extra[0]
    assert torch.equal(graph(X), model(X))


def test_a_layer_that_a_lambda_calls_is_not_recorded_as_something_else():
    class Lambda(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.act = lambda x: self.a(x)

        def forward(self, x):
            return self.act(x)

    recording = record_best(Lambda(), (X,))
    assert recording.rung == "tree"
    assert "a.weight is read in Lambda by a function that holds the model itself" in recording.reason
    with pytest.raises(TraceError, match=r"bind it with functools\.partial"):
        oftfx.graph(Lambda(), (X,))
    bound = Lambda()
    bound.act = functools.partial(nn.Linear.forward, bound.a)
    assert record_best(bound, (X,)).rung == "graph"


def wrapped(model):
    """As accelerate does it: the old forward kept, and a partial in its place."""

    def forward(module, *args):
        return module._old_forward(*args) * 2

    model.a._old_forward = model.a.forward
    model.a.forward = functools.update_wrapper(functools.partial(forward, model.a), model.a._old_forward)
    return model


def compiled(model):
    model.a.compile(backend="eager")
    return model


def optimized(model):
    model.a = torch.compile(model.a, backend="eager")
    return model


@pytest.mark.parametrize("change", [wrapped, compiled, optimized, lambda m: torch.compile(m, backend="eager")])
def test_calls_are_seen_whatever_stands_in_the_way(change):
    expected = record(Watched(lambda: None).eval(), (X,))
    recording = record(change(Watched(lambda: None).eval()), (X,))
    assert recording.rung == "graph"
    calls = {n.replace("_orig_mod", "").replace("..", ".").strip("."): c for n, c in recording.calls.items()}
    assert calls == expected.calls
    assert expected.calls["a"] == 1
    assert len(recording.graph.nodes) == len(expected.graph.nodes)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def part(self, h):
        return self.b(h).relu()

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(self.part, self.a(x), use_reentrant=True)
        with torch.no_grad():
            shift = hidden.mean()
        return hidden + shift


# Recorded without gradients as well, where torch says so itself.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpointing_is_looked_through():
    model = Checkpointed().train()
    graph = oftfx.graph(model, (X,))
    switches = [n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "_set_grad_enabled"]
    assert [n.args for n in switches] == [(False,), (True,)]  # of no_grad alone
    graph(X).square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(X).square().sum().backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        assert rel(gradient, parameter.grad) < 1e-6


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("how", ["add_", "augmented", "setitem", "data"])
def test_what_forward_writes_into_a_buffer_does_not_reach_the_model(fake, how):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.register_buffer("n", torch.zeros(6))

        def forward(self, x):
            if how == "add_":
                self.n.add_(1)
            elif how == "augmented":
                self.n += 1
            elif how == "setitem":
                self.n[:3] = 1
            else:
                self.n.data.mul_(2).add_(1)
            return self.a(x) + self.n

    model = Writes().train()
    assert record_best(model, (X,)).rung == "graph"
    recording = record(model, (X,), fake=fake)
    assert recording.rung == ("graph" if fake else "analysis")
    assert torch.equal(model.n, torch.zeros(6))
    assert model.n._version == 0


@pytest.mark.parametrize("how", ["clamp_", "data", "max_norm"])
def test_a_model_that_writes_into_its_parameters_is_not_recorded(how):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.e = nn.Embedding(5, 6, max_norm=0.1 if how == "max_norm" else None)

        def forward(self, x):
            if how == "clamp_":
                with torch.no_grad():
                    self.a.weight.clamp_(-0.01, 0.01)
            elif how == "data":
                self.a.weight.data.mul_(0.5)
            return self.a(x) + self.e(torch.arange(len(x)))

    model = Writes().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recording = record_best(model, (X,))
    if how == "clamp_":
        assert recording.rung == "tree"
        assert "writes into a parameter or a large buffer of the model, (6, 6)" in recording.reason
    else:  # fake tensors have nothing to write into
        assert recording.rung == "graph"
    shape = (5, 6) if how == "max_norm" else (6, 6)
    said = re.escape(f"writes into a parameter or a large buffer of the model, {shape}")
    with pytest.raises(UnrecordableError, match=said):
        record(model, (X,), fake=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
