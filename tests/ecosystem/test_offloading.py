"""Models that accelerate has placed on devices, or offloaded, before or after they were transformed."""

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

import oftfx
from oftfx import OFT
from oftfx.errors import FoldError
from oftfx.formats.exact import ExactForward, is_exact, use_exact, use_native
from oftfx.formats.registry import format_named
from oftfx.placement.find import rotated_sites
from oftfx.placement.group import InputGroup
from tests.reference import randomize, rel

pytestmark = pytest.mark.needs("transformers", "accelerate")

RULES = {"all-linear": OFT(8)}


@pytest.fixture(params=["cpu", "disk"])
def offload(request, tmp_path):
    from accelerate import cpu_offload, disk_offload

    if request.param == "cpu":
        return lambda model: cpu_offload(model, execution_device="cpu")
    return lambda model: disk_offload(model, tmp_path / "weights", execution_device="cpu")


def adapted(model):
    torch.manual_seed(1)
    return randomize(oftfx.transform(model, RULES), std=0.1)


def gradients(model, batch):
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return [p.grad for p in oftfx.adapter_parameters(model)]


@pytest.mark.parametrize("order", ["offloaded before", "offloaded after"])
def test_an_offloaded_model_computes_and_trains_as_one_that_is_not(order, offload, tiny_llama, ids, tmp_path):
    whole = adapted(tiny_llama())
    if order == "offloaded before":
        base = tiny_llama()
        offload(base)
        model = adapted(base)
    else:
        model = adapted(tiny_llama())
        offload(model)
    assert all(p.is_meta for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
    assert {p.device.type for p in oftfx.adapter_parameters(model)} == {"cpu"}
    for mode in (True, False):
        whole.train(mode), model.train(mode)
        with torch.no_grad():
            assert rel(model(**ids()).logits, whole(**ids()).logits) < 1e-6
    assert all(rel(a, b) < 1e-5 for a, b in zip(gradients(model, ids()), gradients(whole, ids()), strict=True))
    optimiser = torch.optim.SGD(oftfx.adapter_parameters(model), lr=0.1)
    before = model(**ids()).logits
    optimiser.step()
    assert rel(model(**ids()).logits, before) > 1e-4  # what was learnt is there in the next forward
    oftfx.save_adapter(model, tmp_path / "adapter")
    assert rel(oftfx.load_adapter(tiny_llama(), tmp_path / "adapter")(**ids()).logits, model(**ids()).logits) < 1e-6


def test_a_fold_of_an_offloaded_weight_is_refused(offload, tiny_llama, ids):
    model = adapted(tiny_llama())
    wanted = model(**ids()).logits
    offload(model)
    for inplace in (False, True):
        with pytest.raises(FoldError, match=r"q_proj: accelerate has offloaded this weight.*device_map='cpu'"):
            oftfx.fold(model, inplace=inplace)
        assert rel(model(**ids()).logits, wanted) < 1e-6


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("order", ["exact before", "exact after"])
def test_an_exact_layer_runs_inside_accelerates_forward(order):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    layer, hook, x = format_named("bnb8").make_tiny(64, 32), Counts(), torch.randn(3, 64)
    native = layer(x)
    if order == "exact before":
        use_exact(layer)
        add_hook_to_module(layer, hook)
    else:
        add_hook_to_module(layer, hook)
        use_exact(layer)
    assert is_exact(layer)
    exact = layer(x)
    assert hook.calls == 1
    assert torch.equal(exact, ExactForward(layer, format_named("bnb8"))(x))
    assert not torch.equal(exact, native)  # LLM.int8 rounds its inputs
    use_native(layer)
    assert not is_exact(layer)
    assert torch.equal(layer(x), native)
    assert hook.calls == 2
    use_exact(layer)
    remove_hook_from_module(layer)
    assert is_exact(layer)
    assert torch.equal(layer(x), exact)
    assert hook.calls == 2


class Branches(nn.Module):
    """Two layers that read the same, on two devices."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        h = self.a(x)
        return self.b(h).to(x.device) + self.c(h).to(x.device)


@pytest.mark.parametrize("training", [True, False])
def test_rotations_act_where_accelerate_brings_the_input(training):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    places = {"a": "cuda:0", "b": "cuda:1", "c": "cuda:0"}
    model = oftfx.transform(Branches(), {"*": OFT(4, init="normal")}).train(training)
    sites, group = dict(rotated_sites(model)), InputGroup("b")
    for name in "bc":
        sites[name].join(group)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # tensors without numbers, but with devices
        for name, layer in model.named_children():
            for module in layer.modules():
                for key, old in list(module._parameters.items()):
                    module._parameters[key] = nn.Parameter(torch.empty(old.shape, device=places[name]))
            add_hook_to_module(layer, AlignDevicesHook(execution_device=places[name]))
        y = model(torch.empty(30, 8, device="cuda:0"))
        assert (tuple(y.shape), str(y.device)) == ((30, 6), "cuda:0")
