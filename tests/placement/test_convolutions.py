"""Convolutions of any geometry: output, gradients and fold against patches and a dense rotation in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oftfx
from oftfx import OFT
from oftfx.placement.find import rotated_sites
from oftfx.placement.weight import RotateWeight
from tests.reference import dense_rotation, randomize, rel
from tests.zoo.dense import rotation as differentiable_rotation

PADDING_MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect", "replicate": "replicate"}


def patches(x, kernel, stride, dilation):
    """``(batch, channels, *kernel, *positions)`` of a padded input, by plain indexing."""
    spatial = x.shape[2:]
    counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(spatial, kernel, stride, dilation, strict=True)]
    parts = []
    for offset in itertools.product(*map(range, kernel)):
        index = [slice(None), slice(None)]
        for o, s, d, c in zip(offset, stride, dilation, counts, strict=True):
            index.append(slice(o * d, o * d + s * (c - 1) + 1, s))
        parts.append(x[tuple(index)])
    return torch.stack(parts, dim=2).unflatten(2, kernel)


def reference(conv, x, rotation):
    """The convolution as a product of rotated patches with its weight, in float64."""
    kernel, groups = conv.kernel_size, conv.groups
    x = x.double()
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, conv.dilation, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    else:
        pads = [(p, p) for p in conv.padding]
    flat = [p for pair in reversed(pads) for p in pair]
    x = F.pad(x, flat, mode=PADDING_MODES[conv.padding_mode]) if any(flat) else x
    columns = patches(x, kernel, conv.stride, conv.dilation)
    positions = columns.shape[2 + len(kernel) :]
    # (batch, groups, patch, positions): the same rotation for every group
    columns = columns.reshape(len(x), groups, -1, positions.numel())
    turned = torch.einsum("bgip,ij->bgjp", columns, rotation)
    weight = conv.weight.double().reshape(groups, conv.out_channels // groups, -1)
    out = torch.einsum("bgip,goi->bgop", turned, weight).reshape(len(x), conv.out_channels, *positions)
    return out if conv.bias is None else out + conv.bias.double().view(-1, *[1] * len(kernel))


def uncancelled(conv, x, rotation, batched):
    """The norm that the outputs would have if the terms of each sum had random signs.

    That is the norm they have, unless there are few and one nearly cancels: it has the rounding of its terms.
    """
    sizes = copy.deepcopy(conv).requires_grad_(False)
    for parameter in sizes.parameters():
        parameter.abs_()
    found = reference(sizes, x.abs(), rotation.abs())
    return (found if batched else found[0]).norm() / conv.weight[0].numel() ** 0.5


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    mode = draw(st.sampled_from([*PADDING_MODES]))
    same = draw(st.booleans()) and set(stride) == {1}
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(dims))
    conv = {
        "in_channels": groups * draw(st.integers(1, 4)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "padding_mode": mode,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    size = [draw(st.integers(5, 8)) for _ in range(dims)]
    length = conv["in_channels"] // groups * torch.Size(kernel).numel()
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    block = draw(st.sampled_from([d for d in divisors if d <= 32]))
    last = dims > 1 and draw(st.booleans())
    batched = draw(st.booleans())
    placement = draw(st.sampled_from(["auto", "activation"])) if set(kernel) == {1} else "auto"
    return conv, size, block, last, batched, placement


def test_torch_computes_a_wrong_weight_gradient_without_a_batch_in_channels_last():
    """Plain torch 2.13 on a CPU, grouped. Once this fails, `with_right_gradient` is not needed any more."""
    weight = torch.randn(2, 2, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
    x = torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last)
    alone, whole = (
        torch.autograd.grad(nn.functional.conv2d(given, weight, groups=2).sum(), weight)[0] for given in (x[0], x)
    )
    exact = nn.functional.unfold(x, 1).sum(-1).view(2, 2, 1, 1)
    assert rel(whole, exact) < 1e-6
    assert rel(alone, exact) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("named", [False, True])
def test_a_grouped_convolution_without_a_batch_in_channels_last_trains_right(dtype, named):
    layer = nn.Conv2d(4, 6, (1, 2), groups=2, bias=False).to(dtype, memory_format=torch.channels_last)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(2, placement="auto")}), std=0.3)
    x = torch.randn(1, 4, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)[0]
    (skew,) = oftfx.adapter_parameters(model)
    out = model[0](input=x) if named else model(x)
    pull = torch.randn_like(out)
    (out * pull).sum().backward()
    exact = skew.detach().double().requires_grad_()
    wanted = reference(layer, x[None], differentiable_rotation(exact, 2))[0]
    (wanted * pull.double()).sum().backward()
    assert rel(out, wanted) < 1e-6
    assert rel(skew.grad, exact.grad) < (1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(convolutions())
def test_output_gradients_and_fold_equal_dense_algebra(case):
    arguments, size, block, last, batched, placement = case
    dims = len(size)
    torch.manual_seed(0)
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](**arguments)
    memory = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims, torch.contiguous_format)
    base = nn.Sequential(layer)
    x = torch.randn(2, arguments["in_channels"], *size)
    if last:
        base, x = base.to(memory_format=memory), x.to(memory_format=memory)
    model = oftfx.transform(base, {"*": OFT(block, placement=placement)})
    given_x = x if batched else x[0]
    ((_, placed),) = rotated_sites(model)
    if isinstance(placed, RotateWeight):
        rotated = placed.rotated(placed.in_effect())
        assert torch.equal(rotated, layer.weight)
        assert rotated.stride() == layer.weight.stride()
    assert torch.equal(model(given_x), base.requires_grad_(False)(given_x))
    randomize(model, std=0.2)
    (skew,) = oftfx.adapter_parameters(model)
    blocks = skew.shape[0]
    rotation = dense_rotation(skew.detach(), block, blocks)
    expected = reference(layer, x, rotation)
    expected = expected if batched else expected[0]
    size_of_sums = max(expected.norm(), uncancelled(layer, x, rotation, batched))
    out = model(given_x)
    assert (out - expected).norm() < 1e-6 * size_of_sums
    if block > 1:
        pull = torch.randn_like(out)
        (out * pull).sum().backward()
        exact = skew.detach().double().requires_grad_()
        wanted = reference(layer, x, differentiable_rotation(exact, block))
        ((wanted if batched else wanted[0]) * pull.double()).sum().backward()
        # A sum that nearly cancels has the rounding of its terms, whose size is about that of <pull, out>.
        scale = max(exact.grad.norm(), pull.double().norm() * expected.norm() / expected.numel() ** 0.5)
        assert (skew.grad - exact.grad).norm() < 1e-6 * scale
        wide = oftfx.transform(copy.deepcopy(base).double(), {"*": OFT(block, placement=placement)})
        (parameter,) = oftfx.adapter_parameters(wide)
        with torch.no_grad():
            parameter.copy_(skew)
        (wide(given_x.double()) * pull.double()).sum().backward()
        assert (parameter.grad - exact.grad).norm() < 1e-13 * scale
    result = oftfx.fold(model)
    assert (result.model(given_x) - expected).norm() < 1e-6 * size_of_sums
    assert result.model[0].weight.stride() == layer.weight.stride()
    assert torch.equal(oftfx.unfold(result)(given_x), out)


@pytest.mark.parametrize("placement", ["weight", "activation"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_rotate_input_channels(dims, groups, placement):
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1]
    base = nn.Sequential(layer(12, 6, (3, 2, 1)[:dims], stride=2, padding=(1, 0, 0)[:dims], groups=groups))
    x = torch.randn(2, 12, *(4, 5, 3)[:dims])
    model = oftfx.transform(base, {"*": OFT(2, placement=placement)})
    assert torch.equal(model(x), base.requires_grad_(False)(x))
    randomize(model, std=0.2)
    rotation = dense_rotation(oftfx.adapter_parameters(model)[0].detach(), 2)
    turned = torch.einsum("bgi...,ij->bgj...", x.double().unflatten(1, (groups, -1)), rotation).flatten(1, 2)
    expected = nn.Sequential(layer(12, 6, (3, 2, 1)[:dims], stride=2, padding=(1, 0, 0)[:dims], groups=groups)).double()
    expected.load_state_dict({k: v.double() for k, v in base.state_dict().items()})
    assert rel(model(x), expected(turned)) < 1e-6
    assert rel(oftfx.fold(model).model(x), expected(turned)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    base = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1)).to(dtype)
    model = randomize(oftfx.transform(base, {"*": OFT(8)}), std=0.1)
    x = torch.randn(2, 8, 9, 7, dtype=dtype)
    skew = oftfx.adapter_parameters(model)[0].detach()
    assert skew.dtype == torch.float32
    expected = reference(base[0], x, dense_rotation(skew, 8))
    bound = {torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert rel(model(x), expected) < bound
    folded = oftfx.fold(model).model
    assert torch.equal(folded(x), model(x))  # the rotated weight is rounded in the same way on both roads
    weight = base[0].weight.double().flatten(1) @ dense_rotation(skew, 8).T
    assert rel(folded[0].weight.flatten(1), weight) < bound / 2


def test_the_rotated_weight_is_computed_once_in_eval_mode_and_follows_its_parameters():
    model = randomize(oftfx.transform(nn.Sequential(nn.Conv2d(4, 6, 3)), {"*": OFT(6)})).eval()
    x = torch.randn(1, 4, 6, 6)
    ((_, placement),) = rotated_sites(model)
    with torch.no_grad():
        model(x)
        kept = placement._cached[1]
        model(x)
        assert placement._cached[1] is kept
        for change in (lambda: oftfx.adapter_parameters(model)[0].mul_(2), lambda: model[0].weight.mul_(2)):
            before = model(x)
            change()
            assert rel(model(x), before) > 1e-3
            assert rel(oftfx.fold(model).model(x), model(x)) < 1e-6
    assert "weight" not in model[0].__dict__
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 6, 6))
    assert "weight" not in model[0].__dict__  # also after an error
