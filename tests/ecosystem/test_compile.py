"""`torch.compile`: rotations add no graph break, no recompilation, and the numbers stay."""

import shutil

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

import oftfx
from oftfx import OFT
from tests.ecosystem import network
from tests.ecosystem.twin import Explicit, dense_twin, gradients, mlp, skews, values
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers")
SHARE = pytest.mark.parametrize("share", [False, True])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BOTH = pytest.mark.parametrize(
    ("share", "training"), [(False, True), (True, True), (True, False)], ids=["train", "train-shared", "eval-shared"]
)
_no_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Printing(torch.nn.Module):
    """A network that breaks the graph by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


@BOTH
def test_no_graph_break_is_added(rotated, ids, share, training):
    base, model = rotated(share, num_hidden_layers=1)
    base.train(training), model.train(training)
    found = []
    for each in (base, model):
        torch._dynamo.reset()
        with torch.set_grad_enabled(training):
            found.append(torch._dynamo.explain(each)(**ids()))
    assert found[1].graph_count == found[0].graph_count >= 1
    assert found[1].graph_break_count == found[0].graph_break_count
    assert found[1].op_count > found[0].op_count


def test_the_break_of_a_network_stays_the_only_one():
    base = Printing()
    model = oftfx.transform(base, {"all-linear": OFT(4)})
    counts = []
    for each in (base, model):
        torch._dynamo.reset()
        with torch.no_grad():
            counts.append(torch._dynamo.explain(each)(torch.randn(2, 12)).graph_break_count)
    assert counts == [1, 1]


@MODES
def test_outputs_and_gradients(rotated, ids, training):
    base, model = rotated(True, num_hidden_layers=1)
    batch = {**ids(), "labels": ids()["input_ids"]}
    model.train(training)(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(**batch)
    assert rel(out.logits, dense_twin(base, model)(**ids()).logits) < 1e-5
    out.loss.backward()
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(rel(got[n], expected[n]) < 1e-4 for n in expected)


@MODES
def test_training_steps_need_one_compilation(training):
    base = mlp()
    model, explicit = oftfx.transform(base, {"all-linear": OFT(4)}), Explicit(base, 4)
    model.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(16, 12, dtype=torch.float64)
    for each, parameters in [
        (torch.compile(model, backend=counter, fullgraph=True), list(skews(model).values())),
        (explicit, list(explicit.skews)),
    ]:
        optimizer = torch.optim.AdamW(parameters, lr=0.02)
        for _ in range(4):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert counter.frame_count == 1
    assert all(rel(p, q) < 1e-9 for p, q in zip(skews(model).values(), explicit.skews, strict=True))


@SHARE
def test_new_rotations_are_seen_by_what_is_compiled(share):
    base, model, x = network.base(), network.transformed(share).eval(), torch.randn(2, 5, 16, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        randomize(model, std=0.2, seed=seed)
        with torch.no_grad():
            assert rel(compiled(x), dense_twin(base, model)(x)) < 1e-12
    assert counter.frame_count == 1


@SHARE
def test_adapters_switch_under_what_is_compiled(share):
    base, model, x = network.base(), network.transformed(share), torch.randn(2, 5, 16, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with_rotation = compiled(x)
        with oftfx.disable_adapters(compiled):
            assert rel(compiled(x), base(x)) < 1e-12
        assert torch.equal(compiled(x), with_rotation)
    assert rel(oftfx.fold(compiled).model(x), with_rotation) < 1e-12


def test_sizes_may_change():
    base, model, counts = network.base(), network.transformed(True), []
    twin = dense_twin(base, model)
    for each in (base, model):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(each, backend=counter, fullgraph=True)
        with torch.no_grad():
            for batch, length in [(2, 11), (3, 7), (4, 9), (5, 12)]:
                x = torch.randn(batch, length, 16, dtype=torch.float64)
                assert rel(compiled(x), (twin if each is model else base)(x)) < 1e-12
        counts.append(counter.frame_count)
    assert counts == [2, 2]  # once with fixed sizes, once with free ones


def test_block_dropout_is_drawn_anew_in_every_compiled_forward():
    base = mlp()
    model = randomize(oftfx.transform(base, {"all-linear": OFT(4, dropout=0.5)}), std=0.5).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 12, dtype=torch.float64)
    outputs = [compiled(x).detach() for _ in range(4)]
    assert any(rel(outputs[0], o) > 1e-3 for o in outputs[1:])
    model.eval()
    assert rel(compiled(x), dense_twin(base, model)(x)) < 1e-12


def test_module_compile_in_place_keeps_names_and_folds():
    base, model, x = network.base(), network.transformed(True), torch.randn(2, 5, 16, dtype=torch.float64)
    before = list(model.state_dict())
    model.compile(backend="eager", fullgraph=True)
    assert rel(model(x), dense_twin(base, model)(x)) < 1e-12
    assert list(model.state_dict()) == before
    assert rel(oftfx.fold(model).model(x), dense_twin(base, model)(x)) < 1e-12


class Broken(torch.nn.Conv2d):
    """A reader of its weight that breaks the graph."""

    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return super().forward(x)


@pytest.mark.parametrize("first", ["default", None], ids=["with", "without"])
@pytest.mark.parametrize("place", ["forward", "hook before", "hook after rotation", "hook behind"])
def test_a_break_in_what_reads_a_rotated_weight_costs_no_rotation_and_leaves_none(place, first):
    torch.manual_seed(0)
    layer = (Broken if place == "forward" else torch.nn.Conv2d)(4, 4, 3)
    if place == "hook before":
        layer.register_forward_pre_hook(_break)
    model = randomize(oftfx.transform(torch.nn.Sequential(layer).eval(), {"*": OFT(6)}), std=0.3)
    if place == "hook after rotation":
        model[0].register_forward_pre_hook(_break)
    elif place == "hook behind":
        model[0].register_forward_hook(_break)
    x = torch.randn(1, 4, 5, 5)
    compiled = torch.compile(model, backend="aot_eager")
    for adapter in (first, "default", None, "default", None):
        oftfx.set_adapter(model, adapter)
        loss = [m(x).square().sum() for m in (compiled, model)]
        assert torch.equal(*loss)
        assert (
            rel(loss[0], layer(x).square().sum()) < 1e-6
            if adapter is None
            else abs(loss[0] / layer(x).square().sum() - 1) > 1e-3
        )
        assert "weight" not in vars(model[0])
        if adapter is not None:
            got = [torch.autograd.grad(value, skews(model).values())[0] for value in loss]
            assert got[0].abs().max() > 0
            assert rel(*got) < 1e-6


def _break(*_):
    torch._dynamo.graph_break()


def test_experts_whose_graph_breaks_keep_their_weights():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=4)
    ).eval()  # fmt: skip
    base.set_experts_implementation("eager")
    tokens = torch.arange(14).view(2, 7)
    model = randomize(oftfx.transform(base, {"*experts*": OFT(8)}), std=0.2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for adapter in ("default", None, "default", None):
            oftfx.set_adapter(model, adapter)
            expected = model(tokens).logits
            assert rel(compiled(tokens).logits, expected) < 1e-6
            assert (rel(expected, base(tokens).logits) < 1e-6) == (adapter is None)


def test_what_is_compiled_while_others_train_writes_nothing():
    import threading

    torch.manual_seed(0)
    model = randomize(oftfx.transform(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)).eval(), {"*": OFT(6)}), std=0.3)
    x, compiled = torch.randn(1, 4, 5, 5), torch.compile(model, backend="eager", fullgraph=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), skews(model).values())
    with torch.no_grad():
        answer, wrong, done = compiled(x), [], threading.Event()

    def serve():
        while not done.is_set():
            with torch.no_grad():
                wrong.extend([1] if rel(compiled(x), answer) > 1e-6 else [])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(200):
            (got,) = torch.autograd.grad(model(x).square().sum(), skews(model).values())
            assert rel(got, expected) < 1e-6
    finally:
        done.set()
        thread.join()
    assert not wrong


@_no_compiler
def test_inductor():
    base = mlp(torch.float32, 16)
    model, explicit = randomize(oftfx.transform(base, {"all-linear": OFT(8)}), std=0.2), Explicit(base, 8)
    with torch.no_grad():
        for plain, value in zip(explicit.skews, values(model).values(), strict=True):
            plain.copy_(value)
    x = torch.randn(6, 16)
    got, expected = torch.compile(model, fullgraph=True)(x), explicit(x)
    assert rel(got, expected) < 1e-5
    got.square().sum().backward()
    expected.square().sum().backward()
    assert all(rel(p.grad, q.grad) < 1e-4 for p, q in zip(skews(model).values(), explicit.skews, strict=True))
