"""Make the files of old PEFT versions that tests read, and let those versions read what is written here.

    pip install --no-deps --target DIRECTORY peft==0.14.0
    .venv/bin/python tools/compare/foreign_fixtures.py DIRECTORY

These versions do not install beside today's transformers. Each case is a directory in tests/adapter/conventions/files
with the adapter and the outputs of the adapted model, and prints how far the outputs of the old version are from ours
when it loads what oftfx has written of the same adapter.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests/adapter/conventions/files"
CASES: dict[str, dict[str, Any]] = {
    "linear": {"r": 2, "oft_block_size": 0, "target_modules": ["to_q", "to_out.0"]},
    "shared": {"r": 0, "oft_block_size": 4, "block_share": True, "target_modules": ["to_q"]},
    "bounded": {"r": 0, "oft_block_size": 4, "coft": True, "eps": 2e-2, "target_modules": ["to_q"]},
    "conv": {"r": 0, "oft_block_size": 4, "target_modules": ["conv_in", "proj"]},
}


def old_peft(directory: str) -> Any:
    """The package in a directory; it asks transformers for a name that is no more."""
    import transformers

    sys.path.insert(0, directory)
    kind = type(transformers)
    native = kind.__getattr__
    kind.__getattr__ = lambda module, name: object if name == "HybridCache" else native(module, name)
    import peft

    assert Path(peft.__file__).is_relative_to(Path(directory).resolve()), peft.__file__
    return peft


def main() -> None:
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(ROOT))
    peft = old_peft(str(Path(sys.argv[1]).resolve()))
    from safetensors.torch import save_file

    import oftfx
    from tests.adapter.conventions.models import net, outputs, spread
    from tests.reference import rel

    for name, config in CASES.items():
        model = peft.get_peft_model(net(), peft.OFTConfig(**config)).eval()
        for index, (key, parameter) in enumerate(model.named_parameters()):
            if "oft_r" in key.lower():
                parameter.data = spread(parameter.shape, index, 0.4).float()
            elif "oft_s" in key:
                parameter.data = 1 + spread(parameter.shape, index, 0.2).float()
        directory = FILES / f"peft-{peft.__version__}" / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory)
        (directory / "README.md").unlink()
        # The forward of 0.16 and later is wrong for convolutions, what it merges is right.
        expected = outputs(model.merge_and_unload())
        save_file({"outputs": expected.contiguous()}, directory / "outputs.safetensors")
        ours = oftfx.load_adapter(net(), directory)
        line = f"{peft.__version__} {name}: read {rel(outputs(ours), expected):.1e}"
        written = Path(sys.argv[1]) / "written"
        convention = oftfx.adapter_convention(directory)
        oftfx.save_adapter(ours, written, convention=convention)
        again = peft.PeftModel.from_pretrained(net(), written).eval().merge_and_unload()
        print(
            line, f"written {rel(outputs(again), outputs(ours)):.1e}, from the base {rel(expected, outputs(net())):.1g}"
        )


if __name__ == "__main__":
    main()
