"""Every public name has an example in its docstring, and it runs: alone, in an empty directory, with what it shows."""

import doctest
from importlib import import_module

import pytest
import torch

from oftfx.formats import registry

PACKAGES = ("oftfx.serving", "oftfx.passes", "oftfx.formats", "oftfx")
PUBLIC = {name: package for package in PACKAGES for name in import_module(package).__all__}
"""The package of every name; the last one where several have it."""

WITHOUT = {
    "__version__": "a string",
    "WeightState": "a type alias",
}
"""Names without an example, and why."""

NEEDS = {
    **dict.fromkeys(("export_onnx", "ExportReport", "Repository", "write_repository"), ("onnx", "onnxruntime")),
    **dict.fromkeys(("Request", "RequestError", "ServedModel", "ServingError"), ("onnx", "onnxruntime")),
    "export_onnx_adapter": ("onnxruntime",),
    "export_genai": ("onnx", "onnxruntime", "transformers"),
    **dict.fromkeys(("export_gguf", "GgufReport"), ("gguf", "transformers")),
    "export_openvino": ("openvino", "onnx", "onnxruntime", "transformers"),
    "quantize": ("compressed_tensors",),
    **dict.fromkeys(("Budget", "load_rotations", "save_rotations", "ScalarFormat"), ("bitsandbytes",)),
    **dict.fromkeys(("Calibrate", "Dequantize", "FromReference", "Keep", "Requantize"), ("bitsandbytes",)),
}
"""Optional packages that examples need."""

EXPLAINED = [pytest.param(n, marks=pytest.mark.needs(*NEEDS.get(n, ()))) for n in sorted(set(PUBLIC) - set(WITHOUT))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture
def same_formats(monkeypatch):
    """An example may register a format; no other test shall meet it."""
    monkeypatch.setattr(registry, "_formats", dict(registry._formats))


def example_of(name, value):
    """The example in a docstring, with no name known that it does not import; None where there is none."""
    finder = doctest.DocTestFinder(recurse=False, exclude_empty=False)
    (found,) = finder.find(value, name, module=False, globs={})
    return found if found.examples else None


def ran(example):
    """What differs, as doctest reports it; empty where nothing does."""
    report = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", EXPLAINED)
def test_the_example_shows_what_happens(name, same_formats, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = example_of(name, getattr(import_module(PUBLIC[name]), name))
    assert example is not None, f"{PUBLIC[name]}.{name} has no example (>>>) in its docstring"
    report = ran(example)
    assert report == "", report
    assert any(e.want for e in example.examples), "it shows nothing that could be wrong"


def test_names_without_an_example_are_public_and_have_none():
    assert set(WITHOUT) <= set(PUBLIC)
    assert [n for n in WITHOUT if ">>>" in (getattr(import_module(PUBLIC[n]), n).__doc__ or "")] == []


def test_names_that_need_packages_are_public():
    assert set(NEEDS) <= set(PUBLIC)


def test_a_name_in_several_packages_is_one_object():
    for name, package in PUBLIC.items():
        others = [import_module(p) for p in PACKAGES if p != package and name in import_module(p).__all__]
        assert all(getattr(o, name) is getattr(import_module(package), name) for o in others), name


def test_what_differs_is_reported_and_a_warning_is_an_error():
    def wrong():
        """Add.

        Examples:
            >>> 1 + 1
            3
            >>> torch.ones(2)
            >>> import warnings
            >>> warnings.warn("look out", stacklevel=1)
        """

    report = ran(example_of("wrong", wrong))
    assert "Expected:\n    3\nGot:\n    2" in report
    assert "NameError: name 'torch' is not defined" in report
    assert "UserWarning: look out" in report
    assert example_of("without", lambda: None) is None
