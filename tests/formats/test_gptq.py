"""GPTQ layers of gptqmodel and auto-gptq against the packages' own bytes and numbers, and as CPU kernels leave them."""

import copy
import importlib
import importlib.util
import io
import sys

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import FormatError, OftfxWarning
from oftfx.formats.gptq import make_gptq
from oftfx.formats.registry import format_named, format_of
from tests.reference import dense_rotation, randomize, rel

pytestmark = pytest.mark.needs("gptqmodel")
GPTQ = format_named("gptq")
WORDS = ("qweight", "qzeros", "scales")
KERNELS = ("TorchLinear", "TorchAtenLinear", "TorchCpuAvx512Linear")


def kernels(*names):
    skip = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX512-BF16")
    return [pytest.param(n, marks=skip) if "Avx512" in n else n for n in names]


def official(layer):
    """The package's own dequantization, (out, in)."""
    return type(layer).dequantize_weight(layer).T.float()


def bytes_of(layer):
    return {n: getattr(layer, n).clone() for n in (*WORDS, "g_idx")}


def same_bytes(layer, before):
    return all(torch.equal(getattr(layer, n), b) and getattr(layer, n).dtype == b.dtype for n, b in before.items())


def packed_by_the_package(layer):
    """A fresh layer into which gptqmodel packs the same values, scales and zeros."""
    weight, coded = official(layer), GPTQ.codes(layer)
    rows = len(weight)
    zeros = torch.full_like(coded.scale, 2 ** (layer.bits - 1)) if coded.zero is None else coded.zero
    linear = nn.Linear(*reversed(weight.shape), bias=layer.bias is not None).requires_grad_(False)
    linear.weight.data = weight
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    fresh = type(layer)(
        bits=layer.bits, group_size=layer.requested_group_size, sym=layer.sym, desc_act=layer.desc_act,
        in_features=layer.in_features, out_features=layer.out_features, bias=layer.bias is not None,
        format=layer.format,
    )  # fmt: skip
    fresh.pack_original(linear, coded.scale.view(rows, -1), zeros.view(rows, -1), layer.g_idx)
    return fresh


CASES = [
    *[(b, (96, 64), 32) for b in range(2, 9)],
    *[(b, (256, 128), -1) for b in (2, 3, 4, 5, 8)],
    *[(b, (100, 33), 32) for b in (2, 4, 8)],  # the last group, the last words of both packings are short
    (4, (33, 5), 16),
    (8, (64, 3), 64),
    (3, (96, 32), 64),
]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("bits", "shape", "group"), CASES, ids=str)
def test_bytes_and_values_are_those_of_the_package(bits, shape, group, sym, desc_act):
    layer = make_gptq(nn.Linear(*shape), bits=bits, group_size=group, sym=sym, desc_act=desc_act)
    assert layer.scales.dtype == torch.float16
    before, weight = bytes_of(layer), official(layer)
    assert torch.equal(GPTQ.dequantize(layer), weight)
    assert same_bytes(packed_by_the_package(layer), before)
    GPTQ.write(layer, GPTQ.requantize(weight, layer))
    assert same_bytes(layer, before)
    x = torch.randn(3, shape[0])
    for mode in (True, False):
        with torch.no_grad():
            got = layer.train(mode)(x)
        assert rel(got, x.double() @ weight.double().T + layer.bias.double()) < 1e-6


@pytest.mark.parametrize("desc_act", [False, True])
def test_three_bits_in_planes(desc_act):
    from gptqmodel.quantization import FORMAT

    layer = make_gptq(nn.Linear(96, 64), bits=3, desc_act=desc_act, format=FORMAT.GPTQ_P)
    assert layer.planar
    assert torch.equal(GPTQ.dequantize(layer), official(layer))
    assert same_bytes(packed_by_the_package(layer), bytes_of(layer))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_as_good_as_the_packages(bits):
    """Against plain rounding of each group's range, worked out here."""
    linear = nn.Linear(256, 128)
    groups = linear.weight.detach().view(128, 8, 32)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    rounded = (((groups / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).flatten(1)
    got = GPTQ.dequantize(make_gptq(linear, bits=bits))
    assert rel(got, linear.weight) < 1.01 * rel(rounded, linear.weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_saturate_and_zeros_fit_files_of_version_1(bits):
    """Weights far outside the old range, and groups of one sign only."""
    layer = make_gptq(nn.Linear(64, 32), bits=bits)
    weight = torch.rand(32, 64) + 3.0
    weight[::2] *= -1
    weight[5] = 0
    GPTQ.write(layer, GPTQ.requantize(weight, layer))
    zeros = GPTQ.codes(layer).zero
    assert zeros.min() >= 1
    assert zeros.max() <= 2**bits - 1
    assert torch.isfinite(official(layer)).all()
    # One sign only: the whole range from 0 is spread over the levels above or below the zero.
    half_step, float16 = 4.0 / (2**bits - 2) / 2, 4.0 * 2**-11
    assert (official(layer) - weight).abs().max() <= 1.001 * half_step + float16
    assert torch.equal(official(layer)[5], weight[5])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_compensated_rounding_beats_nearest_on_new_inputs(bits, sym, desc_act):
    layer = make_gptq(nn.Linear(128, 64), bits=bits, sym=sym, desc_act=desc_act)
    mix = torch.randn(128, 128) * torch.rand(128)
    seen, new = torch.randn(1024, 128) @ mix, torch.randn(256, 128) @ mix
    weight = torch.randn(64, 128) * 0.05

    def error(state):
        GPTQ.write(layer, state)
        return rel(new @ official(layer).T, new @ weight.T)

    order = layer.g_idx.clone()
    nearest = error(GPTQ.requantize(weight, layer))
    assert error(GPTQ.calibrate(weight, layer, seen.T @ seen)) < 0.85 * nearest
    assert torch.equal(layer.g_idx, order)
    if sym:
        assert GPTQ.codes(layer).zero is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_of_the_scales(dtype):
    layer = make_gptq(nn.Linear(96, 64), desc_act=True).to(dtype)
    assert GPTQ.dtype(layer) == dtype
    assert torch.equal(GPTQ.dequantize(layer), official(layer))
    before = bytes_of(layer)
    GPTQ.write(layer, GPTQ.requantize(GPTQ.dequantize(layer), layer))
    assert same_bytes(layer, before)


@pytest.mark.parametrize("kernel", kernels(*KERNELS))
def test_a_forward_uses_what_was_written_last(kernel):
    layer, x = make_gptq(nn.Linear(64, 32), kernel=kernel, desc_act=True).eval(), torch.randn(3, 64)
    for _ in range(3):
        GPTQ.write(layer, GPTQ.requantize(torch.randn(32, 64), layer))
        with torch.no_grad():
            assert rel(layer(x), x @ GPTQ.dequantize(layer).T + layer.bias) < 1e-6


def test_groups_of_different_sizes_are_read_but_not_rounded():
    layer = make_gptq(nn.Linear(96, 64))
    layer.g_idx[:3] = 1
    layer.g_idx[-5:] = -1  # as some packers write the last group
    assert torch.equal(GPTQ.dequantize(layer), official(layer))
    with pytest.raises(FormatError, match="does not put 32 columns into each group"):
        GPTQ.requantize(GPTQ.dequantize(layer), layer)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)})).eval()
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert rel(oftfx.fold(model, quantized="keep").model(x), model(x)) < 1e-6
    ours = make_gptq(nn.Linear(96, 64))
    ours.g_idx[64:] = -1
    assert torch.equal(GPTQ.requantize(GPTQ.dequantize(ours), ours)["qweight"], ours.qweight)


def test_what_is_no_site():
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantEmbeddings

    embedding = TorchQuantEmbeddings(
        bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=32, bias=False
    )
    assert format_of(embedding) is None
    layer = make_gptq(nn.Linear(64, 32))
    layer.adapter = object()
    assert format_of(layer) is None


def test_sites_without_a_weight_parameter_keep_their_place_in_a_recording():
    model = nn.Sequential(nn.Linear(32, 64), make_gptq(nn.Linear(64, 32)), nn.Linear(32, 32))
    plan = oftfx.plan(model, {"*": OFT(16)}, example_inputs=(torch.randn(2, 32),))
    assert [e.fqn for e in plan] == ["0", "1", "2"]


def test_on_the_meta_device():
    layer = make_gptq(nn.Linear(64, 32)).to("meta")
    assert GPTQ.matches(layer)
    assert (GPTQ.geometry(layer).in_features, GPTQ.geometry(layer).out_features) == (64, 32)
    assert GPTQ.dtype(layer) == torch.float16


def test_the_unused_end_of_the_words_stays():
    """A loader that counts zeros of version 1 up also counts up what no row uses."""
    layer = make_gptq(nn.Linear(64, 36))
    layer.qzeros[:, -1] |= 0x1111 << 16
    before = bytes_of(layer)
    GPTQ.write(layer, GPTQ.requantize(official(layer), layer))
    assert same_bytes(layer, before)


def test_buffers_packed_in_inference_mode_are_replaced_not_written():
    layer = make_gptq(nn.Linear(64, 32))
    with torch.inference_mode():
        for name in WORDS:
            setattr(layer, name, getattr(layer, name).clone())
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)})).train()
    model(torch.randn(3, 64)).sum().backward()
    assert model[0].oft.default.skew.grad.any()
    before = bytes_of(layer)
    folded = oftfx.fold(model, quantized="requantize").model[0]
    assert same_bytes(layer, before)
    assert not torch.equal(folded.qweight, layer.qweight)


# ---------------------------------------------------------------------------------------------------------------------
# What the CPU kernels do to a layer.

KINDS = [{"sym": s, "desc_act": d} for s in (False, True) for d in (False, True)]


def repack(layer, dtype):
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, layer.in_features).to(dtype))
    assert layer._cpu_transformed


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(256, 128), (192, 320), (128, 96), (96, 32)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        *[pytest.param(*p.values, torch.bfloat16, marks=p.marks) for p in kernels("TorchCpuAvx512Linear")],
        ("TorchAtenLinear", torch.float16),
        ("TorchAtenLinear", torch.bfloat16),
    ],
)
def test_a_repacked_layer_is_read_and_undone(kernel, dtype, shape, kind):
    layer = make_gptq(nn.Linear(*shape), kernel=kernel, **kind)
    layer.scales[0, 3] = 0
    weight, before, bias = official(layer), bytes_of(layer), layer.bias.clone()
    repack(layer, dtype)
    lossy = kernel == "TorchAtenLinear" and dtype == torch.bfloat16
    assert GPTQ.matches(layer)
    assert GPTQ.dtype(layer) == torch.float16
    assert rel(GPTQ.dequantize(layer), weight) < (3e-3 if lossy else 1e-9)
    assert "gives no gradients" in GPTQ.native_fault(layer)
    requantized = GPTQ.requantize(GPTQ.dequantize(layer), layer)
    state = GPTQ.read(layer)

    notice = GPTQ.prepare(layer)
    assert (notice is not None) == lossy
    for name, value in before.items():
        now = getattr(layer, name)
        assert now.dtype == value.dtype
        if name == "scales" and lossy:
            assert rel(now, value) < 3e-3
        elif name == "qzeros" and "Aten" in kernel:  # where the scale is 0 the kernel keeps no zero
            now[0, 0] = value[0, 0]
            assert torch.equal(now, value)
        else:
            assert torch.equal(now, value), name
        if name != "g_idx":
            assert requantized[name].dtype == value.dtype
    assert torch.equal(layer.bias, bias)
    assert layer.bias.dtype == bias.dtype
    assert torch.equal(requantized["qweight"], layer.qweight)
    assert GPTQ.prepare(layer) is None
    assert GPTQ.native_fault(layer) is None

    x = torch.randn(3, shape[0], requires_grad=True)
    layer.train()(x).sum().backward()
    assert rel(x.grad, GPTQ.dequantize(layer).sum(0).expand(3, -1)) < 1e-6
    GPTQ.write(layer, state)  # also back into the kernel's packing
    assert layer._cpu_transformed
    assert layer.linear_mode == "inference"


@pytest.mark.parametrize("kernel", kernels(*KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_eval_train_and_fold(kernel, dtype):
    """In every dtype, the original running its own kernel beside."""
    layer = make_gptq(nn.Linear(256, 128), kernel=kernel, desc_act=True)
    base = nn.Sequential(layer, nn.PReLU(init=1.0, dtype=dtype)).eval()  # which says what dtype the model computes in
    weight, before = official(layer).double(), bytes_of(layer)
    model = randomize(oftfx.transform(base, {"0": OFT(32)}))
    x = torch.randn(4, 256, dtype=dtype)
    with torch.no_grad():
        base(x)
    rotation = dense_rotation(model[0].oft.default.skew, 32)
    expected = x.double() @ (weight @ rotation.T).T + layer.bias.double()
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    with torch.no_grad():
        assert rel(model.eval()(x), expected) < bound
    assert rel(model.train()(x), expected) < bound
    model(x).float().sum().backward()
    assert model[0].oft.default.skew.grad.abs().sum() > 0
    with torch.no_grad():
        for policy, extra in [("keep", 0), ("float", 0), ("requantize", 0.12)]:
            folded = oftfx.fold(model, quantized=policy).model.eval()
            assert rel(folded(x), expected) < bound + extra
    assert same_bytes(model[0], before)
    assert same_bytes(oftfx.unfold(oftfx.fold(model, quantized="requantize"))[0], before)


@pytest.mark.parametrize("kernel", kernels("TorchAtenLinear", "TorchCpuAvx512Linear"))
def test_transforming_a_repacked_base_keeps_both_right(kernel):
    layer = make_gptq(nn.Linear(256, 128), kernel=kernel)
    weight = official(layer)
    base = nn.Sequential(layer)
    repack(layer, torch.bfloat16)
    if kernel == "TorchAtenLinear":
        with pytest.warns(OftfxWarning, match="rounded its scales"):
            model = oftfx.transform(base, {"0": OFT(32)})
    else:
        model = oftfx.transform(base, {"0": OFT(32)})
    randomize(model).train()
    x = torch.randn(4, 256)
    expected = x.double() @ (weight.double() @ dense_rotation(model[0].oft.default.skew, 32).T).T + layer.bias.double()
    assert rel(model(x), expected) < (3e-3 if kernel == "TorchAtenLinear" else 1e-6)
    with torch.no_grad():
        assert rel(base(x.bfloat16()), x @ weight.T + layer.bias.float()) < 1e-2
    assert layer._cpu_transformed


def test_a_layer_that_repacked_in_vain_is_refused():
    """Its kernel takes no such group: the first eval forward fails, after it has replaced the buffers."""
    layer = make_gptq(nn.Linear(100, 32), kernel="TorchAtenLinear").eval()
    with pytest.raises(RuntimeError, match="int4pack"), torch.no_grad():
        layer(torch.randn(2, 100).half())
    with pytest.raises(FormatError, match="cannot be read any more: load the layer again"):
        GPTQ.dequantize(layer)
    layer = make_gptq(nn.Linear(96, 32), group_size=96, kernel="TorchAtenLinear").eval()
    weight = official(layer)
    with pytest.raises(RuntimeError, match="int4pack"), torch.no_grad():
        layer(torch.randn(2, 96).half())
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}))  # which brings this one back to life
    with torch.no_grad():
        model(torch.randn(2, 96).half())
    assert torch.equal(GPTQ.dequantize(model[0]), weight)


def test_a_recording_repacks_nothing():
    layer = make_gptq(nn.Linear(64, 32), kernel="TorchAtenLinear")
    before = bytes_of(layer)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    oftfx.plan(nn.Sequential(layer).eval(), {"0": OFT(16)}, example_inputs=(x,))
    assert same_bytes(layer, before)
    assert layer.linear_mode is None
    GPTQ.hold_still(layer)()
    assert layer.linear_mode is None


@pytest.mark.parametrize("kernel", kernels("TorchCpuAvx512Linear"))
def test_training_mode_of_a_kernel_that_refuses_it(kernel):
    layer = make_gptq(nn.Linear(64, 32), kernel=kernel)
    with pytest.raises(NotImplementedError):
        layer.train()
    model = oftfx.transform(nn.Sequential(layer), {"0": OFT(16)}).train()
    assert model[0].training
    assert not model.eval()[0].training
    twin = copy.deepcopy(model).train()
    assert twin[0].training
    assert not model[0].training
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False).train()
    assert again[0].training
    assert not model[0].training
    with pytest.raises(NotImplementedError):
        layer.train()  # the original is as it was


def test_a_compiled_dequantization_reads_no_other_layers_weight():
    """As after `from_pretrained`: the compiled function hangs on the layer and stays bound to it in copies."""
    layer = make_gptq(nn.Linear(64, 32))
    vars(layer)["dequantize_weight"] = lambda num_itr=1: type(layer).dequantize_weight(layer, num_itr=num_itr)
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)})).eval()
    folded = oftfx.fold(model, quantized="requantize").model
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert rel(folded(x), x @ GPTQ.dequantize(folded[0]).T + layer.bias) < 1e-6
        assert torch.equal(layer(x), x @ official(layer).T + layer.bias)
    assert not torch.equal(folded[0].qweight, layer.qweight)


# ---------------------------------------------------------------------------------------------------------------------
# auto-gptq, whose package does not import any more beside a current transformers; its layers do.


def auto_gptq(kernel):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("auto_gptq", "auto_gptq.nn_modules"):
            spec = importlib.util.find_spec(name)
            patch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
        return importlib.import_module(f"auto_gptq.nn_modules.qlinear.{kernel}").QuantLinear


def pack_auto(kernel, bits, *, desc_act=False, sym=False, dtype=torch.float32, shape=(96, 64), group=32):
    """Packed by auto-gptq from scales and zeros that are worked out here."""
    columns, rows = shape
    linear = nn.Linear(*shape).to(dtype)
    group = columns if group == -1 else group
    g_idx = torch.arange(columns, dtype=torch.int32) // group
    if desc_act:
        g_idx = g_idx[torch.randperm(columns)]
    scales, zeros = torch.empty(rows, columns // group), torch.empty(rows, columns // group)
    for g in range(columns // group):
        part = linear.weight.detach().float()[:, g_idx == g]
        low, high = part.amin(1), part.amax(1)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, g] = (high - low) / (2**bits - 1)
        zeros[:, g] = 2 ** (bits - 1) if sym else (-low / scales[:, g]).round().clamp(1, 2**bits - 1)
    layer = auto_gptq(kernel)(bits, group, columns, rows, True, weight_dtype=dtype)
    layer.g_idx = g_idx
    # The package does not clamp codes: give it weights that are on the grid already.
    index = g_idx.long()
    codes = (linear.weight.detach().float() / scales[:, index] + zeros[:, index]).round().clamp(0, 2**bits - 1)
    linear.weight.data = ((codes - zeros[:, index]) * scales[:, index]).to(dtype)
    layer.pack(linear, scales.to(dtype), zeros.clone().to(dtype), g_idx)
    return layer, ((codes - zeros[:, index]) * scales[:, index])


AUTO = [("qlinear_cuda_old", False), ("qlinear_cuda", False), ("qlinear_cuda", True)]  # the old one has no act-order


@pytest.mark.needs("auto_gptq")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("kernel", "desc_act"), AUTO)
@pytest.mark.parametrize(("shape", "group"), [((96, 64), 32), ((96, 96), 24), ((128, 32), -1)], ids=str)
def test_auto_gptq_layers(kernel, desc_act, bits, sym, shape, group):
    layer, weight = pack_auto(kernel, bits, desc_act=desc_act, sym=sym, shape=shape, group=group)
    assert format_of(layer) is GPTQ
    x = torch.randn(5, shape[0])
    with torch.no_grad():
        own = layer(torch.eye(shape[0])) - layer.bias
        assert rel(layer(x), x.double() @ GPTQ.dequantize(layer).double().T + layer.bias) < 1e-6
    assert rel(GPTQ.dequantize(layer), weight) < 1e-6
    assert rel(GPTQ.dequantize(layer), own.T) < 1e-6
    before = bytes_of(layer)
    GPTQ.write(layer, GPTQ.requantize(GPTQ.dequantize(layer), layer))
    assert same_bytes(layer, before)

    # Whatever is written is read by the layer itself as it was meant, also for groups of one sign.
    target = torch.randn(weight.shape) * 0.05
    target[::3] = target[::3].abs()
    GPTQ.write(layer, GPTQ.requantize(target, layer))
    with torch.no_grad():
        assert rel(layer(torch.eye(shape[0])) - layer.bias, GPTQ.dequantize(layer).T) < 1e-6
    assert torch.equal(layer.g_idx, before["g_idx"])
    if sym:
        assert torch.equal(layer.qzeros, before["qzeros"])


@pytest.mark.needs("auto_gptq")
def test_the_old_kernel_looks_at_no_g_idx():
    layer, weight = pack_auto("qlinear_cuda_old", 4)
    layer.g_idx = layer.g_idx.flip(0)
    with torch.no_grad():
        assert rel((layer(torch.eye(96)) - layer.bias).T, weight) < 1e-6
    assert rel(GPTQ.dequantize(layer), weight) < 1e-6


@pytest.mark.needs("auto_gptq")
@pytest.mark.parametrize(("kernel", "desc_act"), AUTO)
def test_auto_gptq_trains_and_folds(kernel, desc_act):
    layer, _ = pack_auto(kernel, 4, desc_act=desc_act)
    weight = GPTQ.dequantize(layer).double()
    model = randomize(oftfx.transform(nn.Sequential(layer), {"0": OFT(16)})).train()
    x = torch.randn(4, 96)
    expected = x.double() @ (weight @ dense_rotation(model[0].oft.default.skew, 16).T).T + layer.bias.double()
    assert rel(model(x), expected) < 1e-6
    model(x).sum().backward()
    assert model[0].oft.default.skew.grad.any()
    result = oftfx.fold(model, quantized="requantize")
    with torch.no_grad():
        assert rel(result.model(x), expected) < 0.12
    assert same_bytes(oftfx.unfold(result)[0], bytes_of(layer))


@pytest.mark.needs("auto_gptq")
@pytest.mark.parametrize(("kernel", "kept"), [("qlinear_cuda_old", 0), ("qlinear_cuda", 16)])
def test_a_stored_15_is_what_the_kernel_makes_of_it(kernel, kept):
    """The one number in which auto-gptq's own kernels differ."""
    layer, _ = pack_auto(kernel, 4)
    layer.qzeros.fill_(-1)
    assert (GPTQ.codes(layer).zero == kept).all()
    with torch.no_grad():
        own = layer(torch.eye(96)) - layer.bias
    assert rel(GPTQ.dequantize(layer), own.T) < 1e-6
    before = bytes_of(layer)
    GPTQ.write(layer, GPTQ.requantize(GPTQ.dequantize(layer), layer))
    assert same_bytes(layer, before)
