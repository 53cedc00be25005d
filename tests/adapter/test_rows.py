"""A whole model with an adapter for each row, and what is refused meanwhile."""

import copy
import threading

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from oftfx.placement.rows import OPEN
from tests.reference import rel

NAMES = ["b", None, "a", "b"]
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    model = oftfx.transform(base, {"*": OFT(4)}, adapter="a")
    oftfx.add_adapter(model, "b", {"3": OFT(8)})
    oftfx.add_adapter(model, "whole", {"3": OFT(8)}, train=["1"])
    oftfx.set_adapter(model, ["a", "b", "whole"])
    for parameter in oftfx.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    oftfx.set_adapter(model, "a")
    return model.eval()


def by_rows(model, x, names=NAMES):
    found, active = [], oftfx.active_adapters(model)
    for row, name in enumerate(names):
        oftfx.set_adapter(model, name)
        found.append(model(x[row : row + 1]))
    oftfx.set_adapter(model, active)
    return torch.cat(found)


def test_the_rows_of_a_model(model):
    with torch.no_grad():
        expected = by_rows(model, X)
        with oftfx.adapter_rows(model, NAMES):
            assert rel(model(X), expected) < 1e-6
            with oftfx.adapter_rows(model, NAMES[::-1]):  # the inner one holds
                assert rel(model(X.flip(0)), expected.flip(0)) < 1e-6
            with oftfx.disable_adapters(model):
                plain = model(X)
            assert rel(model(X), expected) < 1e-6
        assert rel(plain[1], expected[1]) < 1e-6
        oftfx.set_adapter(model, None)
        with oftfx.adapter_rows(model, NAMES):
            assert rel(model(X), expected) < 1e-6
        assert rel(model(X), plain) < 1e-6


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_transformer_and_its_generation(request, kind, ids):
    make = request.getfixturevalue(f"tiny_{kind}")
    model = oftfx.transform(make(), {"all-linear": OFT(8)}, adapter="a").eval()
    oftfx.add_adapter(model, "b", {"all-linear": OFT(4)})
    oftfx.set_adapter(model, ["a", "b"])
    for parameter in oftfx.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    inputs = {k: torch.cat([v, v.flip(0)])[:3] for k, v in ids().items()}
    names = ["b", None, "a"]
    with torch.no_grad():
        wanted = []
        for row, name in enumerate(names):
            oftfx.set_adapter(model, name)
            one = {k: v[row : row + 1] for k, v in inputs.items()}
            wanted.append((model(**one).logits, model.generate(**one, max_new_tokens=6) if kind == "llama" else one))
        with oftfx.adapter_rows(model, names):
            found = model(**inputs).logits
            made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6) if kind == "llama" else None
    assert rel(found, torch.cat([logits for logits, _ in wanted])) < 1e-5
    if made is not None:
        for row, (_, alone) in zip(made, wanted, strict=True):
            assert torch.equal(row[: alone.shape[1]], alone[0])


def test_training_gives_each_adapter_the_gradient_of_its_rows(model):
    oftfx.set_adapter(model, ["a", "b"])
    model.train()
    parameters = oftfx.adapter_parameters(model)
    with oftfx.adapter_rows(model, NAMES):
        loss = model(X).square().sum()
    loss.backward()  # outside
    found = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    for row, name in enumerate(NAMES):
        oftfx.set_adapter(model, name)
        if name is not None:
            model(X[row : row + 1]).square().sum().backward()
    for got, parameter in zip(found, parameters, strict=True):
        assert rel(got, parameter.grad) < 1e-5


def test_other_threads_have_the_models_adapters(model):
    with torch.no_grad():
        expected, outside = by_rows(model, X), model(X)
        found = []
        with oftfx.adapter_rows(model, NAMES):
            thread = threading.Thread(target=lambda: found.append(model(X)))
            thread.start()
            thread.join()
            assert rel(model(X), expected) < 1e-6
    assert rel(found[0], outside) < 1e-6


def test_another_model_is_not_concerned(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        outside = twin(X)
        with oftfx.adapter_rows(model, NAMES):
            assert torch.equal(twin(X), outside)
            with oftfx.adapter_rows(twin, ["a", "b", "b", "b"]):
                expected = by_rows(copy.deepcopy(twin), X, ["a", "b", "b", "b"])
                assert rel(twin(X), expected) < 1e-6
                assert rel(model(X), by_rows(copy.deepcopy(model), X)) < 1e-6


def test_an_exception_leaves_nothing(model):
    with torch.no_grad():
        before = model(X)
        for error in (KeyError, KeyboardInterrupt):
            with pytest.raises(error), oftfx.adapter_rows(model, NAMES):
                raise error
            assert not OPEN.any
            assert torch.equal(model(X), before)
    assert oftfx.active_adapters(model) == ("a",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a", "got 'a', expected a list with an adapter"),
        ([], r"got \[\], expected a list"),
        (["a", "c"], "no adapter 'c'; the model has a, b"),
        ([["a", "a"]], "named twice"),
        (["a", "biased"], r"adapter 'biased' has its own 3\.bias, of which a batch can only have one version"),
    ],
)
def test_bad_names_are_refused(model, names, message):
    oftfx.add_adapter(model, "biased", {"3": OFT(8)}, train_bias="oft")
    with pytest.raises(AdapterError, match=message), oftfx.adapter_rows(model, names):
        pass
    assert not OPEN.any


def test_an_adapter_that_acts_with_biases_of_its_own_is_in_the_way(model):
    oftfx.add_adapter(model, "biased", {"3": OFT(8)}, train_bias="oft")
    oftfx.set_adapter(model, "biased")
    refused = pytest.raises(AdapterError, match=r"one adapter a call, or set_adapter\(model, None\) first")
    with refused, oftfx.adapter_rows(model, ["a", None]):
        pass


def test_what_changes_the_adapters_waits(model, tmp_path):
    oftfx.save_adapter(model, tmp_path, adapter="a")
    calls = {
        "set_adapter": lambda: oftfx.set_adapter(model, "b"),
        "remove_adapter": lambda: oftfx.remove_adapter(model, "b"),
        "adding an adapter": lambda: oftfx.add_adapter(model, "c", {"0": OFT(4)}),
        "a fold": lambda: oftfx.fold(model),
        "a recording": lambda: oftfx.graph(model, (X,)),
    }
    with oftfx.adapter_rows(model, NAMES):
        for what, call in calls.items():
            with pytest.raises(AdapterError, match=f"{what} inside adapter_rows of the same model: leave the 'with'"):
                call()
        with pytest.raises(AdapterError, match="adding an adapter inside adapter_rows"):
            oftfx.load_adapter(model, tmp_path, adapter="c")
        oftfx.save_adapter(model, tmp_path, adapter="b")
    assert list(oftfx.adapters(model)) == ["a", "b", "whole"]


class DataParallel(nn.Module):
    """Holds the model as torch's own wrapper does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_compiled_models_exports_and_threads_of_a_wrapper_are_refused(model):
    compiled = torch.compile(model, backend="eager")
    with (
        pytest.raises(AdapterError, match="OptimizedModule is compiled"),
        oftfx.adapter_rows(compiled, NAMES),
    ):
        pass
    with pytest.raises(AdapterError, match="in threads of its own"), oftfx.adapter_rows(DataParallel(model), NAMES):
        pass
    with torch.no_grad(), oftfx.adapter_rows(model, NAMES):
        for make in (lambda: torch.export.export(model, (X,)), lambda: torch.jit.trace(model, (X,))):
            with pytest.raises(AdapterError, match="0: inside adapter_rows the model cannot be compiled, exported or"):
                make()
    part = copy.deepcopy(model)
    part[3].compile(backend="eager")
    with pytest.raises(AdapterError, match="adapter_rows: 3 is compiled"), oftfx.adapter_rows(part, NAMES):
        pass


def test_a_compiled_function_around_the_model_is_right(model):
    """Its guards see that rows are open; the sites then run as they are."""
    function = torch.compile(lambda x: model(x) * 2, backend="eager")
    with torch.no_grad():
        expected, outside = 2 * by_rows(model, X), 2 * model(X)
        for _ in range(2):
            assert rel(function(X), outside) < 1e-6
            with oftfx.adapter_rows(model, NAMES):
                assert rel(function(X), expected) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused(model, reentrant):
    """Backward runs the layers again when the rows are gone."""
    oftfx.set_adapter(model, ["a", "b"])
    x = X.clone().requires_grad_()
    with (
        oftfx.adapter_rows(model, NAMES),
        pytest.raises(AdapterError, match="0: gradient checkpointing runs this layer again in backward"),
    ):
        checkpoint(model, x, use_reentrant=reentrant)
