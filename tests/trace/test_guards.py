"""A graph refuses, by name, the calls that its recording does not stand for."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import GuardError, TraceError
from tests.reference import randomize

X = torch.randn(6, 16)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(16, 16)


def rotated(model, *inputs):
    return randomize(oftfx.transform(model, {"*": OFT(4)}, example_inputs=inputs)).eval()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, a, b):
        return self.q(a) @ self.k(b).T


def test_one_tensor_at_two_places_is_recorded_as_two():
    model, z = rotated(TwoInputs(), X, X), torch.randn(6, 16)
    graph = oftfx.graph(model, (X, X))
    for a, b in ((X, X), (X, z), (z, X)):
        torch.testing.assert_close(graph(a, b), model(a, b))
    shared = oftfx.plan(TwoInputs(), {"*": OFT(4, share_input=True)}, example_inputs=(X, X))
    assert shared.rotations == 2
    real = oftfx.plan(TwoInputs(), {"*": OFT(4, share_input=True)}, example_inputs={"a": X, "b": X})
    assert real.rotations == 2


def test_it_gets_gradients_as_the_one_that_was_given():
    class Asks(TwoInputs):
        def forward(self, a, b):
            return super().forward(a, b) if b.requires_grad else -super().forward(a, b)

    x = X.clone().requires_grad_()
    model = rotated(Asks(), x, x)
    torch.testing.assert_close(oftfx.graph(model, (x, x))(x, x), model(x, x))


def test_a_model_that_asks_for_strides():
    class Asks(Layer):
        def forward(self, x):
            return self.l(x) if x.is_contiguous() else -self.l(x)

    model = rotated(Asks(), X)
    graph = oftfx.graph(model, (X,))
    torch.testing.assert_close(graph(X), model(X))
    with pytest.raises(GuardError, match=r"x.strides: got not contiguous, axes \[1, 0\] in memory"):
        graph(torch.randn(16, 6).T)
    turned = torch.randn(16, 6).T
    torch.testing.assert_close(oftfx.graph(model, (turned,))(turned), model(turned))
    torch.testing.assert_close(oftfx.graph(model, (X,), on_miss="eager")(turned), model(turned))
    # Nobody asked: any strides will do, also with rotations, which look at them.
    plain = rotated(nn.Sequential(nn.Linear(16, 16)), X)
    torch.testing.assert_close(oftfx.graph(plain, (X,))(turned), plain(turned))


def test_a_model_that_asks_for_gradients():
    class Asks(Layer):
        def forward(self, x):
            return self.l(x) if x.requires_grad else -self.l(x)

    model = rotated(Asks(), X)
    graph = oftfx.graph(model, (X,))
    torch.testing.assert_close(graph(X), model(X))
    with pytest.raises(GuardError, match=r"x.requires_grad: got True, recorded for False"):
        graph(X.clone().requires_grad_())


def test_a_model_that_asks_whether_gradients_are_enabled():
    class Asks(Layer):
        def forward(self, x):
            return self.l(x) if torch.is_grad_enabled() else -self.l(x)

    model = rotated(Asks(), X)
    graph = oftfx.graph(model, (X,))
    torch.testing.assert_close(graph(X), model(X))
    with torch.no_grad(), pytest.raises(GuardError, match="gradients: got disabled, recorded for enabled"):
        graph(X)
    graph.train()
    torch.testing.assert_close(graph(X), model(X))


def test_one_that_switches_gradients_off_inside_is_the_same_program_in_both():
    class Inside(Layer):
        def forward(self, x):
            with torch.no_grad():
                scale = x.abs().mean()
            return self.l(x) * scale

    model = rotated(Inside(), X)
    graph = oftfx.graph(model, (X,))
    with torch.no_grad():
        torch.testing.assert_close(graph(X), model(X))
    torch.testing.assert_close(graph(X), model(X))


def test_true_is_not_one():
    class Number(Layer):
        def forward(self, x, n):
            return -self.l(x) if n is True else self.l(x) * n

    model = rotated(Number(), X, 1)
    graph = oftfx.graph(model, (X, 1))
    torch.testing.assert_close(graph(X, 1), model(X, 1))
    with pytest.raises(GuardError, match="n: got True, recorded for 1"):
        graph(X, True)


class State(Layer):
    """Keeps something for its next call, in ways that no graph follows."""

    def __init__(self, how):
        super().__init__()
        self.how, self._n, self.prev, self.sizes, self.cache = how, 0, None, (), {}
        self.register_buffer("n", torch.zeros(16))

    def forward(self, x):
        y = self.l(x)
        if self.how == "buffer":
            self.n = self.n + 1
            return y + self.n
        if self.how == "number":
            self._n += 1
            return y * self._n
        if self.how == "tuple":
            self.sizes = (*self.sizes, 1)
            return y * len(self.sizes)
        if self.how == "dict":
            self.cache["n"] = self.cache.get("n", 0) + 1
            return y * self.cache["n"]
        if self.how == "tensor":
            out = y if self.prev is None else y + self.prev
            self.prev = y.detach()
            return out
        self._n, self.prev = self._n + 1, y.detach()  # and never read
        return y


@pytest.mark.parametrize("how", ["buffer", "number", "tuple", "dict", "tensor"])
def test_a_model_that_keeps_something_for_its_next_call_is_no_graph(how):
    with pytest.raises(
        TraceError, match="a second call of the model computes something else than the first, in (State|n):"
    ):
        oftfx.graph(rotated(State(how)), (X,))


def test_what_a_model_keeps_and_never_reads_does_not_matter():
    model = rotated(State("not read"))
    graph = oftfx.graph(model, (X,))
    for _ in range(2):
        torch.testing.assert_close(graph(X), model(X))
    assert model._n == 2


def test_a_buffer_that_forward_writes_into_is_written_by_the_graph():
    class Writes(Layer):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros(16))

        def forward(self, x):
            self.n.add_(1)
            return self.l(x) + self.n

    model = rotated(Writes())
    twin = copy.deepcopy(model)
    graph = oftfx.graph(model, (X,))
    for _ in range(3):
        torch.testing.assert_close(graph(X), twin(X))


def test_a_result_of_a_class_of_its_own_does_not_tie_the_graph_to_a_mode():
    class Result(dict):
        pass

    class Makes(Layer):
        def forward(self, x):
            return Result(y=self.l(x))

    model = rotated(Makes())
    graph = oftfx.graph(model, (X,))
    with torch.no_grad():
        torch.testing.assert_close(graph(X)["y"], model(X)["y"])
    torch.testing.assert_close(graph.train()(X)["y"], model(X)["y"])
