"""On an accelerator: the package's own kernel forward, the exact product backward. The kernels here only play one."""

import copy
import types

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxError
from oftfx.formats import exact
from oftfx.formats.dense import Dense
from oftfx.formats.exact import choose_kernel, is_exact, is_fast
from oftfx.formats.registry import _formats, register_format
from tests.reference import dense_rotation, randomize, rel

IN, OUT = 32, 16


class Kernel(nn.Linear):
    """A layer of a package whose kernel gives no gradients, and rounds to 16 bits, by which it is known here."""

    def forward(self, x):
        Kernel.calls += 1
        with torch.no_grad():
            return super().forward(x).half().to(x.dtype)


class Played(Dense):
    name, lossless = "played", False
    fault: str | None = "its kernel gives no gradients"
    right = True
    moves = False

    def matches(self, module):
        return type(module) is Kernel

    def native_fault(self, module):
        return self.fault

    def forward_is_right(self, module):
        return self.right

    def fault_depends_on_device(self, module):
        return self.moves


@pytest.fixture
def played(monkeypatch):
    Kernel.calls = 0
    found = register_format(Played())
    monkeypatch.setattr(exact, "accelerates", lambda device: True)
    yield found
    del _formats["played"]


def make(spec=None):
    torch.manual_seed(0)
    model = oftfx.transform(nn.Sequential(Kernel(IN, OUT)), {"0": spec or OFT(8)})
    return randomize(model, std=0.1).train()


def run(model):
    torch.manual_seed(1)
    x, upstream = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    y = model(x)
    (y * upstream).sum().backward()
    rotation = dense_rotation(model[0].oft.default.skew.detach(), 8)
    weight, bias = model[0].weight.double(), model[0].bias.double()
    rotated = x.detach().double() @ rotation @ weight.T + bias
    return y, rotated, x.grad, upstream.double() @ weight @ rotation.T


def test_forward_is_the_kernels_and_backward_exact(played):
    model = make()
    assert is_exact(model[0])
    assert is_fast(model[0])
    (entry,) = oftfx.plan(nn.Sequential(Kernel(IN, OUT)), {"0": OFT(8)})
    assert "runs its own kernel forward and multiplies exactly backward" in " ".join(entry.notes)
    y, expected, grad, wanted = run(model)
    assert Kernel.calls == 1
    assert torch.equal(y, y.half().float())
    assert rel(y, expected) < 1e-3
    assert rel(grad, wanted) < 1e-6
    assert model[0].oft.default.skew.grad.any()
    with torch.no_grad():
        model(torch.randn(2, IN))
    assert Kernel.calls == 2


def test_the_device_of_the_input_decides(played, monkeypatch):
    model = make()
    monkeypatch.setattr(exact, "accelerates", lambda device: False)
    y, expected, grad, wanted = run(model)
    assert Kernel.calls == 0
    assert rel(y, expected) < 1e-6
    assert rel(grad, wanted) < 1e-6
    monkeypatch.setattr(exact, "accelerates", lambda device: True)
    run(model)
    assert Kernel.calls == 1
    monkeypatch.setattr(played, "fault", None)  # moved to where nothing is wrong with it
    with torch.no_grad():
        model(torch.randn(5, IN))
    assert Kernel.calls == 2
    monkeypatch.setattr(played, "fault", "its kernel rounds")
    monkeypatch.setattr(played, "right", False)
    y, expected, *_ = run(model)
    assert Kernel.calls == 2
    assert rel(y, expected) < 1e-6


def on(device, played, monkeypatch, faults):
    """As after ``model.to(device)``."""
    monkeypatch.setattr(exact, "accelerates", lambda _: device == "cuda")
    monkeypatch.setattr(played, "fault", faults.get(device))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_model_that_moves_to_where_its_kernel_gives_no_gradients(here, there, right, played, monkeypatch):
    faults = {there: "its kernel gives no gradients"}
    monkeypatch.setattr(played, "moves", True)
    monkeypatch.setattr(played, "right", right)
    on(here, played, monkeypatch, faults)
    model = make()
    (entry,) = oftfx.plan(nn.Sequential(Kernel(IN, OUT)), {"0": OFT(8)})
    assert (entry.kernel, entry.notes) == ("native", ())
    moved = copy.deepcopy(model), oftfx.unfold(oftfx.fold(model, quantized="keep"))
    for each in (model, *moved):
        on(here, played, monkeypatch, faults)
        Kernel.calls = 0
        with torch.no_grad():
            y = each(torch.ones(2, IN))
        assert Kernel.calls == 1  # its own, as without us
        assert torch.equal(y, y.half().float())
        on(there, played, monkeypatch, faults)
        Kernel.calls = 0
        y, expected, grad, wanted = run(each)
        assert rel(grad, wanted) < 1e-6
        assert each[0].oft.default.skew.grad.abs().max() > 0
        assert Kernel.calls == int(right)
        assert rel(y, expected) < (1e-3 if Kernel.calls else 1e-6)


def test_a_forward_of_its_own_that_was_asked_for_is_not_changed_where_it_moves(played, monkeypatch):
    monkeypatch.setattr(played, "moves", True)
    on("cpu", played, monkeypatch, {})
    model = make(OFT(8, kernel="native"))
    assert "forward" not in vars(model[0])
    oftfx.add_adapter(model, "second", {"0": OFT(8)})
    assert exact.is_own_anywhere(model[0])
    oftfx.add_adapter(model, "third", {"0": OFT(8, kernel="exact")})
    assert not exact.is_own_anywhere(model[0])
    run(model)
    assert Kernel.calls == 0
    oftfx.remove_adapter(model, "third")
    oftfx.remove_adapter(model, "second")
    oftfx.remove_adapter(model, "default")
    assert "forward" not in vars(model[0])


def test_what_is_asked_for_stays(played):
    model = make(OFT(8, kernel="exact"))
    assert is_exact(model[0])
    assert not is_fast(model[0])
    run(model)
    assert Kernel.calls == 0
    oftfx.add_adapter(model, "second", {"0": OFT(8)})
    assert not is_fast(model[0])
    fast = make()
    exact.use_exact(fast[0])  # as an export asks
    assert not is_fast(fast[0])


def test_copies_and_folds_that_come_undone_keep_it(played):
    model = make()
    for other in (copy.deepcopy(model), oftfx.unfold(oftfx.fold(model, quantized="keep"))):
        assert is_fast(other[0])
        Kernel.calls = 0
        y, expected, *_ = run(other)
        assert Kernel.calls == 1
        assert rel(y, expected) < 1e-3


@pytest.mark.needs("accelerate")
def test_beneath_accelerates_forward(played):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Seen(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.calls += 1
            return args, kwargs

    base = nn.Sequential(Kernel(IN, OUT))
    add_hook_to_module(base[0], Seen())
    model = randomize(oftfx.transform(base, {"0": OFT(8)}, inplace=True), std=0.1).train()
    y, expected, grad, wanted = run(model)
    assert (Kernel.calls, Seen.calls) == (1, 1)
    assert rel(y, expected) < 1e-3
    assert rel(grad, wanted) < 1e-6


@pytest.mark.parametrize("forward_on", ["cpu", "cuda"])
def test_which_layers_have_such_kernels(forward_on):
    awq, eetq, gptq = (_formats[n] for n in ("awq", "eetq", "gptq"))
    words = types.SimpleNamespace(is_cuda=forward_on == "cuda")

    def layer(name, module):
        made = type(name, (nn.Module,), {"__module__": module})()
        vars(made).update(qweight=words, autogptq_cuda_available=True)
        return made

    gemm = layer("WQLinear_GEMM", "awq.modules.linear.gemm")
    old = layer("QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_cuda")
    other = layer("AwqTorchLinear", "gptqmodel.nn_modules.qlinear.torch_awq")
    assert [awq.forward_is_right(gemm), gptq.forward_is_right(old)] == [forward_on == "cuda"] * 2
    assert (gptq.native_fault(old) is not None) == (forward_on == "cuda")
    assert gptq.fault_depends_on_device(old)
    assert not awq.fault_depends_on_device(gemm)
    assert not awq.forward_is_right(other)
    scaled = nn.Module()
    scaled._parameters["weight_scales"] = types.SimpleNamespace(device=torch.device(forward_on))
    assert eetq.forward_is_right(scaled) == (forward_on == "cuda")
    assert eetq.fault_depends_on_device(scaled)


UNREAD = [
    ("MarlinLinear", "gptqmodel.nn_modules.qlinear.marlin", "backend TORCH"),
    ("AwqMarlinLinear", "gptqmodel.nn_modules.qlinear.marlin_awq", "backend TORCH"),
    ("ExllamaV2Linear", "gptqmodel.nn_modules.qlinear.exllamav2", "backend TORCH"),
    ("QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_exllama", "use_exllama=False"),
    ("WQLinear_Marlin", "awq.modules.linear.marlin", "version 'gemm'"),
    ("WQLinear_ExllamaV2", "awq.modules.linear.exllamav2", "version 'gemm'"),
    ("HQQLinearTorchWeightOnlynt4", "hqq.backends.torchao", "prepare_for_inference"),
]


@pytest.mark.parametrize(("name", "module", "instead"), UNREAD, ids=[u[0] for u in UNREAD])
def test_what_cannot_be_read_names_what_to_load(name, module, instead):
    layer = type(name, (nn.Module,), {"__module__": module, "forward": lambda self, x: x})()
    layer.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))
    base = nn.Sequential(layer, nn.Linear(8, 8))
    plan = oftfx.plan(base, {"*": OFT(4)})
    (reason,) = [s.reason for s in plan.skipped if s.fqn == "0"]
    assert f"layers of class {name} cannot be rotated yet" in reason
    assert instead in reason
    with pytest.raises(OftfxError, match=f"0 .{name}.*cannot be rotated yet; .*{instead}"):
        oftfx.transform(base, {"0": OFT(4)})


def test_a_packed_weight_of_torchao():
    kind = type("Int4TilePackedTo4dTensor", (nn.Parameter,), {"__module__": "torchao.quantization.quantize_.workflows"})
    base = nn.Sequential(nn.Linear(8, 8))
    base[0]._parameters["weight"] = base[0].weight.as_subclass(kind)
    assert choose_kernel(base[0], "auto") == ("native", "")
    from oftfx.formats.unread import load_instead

    assert "IntxWeightOnlyConfig" in load_instead(base[0])
