"""The commands ``oftfx export``, ``genai``, ``openvino``, ``gguf`` and ``export-adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oftfx.cli import show
from oftfx.cli.options import Base, Force, Html, Json, Quiet, Threads, use_threads

_Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="An adapter directory, or NAME=DIRECTORY; may be repeated.", show_default=False),
]
_Mode = Annotated[
    str, typer.Option(help="fixed: in the file; swappable: beside it; mixed: a row's choice; inputs: see the guide.")
]
_Dtype = Annotated[str, typer.Option(help="auto, float32 or float16.")]
_Directory = Annotated[Path, typer.Argument(help="The directory.", show_default=False)]
_AccuracyLevel = Annotated[int | None, typer.Option(help="4: int8 products, faster, not exact.", show_default=False)]
_Verify = Annotated[bool, typer.Option(help="Run ONNX Runtime against torch, and refuse a file that differs.")]


def export(
    model: Base,
    out: Annotated[Path, typer.Argument(help="The .onnx file.", show_default=False)],
    adapter: _Adapters = None,
    mode: _Mode = "fixed",
    cache: Annotated[bool, typer.Option("--cache", help="Take and give a decoder's keys and values.")] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="With --cache: attention in one operator, where it is that.")
    ] = False,
    accuracy_level: _AccuracyLevel = None,
    dialect: Annotated[str, typer.Option(help="ort, standard or openvino.")] = "ort",
    opset: Annotated[int | None, typer.Option(help="Of the standard operators.", show_default=False)] = None,
    dtype: _Dtype = "auto",
    verify: _Verify = True,
    html: Html = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write a model, with adapters or folded, as an ONNX file, and check it in ONNX Runtime."""
    from oftfx.onnx.export import export_onnx

    use_threads(threads)
    show.check_new(out, force=force)
    show.check_page(html, force=force)
    made = _with_adapters(model, adapter or [], dtype)
    asked: dict[str, Any] = {"adapters": mode, "dialect": dialect}  # checked there
    with show.waiting(f"export{' and verify' if verify else ''} {out.name}", quiet=json):
        report = export_onnx(
            made, out, **asked, cache=cache, fused=None if fused else False, accuracy_level=accuracy_level, opset=opset,
            verify=verify,
        )  # fmt: skip
    _end(report, html, json)


def genai(
    model: Base,
    out: _Directory,
    adapter: _Adapters = None,
    mode: Annotated[str, typer.Option(help="fixed: in the graph; swappable: a file beside it for each.")] = "fixed",
    context_length: Annotated[int | None, typer.Option(help="Largest number of tokens.", show_default=False)] = None,
    accuracy_level: _AccuracyLevel = None,
    dtype: _Dtype = "auto",
    verify: _Verify = True,
    html: Html = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write a language model as a directory that ONNX Runtime GenAI loads: graph, settings, tokenizer, adapters."""
    from oftfx.onnx.genai import export_genai
    from oftfx.opened import open_tokenizer

    use_threads(threads)
    show.check_new(out, force=force)
    show.check_page(html, force=force)
    made, tokenizer = _with_adapters(model, adapter or [], dtype), open_tokenizer(model)
    asked: dict[str, Any] = {"adapters": mode}
    with show.waiting(f"export{' and verify' if verify else ''} {out.name}", quiet=json):
        report = export_genai(
            made, out, tokenizer=tokenizer, **asked, context_length=context_length, accuracy_level=accuracy_level,
            verify=verify,
        )  # fmt: skip
    _end(report, html, json)


def openvino(
    model: Base,
    out: _Directory,
    adapter: _Adapters = None,
    mode: Annotated[str, typer.Option(help="fixed: in the model; inputs: for plain OpenVINO.")] = "fixed",
    dtype: _Dtype = "auto",
    verify: Annotated[bool, typer.Option(help="Compare with the verified ONNX graph.")] = True,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Write a language model as a directory that OpenVINO GenAI loads."""
    from oftfx.onnx.openvino import export_openvino
    from oftfx.opened import open_tokenizer

    use_threads(threads)
    show.check_new(out, force=force)
    made, tokenizer = _with_adapters(model, adapter or [], dtype), open_tokenizer(model)
    asked: dict[str, Any] = {"adapters": mode}  # checked there
    with show.waiting(f"export {out.name}", quiet=False):
        report = export_openvino(made, out, tokenizer=tokenizer, **asked, verify=verify)
    show.result(str(report))


def gguf(
    model: Base,
    out: Annotated[Path, typer.Argument(help="The .gguf file.", show_default=False)],
    quantized: Annotated[
        str | None, typer.Option(help="Q8_0, Q4_1, ...; without: as it is, to the bit.", show_default=False)
    ] = None,
    dtype: _Dtype = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write a folded model as a file that llama.cpp reads, with the error of every tensor that is not the same."""
    from oftfx.gguf.export import export_gguf
    from oftfx.opened import open_model, open_tokenizer

    show.check_new(out, force=force)
    made, tokenizer = open_model(model, dtype=dtype), open_tokenizer(model)
    asked: dict[str, Any] = {"quantized": quantized}  # checked there
    report = export_gguf(made, out, tokenizer=tokenizer, **asked, progress=not quiet)
    show.result(str(report))


def export_adapter(
    model: Base,
    adapter: Annotated[Path, typer.Argument(help="The adapter's directory.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The .onnx_adapter file.", show_default=False)],
    graph: Annotated[
        Path | None, typer.Option(help="The swappable .onnx file that it is for, to fit it.", show_default=False)
    ] = None,
    force: Force = False,
) -> None:
    """Write one adapter as the file that ONNX Runtime loads beside a swappable model."""
    from oftfx.adapter.load import load_adapter
    from oftfx.onnx.adapters.file import export_onnx_adapter
    from oftfx.opened import open_model

    show.check_new(out, force=force)
    made = load_adapter(open_model(model), adapter)
    show.result(f"{export_onnx_adapter(made, out, graph=graph)}")


def _with_adapters(directory: Path, words: list[str], dtype: str) -> Any:
    """The model with its adapters; the first of them acts, all of them are there."""
    from oftfx.adapter.load import load_adapter
    from oftfx.opened import open_model

    model, names = open_model(directory, dtype=dtype), set[str]()
    for word in words:
        name, equals, path = word.partition("=")
        name, path = (name, path) if equals else ("default" if len(words) == 1 else Path(word).name, word)
        if name in names:
            raise show.OutputError(f"--adapter: {name!r} is given twice; say NAME=DIRECTORY")
        names.add(name)
        load_adapter(model, path, adapter=name)
    return model


def _end(report: Any, html: Path | None, json: bool) -> None:
    show.end(report, report.to_json() if json else str(report), html)
