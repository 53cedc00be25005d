import json

import pytest
import torch

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from tests.blending.test_blend import at, dense, dense_exp, dense_log, made, nearest
from tests.reference import rel


def state(model):
    """Everything that a curve has to leave alone."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {n: (id(p), p.requires_grad, None if p.grad is None else id(p.grad)) for n, p in model.named_parameters()},
        [(n, m.training, [*map(type, m._forward_pre_hooks.values())]) for n, m in model.named_modules()],
        list(oftfx.adapters(model).items()),
        oftfx.active_adapters(model),
    )


def same(before, after):
    return before[1:] == after[1:] and all(torch.equal(v, after[0][k]) for k, v in before[0].items())


@pytest.fixture
def model():
    model = made(OFT(3), std=0.08)
    oftfx.add_adapter(model, "b", {"2": OFT(4)}, train=["0"], trainable=False)
    oftfx.set_adapter(model, ["a", "b"])
    model.train()
    model[0].eval()
    model[0].weight.requires_grad_(True)  # the user's own doing
    return model


def test_the_scores_are_those_of_the_rotations_at_that_strength(model):
    x, before = torch.randn(4, 12, dtype=torch.float64), state(model)
    seen = []

    def outputs(given):
        assert given is model
        assert not any(m.training for m in model.modules())
        seen.append(given(x).detach())
        return seen[-1].norm()

    curve = oftfx.retention(model, {"norm": outputs, "one": lambda m: 1}, (0, 0.5, 1, -1, 1.5), adapter="a")
    assert same(before, state(model))
    oftfx.set_adapter(model, None)
    w0, b0, w2, b2 = model[0].weight, model[0].bias, model[2].weight, model[2].bias
    for strength, got in zip((0, 0.5, 1, -1, 1.5), seen, strict=True):
        rotated = []
        for site in ("0", "2"):
            r = dense(at(model, site, "a"))
            rotated.append(r if strength == 1 else dense_exp(strength * dense_log(nearest(r))))
        expected = (x @ rotated[0] @ w0.T + b0).tanh() @ rotated[1] @ w2.T + b2
        assert rel(got, expected) < 1e-12
    assert curve.tasks == ("norm", "one")
    assert curve["norm"] == {s: float(y.norm()) for s, y in zip((0, 0.5, 1, -1, 1.5), seen, strict=True)}
    assert [p.strength for p in curve] == [0, 0.5, 1, -1, 1.5]
    assert len(json.loads(curve.to_json())["points"]) == len(curve.rows()) == 5
    assert "strength" in curve.table()


@pytest.mark.parametrize("at_strength", [0, 0.5, 1])
def test_an_exception_leaves_nothing_behind(model, at_strength):
    before = state(model)

    def fails(given):
        given.train()
        oftfx.set_adapter(given, "b")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        oftfx.retention(model, {"t": fails}, (at_strength,), adapter="a")
    assert same(before, state(model))


def test_a_blend_that_is_refused_leaves_nothing_behind(model):
    with torch.no_grad():
        at(model, "2", "a").skew.mul_(20)
    before = state(model)
    with pytest.raises(AdapterError, match="stretch a vector"):
        oftfx.retention(model, {"t": lambda m: 0.0}, adapter="a")
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("tasks", "strengths", "said"),
    [
        ({}, (0,), "expected functions by name"),
        ({"t": 3}, (0,), "expected functions by name"),
        ({"t": lambda m: "good"}, (0,), "task 't' returned a str"),
        ({"t": lambda m: None}, (0,), "task 't' returned a NoneType"),
        ({"t": lambda m: torch.ones(3)}, (1,), "task 't' returned a Tensor"),
        ({"t": lambda m: 1.0}, (), "strengths: got none"),
    ],
)
def test_what_gives_no_curve(model, tasks, strengths, said):
    before = state(model)
    with pytest.raises(AdapterError, match=said):
        oftfx.retention(model, tasks, strengths, adapter="a")
    assert same(before, state(model))
