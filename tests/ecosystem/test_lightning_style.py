"""A loop in Lightning's shape: a module that holds the model, and a trainer that only knows the module."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import Explicit, dense_twin, mlp, skews
from tests.reference import rel


class Module(torch.nn.Module):
    """What a LightningModule has."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    validation_step = training_step

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.02)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)


def fit(module, data, epochs=3):
    """What a Trainer does: sanity check, epochs of training, validation without gradients."""
    optimizer, schedule = module.configure_optimizers()
    history = []

    def validate():
        module.eval()
        torch.set_grad_enabled(False)
        history.append(sum(float(module.validation_step(b, i)) for i, b in enumerate(data)))
        torch.set_grad_enabled(True)
        module.train()

    validate()
    for _ in range(epochs):
        for index, batch in enumerate(data):

            def closure(batch=batch, index=index):
                loss = module.training_step(batch, index)
                optimizer.zero_grad()
                loss.backward()
                return loss

            optimizer.step(closure)
        schedule.step()
        validate()
    checkpoint = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    return history, checkpoint


@pytest.fixture
def data():
    return [tuple(torch.randn(16, n, dtype=torch.float64) for n in (12, 8)) for _ in range(2)]


def test_the_run_equals_that_of_the_explicit_network(data):
    base = mlp()
    model, explicit = oftfx.transform(base, {"all-linear": OFT(4)}), Explicit(base, 4)
    got, _ = fit(Module(model), data)
    expected, _ = fit(Module(explicit), data)
    assert got == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < expected[0]
    assert all(rel(p, q) < 1e-9 for p, q in zip(skews(model).values(), explicit.skews, strict=True))
    x = data[0][0]
    assert rel(oftfx.fold(model).model(x), explicit(x)) < 1e-12


def test_a_checkpoint_has_the_bases_names_and_loads(data):
    base = mlp()
    module = Module(oftfx.transform(base, {"all-linear": OFT(4)}))
    _, checkpoint = fit(module, data, 1)
    names = set(checkpoint["state_dict"])
    assert {n for n in names if ".oft." not in n} == {f"network.{n}" for n in base.state_dict()}
    fresh = Module(oftfx.transform(mlp(), {"all-linear": OFT(4)}))
    fresh.load_state_dict(checkpoint["state_dict"])
    assert rel(fresh(data[0][0]), dense_twin(base, module.network)(data[0][0])) < 1e-12
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(skews(module))


def test_a_part_of_a_module_is_transformed_and_folded_in_place(data):
    module = Module(mlp())
    base = mlp()
    oftfx.transform(module.network, {"all-linear": OFT(4)}, inplace=True)
    fit(module, data, 1)
    twin = dense_twin(base, module.network)
    oftfx.fold(module.network, inplace=True)
    assert rel(module(data[0][0]), twin(data[0][0])) < 1e-12
    assert list(module.state_dict()) == [f"network.{n}" for n in base.state_dict()]
