"""What is compiled for eval has the products of rotations in it and no Cayley transform, and is always right."""

import copy
import threading

import pytest
import torch
import torch._dynamo
import torch.nn as nn
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import oftfx
from oftfx import OFT
from oftfx.rotation import recipe
from tests.ecosystem import network
from tests.ecosystem.twin import dense_twin, skews
from tests.reference import randomize, rel

CAYLEY = ("solve", "baddbmm", "inverse", "triu", "eye", "linalg")
SPECS = {
    "series": OFT(4),
    "exact": OFT(4, parameterization="cayley"),
    "shared input": OFT(4, share_input=True),
    "shared blocks": OFT(4, block_share=True),
    "coft": OFT(4, coft_eps=0.3),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Compiles nothing; remembers the operators of each graph."""

    def __init__(self):
        self.graphs = []
        self.run = aot_autograd(fw_compiler=self.see, inference_compiler=self.see)

    def see(self, graph, _):
        self.graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    def __call__(self, graph, inputs):
        return self.run(graph, inputs)

    @property
    def cayley(self):
        return [n for names in self.graphs for n in names if any(c in n for c in CAYLEY)]


@pytest.fixture
def transforms(monkeypatch):
    """How many Cayley transforms have been made."""
    made, original = [], recipe.cayley

    def count(*args, **kwargs):
        if not torch.compiler.is_compiling():
            made.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(recipe, "cayley", count)
    return made


def compiled(model, **options):
    backend = Backend()
    return torch.compile(model, backend=backend, fullgraph=True, **options), backend


X = torch.randn(2, 5, 16, dtype=torch.float64)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_graph_has_no_cayley_in_it_and_none_is_made_again(spec, transforms):
    model = randomize(oftfx.transform(network.base(), {"all-linear": spec}, example_inputs=(X,)), std=0.2).eval()
    run, backend = compiled(model)
    twin = oftfx.fold(model).model
    transforms.clear()
    with torch.no_grad():
        assert rel(run(X), twin(X)) < 1e-12
        first = len(transforms)
        assert first
        for _ in range(3):
            assert rel(run(X), twin(X)) < 1e-12
    assert len(transforms) == first
    assert len(backend.graphs) == 1
    assert not backend.cayley
    assert any("oftfx.turned" in n for n in backend.graphs[0])


def test_the_graph_of_training_makes_them_itself():
    model = randomize(network.transformed(False), std=0.2)
    for training, gradients in [(True, True), (False, True), (True, False)]:
        torch._dynamo.reset()
        run, backend = compiled(model.train(training))
        with torch.set_grad_enabled(gradients):
            run(X)
        assert any("baddbmm" in n for n in backend.cayley)
        assert not any("oftfx." in n for names in backend.graphs for n in names)


def test_a_weight_that_is_rotated_is_too(transforms):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)).eval().requires_grad_(False)
    model = randomize(oftfx.transform(base, {"*": OFT(6)}), std=0.2).eval()
    run, backend = compiled(model)
    x = torch.randn(1, 4, 9)
    with torch.no_grad():
        assert rel(run(x), model(x)) < 1e-6
        before = len(transforms)
        randomize(model, std=0.2, seed=4)
        assert rel(run(x), oftfx.fold(model).model(x)) < 1e-6
        assert len(transforms) > before
        run(x)
    assert len(backend.graphs) == 1
    assert not backend.cayley


def steps_of(model):
    optimizer = torch.optim.AdamW(skews(model).values(), lr=0.05, fused=True)

    def step():
        for skew in skews(model).values():
            skew.grad = torch.randn_like(skew)
        optimizer.step()

    return step


@torch.no_grad()
def copied(model):
    for skew in skews(model).values():
        skew.copy_(torch.randn_like(skew) * 0.2)


def loaded(model):
    model.load_state_dict({n: torch.randn_like(s) * 0.2 for n, s in skews(model).items()}, strict=False)


def assigned(model):
    new = {n: nn.Parameter(torch.randn_like(s) * 0.2) for n, s in skews(model).items()}
    model.load_state_dict(new, strict=False, assign=True)


def through_data(model):
    for skew in skews(model).values():
        skew.data.mul_(0.5)


def behind(model):
    for skew in skews(model).values():
        skew.data[0, 3:5] += 0.3
    oftfx.refresh(model)


@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("change", [copied, loaded, assigned, through_data, behind], ids=lambda f: f.__name__)
def test_changes_of_the_parameters_are_seen(change, share):
    base, model = network.base(), randomize(network.transformed(share), std=0.2).eval()
    run, backend = compiled(model)
    with torch.no_grad():
        before = run(X)
        for _ in range(2):
            change(model)
            assert rel(run(X), dense_twin(base, model)(X)) < 1e-12
            assert rel(run(X), before) > 1e-3
    assert len(backend.graphs) == 1


def test_steps_modes_copies_and_dtypes():
    base, model = network.base(), randomize(network.transformed(False), std=0.2).eval()
    run, backend = compiled(model)

    def right(other=None, bound=1e-12):
        with torch.no_grad():
            return rel((other or run)(X), dense_twin(base, model)(X)) < bound

    assert right()
    step = steps_of(model)
    for _ in range(3):
        step()
        assert right()
    assert len(backend.graphs) == 1
    model.train()
    step()
    model.eval()
    assert right()
    assert len(backend.graphs) == 1
    twin = copy.deepcopy(model)
    randomize(twin, std=0.3, seed=9)
    other, _ = compiled(twin)
    with torch.no_grad():
        assert rel(other(X), dense_twin(base, twin)(X)) < 1e-12
    assert right()
    model.float()
    with torch.no_grad():
        assert rel(run(X.float()), dense_twin(base, model)(X)) < 1e-5
    model.double()
    assert right(bound=1e-12)


def test_adapters_switch_and_folds_come_undone():
    base, model = network.base(), randomize(network.transformed(False), std=0.2).eval()
    oftfx.add_adapter(model, "second", {"all-linear": OFT(2)}, example_inputs=(X,))
    randomize(model, std=0.2, seed=3)
    run, backend = compiled(model)
    with torch.no_grad():
        for adapters in ("default", "second", None, ["default", "second"], "default"):
            oftfx.set_adapter(model, adapters)
            assert rel(run(X), model(X)) < 1e-12
            expected = base(X) if adapters is None else oftfx.fold(model).model(X)
            assert rel(run(X), expected) < 1e-12
        result = oftfx.fold(model, inplace=True, undo=True)
        assert rel(result.model(X), expected) < 1e-12
        back, _ = compiled(oftfx.unfold(result))
        assert rel(back(X), expected) < 1e-12
        randomize(model, std=0.2, seed=5)
        assert rel(back(X), oftfx.fold(model).model(X)) < 1e-12
    assert not backend.cayley


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def test_layers_that_are_compiled_one_by_one_share_one_graph():
    """What regional compilation of a large model hangs on."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(12))).eval().requires_grad_(False)
    model = randomize(oftfx.transform(model, {"*": OFT(4)}), std=0.2).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = model(x)
        backend = Backend()
        for part in model:
            part.compile(backend=backend, fullgraph=True)
        assert rel(model(x), expected) < 1e-6
    assert len(backend.graphs) == 1


def test_autocast_and_frozen_parameters():
    model = randomize(oftfx.transform(network.base().float(), {"all-linear": OFT(4)}), std=0.2).eval()
    model.requires_grad_(False)
    run, backend = compiled(model)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(x).dtype == model(x).dtype
        assert rel(run(x), model(x)) < 1e-2
    assert rel(run(x), model(x)) < 1e-6  # nothing requires gradients, so nothing is switched off
    assert not backend.cayley
    x.requires_grad_()
    run(x).square().sum().backward()
    got, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert rel(got, x.grad) < 1e-6


def test_what_a_fold_keeps_is_cast_once():
    pytest.importorskip("bitsandbytes")
    from oftfx.formats import format_named

    layer = format_named("bnb8").make_tiny(64, 16)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"*": OFT(8)}))
    rotation = next(m for m in oftfx.fold(model, quantized="keep").model.eval().modules() if hasattr(m, "recipe_text"))
    run, backend = compiled(rotation)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(run(x), rotation(x))
        rotation.blocks.mul_(2)
        assert torch.equal(run(x), rotation(x))
    assert backend.graphs == [["oftfx.turned.default", "<built-in function getitem>"]]


def test_two_threads():
    base, model = network.base(), randomize(network.transformed(False), std=0.2).eval()
    run, backend = compiled(model)
    with torch.no_grad():
        run(X)
    for seed in range(20):
        randomize(model, std=0.2, seed=seed)
        expected, found = dense_twin(base, model)(X), []

        def serve(found=found):
            with torch.no_grad():
                found.extend(run(X) for _ in range(5))

        threads = [threading.Thread(target=serve) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(found) == 10
        assert all(rel(f, expected) < 1e-12 for f in found)
    assert len(backend.graphs) == 1


def test_transforms_of_functions_inside_what_is_compiled():
    base, model = network.base(), randomize(network.transformed(False), std=0.2).eval()
    x, v = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        mapped = torch.compile(torch.vmap(lambda x: model(x)), backend="eager", fullgraph=True)
        assert rel(mapped(x), dense_twin(base, model)(x)) < 1e-12
        jvp = torch.compile(lambda x, v: torch.func.jvp(model, (x,), (v,)), backend="eager")
        assert rel(jvp(x, v)[1], torch.func.jvp(dense_twin(base, model), (x,), (v,))[1]) < 1e-9


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_or_traced_makes_them_itself(strict):
    model = randomize(network.transformed(False), std=0.2).eval()
    with torch.no_grad():
        program = torch.export.export(model, (X,), strict=strict)
        traced = torch.jit.trace(model, (X,), check_trace=False)
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        names = [str(n.target) for g in graphs for n in g.nodes]
        assert any("baddbmm" in n for n in names)
        assert not any("oftfx" in n for n in names)
        assert "oftfx::" not in str(traced.inlined_graph)
        assert rel(program.module()(X), model(X)) < 1e-12
        assert rel(traced(X), model(X)) < 1e-12


@pytest.mark.skipif(not __import__("shutil").which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
def test_inductor(share, transforms):
    base = network.base()
    model = randomize(network.transformed(share), std=0.2).eval()
    run = torch.compile(model, fullgraph=True)
    step = steps_of(model)
    with torch.inference_mode():
        for _ in range(2):
            assert rel(run(X), dense_twin(base, model)(X)) < 1e-12
            first = len(transforms)
            assert torch.equal(run(X), run(X))
            assert len(transforms) == first
            with torch.inference_mode(False):
                step()
