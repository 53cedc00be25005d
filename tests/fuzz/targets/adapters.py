"""Adapter directories and files of every convention, and plans."""

from __future__ import annotations

import copy
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

import oftfx
from oftfx import OFT
from oftfx.adapter.conventions.registry import CONVENTIONS
from oftfx.inspecting.inspect import inspect
from tests.adapter.conventions.models import net
from tests.adapter.conventions.published import write
from tests.fuzz.bundle import place, taken
from tests.fuzz.targets.base import Target, every

WEIGHTS, CONFIG, PLAN = "adapter_model.safetensors", "adapter_config.json", "oftfx_plan.json"
NAMES = (WEIGHTS, CONFIG, PLAN, "model.safetensors.index.json", "model.safetensors", "oftfx_scales.safetensors")
PATHS = ("conv_in", "proj", "blocks.0.to_q", "blocks.0.to_out.0", "blocks.1.to_q")
PREFIXES = ("base_model.model.", "lora_unet_", "lora_te1_", "oft_unet_", "lycoris_", "diffusion_model.", "unet.", "")
ENDS = (
    ".oft_R.weight",
    ".oft_embedding_R.weight",
    ".oft_R.scaled_oft",
    ".oft_blocks",
    ".rescale",
    ".alpha",
    ".oft_r",
    ".oft_s",
    ".boft_R",
    ".boft_s",
    ".hra_u",
    ".weight",
    ".base_layer.bias",
    ".oft.default.skew",
)
FIELDS = (
    "target_modules",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "oft_block_size",
    "bias",
    "block_share",
    "coft",
    "eps",
    "layers_to_transform",
    "layers_pattern",
    "module_dropout",
    "init_weights",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "exclude_modules",
    "apply_GS",
    "task_type",
    "SEQ_CLS",
    "OFT",
    "BOFT",
    "HRA",
    "0.17.1",
    "0.21.2",
    "all-linear",
    "oft_only",
    "ss_network_module",
    "ss_network_args",
    "lora_adapter_metadata",
    "lycoris.kohya",
    "networks.oft",
    "weight_map",
    "oftfx_config_sha256",
    "oftfx_base",
    "format",
)
WORDS = (*PATHS, *ENDS, *FIELDS, *(p + PATHS[2].replace(".", "_" if p.endswith("_") else ".") for p in PREFIXES))


def files(path: Path) -> list[bytes]:
    """One adapter or more of each convention."""
    made: list[Path] = []
    model = oftfx.transform(net(), {"proj": OFT(4, init="normal"), "blocks.*": OFT(4, init="normal")})
    exact = oftfx.transform(net(), {"blocks.*": OFT(4, parameterization="cayley", init="normal")}, train=["proj"])
    for index, convention in enumerate(("peft", "oftfx", "oft_v2", "diffusers")):
        made.append(path / str(index))
        target = made[-1] if convention in ("peft", "oftfx") else made[-1] / WEIGHTS
        oftfx.save_adapter(model, target, convention=convention)
    made.append(oftfx.save_adapter(exact, path / "exact", convention="oftfx"))
    q, peft = "blocks.0.to_q", "base_model.model.blocks.0.to_q"
    flat = q.replace(".", "_")
    blocks = torch.linspace(-1, 1, 3 * 16).view(3, 4, 4)
    inputs = torch.linspace(-1, 1, 2 * 16).view(2, 4, 4)
    others: list[tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any] | None]] = [
        ({f"lora_unet_{flat}.oft_blocks": blocks, f"lora_unet_{flat}.rescale": torch.ones(12, 1) * 2}, {}, None),
        ({f"lora_unet_{flat}.oft_blocks": blocks[None], f"lora_unet_{flat}.alpha": torch.tensor(0.1)}, {}, None),
        ({f"oft_unet_{flat}.oft_blocks": blocks, f"oft_unet_{flat}.alpha": torch.tensor(0.1)}, {}, None),
        ({f"{q}.oft_blocks": blocks}, {"ss_network_module": "networks.oft"}, None),
        ({f"diffusion_model.{q}.oft_blocks": blocks}, {}, None),
        (
            {
                f"lora_unet_{flat}.oft_R.weight": torch.ones(2, 6),
                f"lora_unet_{flat}.oft_R.scaled_oft": torch.tensor(True),
            },
            {"ss_network_args": '{"coft": true, "coft_eps": 1e-4}'},
            None,
        ),
        ({f"lora_unet_{flat}.boft_R": inputs[None], f"lora_unet_{flat}.boft_s": torch.ones(12, 1) * 2}, {}, None),
        (
            {f"{peft}.boft_R": inputs[None], f"{peft}.boft_s": torch.ones(12, 1)},
            {},
            {"peft_type": "BOFT"},
        ),
        (
            {f"{peft}.hra_u": torch.linspace(-1, 1, 16).view(8, 2)},
            {},
            {"peft_type": "HRA", "apply_GS": True},
        ),
        (
            {f"{peft}.oft_r": inputs, f"{peft}.oft_s": torch.ones(12, 1)},
            {},
            {"peft_type": "OFT", "r": 2},
        ),
        ({f"{peft}.oft_R.weight": torch.ones(2, 6)}, {}, {"peft_type": "OFT", "oft_block_size": 4}),
        (
            {f"{q}.oft_R.weight": torch.ones(2, 6)},
            {"lora_adapter_metadata": '{"peft_type": "OFT", "oft_block_size": 4}'},
            None,
        ),
        ({f"{q}.oft.default.skew": torch.ones(2, 6), f"{q}.weight": torch.ones(12, 8)}, {}, None),
    ]
    for index, (tensors, notes, config) in enumerate(others):
        made.append(path / f"other{index}")
        made[-1].mkdir()
        write(made[-1] / WEIGHTS, tensors, **notes)
        if config is not None:
            (made[-1] / CONFIG).write_text(json.dumps(config))
    made.append(path / "sharded")
    made[-1].mkdir()
    write(made[-1] / "model.safetensors", {f"{q}.oft.default.skew": torch.ones(2, 6)})
    index = {"weight_map": {f"{q}.oft.default.skew": "model.safetensors"}}
    (made[-1] / "model.safetensors.index.json").write_text(json.dumps(index))
    return [taken(p, NAMES) for p in made]


@cache
def _models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return net(), oftfx.transform(net(), {"blocks.0.to_q": OFT(4)})


def read(data: bytes, path: Path) -> None:
    """Tell what it is, say what is in it, load it as what it seems and as what it does not."""
    place(data, path, NAMES)
    plain, rotated = _models()
    named = [None, *CONVENTIONS][zlib.crc32(data) % (len(CONVENTIONS) + 1)]
    every(
        lambda: oftfx.adapter_convention(path),
        lambda: str(inspect(path)).encode(),
        lambda: inspect(path).to_json(),
        lambda: oftfx.load_adapter(copy.deepcopy(rotated if zlib.crc32(data) & 64 else plain), path),
        lambda: named and oftfx.load_adapter(copy.deepcopy(plain), path, convention=named, part="lora_unet"),
    )


def plans(path: Path) -> list[bytes]:
    """With and without what it may have."""
    shared = oftfx.plan(net(), {"blocks.*": OFT(4, share_input=True)}, example_inputs=(torch.zeros(1, 4, 6, 6),))
    return [oftfx.plan(net(), {"*": OFT(4)}).to_json().encode(), shared.to_json().encode()]


def read_plan(data: bytes, path: Path) -> None:
    """A plan is made of the text, shown, and written again."""
    (path / "plan.json").write_bytes(data)

    def shown() -> None:
        plan = oftfx.Plan.from_json(data.decode(errors="replace"))
        str(plan).encode(), plan.table(full=True).encode(), plan.to_markdown().encode()
        assert oftfx.Plan.from_json(plan.to_json()).to_json() == plan.to_json()

    every(shown, lambda: str(inspect(path / "plan.json")).encode())


ADAPTERS = Target("adapters", files, read, WORDS)
PLANS = Target(
    "plans",
    plans,
    read_plan,
    (
        "oftfx_plan",
        "entries",
        "site",
        "spec",
        "owner",
        "linear",
        "conv2d",
        "activation",
        "weight",
        "layout",
        "producer",
    ),
    ("rich", "jinja2"),
)
