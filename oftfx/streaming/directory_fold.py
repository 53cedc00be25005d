"""Fold an adapter directory into a checkpoint directory."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from oftfx.adapter.store import check_name
from oftfx.errors import FoldError, warn
from oftfx.files import advice
from oftfx.folding.inputs import batches_of
from oftfx.folding.report import FoldReport
from oftfx.folding.verdict import warn_of
from oftfx.model.site import Site
from oftfx.streaming.job import Job
from oftfx.streaming.ranks import Ranks
from oftfx.terminal import byte_bar


def fold_checkpoint(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    quantized: str | Callable[[Site], str] | None = None,
    reference: str | Path | None = None,
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    hidden_states: Literal["memory", "disk"] = "memory",
    name: str = "default",
    overwrite: bool = False,
    convention: str | None = None,
    part: str | None = None,
    distributed: bool = False,
    progress: bool | Callable[[int, int], None] = False,
) -> FoldReport:
    """Fold an adapter into a checkpoint, from files to files: the model is never in memory.

    What comes out is what `oftfx.load_adapter`, `oftfx.fold` and `FoldResult.save` give, tensor for tensor and to the
    bit; `oftfx.load_folded` reads it, and so does ``from_pretrained`` where no rotation stays. Tensors that do not
    change are copied byte for byte, shards and their order stay, and other files of the base are copied (weights of
    other kinds and folders are not, which a warning says).

    All is checked before a byte is written: names, shapes, formats, the adapter, room on the disk. Then layer after
    layer is read through a memory map, folded and written. Memory: of a float layer twice its weight, of a quantized
    one that is rounded anew six times its weight in float32, besides the adapter and what waits to be written (four
    layers at most).

    A run that ends early, for whatever reason, is gone on with by the next one of the same arguments; what it has made
    is in a hidden directory in ``out`` until all is there. Bytes do not depend on how often that happens. Checksums of
    all tensors and files are in ``oftfx_sha256.json``.

    Args:
        base: directory with ``config.json`` and ``model.safetensors`` or shards with their index, of a model that
            transformers has a class for.
        adapter: what `oftfx.load_adapter` reads: a directory of oftfx or PEFT, or the file of another tool.
        out: directory for the result; made where it is not there.
        quantized: as in `oftfx.fold`: ``"keep"`` (and None), ``"requantize"``, ``"float"``, ``"reference"``,
            ``"calibrate"``, or a function from `Site` to one of these.
        reference: directory of the original float checkpoint, for ``"reference"``.
        calibration: inputs of the model, for ``"calibrate"``, as in `oftfx.fold`. They go through the model and the
            unfolded one side by side, with the weights of one decoder layer of each in memory at a time.
        hidden_states: of all these inputs, while layers are calibrated: in ``"memory"``, or on the ``"disk"`` (in files
            without a name in ``out``, which go when the run ends, however it does).
        name: of the adapter, for the report.
        overwrite: replace an earlier result of ours in ``out``; the old files go when the new ones are there.
        convention: of the adapter, where its files leave a choice.
        part: of a file for several models, the prefix of this one's keys.
        distributed: share the work with the other processes that ``torchrun`` has started; all of them call this, on
            one file system. Each folds layers, the first one prepares and ends; the bytes are those of one process.
            ``calibration`` is all inputs in each: every process runs its part of them and rounds every layer, so what
            is calibrated depends, by the rounding of sums, on how many there are. Where one dies the others end as
            well, and the next run goes on, with any number of processes.
        progress: True for a progress bar (needs the ``report`` extra), or a function of (bytes done, all bytes).

    Returns:
        What was done to each site. How far a rotation that stays would have moved its weight is not in it: such a
        weight is copied, and not read as numbers.

    Raises:
        FoldError: the checkpoint is not complete, a policy cannot be, the disk is full (run the same again once there
            is room), another process folds into ``out``, one that shares the work has failed, or the adapter has more
            than rotations (scales of rows, reflections), which are said by the weights: use `oftfx.fold` for that.
        AdapterError: the adapter does not fit the model.
        MissingExtraError: transformers, or the quantization's package, is not installed.

    Examples:
        >>> import oftfx, torch, transformers
        >>> config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        ...     num_attention_heads=2)
        >>> base = transformers.LlamaForCausalLM(config).eval()
        >>> base.save_pretrained("base")
        >>> model = oftfx.transform(base, {"*.q_proj": oftfx.OFT(4, init="normal")})
        >>> adapter = oftfx.save_adapter(model, "adapter")
        >>> report = oftfx.fold_checkpoint("base", adapter, "folded")
        >>> [(site.fqn, site.action) for site in report]
        [('model.layers.0.self_attn.q_proj', 'folded')]
        >>> ids = torch.arange(8).unsqueeze(0)
        >>> torch.allclose(oftfx.load_folded("folded")(ids).logits, model(ids).logits, atol=1e-5)
        True
    """
    check_name(name)
    options: dict[str, Any] = {
        "quantized": quantized,
        "reference": reference,
        "calibration": calibration,
        "hidden_states": hidden_states,
        "convention": convention,
        "part": part,
    }
    job = check_fold(base, adapter, out, **options, overwrite=overwrite)
    if job.base.left:
        warn(f"{base}: not copied: {', '.join(job.base.left)}")
    try:
        with Ranks.here() if distributed else nullcontext(Ranks()) as ranks:
            bar = byte_bar("fold") if progress is True and ranks.first else nullcontext(_nothing)
            with nullcontext(progress) if callable(progress) else bar as report_progress:
                report = job.run(name, report_progress, ranks, show=progress is True and ranks.first)
                if ranks.first:
                    warn_of(report.verdict)
                return report
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FoldError(job.no_room(job.missing())) from error
        raise FoldError(
            f"{out}: cannot be written to: {error.strerror or error}; {advice(error)}. What was there is as it was, "
            "and what was made stays for the next run"
        ) from error


def check_fold(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    quantized: str | Callable[[Site], str] | None = None,
    reference: str | Path | None = None,
    calibration: Iterable[Mapping[str, Any] | tuple[Any, ...]] | None = None,
    hidden_states: str = "memory",
    overwrite: bool = False,
    convention: str | None = None,
    part: str | None = None,
) -> Job:
    """All checks of `fold_checkpoint` and its list of work; nothing is written."""
    original = None if reference is None else Path(reference)
    options: dict[str, Any] = {
        "hidden_states": hidden_states,
        "overwrite": overwrite,
        "convention": convention,
        "part": part,
    }
    return Job.of(Path(base), Path(adapter), Path(out), quantized, original, batches_of(calibration), **options)


def _nothing(done: int, total: int) -> None:
    """No progress."""
