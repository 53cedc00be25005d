"""A recording leaves no fake tensor behind in what other calls read, or says where."""

import functools
import gc
import logging
import logging.handlers
import sys
import threading
import time
import types
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor

import oftfx
from oftfx import OFT
from oftfx.errors import OftfxWarning
from oftfx.trace.record import record

X = torch.randn(5, 6)


@functools.lru_cache
def bounded(n):
    return torch.ones(n, n).tril()


@functools.cache
def unbounded(n):
    return {"mask": (torch.ones(n, n).tril(),)}


_GLOBAL = None
_BY_SIZE = {"there before": torch.ones(1)}
_LIST = ["there before"]


def in_global(n):
    global _GLOBAL
    if _GLOBAL is None:
        _GLOBAL = torch.ones(n, n).tril()
    return _GLOBAL


def in_new_global(n):
    if "_NEW" not in globals():
        globals()["_NEW"] = torch.ones(n, n).tril()
    return globals()["_NEW"]


def in_dict(n):
    if n not in _BY_SIZE:
        _BY_SIZE[n] = torch.ones(n, n).tril(), n
    return _BY_SIZE[n][0]


_NESTED = {"masks": {}}


def in_nested(n):
    masks = _NESTED["masks"]
    if n not in masks:
        masks[n] = types.SimpleNamespace(mask=torch.ones(n, n).tril())
    return masks[n].mask


def in_list(n):
    if len(_LIST) == 1:
        _LIST.append(torch.ones(n, n).tril())
    return _LIST[1]


class Masked(nn.Module):
    """Reads a mask that somebody keeps."""

    of_class = None

    def __init__(self, mask):
        super().__init__()
        self.mask, self.l = mask, nn.Linear(6, 6)

    def forward(self, x):
        return self.mask(len(x)) @ self.l(x)


class OnClass(Masked):
    def forward(self, x):
        if "made" not in vars(OnClass):
            OnClass.made = torch.ones(len(x), len(x)).tril()
        if OnClass.of_class is None:
            OnClass.of_class = OnClass.made * 2
        return OnClass.of_class @ self.l(x)


def fakes():
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), FakeTensor)]


@pytest.fixture(autouse=True, scope="module")
def no_fake_is_left():
    """Torch's own exporters, in other tests, may leave some. Once a file: it looks through the whole process."""
    before = set(map(id, fakes()))
    yield
    assert [f for f in fakes() if id(f) not in before] == []


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: Masked(bounded), id="lru_cache"),
        pytest.param(lambda: Masked(lambda n: unbounded(n)["mask"][0]), id="cache of containers"),
        pytest.param(lambda: Masked(in_global), id="global"),
        pytest.param(lambda: Masked(in_new_global), id="new global"),
        pytest.param(lambda: Masked(in_dict), id="dict"),
        pytest.param(lambda: Masked(in_nested), id="object in a dict"),
        pytest.param(lambda: Masked(in_list), id="list"),
        pytest.param(lambda: OnClass(None), id="class"),
    ],
)
def test_what_a_recording_put_into_a_cache_is_taken_out(model):
    model = model()
    plan = oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,))
    assert plan.trace.rung == "graph"
    out = model(X)
    assert type(out) is torch.Tensor
    mask = torch.ones(5, 5, dtype=torch.float64).tril() * (2 if isinstance(model, OnClass) else 1)
    expected = mask @ (X.double() @ model.l.weight.double().T + model.l.bias.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    graph = oftfx.graph(model, (X,))
    torch.testing.assert_close(graph(X), out)
    assert _LIST[0] == "there before"
    assert list(_NESTED) == ["masks"]
    assert torch.equal(_BY_SIZE["there before"], torch.ones(1))


def test_a_recording_that_fails_takes_it_out_as_well():
    class Fails(Masked):
        def forward(self, x):
            y = super().forward(x)
            raise ValueError(f"of {tuple(y.shape)}")

    bounded.cache_clear()
    plan = oftfx.plan(Fails(bounded), {"l": OFT(3)}, example_inputs=(X,))
    assert "ValueError: of (5, 6)" in plan.trace.reason
    assert type(bounded(5)) is torch.Tensor


class Kept:
    """An object that keeps a mask."""

    def __init__(self):
        self.kept, self.made = None, {}

    def __call__(self, n):
        if self.kept is None:
            self.kept = torch.ones(n, n).tril()
        return self.kept


def enclosed():
    made = None

    def mask(n):
        nonlocal made
        made = torch.ones(n, n).tril() if made is None else made
        return made

    return mask


@pytest.mark.parametrize("mask", [Kept, enclosed, lambda: Kept().__call__, lambda: functools.partial(Kept())])
def test_what_functions_of_the_model_hold_is_as_it_was(mask):
    model = Masked(mask())
    oftfx.graph(model, (X,))
    assert type(model(X)) is torch.Tensor


def test_hooks_that_collect_outputs_keep_what_they_had():
    outputs, by_name, several = {}, Kept(), []

    def collect(module, args, out):
        outputs["l"] = out
        by_name.made["l"] = out
        several.append(out)

    model = Masked(lambda n: torch.ones(n, n))
    model.l.register_forward_hook(collect)
    model(X)
    seen = outputs["l"], several[0]
    oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,))
    assert outputs["l"] is by_name.made["l"] is seen[0]
    assert several == [seen[1]]


def test_what_cannot_be_taken_out_is_said_by_name():
    holder = types.SimpleNamespace(inner=types.MappingProxyType({"cache": types.SimpleNamespace(cache=Kept())}))
    with pytest.warns(OftfxWarning, match=r"keeps 1 of them: kept of a .*Kept"):
        oftfx.plan(Masked(lambda n: holder.inner["cache"].cache(n)), {"l": OFT(3)}, example_inputs=(X,))
    holder.inner["cache"].cache.kept = None


_REGISTRY = {"there": Kept(), "nested": {"a": {"b": None}}}
_ITEMS = [None, "other"]


class Rope:
    cache: ClassVar = {}

    @classmethod
    def get(cls, n):
        return cls.cache.setdefault(n, torch.ones(n, n))


def test_what_was_there_before_is_as_it_was():
    class Uses(Masked):
        def forward(self, x):
            y = Rope.get(len(x)) @ self.l(x)
            _ITEMS[0] = y
            _REGISTRY["there"].kept = y
            _REGISTRY["nested"]["a"]["b"] = y
            return y

    there = _REGISTRY["there"]
    model = Uses(None)
    out = model(X)
    oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,))
    assert _REGISTRY["there"] is there
    assert there.kept is _ITEMS[0] is _REGISTRY["nested"]["a"]["b"] is out
    assert _ITEMS[1] == "other"
    assert type(Rope.cache[5]) is torch.Tensor
    Rope.cache.clear()
    oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,))
    assert Rope.cache == {}
    there.kept = _ITEMS[0] = _REGISTRY["nested"]["a"]["b"] = None


def test_a_log_that_keeps_tensors_is_named_and_soon():
    log = logging.getLogger("oftfx.test_outside")
    kept = logging.handlers.MemoryHandler(100)
    log.propagate, log.level = False, logging.DEBUG
    log.addHandler(kept)

    class Logs(Masked):
        def forward(self, x):
            y = self.l(x)
            log.debug("mean %s", y)
            return y

    start = time.thread_time()  # whatever else the machine does
    with pytest.warns(OftfxWarning, match="keeps 1 of them"):
        oftfx.plan(Logs(None), {"l": OFT(3)}, example_inputs=(X,))
    assert time.thread_time() - start < 60
    log.removeHandler(kept)
    kept.buffer.clear()


def test_circles_of_the_model_are_no_leak():
    class Circle(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 6)
            self.l.parent = [self]  # a list hides it from nn.Module

        def forward(self, x):
            self.last = self.l(x)
            return self.last * 2

    model = Circle()
    assert oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,)).trace.rung == "graph"
    assert "last" not in vars(model)


def test_a_recording_keeps_no_tensor():
    """Neither fake ones, nor real values of a recording that needs them."""
    made = []

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(6, 6)

        def forward(self, x):
            y = self.l(x)
            made.append(weakref.ref(y))
            return y if bool(y.sum() > -1e9) else -y

    model = Branches()
    recording = record(model, (X,), fake=False)
    assert recording.graph.find_nodes(op="call_module", target="l")
    assert [r() for r in made] == [None]


def test_a_lazy_module_of_the_process_is_not_touched():
    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"asked for {name}")

    sys.modules["oftfx_test_lazy"] = Lazy("oftfx_test_lazy")
    try:
        oftfx.plan(Masked(bounded), {"l": OFT(3)}, example_inputs=(X,))
    finally:
        del sys.modules["oftfx_test_lazy"]


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["DINOv3ViT", "Data2VecVision"])
def test_transformers_that_cache_positions_outside(name):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8)
    model = getattr(transformers, f"{name}Model")(config).eval()
    pixels = torch.randn(2, 3, 32, 32)
    before = model(pixels).last_hidden_state
    made = oftfx.transform(model, "all-linear", example_inputs={"pixel_values": pixels})
    for each in (model, made):
        out = each(pixels).last_hidden_state
        assert type(out) is torch.Tensor
        torch.testing.assert_close(out, before)


class Awkward:
    """Whoever asks it for anything runs its code."""

    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name}")


def test_no_code_of_what_holds_a_tensor_is_run():
    awkward = Awkward()
    object.__getattribute__(awkward, "__dict__")["kept"] = None

    class Uses(Masked):
        def forward(self, x):
            y = self.l(x)
            object.__getattribute__(awkward, "__dict__")["kept"] = y
            return y

    model = Uses(None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        oftfx.plan(model, {"l": OFT(3)}, example_inputs=(X,))
    assert all("keeps 1 of them" in str(w.message) for w in seen)
    object.__getattribute__(awkward, "__dict__")["kept"] = None


def test_threads_that_record_models_with_one_cache_leave_it_as_it_was():
    global _GLOBAL
    failures = []

    def work():
        try:
            for _ in range(3):
                oftfx.plan(Masked(in_global), {"l": OFT(3)}, example_inputs=(X,))
                oftfx.graph(Masked(in_dict), (X,))
        except Exception as error:
            failures.append(error)

    _GLOBAL = None
    _BY_SIZE.pop(5, None)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert _GLOBAL is None
    assert list(_BY_SIZE) == ["there before"]
