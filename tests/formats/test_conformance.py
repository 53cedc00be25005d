"""One suite for every registered format: whatever is registered is tested, a user's own as well."""

import copy

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from oftfx.formats.exact import choose_kernel, use_exact
from oftfx.formats.registry import format_of, formats
from oftfx.formats.scalar import ScalarFormat
from oftfx.rotation.spec import nearest_divisor
from tests.formats import eetq_kernel
from tests.reference import dense_rotation, randomize, rel

PACKAGES = {
    "dense": "torch",
    "bnb4": "bitsandbytes",
    "bnb8": "bitsandbytes",
    "hqq": "hqq",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "torchao": "torchao",
    "inc_woq": "neural_compressor",
    "hf_fp8": "transformers",
    "inc_fp8": "neural_compressor",
    "aqlm": "aqlm",
    "eetq": "transformers",
    "compressed_tensors": "compressed_tensors",
    "quanto": "optimum.quanto",
}
ROUNDS_ACTIVATIONS = {"bnb8": 0.02}
"""Formats whose own eval forward rounds activations as well, and how much of the output that is."""
SHAPES = [(256, 128), (192, 320), (64, 96)]  # (in, out)
AWKWARD = {
    "dense": (33, 7),
    "bnb4": (99, 5),
    "bnb8": (33, 5),
    "hqq": (96, 20),
    "gptq": (100, 33),
    "awq": (96, 72),
    "torchao": (96, 5),
    "inc_woq": (100, 33),
    "hf_fp8": (200, 72),
    "inc_fp8": (33, 5),
    "eetq": (192, 64),
    "aqlm": (72, 33),
    "compressed_tensors": (99, 5),
    "quanto": (99, 5),
}
"""The oddest shape (in, out) that each format's own package accepts, more or less."""
INSTEAD = {("eetq", (64, 96)): (64, 192)}
"""Shapes that a format cannot store, and what is tested instead."""
UNCOPYABLE = {"quanto"}
"""Formats whose layers ``copy.deepcopy`` cannot copy, with oftfx or without."""
KERNELS = {"eetq": eetq_kernel.install}
"""Formats whose kernel is not to be had for a CPU, and what puts a stand-in there."""


def mark(name):
    return pytest.param(name, marks=pytest.mark.needs(PACKAGES.get(name, "torch")))


@pytest.fixture(params=[mark(n) for n in formats()])
def weight_format(request):
    return formats()[request.param]


@pytest.fixture(params=[*SHAPES, "awkward"], ids=str)
def layer(request, weight_format, monkeypatch):
    torch.manual_seed(0)
    name = weight_format.name
    if name in KERNELS:
        KERNELS[name](monkeypatch)
    shape = (
        AWKWARD.get(name, (99, 5)) if request.param == "awkward" else INSTEAD.get((name, request.param), request.param)
    )
    return weight_format.make_tiny(*shape)


@pytest.fixture
def block(weight_format, layer):
    """A block size that divides."""
    return nearest_divisor(weight_format.geometry(layer).in_features, 16)


@pytest.fixture
def runnable(weight_format, layer):
    """Tests that run the layer itself."""
    if fault := weight_format.native_fault(layer):
        pytest.skip(f"its own forward is not used here: {fault}")


def own_product(module, x):
    """What the layer's own forward makes of x in training mode, where no runtime takes a shortcut."""
    mode = module.training
    module.train()
    with torch.enable_grad():
        out = module(x.clone().requires_grad_()).detach()
    module.train(mode)
    return out


def test_every_format_has_a_package_here():
    assert set(PACKAGES) == {n for n, f in formats().items() if type(f).__module__.startswith("oftfx.")}


def test_detection_and_geometry(weight_format, layer):
    assert format_of(layer) is weight_format
    shape = weight_format.geometry(layer)
    weight = weight_format.dequantize(layer)
    assert weight.shape == (shape.out_features, shape.in_features)
    assert weight.dtype == torch.float32
    weight.zero_()  # never a view of the layer's own
    assert weight_format.dequantize(layer).any()


@pytest.mark.usefixtures("runnable")
def test_dequantize_equals_the_layers_own_forward(weight_format, layer):
    x = torch.randn(5, weight_format.geometry(layer).in_features)
    expected = x.double() @ weight_format.dequantize(layer).double().T + layer.bias.double()
    assert rel(own_product(layer, x), expected) < 1e-6


def reload_dense(weight_format, layer):
    shape = weight_format.geometry(layer)
    fresh = weight_format.make_tiny(shape.in_features, shape.out_features)
    fresh.load_state_dict(layer.state_dict())
    return fresh


def reload_bnb4(weight_format, layer):
    """As transformers loads a saved 4-bit layer."""
    from bitsandbytes.nn import Params4bit

    fresh, state = copy.deepcopy(layer), layer.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    fresh.weight = Params4bit.from_prequantized(state["weight"], stats, device="cpu", module=fresh)
    return fresh


def reload_inc_fp8(weight_format, layer):
    """The package keeps the scale of a weight in no state_dict, so whoever loads one has to set it."""
    fresh = reload_dense(weight_format, layer)
    fresh.dequant_weights.scale = layer.dequant_weights.scale
    return fresh


RELOAD = {"bnb4": reload_bnb4, "inc_fp8": reload_inc_fp8}
"""Formats whose layers a state_dict alone does not bring back."""


def states(weight_format, layer):
    """The layer after everything that a runtime might do to it."""
    x = torch.randn(5, weight_format.geometry(layer).in_features)
    layer.eval()
    with torch.no_grad():
        layer(x)
    yield "eval forward", layer
    layer.train()
    layer(x.clone().requires_grad_()).sum().backward()
    yield "train forward", layer
    yield "to(cpu)", layer.to("cpu")
    yield "state_dict", RELOAD.get(weight_format.name, reload_dense)(weight_format, layer)
    if weight_format.name not in UNCOPYABLE:
        yield "deepcopy", copy.deepcopy(layer)


def test_a_prepared_layer_keeps_its_weight_through_everything(weight_format, layer):
    assert weight_format.prepare(layer) is None
    if choose_kernel(layer, "auto")[0] == "exact":
        use_exact(layer)
    before = weight_format.dequantize(layer)
    for name, module in states(weight_format, layer):
        assert torch.equal(weight_format.dequantize(module), before), name


def test_requantizing_an_unrotated_weight_changes_no_byte(weight_format, layer):
    before = weight_format.dequantize(layer)
    state = weight_format.read(layer)
    weight_format.write(layer, weight_format.requantize(before, layer))
    assert torch.equal(weight_format.dequantize(layer), before)
    weight_format.write(layer, state)
    now = weight_format.read(layer)
    assert all(now[name] is value for name, value in state.items())


def test_ten_random_rotations_cost_no_more_than_the_first_quantization(weight_format, layer):
    shape = weight_format.dequantize(layer).shape
    # Of a few hundred weights a single error says little: their means are compared.
    few = shape.numel() < 10_000
    first, again = [], []
    original = torch.randn(shape) * 0.05
    for _ in range(10):
        weight_format.write(layer, weight_format.requantize(original, layer))
        base = weight_format.dequantize(layer)
        first.append(rel(base, original))
        rotation, _ = torch.linalg.qr(torch.randn(shape[1], shape[1]))
        target = base @ rotation.T
        weight_format.write(layer, weight_format.requantize(target, layer))
        again.append(rel(weight_format.dequantize(layer), target))
        original = torch.randn(shape) * 0.05 if few else original
    if few:
        assert sum(again) <= max(1.05 * sum(first), 1e-6)
    else:
        assert max(again) <= max(1.05 * min(first), 1e-6)


def test_gradients_reach_the_rotation(weight_format, layer, block):
    base = nn.Sequential(layer)
    model = randomize(oftfx.transform(base, {"0": OFT(block)})).train()
    x = torch.randn(7, weight_format.geometry(layer).in_features)
    skew = model[0].oft.default.skew
    model(x).square().sum().backward()
    weight, bias = weight_format.dequantize(layer).double(), layer.bias.detach().double()

    def loss(values):
        return (x.double() @ dense_rotation(values, block) @ weight.T + bias).square().sum()

    for seed in range(3):  # derivatives along random directions, by central differences in float64
        direction = torch.randn(skew.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start, h = skew.detach().double(), 1e-5
        expected = float(loss(start + h * direction) - loss(start - h * direction)) / (2 * h)
        scale = float(skew.grad.double().norm() * direction.norm())
        assert abs(float((skew.grad.double() * direction).sum()) - expected) < 1e-5 * scale
    assert all(p.grad is None for n, p in model.named_parameters() if "oft" not in n)


def test_a_recorded_forward_leaves_the_layer_as_it_was(weight_format, layer, block):
    shape = weight_format.geometry(layer)
    base = nn.Sequential(nn.Linear(2 * block, shape.in_features), layer, nn.Linear(shape.out_features, 8))
    before = weight_format.dequantize(layer)
    attributes = {n: v for n, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    rules = {"*": OFT(block, on_indivisible="nearest")}
    model = oftfx.transform(base, rules, example_inputs=(torch.randn(3, 2 * block),))
    assert [fqn for fqn, _ in oftfx.placement.find.rotated_sites(model)] == ["0", "1", "2"]
    assert {n: v for n, v in vars(layer).items() if isinstance(v, torch.Tensor)} == attributes
    assert torch.equal(weight_format.dequantize(layer), before)
    assert torch.equal(weight_format.dequantize(model[1]), before)


@pytest.mark.filterwarnings("ignore:quantized='requantize' has nothing to do")
@pytest.mark.parametrize("policy", ["keep", "float", "requantize"])
def test_every_policy_against_the_dense_product(weight_format, layer, block, policy):
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(block)}), std=0.1).eval()
    weight = weight_format.dequantize(layer).double()
    target = weight @ dense_rotation(model[0].oft.default.skew, block).T
    x = torch.randn(5, target.shape[1])
    result = oftfx.fold(model, quantized=policy)
    (row,) = result.report
    expected = x.double() @ target.T + layer.bias.double()
    rounded = ROUNDS_ACTIVATIONS.get(weight_format.name, 0.0) if row.action != "dequantized" else 0.0

    def error_of(wanted):
        with torch.no_grad():
            return rel(result.model(x), wanted)

    if policy == "requantize" and not weight_format.lossless:
        folded = weight_format.dequantize(result.model[0])
        assert row.action == "requantized"
        assert error_of(x.double() @ folded.double().T + layer.bias.double()) < max(1e-5, rounded)
        assert row.relative_error == pytest.approx(rel(folded, target), rel=1e-3)
        update, arrived = (target - weight).flatten(), (folded.double() - weight).flatten()
        assert row.survival == pytest.approx(float(arrived @ update / (update @ update)), rel=1e-3)
        assert row.relative_error < 0.13
    else:
        assert error_of(expected) < max(2e-6, rounded)
        assert row.relative_error < 1e-7
        assert row.survival == pytest.approx(1.0, abs=1e-5)
    assert row.update == pytest.approx(rel(target, weight), rel=1e-4)
    assert row.bytes_before == weight_format.nbytes(layer)
    restored = oftfx.unfold(result)
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))


@pytest.mark.parametrize("how", ["requantize", "calibrate"])
def test_a_fold_writes_what_was_trained_through_it(weight_format, layer, block, how):
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(block)}), std=0.1)
    x = torch.randn(64, weight_format.geometry(layer).in_features)
    calibration = [(x,)] if how == "calibrate" else None
    if not isinstance(weight_format, ScalarFormat):
        with pytest.raises(FoldError, match=r"no code for each weight|float ones fold exactly"):
            oftfx.fold_aware(model, how, calibration=calibration)
        return
    oftfx.fold_aware(model, how, calibration=calibration)
    optimizer = torch.optim.Adam(oftfx.adapter_parameters(model), lr=3e-3)
    for _ in range(3):
        before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    ((_, placement),) = oftfx.placement.find.rotated_sites(model)
    trained = placement.fold_in_effect().values()
    y = model(x).detach()
    assert rel(y, x.double() @ trained.double().T + layer.bias.double()) < 1e-5
    result = oftfx.fold(model)
    (row,) = result.report
    assert (row.action, row.relative_error) == ("as trained", 0.0)
    assert torch.equal(weight_format.dequantize(result.model[0]), trained)
