"""Regular expressions from files: such as take for ever are refused, those that people write are not."""

import json
import re
import time

import pytest

import oftfx
from oftfx import OFT
from oftfx.errors import RuleError
from oftfx.planning.patterns import compiled
from tests.adapter.conventions.models import net


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*.*)*x", "(a|aa)*b", "(.*,){12}x", ".*" * 7 + "x", "((a?b*)+c)*", "a" * 30_000]
)
def test_refused(pattern):
    with pytest.raises(re.error, match="for ever|at most"):
        compiled(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)$",
        r"^(?!.*patch_embed).*(?:self_attn|mlp).*(?:q_proj|v_proj)$",
        r"(.*\.)?to_q",
        r"model\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.\w+)",
        r"(?:^|.*?\.)blocks\.(?P<idx>\d+)\.",
    ],
)
def test_taken(pattern):
    assert compiled(pattern).pattern == pattern


def test_rules_and_configurations_end_at_once(tmp_path):
    began, model = time.process_time(), net()
    config = {"peft_type": "OFT", "peft_version": "0.21.2", "target_modules": "(.*.*.*)*x", "oft_block_size": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RuleError, match="can take for ever"):
        oftfx.plan(model, tmp_path / "adapter_config.json")
    for target in ("re:(.*.*.*)*x", "[" * 20_000):
        with pytest.raises(RuleError, match="for ever|2,000 at most"):
            oftfx.plan(model, {target: OFT(4)})
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["to_q", None]},
        {"target_modules": 7},
        {"exclude_modules": 1},
        {"modules_to_save": [1]},
        {"modules_to_save": {"a": 1}},
        {"layers_to_transform": "x"},
        {"layers_pattern": 5},
        {"task_type": []},
    ],
)
def test_odd_fields_of_a_configuration_as_rules(tmp_path, change):
    config = {"peft_type": "OFT", "peft_version": "0.21.2", "target_modules": ["to_q"], "oft_block_size": 4} | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RuleError, match=f"{next(iter(change))} is .*, expected"):
        oftfx.plan(net(), tmp_path / "adapter_config.json")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"a = " + b"[" * 5000, b"[[rule]]\ntarget = 1", b'[[rule]]\ntarget = "*"\nexclude = "no"']
)
def test_odd_rules(tmp_path, text):
    (tmp_path / "rules.toml").write_bytes(text)
    with pytest.raises(RuleError, match=r"rules\.toml"):
        oftfx.plan(net(), tmp_path / "rules.toml")
