"""Threads in one model: one trains while another evaluates, two train; each gets what it would get alone."""

import sys
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from tests.reference import randomize, rel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Read(nn.Module):
    """A weight that the module around it reads."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x):
        return F.linear(x, self.inner.weight).tanh()


class Group(nn.Module):
    """Three layers that read what the caller gives."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.q(x).sum(-1, keepdim=True) * self.k(x) + self.v(x)


KINDS = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), (2, 4, 7, 7), OFT(6)),
    "attention": (Attention, (2, 5, 8), OFT(4)),
    "functional": (lambda: nn.Sequential(Read()), (5, 8), OFT(4)),
    "group": (Group, (5, 8), OFT(4)),
    "group with one rotation": (Group, (5, 8), OFT(4, share_input=True)),
}


def make(kind):
    build, shape, spec = KINDS[kind]
    torch.manual_seed(0)
    base = build().eval().requires_grad_(False)
    model = oftfx.transform(base, {"*": spec}, example_inputs=(torch.randn(shape),))
    return randomize(model, std=0.2).eval(), [torch.randn(shape) for _ in range(2)]


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(oftfx.adapter_parameters(model)))


def evaluate(model, x):
    with torch.no_grad():
        return (model(x),)


def together(*jobs):
    """Run functions in threads of their own that take turns as often as Python lets them; raises what they raise."""
    errors, interval = [], sys.getswitchinterval()

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(j,)) for j in jobs]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def repeated(function, model, x, expected, rounds=200):
    def job():
        for _ in range(rounds):
            found = function(model, x)
            assert all(rel(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))

    return job


@pytest.mark.parametrize("same", [False, True], ids=["own input", "same input"])
@pytest.mark.parametrize("second", [evaluate, gradients])
@pytest.mark.parametrize("kind", KINDS)
def test_what_two_threads_do_is_what_each_does_alone(kind, second, same):
    model, (x, y) = make(kind)
    y = x if same else y
    expected = gradients(model, x), second(model, y)
    assert all(g.abs().max() > 0 for g in expected[0])
    together(repeated(gradients, model, x, expected[0]), repeated(second, model, y, expected[1]))
    assert not [k for m in model.modules() for k in vars(m) if k in m._parameters]


@pytest.mark.parametrize("kind", KINDS)
def test_training_takes_the_steps_it_takes_alone(kind):
    steps = []
    for busy in (False, True):
        model, (x, y) = make(kind)
        optimizer = torch.optim.Adam(oftfx.adapter_parameters(model), lr=1e-3)
        done, taken = threading.Event(), []

        def train(model=model, x=x, optimizer=optimizer, done=done, taken=taken):
            try:
                for _ in range(200):
                    optimizer.zero_grad()
                    model(x).square().sum().backward()
                    taken.append([p.grad.clone() for p in oftfx.adapter_parameters(model)])
                    optimizer.step()
            finally:
                done.set()

        def watch(model=model, y=y, done=done):
            while not done.is_set():
                assert evaluate(model, y)[0].isfinite().all()

        together(train, *([watch] if busy else []))
        steps.append(taken)
    assert all(torch.equal(a, b) for one, other in zip(*steps, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("first", [evaluate, gradients])
@pytest.mark.parametrize("second", [evaluate, gradients])
@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_that_waits_inside_a_layer_keeps_its_own(kind, first, second):
    """One stops in each layer in turn, after the rotation, while the other passes through the whole model."""
    model, (x, y) = make(kind)
    expected = first(model, x), second(model, y)
    layers = [m for m in model.modules() if m._forward_pre_hooks]
    assert layers
    for layer in layers:
        inside, go, found = threading.Event(), threading.Event(), []

        def pause(*_, inside=inside, go=go):
            if threading.current_thread().name == "first":
                inside.set()
                assert go.wait(60)

        handle = layer.register_forward_pre_hook(pause)
        thread = threading.Thread(target=lambda found=found: found.extend(first(model, x)), name="first")
        thread.start()
        assert inside.wait(60)
        other = second(model, y)
        go.set()
        thread.join()
        handle.remove()
        assert all(rel(a, b) < 1e-6 for a, b in zip(other, expected[1], strict=True))
        assert all(rel(a, b) < 1e-6 for a, b in zip(found, expected[0], strict=True))
