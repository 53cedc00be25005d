"""What a recording knows of functions that it has run before is what running them again gives."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx.trace.record import record
from oftfx.trace.repeated import Repeated


class Each:
    """In the place of `Repeated`: every function runs."""

    def __init__(self, fakes):
        pass

    def result(self, function, name, args, kwargs):
        return function(*args, **kwargs)


def twice(model, inputs, monkeypatch, **how):
    """The recordings with and without what is known, as (operation, arguments, what is known of the value)."""
    found = []
    for known in (True, False):
        with monkeypatch.context() as patch:
            if not known:
                patch.setattr("oftfx.trace.recorder.Repeated", Each)
            nodes = record(model, inputs, **how).graph.nodes
            found.append([(n.op, str(n.target), str(n.args), str(n.kwargs), n.meta.get("value")) for n in nodes])
    return found


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_model_is_recorded_as_without(kind, gradients, tiny_llama, tiny_bert, ids, monkeypatch):
    model = (tiny_llama if kind == "llama" else tiny_bert)()
    known, run = twice(model, ids(), monkeypatch, gradients=gradients)
    assert len(known) > 80
    assert known == run


class Steps(nn.Module):
    """Calls that repeat, and calls that look as if they did."""

    def __init__(self, casts=True):
        super().__init__()
        self.scale, self.casts = nn.Parameter(torch.rand(6)), casts

    def forward(self, x):
        found = []
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            y = (x * self.scale).to(dtype)  # as it is, the second time as well
            y = y.view(3, 2, -1).transpose(0, 2)
            parts = y.chunk(2, dim=2)
            values, places = y.max(dim=0)
            found += [y, *parts, values, places, F.softmax(y, -1), torch.cat([y, y], 1), y[..., :1], y > 1, -y, y**2]
            with torch.no_grad():
                found += [y * 2, y.expand(2, *y.shape)]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.casts):
                found += [y.flatten(1) @ y.flatten(1).T]
            z = y + 1
            F.relu(z, inplace=True)
            z[0] = 0
            z.mul_(2)
            z.clamp_(min=0).add_(y)
            found += [z, torch.mul(z, 2), z.detach() + 1, z.sum(), z.mean(-1, keepdim=True), torch.ones_like(z)]
        return found


@pytest.mark.parametrize("gradients", [True, False])
def test_every_value_is_like_the_one_of_a_run(gradients, monkeypatch):
    x = torch.randn(3, 2, 6)
    known, run = twice(Steps(), (x,), monkeypatch, gradients=gradients)
    assert known == run
    values = [v for *_, v in known if v is not None]
    with torch.set_grad_enabled(gradients):
        real = Steps()(x)
    seen = {(v.shape, v.dtype, v.requires_grad) for v in values}
    assert all((tuple(t.shape), t.dtype, t.requires_grad) in seen for t in real)


def test_a_recording_with_what_is_known_computes_what_the_model_does():
    model, x = Steps(casts=False), torch.randn(3, 2, 6)
    graph = record(model, (x,), executable=True).module
    got, expected = graph(x), model(x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nearly_nothing_runs_a_second_time(monkeypatch):
    class Deep(nn.Module):
        def forward(self, x):
            for _ in range(40):
                x = (x.view(2, 3, 4).transpose(1, 2).reshape(2, 12) * 2).relu()
            return x

    runs = []
    learn = Repeated._learn
    monkeypatch.setattr(Repeated, "_learn", lambda self, *a: (runs.append(a[1]), learn(self, *a))[1])
    assert len(record(Deep(), (torch.randn(2, 12),)).graph.nodes) == 40 * 5 + 2
    assert len(runs) <= 10


def test_gradients_inside_a_forward_have_a_way():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x):
            x = x.detach().requires_grad_()
            energy = self.b(torch.tanh(self.a(torch.tanh(self.a(x))))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0] * 2

    found = record(Force(), (torch.randn(3, 6),))
    shapes = [n.meta["value"].shape for n in found.graph.nodes if "value" in n.meta]
    assert shapes[-1] == (3, 6)


def test_a_view_of_a_parameter_is_written_to_in_the_recording_only(monkeypatch):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            y = x.view(-1) + x.view(-1)
            with torch.no_grad():
                self.w.view(-1).add_(1)
            return y + self.w.view(-1)

    model = Writes()
    known, run = twice(model, (torch.randn(4, 4),), monkeypatch)
    assert known == run
    assert torch.equal(model.w, torch.ones(4, 4))


def test_a_number_that_is_known_stays_known():
    class Counts(nn.Module):
        def forward(self, x):
            for n in (1, 2, 3):
                x = x[: int((torch.tensor(n) + torch.tensor(1)).item())]
            return x

    values = [n.meta["value"].shape for n in record(Counts(), (torch.randn(5, 2),)).graph.nodes if "value" in n.meta]
    assert values[-1] == (2, 2)


def test_another_default_dtype_is_told_apart(monkeypatch):
    class Ints(nn.Module):
        def forward(self, x):
            a = x / 2
            torch.set_default_dtype(torch.float64)
            try:
                return a, x / 2
            finally:
                torch.set_default_dtype(torch.float32)

    known, run = twice(Ints(), (torch.arange(6),), monkeypatch)
    assert known == run
    assert [v.dtype for *_, v in known if v is not None][-2:] == [torch.float32, torch.float64]


def test_a_plan_is_the_same(tiny_llama, monkeypatch):
    model = tiny_llama()
    plan = oftfx.plan(model, {"all-linear": oftfx.OFT(8)})
    monkeypatch.setattr("oftfx.trace.recorder.Repeated", Each)
    assert oftfx.plan(model, {"all-linear": oftfx.OFT(8)}).to_json() == plan.to_json()


def test_a_value_that_is_written_to_after_it_was_read_is_let_go(recwarn):
    class Adds(nn.Module):
        def forward(self, x):
            total = torch.zeros_like(x).detach()
            for _ in range(3):
                total.add_((total * 2).tanh() + x.tanh() * 2)
            return total

    x = torch.randn(3, 4, requires_grad=True)
    record(Adds(), (x,))
    assert not [w for w in recwarn if "FakeTensor" in str(w.message)]  # which says what is still there
