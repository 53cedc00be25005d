"""A fold tells what it changes for others, and its result is nobody else's."""

import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import oftfx
from oftfx import OFT
from oftfx.errors import AdapterError, FoldError
from tests.reference import dense_rotation, randomize, rel

X, IDS = torch.randn(6, 16), torch.arange(9)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def rotated(model=None, **options):
    return randomize(oftfx.transform(model or two_layers(), {"*": OFT(4)}, **options), std=0.2).eval()


class Tied(nn.Module):
    """Reads the weight of its embedding past the embedding."""

    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return F.linear(self.l(self.e(ids)).tanh(), self.e.weight)


class TestOtherReaders:
    def test_are_found_on_calibration_inputs(self):
        model = rotated(Tied())
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(FoldError, match=r"e: its weight is also read by other code \(in the model itself\)"):
            oftfx.fold(model, calibration=[(IDS,)], inplace=True)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert oftfx.active_adapters(model) == ("default",)

    def test_are_found_on_inputs_that_the_model_names(self):
        class Names(Tied):
            @property
            def dummy_inputs(self):
                return {"ids": IDS}

        model = Names()
        plan = oftfx.plan(Tied(), {"*": OFT(4)})
        with pytest.raises(FoldError, match="e: its weight is also read by other code"):
            oftfx.fold(randomize(oftfx.transform(model, plan)))

    def test_are_not_looked_for_without_inputs_and_the_report_says_so(self):
        report = oftfx.fold(rotated(Tied())).report
        first, second, *_ = str(report).splitlines()
        assert first == report.verdict.sentence
        assert second.startswith("not checked: whether other code reads the folded weights: no inpu")
        assert '"unchecked": [' in report.to_json()

    def test_of_a_layer_that_is_never_called(self):
        class Uncalled(nn.Module):
            def __init__(self):
                super().__init__()
                self.l = nn.Linear(16, 16)

            def forward(self, x):
                return F.linear(x, self.l.weight)

        with pytest.raises(FoldError, match="l: it is never called, and its weight is read in"):
            oftfx.fold(rotated(Uncalled()), calibration=[(X,)])

    def test_a_model_without_is_folded_without_a_remark(self):
        for model in (rotated(), rotated(example_inputs=(X,))):
            report = oftfx.fold(model, calibration=[(X,)]).report
            assert report.unchecked == ()
        assert oftfx.fold(rotated(example_inputs=(X,))).report.unchecked == ()


class TestHooksOfOthers:
    def test_that_read_a_layers_input(self):
        base = two_layers()

        def adds_its_input(module, args, out):
            return out + args[0]

        base[0].register_forward_hook(adds_its_input)
        model = rotated(base)
        with pytest.warns(UserWarning, match=r"0: 1 forward hook\(s\) \(.*adds_its_input\) saw x @ R as the input"):
            report = oftfx.fold(model).report
        assert "adds_its_input" in report.sites[0].note
        assert report.sites[1].note == ""

    def test_that_change_an_embedding_before_it_is_rotated(self):
        base = nn.Sequential(nn.Embedding(20, 16))
        base[0].register_forward_hook(lambda m, a, out: out + 1)
        model = rotated(base)
        with pytest.warns(
            UserWarning, match=r"0: 1 forward hook\(s\) before the rotation \(.*lambda.*\) saw the unrot"
        ):
            oftfx.fold(model)

    def test_that_do_not_notice_are_not_named(self):
        base = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8), nn.Conv1d(8, 8, 1))
        base[1].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        model = randomize(oftfx.transform(base, {"*": OFT(4)}))
        model[0].register_forward_hook(lambda m, a, out: out * 2)
        model[2].register_full_backward_hook(lambda m, i, o: None)
        folded = oftfx.fold(model)
        assert [s.note for s in folded.report] == ["", "", ""]
        assert rel(folded.model[:2](IDS), model[:2](IDS)) < 1e-5


class TestOutputs:
    @dataclasses.dataclass
    class Out:
        y: torch.Tensor

    @dataclasses.dataclass(slots=True)
    class Slots:
        y: torch.Tensor

    @pytest.mark.parametrize("kind", [Out, Slots])
    def test_in_a_dataclass_are_measured(self, kind):
        class Model(nn.Sequential):
            def forward(self, x):
                return kind(super().forward(x))

        model = rotated(Model(nn.Linear(16, 16).bfloat16()))
        x = X.bfloat16()
        result = oftfx.fold(model, calibration=[(x,)])
        expected = rel(result.model(x).y, model(x).y)
        assert expected > 1e-4
        assert result.report.output_error == pytest.approx(expected, rel=1e-3)

    def test_that_cannot_be_compared_are_not_called_equal(self):
        class Model(nn.Sequential):
            def forward(self, x):
                return super().forward(x).argmax(-1)

        report = oftfx.fold(rotated(Model(nn.Linear(16, 16))), calibration=[(X,)]).report
        assert report.output_error is None
        assert report.unchecked == ("the model's outputs: no float tensor is among them",)


class TestResultsOfTheirOwn:
    def test_training_goes_on_and_unfold_gives_what_was_folded(self):
        model = randomize(oftfx.transform(two_layers(), {"0": OFT(4)}, train=["2"]))
        old = model(X).detach()
        result = oftfx.fold(model)
        randomize(model, seed=9)
        assert rel(result.model(X), old) < 1e-5
        first = oftfx.unfold(result)
        assert torch.equal(first(X), old)
        randomize(first, seed=4)
        assert torch.equal(oftfx.unfold(result)(X), old)

    def test_a_fold_in_place_is_not_undone_after_another_transform(self):
        model = rotated()
        result = oftfx.fold(model, inplace=True, undo=True)
        again = randomize(oftfx.transform(model, {"0": OFT(8)}, inplace=True), seed=3)
        between = again(X).detach()
        with pytest.raises(FoldError, match="transformed again since this fold"):
            oftfx.unfold(result)
        assert torch.equal(again(X), between)
        later = oftfx.fold(model, inplace=True, undo=True)
        with pytest.raises(FoldError, match="another fold has followed"):
            oftfx.unfold(result)
        assert torch.equal(oftfx.unfold(later)(X), between)
        oftfx.remove_adapter(model, "default")

    def test_folds_in_place_are_undone_in_turn(self):
        model = rotated()
        old = model(X).detach()
        first = oftfx.fold(model, inplace=True, undo=True)
        randomize(oftfx.transform(model, {"0": OFT(8)}, inplace=True), seed=3)
        second = oftfx.fold(model, inplace=True, undo=True)
        oftfx.unfold(second)
        oftfx.fold(model, inplace=True, adapter="default")
        with pytest.raises(FoldError, match="another fold has followed"):
            oftfx.unfold(first)
        assert rel(model(X), old) > 0


class TestParts:
    def test_of_a_transformed_model_are_not_transformed(self, tmp_path):
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = two_layers()

            def forward(self, x):
                return self.part(x)

        model = rotated(Whole())
        old = model(X).detach()
        oftfx.save_adapter(rotated(), tmp_path)
        for inplace in (True, False):
            with pytest.raises(
                AdapterError, match="0 rotates already, by an adapter of the model that this Sequential"
            ):
                oftfx.transform(model.part, {"*": OFT(4)}, adapter="b", inplace=inplace)
        with pytest.raises(AdapterError, match="rotates already"):
            oftfx.load_adapter(model.part, tmp_path, adapter="b")
        assert torch.equal(model(X), old)
        assert rel(oftfx.fold(model).model(X), old) < 1e-5

    def test_of_a_folded_model_are(self):
        model = nn.Sequential(two_layers())
        folded = oftfx.fold(rotated(model)).model
        part = rotated(folded[0])
        r = dense_rotation(part[0].oft.default.skew, 4)
        expected = F.linear(X.double() @ r, part[0].weight.double(), part[0].bias.double())
        assert rel(part[0](X), expected) < 1e-6


def test_a_compiled_model_follows_folds_in_place_and_back():
    model = rotated()
    compiled = torch.compile(model, backend="eager")
    old = compiled(X).detach()
    result = oftfx.fold(compiled, inplace=True, undo=True)
    assert rel(compiled(X), old) < 1e-5
    oftfx.unfold(result)
    assert rel(compiled(X), old) < 1e-6
    oftfx.fold(compiled, inplace=True)
    assert rel(compiled(X), old) < 1e-5
    randomize(oftfx.transform(model, {"0": OFT(8)}, inplace=True), seed=3)
    assert rel(compiled(X), model(X)) < 1e-6
    assert rel(compiled(X), old) > 1e-3


def test_a_compiled_base_follows_adapters_that_are_loaded_and_removed(tmp_path):
    oftfx.save_adapter(rotated(), tmp_path)
    model = two_layers().eval()
    compiled = torch.compile(model, backend="eager")
    base = compiled(X).detach()
    for _ in range(2):
        oftfx.load_adapter(model, tmp_path)
        assert rel(compiled(X), model(X)) < 1e-6
        assert rel(compiled(X), base) > 1e-3
        oftfx.remove_adapter(model, "default")
        assert torch.equal(compiled(X), base)


@pytest.mark.parametrize("layer", [nn.Embedding(20, 16), nn.Linear(16, 4), nn.Conv1d(16, 4, 3)])
def test_a_rotated_layer_runs_on_the_meta_device(layer):
    x = IDS if isinstance(layer, nn.Embedding) else torch.randn(2, 16, 16)
    model = rotated(nn.Sequential(layer))
    assert model.to("meta")(x.to("meta")).shape == layer(x).shape
