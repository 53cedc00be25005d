"""Forwards that wait for each other: order, what each layer sees, and how they end."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.errors import FoldError
from oftfx.folding.lockstep import Lockstep
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.formats.registry import format_of
from oftfx.passes.quantized.roundings import best_rounding
from oftfx.placement.find import rotated_sites
from tests.quantized import NAMES, inputs, rotated, rotations, run, weight
from tests.reference import rel

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class Net(nn.Module):
    """Two readers of one tensor, a residual, a layer called twice and one never called."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(6, 6)
        self.last, self.twice, self.right, self.left = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, *, scale=1.0):
        y = torch.tanh(self.left(x)) * self.right(x) + x
        y = y + self.twice(y)
        y = y + self.twice(torch.sin(y))
        return self.last(input=y) * scale


LAYERS = ("unused", "last", "twice", "right", "left")


def batches():
    return [{"x": torch.randn(n, 6), "scale": 2.0} for n in (1, 7, 3)]


def net():
    torch.manual_seed(3)
    return Net()


def rounded(layer):
    layer.weight.data = (layer.weight.data * 4).round() / 4


def threads():
    return threading.active_count()


def test_each_layer_sees_what_the_earlier_ones_became():
    model, data, before = net(), batches(), threads()
    seen = {}

    def show(layer, inputs, _):
        name = next(n for n, m in model.named_modules() if m is layer)
        assert name not in seen
        seen[name] = [x.clone() for x in inputs]
        rounded(layer)

    missed = Lockstep(model, [getattr(model, n) for n in LAYERS]).run(data, show)
    assert missed == [model.unused]
    assert list(seen) == ["left", "right", "twice", "last"]
    # The same by hand: layer after layer, with all inputs for each.
    twin = net()
    xs = [b["x"] for b in data]
    with torch.no_grad():
        for name in ("left", "right"):
            assert all(torch.equal(a, b) for a, b in zip(seen[name], xs, strict=True))
            rounded(getattr(twin, name))
        ys = [torch.tanh(twin.left(x)) * twin.right(x) + x for x in xs]
        assert all(torch.equal(a, b) for a, b in zip(seen["twice"], ys, strict=True))
        rounded(twin.twice)
        ys = [y + twin.twice(y) for y in ys]
        ys = [y + twin.twice(torch.sin(y)) for y in ys]
        assert all(torch.equal(a, b) for a, b in zip(seen["last"], ys, strict=True))
        rounded(twin.last)
        assert all(torch.equal(model(**b), twin(**b)) for b in data)
    assert threads() == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_positional_inputs_and_a_single_batch():
    model, order = net(), []
    Lockstep(model, [model.left, model.last]).run([(torch.randn(2, 6),)], lambda m, x, _: order.append((m, x[0].shape)))
    assert order == [(model.left, (2, 6)), (model.last, (2, 6))]


def test_no_inputs_and_no_layers():
    model = net()
    assert Lockstep(model, [model.left]).run([], lambda *_: pytest.fail("shown")) == [model.left]
    assert Lockstep(model, []).run(batches(), lambda *_: pytest.fail("shown")) == []


class Experts(nn.Module):
    """Rows of an input go to the expert whose number is in their first column; experts without rows are not called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = x[:, 0].long() == number
            if mine.any():
                y[mine] = expert(x[mine])
        return self.head(y)


def routed(*numbers):
    x = torch.randn(len(numbers), 4)
    x[:, 0] = torch.tensor(numbers).float()
    return (x,)


def test_layers_that_only_some_inputs_reach_are_shown_with_those():
    model = Experts()
    data = [routed(0, 0, 3), routed(1, 3), routed(3, 0, 1, 1)]
    shown = []

    def show(layer, inputs, _):
        shown.append((layer, [len(x) for x in inputs]))
        layer.weight.data.zero_()

    assert Lockstep(model, [*model.experts, model.head]).run(data, show) == [model.experts[2]]
    e = model.experts
    assert shown == [(e[0], [2, 1]), (e[1], [1, 2]), (e[3], [1, 1, 1]), (model.head, [3, 2, 4])]


def test_forwards_that_wait_at_different_layers_go_on_together_as_far_as_the_order_allows():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.end = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x, both):
            return self.end(self.b(self.a(x)) if both else self.b(x))

    model, shown = Either(), []
    data = [(torch.randn(2, 3), False), (torch.randn(4, 3), True), (torch.randn(1, 3), False)]
    Lockstep(model, list(model.children())).run(data, lambda m, xs, _: shown.append((m, [len(x) for x in xs])))
    assert shown == [(model.a, [4]), (model.b, [2, 4, 1]), (model.end, [2, 4, 1])]


class Faulty(Net):
    """Fails at inputs of three rows, after its first layers."""

    def forward(self, x, *, scale=1.0):
        y = torch.tanh(self.left(x)) * self.right(x)
        if len(x) == 3:
            raise ValueError("three rows")
        return self.last(y)


def modes(model):
    return {n: m.training for n, m in model.named_modules()}


def mixed(model):
    model.train()
    model.left.eval()
    return modes(model)


def test_an_error_inside_a_forward_arrives_in_the_caller():
    model, before = Faulty(), threads()
    wanted, shown = mixed(model), []
    with pytest.raises(FoldError, match=r"cannot be run on \(x float32 \(3, 6\).*ValueError: three rows"):
        Lockstep(model, [getattr(model, n) for n in LAYERS]).run(batches(), lambda m, *_: shown.append(m))
    assert shown == [model.left, model.right]
    assert threads() == before
    assert modes(model) == wanted
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_one_who_looks_ends_all_forwards(fault):
    model, before = net(), threads()
    wanted = mixed(model)

    def show(layer, inputs, _):
        assert not any(modes(model).values())
        if layer is model.twice:
            raise fault("stop")

    with pytest.raises(fault, match="stop"):
        Lockstep(model, [getattr(model, n) for n in LAYERS]).run(batches(), show)
    assert threads() == before
    assert modes(model) == wanted
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("caught", [Exception, BaseException])
@pytest.mark.parametrize("stops", [False, True])
def test_model_code_that_catches_errors_around_its_layers(caught, stops):
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                try:
                    x = layer(x)
                except caught:
                    x = x + 1
            return x

    model, before, shown = Careful(), threads(), []

    def show(layer, inputs, _):
        shown.append((layer, len(inputs)))
        if stops and layer is model.layers[1]:
            raise RuntimeError("stop")

    def run():
        Lockstep(model, list(model.layers)).run([(torch.randn(2, 3),), (torch.randn(3, 3),)], show)

    if stops:
        with pytest.raises(RuntimeError, match="stop"):
            run()
    else:
        run()
    assert shown == [(m, 2) for m in model.layers[: 2 if stops else 4]]
    assert threads() == before


def test_forwards_end_after_the_last_layer_and_run_without_gradients_and_in_the_callers_autocast():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.tail = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            states.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.training))
            x = self.layer(x)
            states.append((x.dtype,))
            return self.tail(x)

    states, shown = [], []
    model = Tail()
    with torch.autocast("cpu", torch.bfloat16):
        Lockstep(model, [model.layer]).run([(torch.randn(2, 3),)] * 2, lambda m, x, _: shown.append(len(x)))
    assert shown == [2]
    assert states == [(False, True, False)] * 2  # what follows the last layer is never computed
    states.clear()
    with torch.autocast("cpu", torch.bfloat16):
        Lockstep(model, [model.layer, model.tail]).run([(torch.randn(2, 3),)], lambda *_: None)
    assert states == [(False, True, False), (torch.bfloat16,)]


def test_a_second_model_is_shown_beside_at_the_same_layers():
    model, beside, data = net(), net(), batches()
    with torch.no_grad():
        beside.left.weight.mul_(1.5)
    seen = {}

    def show(layer, inputs, others):
        seen[layer] = (torch.cat(inputs), torch.cat(others))
        with torch.no_grad():
            layer.weight.mul_(0.5)  # of one model only

    layers = [list(m.children()) for m in (model, beside)]
    alone = {}
    Lockstep(beside, layers[1]).run(data, lambda m, xs, _: alone.update({m: torch.cat(xs)}))
    assert Lockstep(model, layers[0], (beside, layers[1])).run(data, show) == [model.unused]
    assert len(alone) == len(seen) == 4
    for layer, fellow in zip(layers[0][1:], layers[1][1:], strict=True):
        assert torch.equal(seen[layer][1], alone[fellow])
    assert not torch.equal(*seen[model.last])
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *beside.modules()))


def test_a_fellow_that_goes_another_way_is_not_shown_and_holds_nobody_up():
    class Either(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.a, self.b, self.head, self.first = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), first

        def forward(self, x):
            return self.head((self.a if self.first else self.b)(x))

    seen = []
    model, beside = Either(True), Either(False)

    def show(layer, inputs, others):
        seen.append((layer, [len(x) for x in inputs], [o is None for o in others]))

    layers = [[m.a, m.b, m.head] for m in (model, beside)]
    data = [(torch.randn(2, 3),), (torch.randn(4, 3),)]
    assert Lockstep(model, layers[0], (beside, layers[1])).run(data, show) == [model.b]
    assert seen == [(model.a, [2, 4], [True, True]), (model.head, [2, 4], [True, True])]


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("share", [False, True])
def test_a_calibrated_fold_is_the_sequential_one(share):
    """Site after site by hand: inputs recorded on the model as it is by then, one site folded, and so on."""
    model, data = rotated(share), inputs()
    folded = oftfx.fold(model, quantized="calibrate", calibration=data).model
    turn = rotations(model)
    assert sorted(turn) == sorted(NAMES)
    plain, unfolded = (oftfx.fold(model, quantized="float").model for _ in range(2))  # compute what the model does
    for name in NAMES:
        seen = []
        for one in (plain, unfolded):
            handle = one.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))  # noqa: B023
            run(one, data)
            handle.remove()
        site = Turned.of(name, dict(rotated_sites(model))[name], format_of(model.get_submodule(name)))
        assert rel(site.target, weight(model, name).double() @ turn[name].T) < 1e-6
        best = best_rounding(site, Shown(seen[: len(data)], seen[len(data) :]))
        quantized = copy.copy(model.get_submodule(name))
        quantized._parameters = dict(quantized._parameters)
        format_of(quantized).write(quantized, best.state)
        plain.get_submodule(name).weight.data = format_of(quantized).dequantize(quantized)
        assert rel(weight(folded, name), plain.get_submodule(name).weight) < 5e-3, name  # a code may fall otherwise
    expected = run(plain, data)
    assert rel(run(folded, data), expected) < 2e-3
    assert rel(run(oftfx.fold(model, quantized="requantize").model, data), expected) > 0.05


class Device(nn.Module):
    """Makes a tensor without naming a device."""

    def __init__(self):
        super().__init__()
        self.layer, self.found = nn.Linear(3, 3), []

    def forward(self, x):
        self.found.append(torch.empty(1).device.type)
        return self.layer(x)


def test_forwards_make_tensors_where_the_caller_does():
    model, x = Device(), torch.randn(2, 3)
    with torch.device("meta"):
        Lockstep(model, [model.layer]).run([(x,), (x,)], lambda *_: None)
    Lockstep(model, [model.layer]).run([(x,)], lambda *_: None)
    torch.set_default_device("meta")
    try:
        Lockstep(model, [model.layer]).run([(x,)], lambda *_: None)
    finally:
        torch.set_default_device(None)
    assert model.found == ["meta", "meta", "cpu", "meta"]


class Caching(nn.Module):
    """Notes whether it was to keep keys and values."""

    def __init__(self):
        super().__init__()
        self.layer, self.asked = nn.Linear(3, 3), []

    def forward(self, x, use_cache=None, past_key_values=None):
        self.asked.append((use_cache, past_key_values))
        return self.layer(x)


class HandsOn(Caching):
    def forward(self, x, past_key_values=None, **kwargs):
        return super().forward(x, past_key_values=past_key_values, **kwargs)


class Plain(Caching):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)


@pytest.mark.parametrize(("kind", "said"), [(Caching, False), (HandsOn, False), (Plain, None)])
def test_no_cache_is_asked_for_unless_an_input_speaks_of_one(kind, said):
    x, model = torch.randn(2, 3), kind()
    data = [{"x": x}, (x,), {"x": x, "use_cache": True}]
    asked = [(said, None), (said, None), (True, None)]
    if kind is not Plain:
        data.append({"x": x, "past_key_values": "mine"})
        asked.append((None, "mine"))
    if kind is Caching:
        data += [(x, True), (x, None, "mine")]
        asked += [(True, None), (None, "mine")]
    Lockstep(model, [model.layer]).run(data, lambda *_: None)
    assert model.asked == asked


class Renamed(Caching):
    def forward(self, x, cache=None, **kwargs):
        return super().forward(x, past_key_values=cache, **kwargs)


@pytest.mark.parametrize(("config", "said"), [({"use_cache": True}, False), ({}, None), (None, None)])
def test_what_is_called_cache_is_one_of_keys_and_values_where_the_config_says_so(config, said):
    x, model = torch.randn(2, 3), Renamed()
    if config is not None:
        model.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**config))
    Lockstep(model, [model.layer]).run([{"x": x}, (x,), {"x": x, "cache": "mine"}], lambda *_: None)
    assert model.asked == [(said, None), (said, None), (None, "mine")]


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("family", ["llama", "granite"])  # granite's own forward has no use_cache and hands it on
def test_transformers_models_make_no_cache(tiny_llama, ids, family, monkeypatch):
    from transformers import DynamicCache, GraniteMoeConfig, GraniteMoeForCausalLM

    model = tiny_llama()
    if family == "granite":
        config = GraniteMoeConfig(
            vocab_size=131, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        )  # fmt: skip
        model = GraniteMoeForCausalLM(config).eval()
    made = []
    update = DynamicCache.update
    monkeypatch.setattr(DynamicCache, "update", lambda self, *a, **k: made.append(1) or update(self, *a, **k))
    layers = [b.self_attn.o_proj for b in model.model.layers]
    Lockstep(model, layers).run([ids()], lambda *_: None)
    assert not made
    Lockstep(model, layers).run([{**ids(), "use_cache": True}], lambda *_: None)
    assert made
