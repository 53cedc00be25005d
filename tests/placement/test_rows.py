"""Rows of one batch with adapters of their own, at every kind of site, against dense float64 algebra."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError
from oftfx.placement.rows import OPEN
from tests.dense_layers import dense_conv2d, dense_embedding, dense_linear
from tests.reference import dense_rotation, rel


class Group(nn.Module):
    """Three layers that read the same tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return torch.stack([self.q(x), self.k(x), self.v(x)])


class Read(nn.Module):
    """A weight that the module around it reads, with more than one input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x, scale=2.0):
        return F.linear(x, self.inner.weight) * scale


def gpt2():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 8)


IDS = torch.arange(15).view(5, 3) % 11
NAMES = ["b", None, "a", ["a", "b"], "b"]
ORDERED = [("b",), (), ("a",), ("a", "b"), ("b",)]
LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (5, 3, 8), dense_linear, {}),
    "linear, two axes": (lambda: nn.Linear(8, 6), (5, 8), dense_linear, {}),
    "linear, four axes": (lambda: nn.Linear(8, 6), (5, 2, 3, 8), dense_linear, {}),
    "linear, weight": (lambda: nn.Linear(8, 6), (5, 3, 8), dense_linear, {"placement": "weight"}),
    "conv k=1": (lambda: nn.Conv2d(8, 6, 1), (5, 8, 4, 4), dense_conv2d, {}),
    "conv k=1, channels": (lambda: nn.Conv2d(8, 6, 1), (5, 8, 4, 4), dense_conv2d, {"placement": "activation"}),
    "conv k=3": (lambda: nn.Conv2d(8, 6, 3, padding=1), (5, 8, 4, 4), dense_conv2d, {}),
    "embedding": (lambda: nn.Embedding(11, 8), None, dense_embedding, {}),
    "GPT-2": (gpt2, (5, 3, 8), dense_linear, {}),
}


def adapted(layer, **changes):
    """With adapters a and b, of other block sizes, both trainable; a acts."""
    model = oftfx.transform(layer, {"*": OFT(4, **changes)}, adapter="a").eval()
    oftfx.add_adapter(model, "b", {"*": OFT(8, **changes)})
    oftfx.set_adapter(model, ["a", "b"])
    for parameter in oftfx.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    oftfx.set_adapter(model, "a")
    return model


def rotation_of(layer, chain):
    features = next(iter(layer.oft._modules.values())).in_features
    result = torch.eye(features, dtype=torch.float64)
    for name in chain:
        rotation = getattr(layer.oft, name)
        result = result @ dense_rotation(rotation.skew, rotation.block_size)
    return result


def made(kind):
    build, shape, dense, changes = LAYERS[kind]
    torch.manual_seed(0)
    model = adapted(nn.Sequential(build()).double(), **changes)
    x = IDS if shape is None else torch.randn(shape, dtype=torch.float64)
    return model, x, dense


def expected_rows(model, x, dense, chains):
    return torch.cat([dense(model[0], rotation_of(model[0], c), x[i : i + 1]) for i, c in enumerate(chains)])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [False, True])
def test_each_row_has_its_adapters(kind, grad):
    model, x, dense = made(kind)
    base = expected_rows(model, x, dense, [()] * 5)
    expected = expected_rows(model, x, dense, ORDERED)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with oftfx.adapter_rows(model, NAMES):
            found = model(x)
        assert rel(found, expected) < 1e-12
        assert rel(found, base) > 0.1
        assert torch.equal(model(x), before)
        with oftfx.adapter_rows(model, ["a"] * 5):
            assert rel(model(x), before) < 1e-13
        with oftfx.adapter_rows(model, [None, "__base__", None, (), None]), oftfx.disable_adapters(model):
            plain = model(x)
        with oftfx.adapter_rows(model, [None, "__base__", None, (), None]):
            assert torch.equal(model(x), plain)
    assert not OPEN.any


@pytest.mark.parametrize("kind", LAYERS)
def test_a_base_row_is_the_bases_bit_for_bit(kind):
    model, x, _ = made(kind)
    with torch.no_grad():
        with oftfx.disable_adapters(model):
            plain = model(x)
        with oftfx.adapter_rows(model, ["b", None, "a", None, "b"]):
            assert torch.equal(model(x)[[1, 3]], plain[[1, 3]])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_the_sum_over_each_adapters_rows(kind, train):
    model, x, _ = made(kind)
    model.train(train)
    oftfx.set_adapter(model, ["a", "b"])
    skews = oftfx.adapter_parameters(model)
    inputs = [] if kind.startswith("embedding") else [x.requires_grad_()]
    weights = torch.randn_like(model(x))
    with oftfx.adapter_rows(model, NAMES):
        found = torch.autograd.grad((model(x) * weights).sum(), [*skews, *inputs])
    total = torch.zeros((), dtype=torch.float64)
    for row, chain in enumerate(ORDERED):
        oftfx.set_adapter(model, chain)
        total = total + (model(x[row : row + 1]) * weights[row : row + 1]).sum()
    oftfx.set_adapter(model, ["a", "b"])  # what does not act requires no gradient
    expected = torch.autograd.grad(total, [*skews, *inputs])
    for got, want in zip(found, expected, strict=True):
        assert rel(got, want) < 1e-12


@pytest.mark.parametrize("changes", [{}, {"share_input": True}], ids=["own", "shared"])
def test_layers_that_read_the_same_tensor(changes):
    torch.manual_seed(0)
    base, x = nn.Sequential(Group()).double(), torch.randn(5, 3, 8, dtype=torch.float64)
    model = oftfx.transform(base, {"*": OFT(4, **changes)}, adapter="a", example_inputs=(x,)).eval()
    oftfx.add_adapter(model, "b", {"*.k": OFT(4)})
    oftfx.set_adapter(model, ["a", "b"])
    for parameter in oftfx.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        wanted = []
        for row, chain in enumerate(ORDERED):
            oftfx.set_adapter(model, chain)
            wanted.append(model(x[row : row + 1]))
        for _ in range(2):
            with oftfx.adapter_rows(model, NAMES):
                assert rel(model(x), torch.cat(wanted, dim=1)) < 1e-13
            assert rel(model(x)[:, -1:], wanted[-1]) < 1e-13  # and what acts outside is as it was


def test_a_weight_that_a_larger_module_reads_needs_one_adapter_for_all():
    x = torch.randn(5, 3, 8)
    model = oftfx.transform(nn.Sequential(Read()), {"*inner*": OFT(4)}, adapter="a", example_inputs=(x,)).eval()
    nn.init.normal_(oftfx.adapter_parameters(model)[0], std=0.3)
    expected = model(x)
    with oftfx.adapter_rows(model, ["a"] * 5):
        assert torch.equal(model(x), expected)
    for _ in range(2):
        with (
            oftfx.adapter_rows(model, ["a", None, "a", "a", "a"]),
            pytest.raises(AdapterError, match=r"0\.inner.*: the forward of Read reads this weight and more than one"),
        ):
            model(x)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("linear", lambda x: x.flatten(0, 1), r"0: adapter_rows names 5 rows.*of size 5; got \(15, 8\)"),
        ("linear", lambda x: x.transpose(0, 1), r"got \(3, 5, 8\)"),
        ("linear, two axes", lambda x: x[0], r"got \(8,\)"),
        ("linear, weight", lambda x: x[:4], r"got \(4, 3, 8\)"),
        ("conv k=1, channels", lambda x: x[0], r"got \(8, 4, 4\)"),
        ("conv k=3", lambda x: x[0], r"got \(8, 4, 4\)"),
        ("embedding", lambda x: x.flatten(), r"got \(15, 8\)"),
    ],
)
def test_other_shapes_are_refused_by_name_and_leave_nothing(kind, change, message):
    model, x, _ = made(kind)
    before = model(x)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(AdapterError, match=message), oftfx.adapter_rows(model, NAMES):
        model(change(x))
    assert not OPEN.any
    assert torch.equal(model(x), before)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_as_many_channels_or_features_as_rows_are_no_batch():
    """Dimension 0 of an unbatched input has the size of the batch by chance."""
    with torch.no_grad():
        for layer, x in (
            (nn.Conv2d(8, 6, 3), torch.randn(8, 5, 5)),
            (nn.Conv2d(8, 6, 1), torch.randn(8, 5, 5)),
            (nn.Linear(8, 6), torch.randn(8)),
        ):
            model = adapted(nn.Sequential(layer))
            with oftfx.adapter_rows(model, ["a", "b"] * 4), pytest.raises(AdapterError, match="dimension 0"):
                model(x)


def test_dropout_is_drawn_in_training_and_not_in_eval():
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(64, 64, bias=False)), dropout=0.5)
    x = torch.eye(64).expand(2, 64, 64)
    with oftfx.adapter_rows(model.train(), ["a", None]):
        first, second = model(x), model(x)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    with oftfx.adapter_rows(model.eval(), ["a", None]):
        assert torch.equal(model(x), model(x))
