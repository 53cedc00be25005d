"""Random sequences of training through the fold among the other verbs; after every step the model is its dense twin."""

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
from oftfx.errors import AdapterFileError, FoldError
from tests.hostile.machines import run
from tests.hostile.quantized_twin import WIDTHS, Model, Twin, X, read

pytestmark = pytest.mark.needs("bitsandbytes")
NAMES = ("p", "q")
BLOCKS = [("a", 8), ("a", 32), ("b", 4), ("b", 16), ("c", 8)]
SIZES = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4).map(dict)
CALIBRATION = [(x,) for x in torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(7))]
CLOSE = 2e-4
"""float32 and its own products; a wrong code is a hundred times as much."""


def near(got, expected):
    return float((got.detach().double() - expected).norm() / expected.norm().clamp(min=1e-9))


class Machine(RuleBasedStateMachine):
    """One model under test, with its twin, and models that must stay what they were."""

    @initialize(seed=st.integers(0, 3), sizes=SIZES)
    def start(self, seed, sizes):
        base = Model(seed)
        self.twin = Twin(base)
        self.model = oftfx.transform(base, {s: OFT(b) for s, b in sizes.items()}, adapter="p")
        self.enter("p", sizes)
        self.twin.active = ("p",)
        self.kept = []
        self.contexts = []
        self.files = tempfile.TemporaryDirectory()
        self.saved = []

    def teardown(self):
        if hasattr(self, "files"):
            self.files.cleanup()

    # -- what holds after every step ----------------------------------------------------------------

    @invariant()
    def it_is_its_twin(self):
        if not hasattr(self, "model"):
            return
        for model, twin in [(self.model, self.twin), *self.kept]:
            expected = twin.run(X)
            assert near(model(X), expected) < CLOSE
            with torch.no_grad():
                assert near(model(X), expected) < CLOSE
        assert oftfx.active_adapters(self.model) == self.twin.active
        aware = {s for s in ("a", "b") if (s, self.twin.here(s)) in self.twin.through}
        assert {s for s in WIDTHS if self.instead(s) is not None} == aware

    # -- through the fold -------------------------------------------------------------------------------

    @precondition(lambda self: self.twin.active)
    @rule(how=st.sampled_from(["requantize", "calibrate"]), for_good=st.booleans(), distil=st.sampled_from([0, 0, 2]))
    def fold_aware(self, how, for_good, distil):
        if not any(self.twin.here(s) for s in ("a", "b")):
            with pytest.raises(FoldError, match="none of these adapters acts on a quantized weight"):
                oftfx.fold_aware(self.model, how, calibration=CALIBRATION)
            return
        before = self.twin.copy()
        options = {"calibration": CALIBRATION, "distil": distil} if how == "calibrate" else {}
        turns = {s for s in ("a", "b") if any(self.twin.adapters[n][s][0].any() for n in self.twin.here(s))}
        if how == "calibrate" and not turns:
            with pytest.raises(FoldError, match="exactly the identity"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                oftfx.fold_aware(self.model, how, **options)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few tokens
            entered = oftfx.fold_aware(self.model, how, **options)
        for site in ("a", "b"):
            if not (here := self.twin.here(site)):
                continue
            if how == "requantize":
                self.twin.through[site, here] = None
                continue
            if site in turns:
                self.twin.through[site, here] = self.computed(site)
        if not for_good:
            self.it_is_its_twin()
            with entered:
                pass
            self.twin = before

    @precondition(lambda self: self.twin.active)
    @rule()
    def rotate_again(self):
        oftfx.fold_aware(self.model, None)
        self.twin.forget(self.twin.active)

    @precondition(lambda self: self.twin.active)
    @rule(adam=st.booleans())
    def train_step(self, adam):
        expected = self.twin.gradients(X)
        trained = oftfx.adapter_parameters(self.model)
        for parameter in self.model.parameters():
            parameter.grad = None
        frozen = {n: p.detach().clone() for n, p in self.model.named_parameters() if not p.requires_grad}
        self.model(X).square().mean().backward()
        size = max((float(g.norm()) for g in expected.values()), default=0.0)
        for (name, site), gradient in expected.items():
            got = self.skew(name, site).grad
            got = torch.zeros_like(gradient) if got is None else got.double()
            assert float((got - gradient).norm()) < 1e-3 * size + 1e-7
        for name in self.twin.active:
            for site in self.twin.adapters[name]:
                if (name, site) not in expected:  # scales train in its place
                    assert self.skew(name, site).grad is None
        (torch.optim.AdamW if adam else torch.optim.SGD)(trained, lr=1e-3, weight_decay=0.0).step()
        now = dict(self.model.named_parameters())
        assert all(torch.equal(now[n], value) for n, value in frozen.items())
        self.follow()

    # -- adapters and values ----------------------------------------------------------------------------

    @rule(sizes=SIZES)
    def add_adapter(self, sizes):
        free = [n for n in NAMES if n not in self.twin.adapters]
        if not free or not self.twin.adapters:
            return
        oftfx.add_adapter(self.model, free[0], {s: OFT(b) for s, b in sizes.items()})
        self.enter(free[0], sizes)

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def set_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from(sorted(self.twin.adapters)), unique=True))
        oftfx.set_adapter(self.model, names or None)
        self.twin.active = tuple(names)

    @precondition(lambda self: len(self.twin.adapters) > 1)
    @rule()
    def remove_adapter(self):
        oftfx.set_adapter(self.model, "p")
        self.twin.active = ("p",)
        oftfx.remove_adapter(self.model, "q")
        self.twin.remove("q")

    @precondition(lambda self: self.twin.adapters)
    @rule()
    def disable_adapters(self):
        base = self.twin.copy()
        base.active = ()
        with oftfx.disable_adapters(self.model):
            assert near(self.model(X), base.run(X)) < CLOSE

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def a_row_an_adapter(self, data):
        names = data.draw(st.lists(st.sampled_from([None, *sorted(self.twin.adapters)]), min_size=2, max_size=2))
        with oftfx.adapter_rows(self.model, names):
            out = self.model(X.view(1, 7, 64).expand(2, -1, -1))
        for row, name in enumerate(names):
            alone = self.twin.copy()
            alone.active = () if name is None else (name,)
            assert near(out[row], alone.run(X, folded=False)) < CLOSE

    @precondition(lambda self: self.twin.adapters)
    @rule(seed=st.integers(0, 99))
    def write_skews(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for name, sites in self.twin.adapters.items():
            for site in list(sites):
                skew = self.skew(name, site)
                with torch.no_grad():
                    skew.copy_(torch.randn(skew.shape, generator=generator) / 8)
        self.follow()

    @rule(training=st.booleans())
    def mode(self, training):
        self.model.train(training)

    # -- copies, files, folds ---------------------------------------------------------------------------

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copies(self, how):
        self.kept = [(self.model, self.twin.copy())]
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)

    @precondition(lambda self: self.twin.active)
    @rule(inplace=st.booleans())
    def fold(self, inplace):
        before = self.twin.copy()
        now = {s: self.computed(s) for s in ("a", "b") if self.instead(s) is not None}
        kept = {s for s in ("a", "b") if now and s not in now and before.here(s)}  # a rotation stays in front
        inplace = inplace and not kept
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # little survives
            result = oftfx.fold(self.model, quantized="requantize" if not now else None, inplace=inplace)
        folded = self.twin.copy()
        folded.fold(kept)
        assert near(result.model(X), folded.run(X)) < CLOSE
        for site, weight in now.items():
            assert torch.equal(read(result.model.get_submodule(site)).float(), weight.float()), site
        if inplace:
            self.start_again()
            return
        self.model, self.twin = oftfx.unfold(result), before
        self.kept = []

    def start_again(self):
        """The folded model is the base of what comes."""
        base = self.model
        self.kept = []
        self.saved.clear()
        self.twin = Twin(base)
        self.model = oftfx.transform(base, {"a": OFT(8), "b": OFT(16)}, adapter="p")
        self.enter("p", {"a": 8, "b": 16})
        self.twin.active = ("p",)

    @precondition(lambda self: self.twin.adapters)
    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(sorted(self.twin.adapters)))
        path = Path(self.files.name) / str(len(self.saved))
        oftfx.save_adapter(self.model, path, adapter=name, convention="oftfx")
        scales = {s: self.instead(s, (name,)) for s in self.twin.adapters[name]}
        weights = {s: self.computed(s, (name,)) for s, a in scales.items() if a is not None and a.how == "calibrate"}
        assert (path / "oftfx_scales.safetensors").exists() == bool(weights)
        self.saved.append((path, copy.deepcopy(self.twin.adapters[name]), weights))

    @precondition(lambda self: self.saved and len(self.twin.adapters) == 1 and "q" not in self.twin.adapters)
    @rule(data=st.data())
    def load(self, data):
        path, skews, weights = data.draw(st.sampled_from(self.saved))
        oftfx.load_adapter(self.model, path, adapter="q", trainable=True)
        self.twin.adapters["q"] = copy.deepcopy(skews)
        oftfx.set_adapter(self.model, "q")
        self.twin.active = ("q",)
        if not any(s in skews for s in ("a", "b")):
            return
        if not weights:
            with pytest.raises(AdapterFileError, match="oftfx_scales"):
                oftfx.fold_aware(self.model, "calibrate", calibration=path)
            return
        oftfx.fold_aware(self.model, "calibrate", calibration=path)
        for site in ("a", "b"):
            if site in weights:
                self.twin.through[site, ("q",)] = weights[site]

    # -- what the steps share ---------------------------------------------------------------------------

    def enter(self, name, sizes):
        """The twin of a new adapter."""
        self.twin.adapters[name] = {
            s: (torch.zeros(WIDTHS[s] // b, b * (b - 1) // 2, dtype=torch.float64), b) for s, b in sizes.items()
        }

    def follow(self):
        """Take over what trained or was written: skews, and weights whose scales train."""
        for name, sites in self.twin.adapters.items():
            for site, (_, block) in list(sites.items()):
                sites[site] = (self.skew(name, site).detach().double().clone(), block)
        for (site, here), weight in list(self.twin.through.items()):
            if weight is not None:
                self.twin.through[site, here] = self.computed(site, here)

    def skew(self, name, site):
        return self.model.get_parameter(f"{site}.oft.{name}.skew")

    def instead(self, site, names=None):
        """What stands at a site for the adapters that act, or for these."""
        holder = getattr(getattr(self.model, site), "oft", None)
        names = self.twin.here(site) if names is None else names
        sites = None if holder is None else holder._modules.get("_fold")
        return None if sites is None else sites._modules.get("+".join(names))

    def computed(self, site, names=None):
        """What it computes with: the levels of its codes under its scales, by the published formats."""
        aware = self.instead(site, names)
        coded = aware.coded()
        levels = self.twin.table[coded.codes.long()].view(-1, 64)
        return (levels * coded.scale.double().view(-1, 1)).view(coded.codes.shape)


def test_random_sequences_of_training_through_the_fold():
    run(Machine)
