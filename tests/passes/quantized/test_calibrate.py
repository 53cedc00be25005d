import pytest
import torch
import torch.nn as nn

import oftfx
from oftfx.folding.journal import Journal
from oftfx.folding.policies import Budget
from oftfx.folding.shown import Shown
from oftfx.folding.turned import Turned
from oftfx.folding.workbench import Workbench
from oftfx.formats import format_of
from oftfx.model.index import ModelIndex
from oftfx.passes import Calibrate, Program, Requantize
from oftfx.passes.quantized.calibrate import in_running_order
from oftfx.placement.find import rotated_sites
from tests.passes.quantized.layers import INPUT, dense, rotated
from tests.reference import rel

MIX = torch.randn(128, 128, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.logspace(0, -2, 128))
ROWS = torch.randn(400, 128, generator=torch.Generator().manual_seed(6)) @ MIX


def folded_by(policy, shown):
    """The line of a site, its target and the weight that was written, float64."""
    model = rotated(std=0.05)
    weight, rotation = dense(model[2])
    site = Turned.of("2", dict(rotated_sites(model))["2"], format_of(model[2]))
    line = policy.fold(site, Workbench(ModelIndex(model), Journal(keep=False)), shown, None)
    return line, weight @ rotation.T, format_of(model[2]).dequantize(model[2]).double()


@pytest.mark.needs("bitsandbytes")
def test_with_inputs_the_outputs_are_nearer_than_those_of_the_nearest_codes():
    fresh = torch.randn(3000, 128, generator=torch.Generator().manual_seed(7)) @ MIX
    errors = {}
    for policy in (Calibrate(), Requantize()):
        line, target, got = folded_by(policy, Shown([ROWS], [None]))
        errors[line.action] = rel(fresh.double() @ got.T, fresh.double() @ target.T)
        held = {"calibrated": ROWS[300:], "requantized": ROWS}[line.action].double()
        near = {"calibrated": 0.3, "requantized": 1e-3}[line.action]  # judged on a quarter, then made from all
        assert line.output_error == pytest.approx(rel(held @ got.T, held @ target.T), rel=near)
    assert errors["calibrated"] < 0.8 * errors["requantized"]


@pytest.mark.needs("bitsandbytes")
def test_what_earlier_folds_have_missed_is_made_up_for():
    seen = ROWS + 0.15 * ROWS @ torch.randn(128, 128, generator=torch.Generator().manual_seed(2)) / 128**0.5
    errors = {}
    for name, shown in (("own", Shown([seen], [None])), ("both", Shown([seen], [ROWS]))):
        _, target, got = folded_by(Calibrate(), shown)
        errors[name] = rel(seen.double() @ got.T, ROWS.double() @ target.T)
    assert errors["both"] < 0.7 * errors["own"]


@pytest.mark.needs("bitsandbytes")
def test_without_moments_the_nearest_codes_are_taken_and_said_so():
    nearest, alone = rotated(), rotated()
    Requantize().run(Program.of(nearest))
    (line,) = Calibrate().run(Program.of(alone)).found.sites
    assert line.action == "requantized"
    assert torch.equal(nearest[2].weight, alone[2].weight)


@pytest.mark.needs("bitsandbytes")
def test_over_the_bound_nothing_is_changed():
    model = rotated()
    before, expected = model[2].weight.detach().clone(), model(INPUT)
    site = Turned.of("2", dict(rotated_sites(model))["2"], format_of(model[2]))
    assert Calibrate().fold(site, Workbench(ModelIndex(model), Journal(keep=False)), None, Budget(1e-6)) is None
    assert torch.equal(model[2].weight, before)
    assert torch.equal(model(INPUT), expected)
    assert oftfx.active_adapters(model) == ("default",)


def test_layers_are_shown_in_the_order_they_run_each_knowing_what_came_of_the_ones_before():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.never = nn.Linear(5, 3), nn.Linear(4, 5), nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x))

    torch.manual_seed(0)
    model, x = Backwards().eval().requires_grad_(False), torch.randn(6, 4)
    seen = []

    def fold(module, shown):
        seen.append((module, shown and shown.seen))
        module.weight *= 2

    hidden = nn.functional.linear(x, 2 * model.first.weight.clone(), model.first.bias).double()
    in_running_order(model, [model.last, model.never, model.first], [(x[:2],), (x[2:],)], fold)
    assert [m for m, _ in seen] == [model.first, model.last, model.never]
    assert rel(seen[0][1], x.double().T @ x.double()) < 1e-6
    assert rel(seen[1][1], hidden.T @ hidden) < 1e-6
    assert seen[2][1] is None
