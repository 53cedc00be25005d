"""transformers' Trainer: steps, checkpoints, resuming, evaluation, checkpointing and mixed precision."""

import pytest
import torch

import oftfx
from oftfx import OFT
from tests.ecosystem.twin import dense_twin, skews, values
from tests.reference import rel

pytestmark = [pytest.mark.needs("transformers", "accelerate"), pytest.mark.usefixtures("_accelerate_state")]
STEPS = 6


@pytest.fixture
def rows(ids):
    def row(seed):
        return {**{k: v[0] for k, v in ids(1, 9, seed=seed).items()}, "labels": ids(1, 9, seed=seed)["input_ids"][0]}

    return [row(seed) for seed in range(20)]


@pytest.fixture
def trainer(rows, tmp_path):
    from transformers import Trainer, TrainingArguments

    def make(model, folder="run", **changes):
        arguments = {
            "output_dir": str(tmp_path / folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no",
            "disable_tqdm": True, "seed": 3, "dataloader_pin_memory": False, **changes,
        }  # fmt: skip
        return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, eval_dataset=rows[:4])

    return make


def transformed(base, share=False):
    return oftfx.transform(base, {"all-linear": OFT(16, share_input=share)})


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
def test_only_rotations_change(tiny_llama, trainer, optimizer, share):
    base = tiny_llama()
    model = transformed(base, share)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer(model, optim=optimizer, weight_decay=0.1).train()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(skews(model))
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


def test_the_steps_are_those_of_a_loop_by_hand(tiny_llama, trainer, rows):
    model, other = transformed(tiny_llama()), transformed(tiny_llama())
    options = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    losses = trainer(model, logging_strategy="steps", logging_steps=1, **options)
    losses.train()
    optimizer, expected = torch.optim.SGD(oftfx.adapter_parameters(other.train()), lr=1e-2), []
    for step in range(STEPS):
        batch = {k: torch.stack([r[k] for r in rows[2 * step : 2 * step + 2]]) for k in rows[0]}
        loss = other(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    got = [entry["loss"] for entry in losses.state.log_history if "loss" in entry]
    assert got == pytest.approx(expected, rel=1e-3)
    assert all(rel(skews(model)[n], p) < 1e-4 for n, p in skews(other).items())


def test_resuming_gives_the_uninterrupted_run(tiny_llama, trainer, tmp_path):
    straight = transformed(tiny_llama(), True)
    trainer(straight, "straight").train()
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = transformed(tiny_llama(), True)
    trainer(first, "cut", **saving).train()
    second = transformed(tiny_llama(), True)
    trainer(second, "cut", **saving).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert all(torch.equal(p, skews(straight)[n]) for n, p in skews(first).items())
    assert all(torch.equal(p, skews(straight)[n]) for n, p in skews(second).items())
    assert any(p.any() for p in skews(second).values())


def test_the_best_model_is_loaded_at_the_end(tiny_llama, trainer, ids):
    base = tiny_llama()
    model = transformed(base)
    seen = {}
    every = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(model, load_best_model_at_end=True, learning_rate=0.3, optim="adamw_torch_fused", **every)
    evaluate = run.evaluate

    def noted(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        seen[metrics["eval_loss"]] = values(model)
        return metrics

    run.evaluate = noted
    run.train()
    best = seen[min(seen)]
    assert all(torch.equal(p, best[n]) for n, p in skews(model).items())
    assert len(seen) == 3
    again = run.evaluate()["eval_loss"]
    assert again == pytest.approx(min(seen), rel=1e-6)
    with torch.no_grad():
        assert rel(model.eval()(**ids()).logits, dense_twin(base, model)(**ids()).logits) < 1e-5


def test_evaluation_and_prediction_are_the_plain_models(rotated, rows, trainer):
    base, model = rotated()
    got = trainer(model).predict(rows[:4])
    expected = trainer(dense_twin(base, model), "plain").predict(rows[:4])
    assert got.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    assert rel(torch.tensor(got.predictions[0] if isinstance(got.predictions, tuple) else got.predictions),
               torch.tensor(expected.predictions[0] if isinstance(expected.predictions, tuple)
                            else expected.predictions)) < 1e-5  # fmt: skip


@pytest.mark.parametrize("options", [
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    {"torch_compile": True, "torch_compile_backend": "eager"},
], ids=["checkpointing", "accumulation", "compiled"])  # fmt: skip
def test_ways_to_run_the_same_steps(tiny_llama, trainer, options):
    torch._dynamo.reset()
    plain, other = (transformed(tiny_llama(num_hidden_layers=1), True) for _ in range(2))
    trainer(plain, "plain", optim="sgd", max_steps=3).train()
    trainer(other, "other", optim="sgd", max_steps=3, **options).train()
    assert all(p.any() for p in skews(plain).values())
    assert all(rel(p, skews(plain)[n]) < 1e-4 for n, p in skews(other).items())
    torch._dynamo.reset()


def test_mixed_precision(tiny_llama, trainer, ids):
    base = tiny_llama()
    exact, model = transformed(base), transformed(base)
    trainer(exact, "exact", optim="sgd").train()
    trainer(model, "narrow", optim="sgd", bf16=True).train()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    distances = [rel(p, skews(exact)[n]) for n, p in skews(model).items()]
    assert 0 < max(distances) < 0.2
    folded = oftfx.fold(model).model
    assert rel(folded(**ids()).logits.float(), dense_twin(base, model)(**ids()).logits) < 1e-2


def test_a_saved_run_is_a_base_and_an_adapter(tiny_llama, trainer, ids, tmp_path):
    base = tiny_llama()
    model = transformed(base)
    run = trainer(model)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    plain, info = type(base).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(skews(model))
    assert torch.equal(plain.eval()(**ids()).logits, base(**ids()).logits)
