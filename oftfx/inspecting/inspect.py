"""Tell what something is, and say what is in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from oftfx.adapter.peft_files import CONFIG_FILE, WEIGHT_FILE
from oftfx.folding.report import FoldReport
from oftfx.inspecting.adapters import inspect_adapter
from oftfx.inspecting.checkpoints import inspect_checkpoint
from oftfx.inspecting.found import Found, InspectError, Table
from oftfx.inspecting.graphs import inspect_graph, inspect_graph_adapter
from oftfx.inspecting.headers import digest, read_header
from oftfx.planning.plans import Plan
from oftfx.serving.copied.runtime.contract import SUFFIX
from oftfx.training.job import RESULT, read_result
from oftfx.training.progress import FILE as PROGRESS
from oftfx.training.progress import losses_so_far
from oftfx.training.recipe import FILE as RECIPE
from oftfx.training.recipe import Recipe
from oftfx.typed_json import parsed


def inspect(path: str | Path) -> Found:
    """What a path holds: an adapter, a checkpoint (folded or not), an ONNX file, an ``.onnx_adapter``, a plan or report
    as JSON, a training run, a model repository, or a safetensors file.

    Raises:
        InspectError: there is nothing, or nothing that is known; or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise InspectError(f"there is no {path}")
    if path.suffix == ".onnx":
        return inspect_graph(path)
    if path.name.endswith(SUFFIX):
        return inspect_graph_adapter(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        rows = [(n, d, "x".join(map(str, s))) for n, (d, s, _) in header.tensors.items()]
        facts: dict[str, Any] = {
            "tensors": len(rows),
            "numbers": header.numbers,
            **header.notes,
            "sha256": digest(path),
        }
        return Found("safetensors", path, facts, Table("Tensors", ("name", "dtype", "shape"), rows))
    if path.suffix == ".json":
        return _json(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise InspectError(f"{path} is a pickle, which can run any program when it is read; convert it to safetensors")
    raise InspectError(f"{path}: a file of this kind is not known; expected .onnx, {SUFFIX}, .safetensors or .json")


def _directory(path: Path) -> Found:
    if (path / RECIPE).is_file():
        return _training(path)
    if (path / WEIGHT_FILE).is_file() or (path / CONFIG_FILE).is_file():
        return inspect_adapter(path)
    if (path / "genai_config.json").is_file():
        found = inspect_graph(path / "model.onnx")
        adapters = sorted(p.name for p in path.glob(f"*{SUFFIX}"))
        return Found("genai", path, {**found.facts, "adapters beside it": adapters}, found.table, found.faults)
    if (path / "config.json").is_file():
        return inspect_checkpoint(path)
    models = sorted([*path.rglob("model.onnx"), *path.rglob("*.onnx")])
    if models:
        return _repository(path, models)
    there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise InspectError(f"{path} holds nothing that is known (there: {there})")


def _training(path: Path) -> Found:
    recipe, losses = Recipe.read(path / RECIPE), losses_so_far(path)
    done = (path / RESULT).is_file()
    result = read_result(path) if done else {}
    facts: dict[str, Any] = {
        "state": "complete"
        if done
        else f"stopped after step {len(losses)}; start it again to go on: oftfx train {path}",
        "base": recipe.base,
        "data": recipe.data,
        "layers": recipe.rules or recipe.target,
        "rate": f"{recipe.rate:g}",
        "steps done": len(losses),
        "last loss": f"{losses[-1]:.4f}" if losses else None,
        **{f"held out {when}": f"loss {v['loss']:.4f}" for when, v in result.get("held_out", {}).items()},
        "adapter": "adapter" if (path / "adapter").is_dir() else None,
    }
    return Found("training", path, facts, None, () if losses or (path / PROGRESS).is_file() else ("no step is done",))


def _json(path: Path) -> Found:
    try:
        text = path.read_text(encoding="utf-8")
        found = parsed(text)
    except (OSError, ValueError) as error:
        raise InspectError(f"{path} is not readable as JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("sites"), list) and "survival" in found:
        report = FoldReport.from_json(text)
        actions = dict(Counter(s.action for s in report))
        facts: dict[str, Any] = {
            "adapters": list(report.adapters),
            "sites": len(report),
            "actions": actions,
        }
        share = None if report.survival is None else f"{report.survival:.1%}"
        facts |= {"survival of the update": share, "warnings": report.warnings}
        return Found("fold report", path, facts)
    plan = Plan.from_json(text)
    facts = {"model": plan.model_class, "sites": len(plan), "parameters": plan.trainable, "recorded": plan.trace.rung}
    kinds = Counter((e.site.kind, e.site.format, e.block_size) for e in plan)
    rows = [(k, f, str(size), str(count)) for (k, f, size), count in kinds.items()]
    return Found("plan", path, facts, Table("Sites", ("kind", "format", "block size", "count"), rows))


def _repository(path: Path, models: list[Path]) -> Found:
    rows = []
    for model in dict.fromkeys(models):
        adapters = sorted(p.name.removesuffix(SUFFIX) for p in model.parent.rglob(f"*{SUFFIX}"))
        rows.append((str(model.relative_to(path)), f"{model.stat().st_size:,}", ", ".join(adapters) or "none"))
    server = (
        "triton" if any(path.rglob("config.pbtxt")) else "mlserver" if any(path.rglob("model-settings.json")) else ""
    )
    facts = {"server": server, "models": len(rows)}
    return Found("repository", path, facts, Table("Models", ("file", "bytes", "adapters"), rows))
