"""Checkpoints as `oftfx.fold` and `FoldResult.save` write them, to hold the fold of files against."""

import hashlib
import json

import torch
from safetensors import safe_open

import oftfx
from oftfx import OFT
from oftfx.folding.checkpoint import ROTATION
from tests.reference import randomize


def tensors(directory):
    """All tensors by name."""
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert name not in found
                if not ROTATION.search(name):  # `save_pretrained` writes rotations twice: no reader uses these
                    found[name] = opened.get_tensor(name)
    return found


def assert_same(got, wanted):
    """The same names, dtypes, shapes and bytes."""
    got, wanted = tensors(got), tensors(wanted)
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (got[name], tensor))), name


def note(directory):
    """The note of a fold."""
    return json.loads((directory / "oftfx_fold.json").read_text())


def files(directory):
    """Every file below it, by name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def sums(directory):
    """SHA-256 of every file below it."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files(directory).items()}


def adapter_for(model, path, rules, **options):
    """An adapter directory with random numbers; what trains whole is moved as well."""
    rotated = randomize(oftfx.transform(model, rules, **options), std=0.1)
    with torch.no_grad():
        for parameter in oftfx.adapter_parameters(rotated):
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return oftfx.save_adapter(rotated, path, convention="oftfx")


def in_memory(base, adapter, out, **options):
    """The same fold with the model in memory; returns the result."""
    result = oftfx.fold(oftfx.load_adapter(base, adapter), **options)
    result.save(out)
    return result


ALL = {"all-linear": OFT(16), "lm_head": OFT(16)}
