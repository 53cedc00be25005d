"""A training run in a directory: started, stopped, gone on with, and what it leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.save import save_adapter
from oftfx.adapter.store import located
from oftfx.adapter.switch import adapter_parameters
from oftfx.errors import AdapterError, OftfxError
from oftfx.files import check_writable, write_whole
from oftfx.foldaware import fold_aware
from oftfx.opened import open_config, open_image_processor, open_model, open_tokenizer
from oftfx.planning.plans import Plan
from oftfx.planning.read_rules import names_of
from oftfx.rotation.spec import OFT
from oftfx.surgery import plan as plan_of
from oftfx.surgery import transform
from oftfx.training.claim import check_data, claimed
from oftfx.training.examples import Bar, Data
from oftfx.training.images import read_images
from oftfx.training.minimise import Schedule, minimise
from oftfx.training.progress import FILE as PROGRESS
from oftfx.training.read_examples import read_examples
from oftfx.training.recipe import FILE as RECIPE
from oftfx.training.recipe import Recipe, RecipeError
from oftfx.typed_json import made, parsed

ADAPTER, RESULT, SCALES = "adapter", "oftfx_training.json", "scales"


@dataclass
class Training:
    """One run.

    Attributes:
        recipe: what it is decided by.
        out: its directory: the recipe, the progress, the adapter, the result.
        say: called with a line of text for the user.
        bar: see `Bar`.
        result: figures, filled on the way.
    """

    recipe: Recipe
    out: Path
    say: Callable[[str], None]
    bar: Bar
    result: dict[str, Any] = field(default_factory=dict)

    def check(self) -> Plan:
        """Everything that can be known before the first step: directories, data, rules.

        Raises:
            OftfxError: what is wrong.
        """
        _check_apart(self.out, self.recipe)
        return self._prepared()[2]

    def run(self) -> dict[str, Any]:
        """Train, and write the adapter; a run that is complete says so and does nothing.

        Raises:
            OftfxError: the directory has a run of another recipe, or what `check` finds.
        """
        _check_apart(self.out, self.recipe)
        if (self.out / RESULT).is_file():
            self.result = read_result(self.out)
            self.say(f"{self.out} is complete; nothing to do")
            return self.result
        prepared = self._prepared()  # a recipe that cannot be run leaves no directory
        with claimed(self.out):
            return self._run(*prepared)

    def _run(self, model: nn.Module, parts: tuple[Data, Data], plan: Plan) -> dict[str, Any]:
        data, held_out = parts
        convention = self._convention(model)
        read = {n: Path(p) for n in ("data", "held_out", "rules") if (p := getattr(self.recipe, n))}
        check_data(self.out, read)
        self.recipe.write(self.out / RECIPE)
        self._loss_of("before", model, held_out)
        steps = self._steps(data)
        self._train(model, data, steps, 0, self.out, f"train {steps} steps")
        self._loss_of("after", model, held_out)
        if self.recipe.fold_aware:
            inputs = self._calibration(data)
            with fold_aware(model, "calibrate", calibration=inputs, progress=False):
                title = f"train the scales, {self.recipe.fold_aware} steps"
                self._train(model, data, self.recipe.fold_aware, steps, self.out / SCALES, title)
                self._loss_of("after, folded", model, held_out)
                save_adapter(model, self.out / ADAPTER, convention=convention)
        else:
            save_adapter(model, self.out / ADAPTER, convention=convention)
        self.result |= {"adapter": ADAPTER, "sites": len(plan), "trainable": plan.trainable, "convention": convention}
        write_whole(self.out / RESULT, (json.dumps(self.result, indent=1) + "\n").encode())
        self.say(f"the adapter is in {self.out / ADAPTER}")
        return self.result

    def _prepared(self) -> tuple[nn.Module, tuple[Data, Data], Plan]:
        recipe = self.recipe
        check_writable(self.out, OftfxError)
        read = self._reader()
        data = read(Path(recipe.data))
        for remark in data.remarks:
            self.say(f"{recipe.data}: {remark}")
        if recipe.held_out:
            parts = data, read(Path(recipe.held_out))
        else:
            parts = data.split(min(recipe.held_out_rows, len(data) // 5))
        for part in parts:
            part.check(self.bar)
        self.say(f"{parts[0].said}, {len(parts[1])} held out")
        torch.manual_seed(recipe.seed)
        device = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        model = open_model(recipe.base, dtype=recipe.dtype, **({} if device == "cpu" else {"device_map": {"": device}}))
        plan = plan_of(model, recipe.rules or {name: self._spec() for name in names_of(recipe.target)})
        self.say(str(plan))
        made = transform(model, plan, inplace=True)
        if recipe.gradient_checkpointing:
            enable: Any = getattr(made, "gradient_checkpointing_enable", None)
            if enable is None:
                raise RecipeError(f"gradient_checkpointing: a {type(made).__name__} does not have it")
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return made, parts, plan  # type: ignore[return-value]

    def _reader(self) -> Callable[[Path], Data]:
        """Of texts, or where ``data`` is a folder, of images."""
        recipe = self.recipe
        if Path(recipe.data).is_dir():
            processor, config = open_image_processor(recipe.base), open_config(recipe.base)
            return lambda path: read_images(path, processor, config)
        tokenizer = open_tokenizer(recipe.base)
        return lambda path: read_examples(path, tokenizer, recipe.sequence)

    def _spec(self) -> OFT:
        return OFT(self.recipe.block_size, share_input=self.recipe.share_input, dropout=self.recipe.dropout)

    def _convention(self, model: nn.Module) -> str:
        try:
            peft_files.config_for(located(model)[1].adapters["default"].plan, model)
        except AdapterError as error:
            self.say(f"saved in our own convention: {error}")
            return "oftfx"
        return "peft"

    def _steps(self, data: Data) -> int:
        if self.recipe.steps:
            return self.recipe.steps
        rows = self.recipe.batch * self.recipe.accumulate
        return max(1, math.ceil(len(data) * self.recipe.epochs / rows))

    def _train(self, model: nn.Module, data: Data, steps: int, first: int, folder: Path, title: str) -> None:
        recipe = self.recipe
        device = next(model.parameters()).device

        def loss(call: int) -> Tensor:
            batch = data.batch(first * recipe.accumulate + call, recipe.batch, recipe.seed)
            return model(**{n: t.to(device) for n, t in batch.items()}, **data.options).loss

        schedule = Schedule(
            steps, recipe.rate, recipe.warmup, recipe.weight_decay, recipe.accumulate, recipe.clip or None, recipe.every
        )
        folder.mkdir(parents=True, exist_ok=True)
        model.train()
        with self.bar(title, steps) as advance:
            losses = minimise(
                loss,
                adapter_parameters(model),
                schedule,
                folder=folder,
                report=lambda done, value: advance(done, f"loss {value:.4f}"),
            )
        model.eval()
        self.result.setdefault("losses", []).extend(losses)

    @torch.no_grad()
    def _loss_of(self, when: str, model: nn.Module, held_out: Data) -> None:
        if not len(held_out):
            return
        device = next(model.parameters()).device
        total, count, right = 0.0, 0, 0
        calls = math.ceil(len(held_out) / self.recipe.batch)
        model.eval()
        with self.bar(f"held-out loss {when}", calls) as advance:
            for done, batch in enumerate(held_out.batches(self.recipe.batch), 1):
                learnt = held_out.learnt(batch)
                found = model(**{n: t.to(device) for n, t in batch.items()}, **held_out.options)
                total, count = total + float(found.loss) * learnt, count + learnt
                if batch["labels"].dim() == 1:
                    right += int((found.logits.argmax(-1).cpu() == batch["labels"]).sum())
                advance(done, "")
        figures = held_out.figures(total / count, right / count)
        self.result.setdefault("held_out", {})[when] = figures
        self.say(f"held out {when}: {in_words(figures)}")

    def _calibration(self, data: Data) -> list[Mapping[str, Any]]:
        inputs: list[Mapping[str, Any]] = []
        tokens = 0
        for batch in data.batches(self.recipe.batch):
            if tokens >= self.recipe.calibration_tokens:
                break
            inputs.append({name: value for name, value in batch.items() if name != "labels"})
            tokens += data.tokens_in(batch)
        return inputs


def in_words(figures: Mapping[str, float]) -> str:
    """``loss 1.2345, perplexity 3.436``."""
    return ", ".join(f"{name} {value:.{4 if name == 'loss' else 3}f}" for name, value in figures.items())


def start(recipe: Recipe, out: Path, say: Callable[[str], None], bar: Bar) -> Training:
    """A run as the recipe has it, with the paths in it made whole, so that it can be gone on with from elsewhere."""
    whole: dict[str, Any] = {
        n: str(Path(v).absolute()) for n in ("base", "data", "rules", "held_out") if (v := getattr(recipe, n))
    }
    return Training(replace(recipe, **whole), out, say, bar)


def _check_apart(out: Path, recipe: Recipe) -> None:
    """Refuse the directory of another run."""
    if (out / RECIPE).is_file():
        if differing := recipe.differences(Recipe.read(out / RECIPE)):
            raise RecipeError(
                f"{out} has a run with another recipe ({'; '.join(differing[:3])}); go on with that by leaving these "
                "options as they were, or choose another directory"
            )
    elif (out / PROGRESS).is_file() or (out.is_dir() and (out / "config.json").is_file()):
        raise OftfxError(f"{out} holds something else; choose another directory")


def read_result(folder: Path) -> dict[str, Any]:
    """What a complete run wrote.

    Raises:
        OftfxError: it is damaged.
    """
    try:
        found = parsed((folder / RESULT).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        for when, figures in made(dict[str, Any], found.get("held_out", {}), "held_out").items():
            made(dict[str, float], figures, f"held_out.{when}")["loss"]
    except (OSError, ValueError, KeyError) as error:
        raise OftfxError(f"{folder / RESULT} is damaged: {error}; remove it to train from the start") from None
    return found
