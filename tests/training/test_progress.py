"""What is on disk of a run, and what is not taken for it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from oftfx.errors import OftfxError
from oftfx.training.progress import FILE, losses_so_far, resume, save_progress


def run(size=5, steps=3):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, 3)), torch.nn.Parameter(torch.randn(4))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    losses = []
    for _ in range(steps):
        loss = sum((p**2).sum() for p in parameters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return parameters, optimizer, losses


def test_a_step_after_is_the_step_that_would_have_been(tmp_path):
    parameters, optimizer, losses = run()
    save_progress(tmp_path, parameters, optimizer, losses)
    torch.rand(7)
    expected = torch.get_rng_state()
    fresh, own, _ = run(steps=1)
    assert resume(tmp_path, fresh, own) == losses == losses_so_far(tmp_path)
    torch.rand(7)
    assert torch.equal(torch.get_rng_state(), expected)
    for ps, o in ((parameters, optimizer), (fresh, own)):
        o.zero_grad()
        sum((p**2).sum() for p in ps).backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, fresh, strict=True))


def test_nothing_there_is_a_start(tmp_path):
    parameters, optimizer, _ = run()
    assert resume(tmp_path, parameters, optimizer) == []


def test_other_parameters_and_damage_are_refused_before_anything_changes(tmp_path):
    parameters, optimizer, losses = run()
    save_progress(tmp_path, parameters, optimizer, losses)
    other, own, _ = run(size=6)
    before = [p.detach().clone() for p in other]
    with pytest.raises(OftfxError, match=r"parameter 0 is \(5, 3\), here it is \(6, 3\)"):
        resume(tmp_path, other, own)
    with pytest.raises(OftfxError, match="has 2 parameters, here are 1"):
        resume(tmp_path, other[:1], own)
    tensors = load_file(tmp_path / FILE)
    save_file({k: v for k, v in tensors.items() if k != "losses"}, tmp_path / FILE)
    with pytest.raises(OftfxError, match="is damaged"):
        resume(tmp_path, parameters, optimizer)
    (tmp_path / FILE).write_bytes(b"\x80\x04pickle")
    with pytest.raises(OftfxError, match="is damaged"):
        resume(tmp_path, parameters, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, other, strict=True))
