"""Plain optimisers: every step equals that of an MLP whose rotations are written out as dense products."""

import io

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import Explicit, mlp, skews
from tests.reference import rel

STEPS = 4
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
}
TOLERANCE = {"muon": 1e-2}  # its orthogonalisation runs in bfloat16


def pair(dtype=torch.float64):
    """``(transformed, explicit)``: the same network twice."""
    base = mlp(dtype)
    return oftfx.transform(base, {"all-linear": OFT(4)}), Explicit(base, 4)


def batch(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(16, n, generator=generator, dtype=torch.float64).to(dtype) for n in (12, 8))


def fit(model, optimizer, steps=STEPS, first=0):
    """Train; the losses."""
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step % 2, next(model.parameters()).dtype)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses


def distance(model, explicit):
    got, expected = list(skews(model).values()), list(explicit.skews)
    assert [g.shape for g in got] == [e.shape for e in expected]
    return max(rel(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "muon" or hasattr(torch.optim, "Muon")])
def test_steps_equal_those_of_the_explicit_network(name):
    model, explicit = pair()
    before = {n: p.clone() for n, p in model.named_parameters() if ".oft." not in n}
    got = fit(model, OPTIMIZERS[name](oftfx.adapter_parameters(model)))
    expected = fit(explicit, OPTIMIZERS[name](list(explicit.skews)))
    tolerance = TOLERANCE.get(name, 1e-9)
    assert got == pytest.approx(expected, rel=tolerance)
    assert min(expected[2:]) < expected[0]
    assert distance(model, explicit) < tolerance
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_an_optimizer_over_all_parameters_moves_only_the_rotations():
    model, explicit = pair()
    before = {n: p.clone() for n, p in model.named_parameters() if ".oft." not in n}
    fit(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
    fit(explicit, torch.optim.AdamW(explicit.skews, lr=0.01, weight_decay=0.5))
    assert distance(model, explicit) < 1e-9
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_parameter_groups_and_a_schedule():
    model, explicit = pair()
    for network, parameters in [(model, list(skews(model).values())), (explicit, list(explicit.skews))]:
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:]}]
        optimizer = torch.optim.SGD(groups, lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        for step in range(STEPS):
            fit(network, optimizer, 1, step)
            schedule.step()
    assert distance(model, explicit) < 1e-12


def test_accumulation_and_clipping():
    model, explicit = pair()
    for network, parameters in [(model, oftfx.adapter_parameters(model)), (explicit, list(explicit.skews))]:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for seed in (0, 1):
                x, y = batch(seed)
                (torch.nn.functional.mse_loss(network(x), y) / 2).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            assert norm > 0.05
            optimizer.step()
    assert distance(model, explicit) < 1e-12


def test_the_state_of_an_optimizer_is_saved_and_continues():
    straight, _ = pair()
    fit(straight, torch.optim.AdamW(oftfx.adapter_parameters(straight), lr=0.01), 4)
    first, _ = pair()
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(first), lr=0.01)
    fit(first, optimizer, 2)
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second, _ = pair()
    second.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(second), lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    fit(second, optimizer, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(skews(second).values(), skews(straight).values(), strict=True))


@pytest.mark.needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "Lion8bit"])
def test_bitsandbytes_keeps_eight_bit_states(name):
    bnb = pytest.importorskip("bitsandbytes")
    base = mlp(torch.float32, 64)
    model, explicit = oftfx.transform(base, {"all-linear": OFT(16)}), Explicit(base, 16)
    x, y = torch.randn(32, 64), torch.randn(32, 8)

    def losses(network, parameters):
        optimizer = getattr(bnb.optim, name)(parameters, lr=2e-3, min_8bit_size=1)
        result = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(network(x), y)
            loss.backward()
            optimizer.step()
            result.append(float(loss.detach()))
        assert all(optimizer.state[p]["state1"].dtype == torch.uint8 for p in parameters)
        return result

    expected = losses(explicit, list(explicit.skews))
    assert expected[-1] < expected[0] - 1e-3
    assert losses(model, oftfx.adapter_parameters(model)) == pytest.approx(expected, rel=1e-3)


class WritesData(torch.optim.Optimizer):
    """Gradient descent through ``p.data``, as many published optimisers do it; autograd does not see the write."""

    def __init__(self, parameters, lr=0.05):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])
        return loss


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adafactor", "lbfgs", "writes-data", "bnb-adam8bit"])
def test_in_eval_mode_a_step_takes_effect_at_once(name):
    """A frozen batch norm or a policy without dropout trains like this; the blocks that eval mode keeps must go."""
    make, dtype = OPTIMIZERS.get(name), torch.float64
    if name == "writes-data":
        make = WritesData
    elif name == "bnb-adam8bit":
        dtype = torch.float32
        bnb = pytest.importorskip("bitsandbytes")
        make = lambda p: bnb.optim.Adam8bit(p, lr=0.05, min_8bit_size=1)  # noqa: E731
    model, explicit = (m.eval() for m in pair(dtype))
    optimizer = make(oftfx.adapter_parameters(model))
    x, _ = batch(5, dtype)
    for step in range(3):
        fit(model, optimizer, 1, step)
        for ours, plain in zip(skews(model).values(), explicit.skews, strict=True):
            plain.data.copy_(ours.detach())
        with torch.no_grad():  # the forward that keeps the rotation's blocks
            assert rel(model(x), explicit(x)) < (1e-5 if dtype == torch.float32 else 1e-12), step


@pytest.mark.parametrize("fused", [False, True])
def test_a_look_between_backward_and_step_does_not_linger(fused):
    model, explicit = (m.eval() for m in pair())
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=0.05, fused=fused)
    x, y = batch()
    torch.nn.functional.mse_loss(model(x), y).backward()
    with torch.no_grad():
        model(x)
        optimizer.step()
        for ours, plain in zip(skews(model).values(), explicit.skews, strict=True):
            plain.copy_(ours)
        assert rel(model(x), explicit(x)) < 1e-12
