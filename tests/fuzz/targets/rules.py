"""Rules: TOML, a PEFT configuration, names."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

import oftfx
from tests.adapter.conventions.models import net
from tests.fuzz.targets.adapters import FIELDS, PATHS
from tests.fuzz.targets.base import Target, every

TOML = b"""[[rule]]
target = "blocks.*"
block_size = 4
parameterization = "cayley"
terms = 5
dropout = 0.1

[[rule]]
target = "re:proj|conv.*"
exclude = true
optional = true

[[rule]]
target = "all-linear"
blocks = 2
coft_eps = 1e-4
share_input = true
on_indivisible = "nearest"
experts = "each"
placement = "weight"
"""
CONFIG = b"""{"peft_type": "OFT", "peft_version": "0.21.2", "target_modules": ["to_q", "proj"], "r": 0,
"oft_block_size": 4, "bias": "none", "modules_to_save": ["conv_in"], "layers_to_transform": [0],
"layers_pattern": "blocks", "exclude_modules": "x", "module_dropout": 0.0, "coft": true, "eps": 1e-4,
"block_share": false, "use_cayley_neumann": true, "num_cayley_neumann_terms": 5, "init_weights": true,
"task_type": "SEQ_CLS", "fan_in_fan_out": false}"""
OFTS = (
    "target",
    "optional",
    "exclude",
    "rule",
    "block_size",
    "blocks",
    "parameterization",
    "cayley_neumann",
    "terms",
    "dropout",
    "block_share",
    "coft_eps",
    "share_input",
    "placement",
    "experts",
    "into",
    "producer",
    "kernel",
    "init",
    "normal",
    "on_indivisible",
    "exact",
    "re:.*",
    "re:(",
    "*",
    "all-linear",
    "nearest",
)


@cache
def _model() -> torch.nn.Module:
    return net()


def read_toml(data: bytes, path: Path) -> None:
    """As rules of a plan."""
    (path / "rules.toml").write_bytes(data)
    oftfx.plan(_model(), path / "rules.toml")


def read_config(data: bytes, path: Path) -> None:
    """As rules of a plan."""
    (path / "adapter_config.json").write_bytes(data)
    oftfx.plan(_model(), path / "adapter_config.json")


def read_names(data: bytes, path: Path) -> None:
    """As names of layers, globs, and as one text."""
    text = data.decode(errors="replace")
    every(
        lambda: oftfx.plan(_model(), text.split("\n")),
        lambda: oftfx.plan(_model(), {n: oftfx.OFT(4) for n in text.split("\n")}),
        lambda: oftfx.plan(_model(), text),
    )


RULES = Target("rules", lambda path: [TOML], read_toml, (*OFTS, *PATHS))
CONFIGS = Target("configs", lambda path: [CONFIG], read_config, (*FIELDS, *PATHS, "blocks", "(", "(a+)+$"))
NAMES = Target(
    "names", lambda path: [b"to_q\nproj\nblocks.*", b"re:.*to_q", b"all-linear"], read_names, (*PATHS, *OFTS)
)
