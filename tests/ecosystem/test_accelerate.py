"""Accelerate: prepared models train, and the adapter functions reach through what was prepared."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, skews, values
from tests.reference import randomize, rel

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.usefixtures("_accelerate_state")]


def batches(ids, count=4):
    return [{**ids(2, 9, seed=s), "labels": ids(2, 9, seed=s)["input_ids"]} for s in range(count)]


def by_hand(model, data, every=1):
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model.train()), lr=1e-2)
    for index, batch in enumerate(data):
        (model(**batch).loss / every).backward()
        if (index + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return values(model)


@pytest.mark.parametrize("every", [1, 2])
def test_a_prepared_loop_equals_one_by_hand(tiny_llama, ids, every):
    from accelerate import Accelerator

    spec = {"all-linear": OFT(16, share_input=True)}
    base = tiny_llama()
    expected = by_hand(oftfx.transform(base, spec), batches(ids), every)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=every)
    model = oftfx.transform(base, spec).train()
    optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
    loader = torch.utils.data.DataLoader(batches(ids), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert all(rel(p, expected[n]) < 1e-6 for n, p in skews(model).items())
    unwrapped = accelerator.unwrap_model(model)
    assert rel(oftfx.fold(unwrapped).model(**ids()).logits, dense_twin(base, unwrapped)(**ids()).logits) < 1e-5


def test_adapter_functions_reach_a_model_prepared_for_mixed_precision(tiny_llama, ids, tmp_path):
    """``prepare`` puts a forward of its own on the instance; copies must call theirs, not the original's."""
    from accelerate import Accelerator

    base = tiny_llama()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(oftfx.transform(base, {"all-linear": OFT(16)}))
    for batch in batches(ids, 2):
        accelerator.backward(model(**batch).loss)
    assert all(p.grad is not None for p in oftfx.adapter_parameters(model))
    randomize(model, std=0.1)
    assert oftfx.active_adapters(model) == ("default",)
    twin = dense_twin(base, model)
    with torch.no_grad():
        got = model(**ids()).logits
        assert 1e-5 < rel(got, twin(**ids()).logits) < 3e-2
        with oftfx.disable_adapters(model):
            assert rel(model(**ids()).logits, base(**ids()).logits) < 3e-2
    folded = oftfx.fold(model).model
    randomize(model, std=0.3, seed=4)
    assert rel(folded(**ids()).logits, twin(**ids()).logits) < 3e-2
    plain = accelerator.unwrap_model(folded, keep_fp32_wrapper=False)
    assert rel(plain(**ids()).logits, twin(**ids()).logits) < 1e-5
    oftfx.save_adapter(accelerator.unwrap_model(model), tmp_path)
    fresh = tiny_llama()
    fresh = oftfx.load_adapter(fresh, tmp_path) or fresh
    assert all(torch.equal(p, skews(model)[n]) for n, p in skews(fresh).items())


def test_save_state_and_load_state_continue(tiny_llama, ids, tmp_path):
    from accelerate import Accelerator

    spec = {"all-linear": OFT(16)}
    expected = by_hand(oftfx.transform(tiny_llama(), spec), batches(ids))
    accelerator = Accelerator(cpu=True)

    def prepared():
        model = oftfx.transform(tiny_llama(), spec).train()
        optimizer = torch.optim.AdamW(oftfx.adapter_parameters(model), lr=1e-2)
        accelerator.free_memory()
        return accelerator.prepare(model, optimizer)

    def steps(model, optimizer, data):
        for batch in data:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = prepared()
    steps(model, optimizer, batches(ids)[:2])
    accelerator.save_state(tmp_path)
    model, optimizer = prepared()
    accelerator.load_state(tmp_path)
    steps(model, optimizer, batches(ids)[2:])
    assert all(rel(p, expected[n]) < 1e-6 for n, p in skews(model).items())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_come_when_they_are_needed(rotated, ids, tmp_path, where, share):
    """Offloading puts the model's parameters on the meta device and fills them in around a module's forward."""
    from accelerate import cpu_offload, disk_offload

    base, model = rotated(share)
    twin = dense_twin(base, model)
    offload = {"cpu": cpu_offload, "disk": lambda m, d: disk_offload(m, str(tmp_path), d)}[where]
    offload(model, torch.device("cpu"))
    mine = {id(p) for p in skews(model).values()}
    assert all(p.is_meta != (id(p) in mine) for p in model.parameters())
    with torch.no_grad():
        for _ in range(2):
            assert rel(model(**ids()).logits, twin(**ids()).logits) < 1e-5


def test_a_model_is_estimated_and_dispatched_by_its_modules(rotated, ids):
    from accelerate import dispatch_model, infer_auto_device_map

    base, model = rotated(True)
    devices = infer_auto_device_map(model, {"cpu": "1GB"}, no_split_module_classes=["LlamaDecoderLayer"])
    dispatch_model(model, devices, force_hooks=True)
    assert rel(model(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5
