"""Recording touches neither the model nor the process: others run, and record, at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.trace.record import record, record_best
from tests.reference import randomize

ROUNDS = 50
X = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(0))


class Served(nn.Module):
    """What a recording would disturb in place: a mode, a mask made on first use, buffers, a branch on data."""

    def __init__(self, branch=False):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.drop, self.norm, self.branch = nn.Dropout(0.5), nn.BatchNorm1d(7), branch
        self.register_buffer("calls", torch.zeros(()))
        self.mask = None

    def forward(self, x):
        if self.mask is None or self.mask.shape[0] != x.shape[1]:
            self.mask = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        if self.training:
            self.calls += 1
        a = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=self.mask)
        if self.branch and not x.sum() > 1e6:
            a = F.dropout(a, 0.5, self.training)
        return x + self.drop(self.norm(self.o(a)))


def together(*functions):
    """Each in a thread of its own, started at once; what one raises is raised here."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [f.result() for f in [pool.submit(run, f) for f in functions]]


def said(recording):
    nodes = [f"{n.op} {n.target} {n.args} {n.kwargs} {n.meta.get('module')}" for n in recording.graph.nodes]
    return recording.rung, recording.reason, recording.calls, nodes


@pytest.mark.needs("transformers")
def test_two_models_recorded_at_once_give_right_graphs(tiny_llama, ids):
    cases = [(tiny_llama(num_hidden_layers=1), ids()), (Served(), (X,))]
    alone = [said(record(*case)) for case in cases]
    assert [rung for rung, *_ in alone] == ["graph", "graph"]
    before, tables = nn.Module.__call__, [[dict(vars(m)) for m in model.modules()] for model, _ in cases]
    switches = torch.utils._python_dispatch._is_in_torch_dispatch_mode

    def several(case):
        return lambda: [said(record(*case)) for _ in range(ROUNDS)]

    for expected, found in zip(alone, together(*map(several, cases)), strict=True):
        assert all(f == expected for f in found)
    assert nn.Module.__call__ is before
    assert nn.Module._call_impl.__module__ == "torch.nn.modules.module"
    assert torch.utils._python_dispatch._is_in_torch_dispatch_mode is switches
    for (model, _), expected in zip(cases, tables, strict=True):
        assert all(vars(m) == t for m, t in zip(model.modules(), expected, strict=True))


def served_while(model, x, act, rounds=200, times=5):
    """Rounds in which a model's answer differs from the one before, while another thread does something to it."""
    ran, acted = threading.Event(), threading.Event()

    def serve():
        wrong, done = [], 0
        try:
            with torch.no_grad():
                while done < rounds or not acted.is_set():
                    wrong += [] if torch.equal(model(x), answer) else [done]
                    done += 1
        finally:
            ran.set()
        return wrong

    def disturb():
        done = 0
        try:
            while done < times or not ran.is_set():
                act()
                done += 1
                if done >= times:
                    acted.set()
        finally:
            acted.set()

    with torch.no_grad():
        answer = model(x)
    return together(serve, disturb)[0]


ACTIONS = {
    "plan": lambda m: oftfx.plan(m, {"q": OFT(4)}, example_inputs=(X,)),
    "graph": lambda m: oftfx.graph(m, (X,)),
    "bare": lambda m: record_best(m, (X,), bare=True),
    "real values": lambda m: record(m, (X,), fake=False),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_model_is_served_while_it_is_recorded(action):
    model = randomize(oftfx.transform(Served(branch=action == "real values"), {"all-linear": OFT(4)}), std=0.3).eval()
    modes = [m.training for m in model.modules()]
    assert served_while(model, X, lambda: ACTIONS[action](model)) == []
    assert modes == [m.training for m in model.modules()]
    assert oftfx.active_adapters(model) == ("default",)
