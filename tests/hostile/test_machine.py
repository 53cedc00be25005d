"""Random sequences of the public verbs; after every step the model is its dense twin, and so is everything kept."""

import copy
import io
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, FoldError
from tests.hostile.machines import run
from tests.hostile.twin import IDS, SITES, Model, Twin

NAMES = st.sampled_from(["p", "q", "r"])
BLOCKS = [("e", 2), ("e", 3), ("a", 1), ("a", 6), ("c", 3), ("c", 4), ("h.b", 4), ("h.b", 8)]
SIZES = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6).map(dict)


class Machine(RuleBasedStateMachine):
    """One model under test, with its twin, and what earlier steps have left beside it."""

    @initialize(seed=st.integers(0, 5), recorded=st.booleans())
    def start(self, seed, recorded):
        self.model = Model(seed)
        self.twin = Twin(self.model)
        self.inputs = (IDS,) if recorded else None
        self.kept = []  # models with the twins they must stay equal to
        self.results = []  # folds with the twin before
        self.undoable = []  # folds in place, the last one last
        self.files = tempfile.TemporaryDirectory()
        self.saved = []
        self.seed = 0

    def teardown(self):
        if hasattr(self, "files"):
            self.files.cleanup()

    # -- what holds after every step ----------------------------------------------------------------

    @invariant()
    def it_is_its_twin(self):
        if not hasattr(self, "model"):
            return
        for model, twin in [(self.model, self.twin), *self.kept]:
            expected = twin.run(IDS)
            calls = model.calls.clone()
            out = model(IDS)
            with torch.no_grad():
                quiet = model(IDS)
            for got in (out, quiet):
                error = float((got.detach() - expected).norm() / expected.norm())
                assert error < 1e-9, error
            assert float(model.calls - calls) == 2 * model.training
            model.calls.copy_(calls)
        assert oftfx.active_adapters(self.model) == self.twin.active
        assert set(oftfx.adapters(self.model)) == set(self.twin.adapters)

    # -- adapters ---------------------------------------------------------------------------------------

    @rule(name=NAMES, sizes=SIZES, inplace=st.booleans(), plan=st.booleans())
    def transform(self, name, sizes, inplace, plan):
        rules = {site: OFT(size) for site, size in sizes.items()}
        if name in self.twin.adapters:
            with pytest.raises(AdapterError, match="already has an adapter"):
                oftfx.transform(self.model, rules, adapter=name, inplace=inplace)
            return
        if plan:
            rules = oftfx.plan(self.model, rules, example_inputs=self.inputs)
        before = self.model
        self.model = oftfx.transform(
            before, rules, adapter=name, inplace=inplace, example_inputs=None if plan else self.inputs
        )
        assert (self.model is before) == inplace
        if not inplace:
            self.keep(before, self.twin.copy())
            self.undoable.clear()
        self.enter(name, sizes)
        self.twin.active = (name,)

    @precondition(lambda self: self.twin.adapters)
    @rule(name=NAMES, sizes=SIZES)
    def add_adapter(self, name, sizes):
        rules = {site: OFT(size) for site, size in sizes.items()}
        if name in self.twin.adapters:
            with pytest.raises(AdapterError, match="already has an adapter"):
                oftfx.add_adapter(self.model, name, rules)
            return
        oftfx.add_adapter(self.model, name, rules, example_inputs=self.inputs)
        self.enter(name, sizes)

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def set_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.twin.adapters)), unique=True))
        oftfx.set_adapter(self.model, names or None)
        self.twin.active = tuple(names)

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def remove_adapter(self, data):
        name = data.draw(st.sampled_from(sorted(self.twin.adapters)))
        alone = self.twin.active == (name,) and len(self.twin.adapters) > 1
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            oftfx.remove_adapter(self.model, name)
        assert bool(seen) == alone
        del self.twin.adapters[name]
        self.twin.active = tuple(n for n in self.twin.active if n != name)
        if alone:
            self.twin.active = (sorted(self.twin.adapters)[0],)

    @precondition(lambda self: self.twin.adapters)
    @rule()
    def disable_adapters(self):
        base = self.twin.copy()
        base.active = ()
        with oftfx.disable_adapters(self.model):
            assert torch.allclose(self.model(IDS), base.run(IDS), rtol=0, atol=1e-9)

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def a_row_an_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from([None, *sorted(self.twin.adapters)]), min_size=2, max_size=2))
        with oftfx.adapter_rows(self.model, names):
            out = self.model(IDS)
        for row, name in enumerate(names):
            alone = self.twin.copy()
            alone.active = () if name is None else (name,)
            assert torch.allclose(out[row], alone.run(IDS[row : row + 1])[0], rtol=0, atol=1e-9)

    @precondition(lambda self: self.twin.adapters)
    @rule(part=st.sampled_from(["h", "a"]))
    def transform_a_part(self, part):
        module = self.model.get_submodule(part)
        rotates = any("oft" in name for name, _ in module.named_modules())
        if rotates:
            with pytest.raises(AdapterError, match="rotates already"):
                oftfx.transform(module, "all-linear", inplace=True)

    # -- values -----------------------------------------------------------------------------------------

    @rule(seed=st.integers(0, 99), through_data=st.booleans())
    def write_skews(self, seed, through_data):
        generator = torch.Generator().manual_seed(seed)
        for name in self.twin.adapters:
            for key, skew in self.skews(name).items():
                value = torch.randn(skew.shape, generator=generator, dtype=torch.float64) / 5
                with torch.no_grad():
                    (skew.data if through_data else skew).copy_(value)
                site = key.partition(".")[2]
                self.twin.adapters[name][site] = (value, self.twin.adapters[name][site][1])

    @precondition(lambda self: self.twin.active)
    @rule(kind=st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))
    def train_step(self, kind):
        expected = self.twin.gradients(IDS, self.twin.active)
        trained = oftfx.adapter_parameters(self.model)
        if not all(p.requires_grad for p in trained):
            return  # an adapter that was loaded to be used
        for parameter in trained:
            parameter.grad = None
        frozen = {n: p.detach().clone() for n, p in self.model.named_parameters() if not p.requires_grad}
        self.model(IDS).square().sum().backward()
        for name in self.twin.active:
            for key, skew in self.skews(name).items():
                assert torch.allclose(skew.grad, expected[key], rtol=1e-7, atol=1e-8)
        kind(trained, lr=1e-3).step()
        now = dict(self.model.named_parameters())
        assert all(torch.equal(now[n], value) for n, value in frozen.items())
        for name in self.twin.active:
            for key, skew in self.skews(name).items():
                site = key.partition(".")[2]
                self.twin.adapters[name][site] = (skew.detach().clone(), self.twin.adapters[name][site][1])

    @rule(factor=st.sampled_from([0.5, -1.0]), name=st.sampled_from(["c.weight", "a.weight", "e.weight"]))
    def scale_a_weight_through_data(self, factor, name):
        self.apart()
        self.model.get_parameter(name).data.mul_(factor)
        self.twin.weights[name] = self.twin.weights[name] * factor

    @rule()
    def through_float32(self):
        self.apart()
        self.model.float().double()
        self.twin.round_()

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    # -- copies -----------------------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copies(self, how):
        if how == "state_dict":
            state = {k: v.clone() for k, v in self.model.state_dict().items()}
            other = copy.deepcopy(self.model)
            for parameter in other.parameters():
                parameter.data = torch.zeros_like(parameter)
            other.load_state_dict(state)
        elif how == "pickle":
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            other = copy.deepcopy(self.model)
        self.keep(self.model, self.twin.copy())
        self.model = other
        self.undoable.clear()

    # -- folds ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.twin.active)
    @rule(inplace=st.booleans(), undo=st.booleans(), follow=st.booleans())
    def fold(self, inplace, undo, follow):
        before = self.twin.copy()
        if inplace:
            self.kept.clear()
            self.results.clear()
        result = oftfx.fold(self.model, inplace=inplace, undo=undo if inplace else None)
        folded = self.twin.copy()
        folded.fold()
        if inplace:
            self.undoable = [*self.undoable, (result, before)] if undo else []
            self.twin = folded
            return
        self.results.append((result, before))
        del self.results[:-2]
        if follow:
            self.keep(self.model, before.copy())
            self.model, self.twin = result.model, folded
            self.undoable.clear()
        else:
            self.keep(result.model, folded)

    @precondition(lambda self: self.results)
    @rule(data=st.data())
    def unfold(self, data):
        result, before = data.draw(st.sampled_from(self.results))
        model = oftfx.unfold(result)
        self.keep(self.model, self.twin.copy())
        self.model, self.twin = model, before.copy()
        self.undoable.clear()

    @precondition(lambda self: self.undoable)
    @rule(last=st.booleans())
    def unfold_in_place(self, last):
        result, before = self.undoable[-1 if last else 0]
        is_last = result is self.undoable[-1][0]
        if self.twin.adapters or not is_last:
            with pytest.raises(FoldError, match="transformed again|another fold has followed"):
                oftfx.unfold(result)
            return
        self.kept.clear()
        self.results.clear()
        assert oftfx.unfold(result) is self.model
        self.undoable.pop()
        self.twin = before.copy()

    # -- files ------------------------------------------------------------------------------------------

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(sorted(self.twin.adapters)))
        path = Path(self.files.name) / str(len(self.saved))
        oftfx.save_adapter(self.model, path, adapter=name, convention="oftfx")
        self.saved.append((path, copy.deepcopy(self.twin.adapters[name])))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=NAMES, trainable=st.booleans())
    def load(self, data, name, trainable):
        path, skews = data.draw(st.sampled_from(self.saved))
        if name in self.twin.adapters:
            return
        first = not self.twin.active
        oftfx.load_adapter(self.model, path, adapter=name, trainable=trainable)
        self.twin.adapters[name] = copy.deepcopy(skews)
        if first:
            self.twin.active = (name,)

    # -- what the steps share ---------------------------------------------------------------------------

    def keep(self, model, twin):
        """Watch a model that is not under test any more."""
        self.kept.append((model, twin))
        del self.kept[:-3]

    def apart(self):
        """Copies share frozen weights by design, and a fold in place brings back only weights that it has changed.

        So what writes into weights is tried on a model that shares none.
        """
        self.kept.clear()
        self.results.clear()
        self.undoable.clear()

    def skews(self, name):
        """Those of an adapter, by ``adapter.site``."""
        found = {}
        for key, parameter in self.model.named_parameters():
            if key.endswith(f".oft.{name}.skew"):
                found[f"{name}.{key.removesuffix(f'.oft.{name}.skew')}"] = parameter
        return found

    def enter(self, name, sizes):
        """The twin of a new adapter."""
        self.twin.adapters[name] = {
            site: (torch.zeros(SITES[site] // size, size * (size - 1) // 2, dtype=torch.float64), size)
            for site, size in sizes.items()
        }


def test_random_sequences_of_public_verbs():
    run(Machine)
