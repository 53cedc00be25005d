"""What a CUDA graph reads: its replays run the kernels of one run again, on the same memory, and no Python."""

import contextlib

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oftfx
from oftfx import OFT
from oftfx.rotation import kept
from tests.reference import randomize, rel


class Recorded(TorchDispatchMode):
    """A CUDA graph on a CPU: the operators of one run, to be run again on the tensors that they read then."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, made in self.steps:
            for old, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @property
    def names(self):
        return {function.overloadpacket.__name__ for function, *_ in self.steps}


@pytest.fixture
def capture(monkeypatch):
    """Runs a model as if into a CUDA graph; gives the graph and what it writes."""

    @contextlib.contextmanager
    def capturing():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    def run(model, x):
        with torch.no_grad(), capturing(), Recorded() as graph:
            y = model(x)
        return graph, y

    return run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.o = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x):
        y = self.norm(x)
        y = x + self.o(self.q(y) * self.k(y))
        return self.conv(y.transpose(1, 2))


def make(spec=None):
    torch.manual_seed(0)
    rules = {"conv": OFT(6), "*": spec or OFT(4)}
    model = oftfx.transform(Net().eval(), rules, example_inputs=(torch.randn(2, 5, 16),))
    return randomize(model, std=0.2).eval(), torch.randn(2, 5, 16)


SPECS = pytest.mark.parametrize("spec", [OFT(4), OFT(4, share_input=True)], ids=["own", "shared"])


def eager(model, x):
    with torch.no_grad():
        return model(x)


@SPECS
def test_replays_after_steps_loading_and_changes_of_the_mode(capture, spec):
    model, x = make(spec)
    expected = eager(model, x)
    graph, y = capture(model, x)
    assert rel(y, expected) < 1e-6
    assert not graph.names & {"baddbmm", "_linalg_solve_ex"}
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=0.05, fused=True)

    def step():
        for parameter in oftfx.adapter_parameters(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    def load():
        skews = {n: torch.randn_like(p) * 0.2 for n, p in model.named_parameters() if p.requires_grad}
        model.load_state_dict(skews, strict=False)

    def train():
        model.train()
        model(x).square().sum().backward()
        optimizer.step()
        model.eval()

    @torch.no_grad()
    def copy():
        for parameter in oftfx.adapter_parameters(model):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        oftfx.refresh(model)

    for change in (step, load, train, copy, step):
        before = y.clone()
        change()
        graph.replay()
        assert rel(y, eager(model, x)) < 1e-6
        assert rel(y, before) > 1e-3


def test_what_is_stale_when_it_is_captured_is_made_by_the_graph(capture):
    model, x = make()
    eager(model, x)
    randomize(model, std=0.2, seed=1)
    graph, y = capture(model, x)
    assert "baddbmm" in graph.names
    assert rel(y, eager(model, x)) < 1e-6
    randomize(model, std=0.2, seed=2)  # which nobody is told of
    graph.replay()
    assert rel(y, eager(model, x)) < 1e-6


def test_the_memory_of_a_graph_is_kept_by_nobody(capture):
    model, x = make()
    first = eager(model, x)
    randomize(model, std=0.2, seed=1)
    graph, y = capture(model, x)
    expected = y.clone()
    for function, _, _, made in graph.steps:  # what a replay with other numbers would do
        if function.overloadpacket.__name__ in ("bmm", "baddbmm", "cat"):
            made.fill_(7)
    assert rel(eager(model, x), expected) < 1e-6
    assert rel(first, expected) > 1e-3


def test_what_no_graph_reads_is_replaced():
    """A backward that is to come may need the old blocks."""
    model, x = make()
    model.requires_grad_(False)
    x.requires_grad_()
    y = model(x).square().sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    randomize(model, std=0.2, seed=1)
    model(x)
    (got,) = torch.autograd.grad(y, x)
    assert torch.equal(got, expected)


def test_what_is_kept_goes_with_its_parameter():
    model, x = make()
    eager(model, x)
    held = len(kept._SOURCES)
    del model
    import gc

    gc.collect()
    assert len(kept._SOURCES) <= held - 4


def test_memory_that_stays_is_allocated_by_another_thread():
    import threading

    found = kept.on_another_thread(lambda: torch.tensor(threading.get_ident()), torch.device("cpu"))
    assert int(found) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        kept.on_another_thread(lambda: 1 / 0, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["torch.cuda.graph", "reduce-overhead"])
@SPECS
def test_on_a_device(compiled, spec):
    model, x = make(spec)
    model, x = model.cuda(), x.cuda()
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=0.05, fused=True)
    with torch.no_grad():
        if compiled:
            run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            for _ in range(4):
                run(x)
        else:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                model(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = model(x)

            def run(_):
                graph.replay()
                return y

    for _ in range(3):
        for parameter in oftfx.adapter_parameters(model):
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        with torch.no_grad():
            assert rel(run(x).clone(), model(x)) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_stream_waits_for_blocks_that_are_being_made():
    model = nn.Sequential(nn.Linear(4096, 64))
    model = randomize(oftfx.transform(model, {"*": OFT(64)}), std=0.05).eval().cuda()
    x = torch.randn(1, 4096, device="cuda")
    with torch.no_grad():
        for seed in range(20):
            randomize(model, std=0.05, seed=seed)
            torch.cuda.synchronize()
            y = model(x)
            with torch.cuda.stream(torch.cuda.Stream()):
                z = model(x)
            torch.cuda.synchronize()
            assert torch.equal(y, z)
