"""Rows whose adapters train modules whole: heads, norms, statistics."""

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, OftfxWarning
from tests.adapter.test_rows import by_rows
from tests.reference import rel

NAMES = ["b", None, "a", "c", "b"]
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.norm(self.dense(x)).tanh())


@pytest.fixture
def model():
    """Adapter a trains the head, b a part of it, c none."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Head())
    model = oftfx.transform(base, {"0": OFT(4)}, adapter="a", train=["2"])
    oftfx.add_adapter(model, "b", {"0": OFT(8)}, train=["2.out", "1"])
    oftfx.add_adapter(model, "c", {"0": OFT(2)})
    for seed, name in enumerate("abc"):
        oftfx.set_adapter(model, name)
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.3)
        model.train()(torch.randn(9, 8, generator=torch.Generator().manual_seed(seed)) * 3 + seed)  # statistics
    return model.eval()


@pytest.mark.parametrize("active", [None, "a", "b", "c"])
def test_each_row_runs_through_its_version(model, active):
    oftfx.set_adapter(model, active)
    with torch.no_grad():
        expected, outside = by_rows(model, X, NAMES), model(X)
        hooks = [len(m._forward_hooks) for m in model.modules()]
        parameters = [id(p) for p in model.parameters()]
        with oftfx.adapter_rows(model, NAMES):
            assert rel(model(X), expected) < 1e-6
            with oftfx.disable_adapters(model):
                plain = model(X)
            assert rel(plain[1], expected[1]) < 1e-6
            assert [id(p) for p in model.parameters()] == parameters
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
        assert torch.equal(model(X), outside)
    assert rel(expected, outside) > 0.1


def test_gradients_and_the_mode_that_is_set_inside(model):
    oftfx.set_adapter(model, "a")
    own = oftfx.adapter_parameters(model, "a")
    with oftfx.adapter_rows(model, ["a", None, "a", "c", None]):
        found = torch.autograd.grad(model(X).square().sum(), own)
        model.train()
        with pytest.raises(AdapterError, match="2 trains whole.*in training it also writes statistics of its batch"):
            model(X)
        model.eval()
    expected = torch.autograd.grad(sum(model(X[i : i + 1]).square().sum() for i in (0, 2)), own)
    for got, want in zip(found, expected, strict=True):
        assert rel(got, want) < 1e-5


@pytest.mark.needs("peft", "transformers")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_classifier_whose_adapters_have_a_head_each(tiny_bert, ids):
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(oft_block_size=8, target_modules=["query"], task_type="SEQ_CLS")
    model = oftfx.transform(tiny_bert(), config, adapter="a").eval()
    oftfx.add_adapter(model, "b", config)
    for name in "ab":
        for parameter in oftfx.adapter_parameters(model, name):
            nn.init.normal_(parameter, std=0.2)
    given = {k: torch.cat([v, v.flip(0)])[:3] for k, v in ids().items()}
    with torch.no_grad():
        expected = []
        for row, name in enumerate(["b", None, "a"]):
            oftfx.set_adapter(model, name)
            expected.append(model(**{k: v[row : row + 1] for k, v in given.items()}).logits)
        with oftfx.adapter_rows(model, ["b", None, "a"]):
            assert rel(model(**given).logits, torch.cat(expected)) < 1e-5


class Reads(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return nn.functional.linear(self.lin(x), self.head.weight)


def test_a_whole_module_that_is_not_called_is_named():
    model = oftfx.transform(nn.Sequential(Reads()), {"*lin": OFT(4)}, train=["head"]).eval()
    warned = pytest.warns(OftfxWarning, match=r"adapter_rows: 0\.head trains whole in an adapter that was named, and")
    with warned, oftfx.adapter_rows(model, [None, "default"]):
        model(X[:2])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Flatten(0), r"2 trains whole.*it reads \(5, 8\) and returns \(40,\)"),
        (nn.Bilinear(8, 8, 3), "2 trains whole.*it is called with more than one tensor"),
        (nn.ModuleList([nn.Linear(8, 3)]), "2 trains whole and is called in parts"),
    ],
    ids=["shape", "arguments", "list"],
)
def test_what_cannot_run_row_by_row_is_refused(head, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.Linear(8, 8))
            self.add_module("1", nn.Linear(8, 8))
            last = nn.Sequential(nn.Linear(8, 8), head) if isinstance(head, nn.Flatten) else head
            self.add_module("2", last)

        def forward(self, x):
            x = self.get_submodule("0")(x)
            last = self.get_submodule("2")
            if isinstance(last, nn.ModuleList):
                return last[0](x)
            return last(x, x) if isinstance(last, nn.Bilinear) else last(x)

    model = oftfx.transform(Model(), {"0": OFT(4)}, train=["2"]).eval()
    with pytest.raises(AdapterError, match=message), oftfx.adapter_rows(model, [None, "default"] * 2 + [None]):
        model(X)


def test_a_module_that_another_adapter_rotates_is_refused():
    model = oftfx.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), {"1": OFT(4)}, adapter="a")
    oftfx.add_adapter(model, "b", {"0": OFT(4)}, train=["1"])
    refused = pytest.raises(AdapterError, match="one adapter trains 1 whole and another rotates 1 in it")
    with refused, oftfx.adapter_rows(model, ["a", "b"]):
        pass
