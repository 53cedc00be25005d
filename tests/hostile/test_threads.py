"""Threads that do what they like with one model, in random order; every answer is that of the dense twin.

``OFTFX_THREAD_SECONDS`` sets for how long. Switching the adapters of a model that another thread serves is not tried:
a forward that is under way then has some layers of both, which `oftfx.adapter_rows` is for.
"""

import os
import random
import threading

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.hostile.twin import IDS, SITES, Model, Twin
from tests.reference import randomize

SECONDS = float(os.environ.get("OFTFX_THREAD_SECONDS", "5"))
RULES = {"e": OFT(3), "a": OFT(2), "c": OFT(4), "h.b": OFT(4)}


def rotated(seed=0, adapter="p"):
    return randomize(oftfx.transform(Model(), RULES, adapter=adapter, example_inputs=(IDS,)).eval(), 0.2, seed)


def twin_of(model):
    """Its dense twin, with all adapters that it has."""
    twin = Twin.__new__(Twin)
    twin.weights = {n: p.detach().clone() for n, p in model.named_parameters() if ".oft." not in n}
    sizes = {site: rule.block_size for site, rule in RULES.items()}
    twin.adapters = {
        name: {s: (model.get_submodule(s).oft.get_submodule(name).skew.detach().clone(), sizes[s]) for s in SITES}
        for name in oftfx.adapters(model)
    }
    twin.active = oftfx.active_adapters(model)
    return twin


def close(got, expected):
    return got.shape == expected.shape and float((got.detach() - expected).norm() / expected.norm()) < 1e-9


class Workshop:
    """Threads around one model; the first failure stops them all."""

    def __init__(self, model, tmp_path):
        self.model, self.twin = model, twin_of(model)
        self.expected = self.twin.run(IDS)
        self.path = tmp_path
        self.stop = threading.Event()
        self.failures = []
        self.counts = {}

    def work(self, name, steps, seed):
        chance = random.Random(seed)
        while not self.stop.is_set():
            step = chance.choice(steps)
            try:
                step(chance)
            except Exception as error:  # of any kind: it is shown by the test
                self.failures.append(f"{name}: {step.__name__}: {type(error).__name__}: {error}")
                self.stop.set()
            self.counts[step.__name__] = self.counts.get(step.__name__, 0) + 1

    def run(self, *workers):
        threads = [
            threading.Thread(target=self.work, args=(f"thread {i}", steps, i)) for i, steps in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        self.stop.wait(SECONDS)
        self.stop.set()
        for thread in threads:
            thread.join(60)
        assert not any(t.is_alive() for t in threads)
        assert self.failures == []
        assert close(self.model(IDS), self.expected)
        assert oftfx.active_adapters(self.model) == self.twin.active

    # -- what a thread may do -----------------------------------------------------------------------

    def serve(self, _):
        with torch.no_grad():
            assert close(self.model(IDS), self.expected)

    def serve_with_gradients(self, _):
        assert close(self.model(IDS), self.expected)

    def serve_rows(self, chance):
        names = [chance.choice([None, *self.twin.adapters]) for _ in IDS]
        with oftfx.adapter_rows(self.model, names), torch.no_grad():
            out = self.model(IDS)
        for row, name in enumerate(names):
            alone = self.twin.copy()
            alone.active = () if name is None else (name,)
            assert close(out[row : row + 1], alone.run(IDS[row : row + 1]))

    def plan(self, _):
        assert oftfx.plan(self.model, RULES, example_inputs=(IDS,)).trace.rung == "graph"

    def graph(self, _):
        assert close(oftfx.graph(self.model, (IDS,))(IDS), self.expected)

    def transform(self, _):
        made = oftfx.transform(self.model, {"a": OFT(6)}, adapter="mine", example_inputs=(IDS,))
        oftfx.set_adapter(made, self.twin.active)
        assert close(made(IDS), self.expected)

    def fold(self, _):
        result = oftfx.fold(self.model)
        assert close(result.model(IDS), self.expected)
        assert close(oftfx.unfold(result)(IDS), self.expected)

    def save_and_load(self, chance):
        path = self.path / f"{threading.get_ident()}"
        oftfx.save_adapter(self.model, path, adapter="p", convention="oftfx")
        loaded = oftfx.load_adapter(Model(), path, adapter="p")
        assert close(loaded(IDS), self.expected)

    def add_and_remove(self, _):
        name = f"of{threading.get_ident()}"
        oftfx.add_adapter(self.model, name, {"a": OFT(3), "c": OFT(3)}, example_inputs=(IDS,))
        oftfx.remove_adapter(self.model, name)

    def train_a_copy(self, chance):
        model = oftfx.transform(Model(), RULES, example_inputs=(IDS,))
        randomize(model, 0.2, chance.randrange(99))
        twin = twin_of(model)
        wanted = twin.gradients(IDS, ("default",))
        model.train()(IDS).square().sum().backward()
        for site in SITES:
            got = model.get_submodule(site).oft.default.skew.grad
            assert torch.allclose(got, wanted[f"default.{site}"], rtol=1e-7, atol=1e-8)

    def gradients_of_the_model(self, _):
        parameters = oftfx.adapter_parameters(self.model)
        found = torch.autograd.grad(self.model(IDS).square().sum(), parameters)
        for (site, _), got in zip(sorted(SITES.items(), key=lambda s: self.order.index(s[0])), found, strict=True):
            assert torch.allclose(got, self.wanted[f"p.{site}"], rtol=1e-7, atol=1e-8)


@pytest.fixture
def shop(tmp_path):
    shop = Workshop(rotated(), tmp_path)
    shop.order = [n.partition(".oft.")[0] for n, _ in shop.model.named_parameters() if ".oft.p." in n]
    shop.wanted = shop.twin.gradients(IDS, ("p",))
    return shop


def test_serving_beside_everything_that_leaves_the_model_as_it_is(shop):
    others = [shop.plan, shop.graph, shop.transform, shop.fold, shop.save_and_load, shop.train_a_copy]
    shop.run([shop.serve, shop.serve_with_gradients, shop.serve_rows], others, others)
    assert min(shop.counts.values()) > 0


def test_serving_and_training_beside_adapters_that_come_and_go(shop):
    reading = [shop.serve, shop.serve_with_gradients, shop.gradients_of_the_model]
    shop.run(reading, reading, [shop.add_and_remove, shop.plan])
    assert shop.counts["add_and_remove"] > 0


def test_many_recordings_at_once(shop):
    recording = [shop.plan, shop.graph, shop.transform]
    shop.run(recording, recording, recording, [shop.serve])
