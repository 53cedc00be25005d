"""Averages over a run, as `torch.optim.swa_utils` makes them."""

import pytest
import torch
from torch.optim import swa_utils

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, mlp, skews, values
from tests.reference import randomize, rel

DECAY = 0.75


def swa(history):
    return {n: torch.stack([h[n] for h in history]).mean(0) for n in history[0]}


def ema(history):
    result = history[0]
    for later in history[1:]:
        result = {n: DECAY * result[n] + (1 - DECAY) * later[n] for n in result}
    return result


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_the_averaged_model_computes_and_folds_with_the_averaged_rotations(kind):
    base = mlp()
    model = oftfx.transform(base, {"all-linear": OFT(4)})
    average = {} if kind == "swa" else {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}
    averaged = swa_utils.AveragedModel(model, **average)
    averaged.eval()
    history, x = [], torch.randn(5, 12, dtype=torch.float64)
    for seed in range(4):
        randomize(model, std=0.2, seed=seed)
        history.append(values(model))
        averaged.update_parameters(model)
        expected = {"swa": swa, "ema": ema}[kind](history)
        got = skews(averaged.module)
        assert all(rel(got[n], expected[n]) < 1e-12 for n in expected)
        with torch.no_grad():
            assert rel(averaged(x), dense_twin(base, averaged.module)(x)) < 1e-12
    assert rel(oftfx.fold(averaged.module).model(x), averaged(x)) < 1e-12
    assert all(torch.equal(p, history[-1][n]) for n, p in skews(model).items())


def test_swalr_and_update_bn_take_the_averaged_model():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 4)).double()
    model = randomize(oftfx.transform(base, {"all-linear": OFT(4)}), std=0.3)
    averaged = swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    data = [torch.randn(32, 12, dtype=torch.float64) for _ in range(2)]
    swa_utils.update_bn(data, averaged)
    hidden = [dense_twin(base, model)[0](x) for x in data]
    assert rel(averaged.module[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0)) < 1e-12
