"""`torch.func` and `torch.nn.utils.stateless`: a transformed model as a function of its rotations."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import Explicit, dense_twin, gradients, mlp, skews, values
from tests.reference import randomize, rel

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def network(training=True, std=0.2):
    base = mlp().train(training)
    return base, randomize(oftfx.transform(base, {"all-linear": OFT(4)}), std=std)


def others(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in skews(model).items()}


def loaded(base, model, chosen):
    """The dense twin of the model with these values."""
    kept = values(model)
    model.load_state_dict(chosen, strict=False)
    twin = dense_twin(base, model)
    model.load_state_dict(kept, strict=False)
    return twin


@MODES
@pytest.mark.parametrize("share", [False, True])
def test_functional_call_with_other_rotations(rotated, ids, share, training):
    base, model = rotated(share, dtype=torch.float64)
    base.train(training), model.train(training)
    own = values(model)
    with torch.no_grad():
        before = model(**ids()).logits
        for seed in range(4):  # fresh tensors each time, so memory is used again
            expected = loaded(base, model, others(model, seed))(**ids()).logits
            got = functional_call(model, others(model, seed), kwargs=ids()).logits
            assert rel(got, expected) < 1e-11, seed
        assert torch.equal(model(**ids()).logits, before)
    assert all(torch.equal(p, own[n]) for n, p in skews(model).items())


def test_values_that_stand_where_others_stood_are_seen():
    base, model = network(training=False)
    x = torch.randn(3, 12, dtype=torch.float64)
    store = {n: torch.empty_like(p) for n, p in skews(model).items()}
    for seed in range(3):  # the same memory every time, a new tensor object on it
        for name, value in others(model, seed).items():
            store[name].numpy()[...] = value.numpy()
        chosen = {n: torch.from_numpy(v.numpy()) for n, v in store.items()}
        with torch.no_grad():
            assert rel(functional_call(model, chosen, (x,)), loaded(base, model, chosen)(x)) < 1e-12, seed


@MODES
def test_grad_equals_backward(training):
    _, model = network(training)
    x = torch.randn(6, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    got = grad(lambda p: functional_call(model, p, (x,)).square().sum())(values(model))
    expected = gradients(model)
    assert got.keys() == expected.keys()
    assert all(rel(got[n], expected[n]) < 1e-12 for n in got)


@MODES
def test_per_sample_gradients(training):
    _, model = network(training)
    x = torch.randn(4, 12, dtype=torch.float64)
    one = grad(lambda p, row: functional_call(model, p, (row[None],)).square().sum())
    got = vmap(one, in_dims=(None, 0))(values(model), x)
    for index, row in enumerate(x):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        expected = gradients(model)
        assert all(rel(got[n][index], expected[n]) < 1e-12 for n in expected)


@MODES
def test_an_ensemble_of_rotations_in_one_call(training):
    base, model = network(training)
    x = torch.randn(5, 12, dtype=torch.float64)
    several = [others(model, s) for s in range(3)]
    stacked = {n: torch.stack([o[n] for o in several]) for n in several[0]}
    got = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    for index, chosen in enumerate(several):
        assert rel(got[index], loaded(base, model, chosen)(x)) < 1e-12
    with torch.no_grad():
        assert rel(vmap(lambda p: functional_call(model, p, (x,)))(stacked), got) < 1e-12


def test_transformed_models_stack():
    base, first = network()
    second = randomize(oftfx.transform(base, {"all-linear": OFT(4)}), std=0.2, seed=1)
    parameters, buffers = stack_module_state([first, second])
    x = torch.randn(5, 12, dtype=torch.float64)
    got = vmap(lambda p, b: functional_call(first, (p, b), (x,)))(parameters, buffers)
    assert rel(got[0], dense_twin(base, first)(x)) < 1e-12
    assert rel(got[1], dense_twin(base, second)(x)) < 1e-12


@MODES
def test_forward_mode_and_the_jacobian(training):
    base, model = network(training)
    explicit = Explicit(base, 4)
    names = list(skews(model))
    point = values(model)
    x, direction = torch.randn(2, 12, dtype=torch.float64), others(model, 9)
    plain = lambda p: functional_call(explicit, {f"skews.{i}": p[n] for i, n in enumerate(names)}, (x,))  # noqa: E731
    ours = lambda p: functional_call(model, p, (x,))  # noqa: E731
    for got, expected in zip(jvp(ours, (point,), (direction,)), jvp(plain, (point,), (direction,)), strict=True):
        assert rel(got, expected) < 1e-12
    got, expected = jacrev(ours)(point), jacrev(plain)(point)
    assert all(rel(got[n], expected[n]) < 1e-12 for n in names)


def test_second_derivatives():
    base, model = network()
    explicit = Explicit(base, 4)
    x = torch.randn(3, 12, dtype=torch.float64)
    results = []
    for module, parameters in [(model, list(skews(model).values())), (explicit, list(explicit.skews))]:
        with torch.no_grad():
            for ours, theirs in zip(parameters, values(model).values(), strict=True):
                ours.copy_(theirs)
        first = torch.autograd.grad(module(x).square().sum(), parameters, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(norm, parameters))
    assert all(rel(g, e) < 1e-11 for g, e in zip(*results, strict=True))


def test_parametrizations_of_the_rotation_itself():
    base, model = network()
    site = model.get_submodule("0.oft.default")
    torch.nn.utils.parametrize.register_parametrization(site, "skew", torch.nn.Tanh())
    x = torch.randn(3, 12, dtype=torch.float64)
    got = model(x)
    expected = {"0.oft.default.skew": site.skew.detach().clone()}
    torch.nn.utils.parametrize.remove_parametrizations(site, "skew")
    assert rel(got, loaded(base, model, {**values(model), **expected})(x)) < 1e-12
