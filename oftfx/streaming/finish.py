"""What is written beside the weights: configuration, index, rotations, checksums, the note with the report."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from oftfx.adapter import peft_files
from oftfx.adapter.fingerprint import fingerprint_of
from oftfx.adapter.fixed_rotations import CONFIG_KEY, rotation_notes
from oftfx.adapter.fixed_rotations import FILE as ROTATIONS
from oftfx.adapter.folded import NOTE, file_sum, note_of
from oftfx.adapter.from_file import AdapterFiles
from oftfx.adapter.packed import packed_one_by_one
from oftfx.files import put, write
from oftfx.folding.note import noted
from oftfx.folding.provenance import provenance_of
from oftfx.folding.record import SiteFold
from oftfx.folding.report import FoldReport, report_from
from oftfx.model.huggingface import note_float_layers
from oftfx.model.running import Inputs
from oftfx.model.structure import replace_module
from oftfx.passes.insert_rotations import rotation_for
from oftfx.streaming.decisions import Decision, Decisions
from oftfx.streaming.directory import CONFIG, INDEX, CheckpointDirectory
from oftfx.streaming.journal import Done
from oftfx.streaming.skeleton import Skeleton
from oftfx.streaming.transformers_loader import ties
from oftfx.streaming.work import Work
from oftfx.typed_json import read_object

SUMS = "oftfx_sha256.json"
OURS = (NOTE, ROTATIONS, SUMS)
"""Of an earlier fold, which are made anew."""
_NOT_RUN = "whether other code reads the folded weights: a fold of files does not record the model"
_NOT_READ = "how far the rotation moves it was not measured: the weight was not read"


@dataclass(frozen=True)
class Finish:
    """Ends a fold whose weights are written.

    Attributes:
        base: the checkpoint.
        files: the adapter.
        skeleton: the model.
        decisions: per site.
        work: what was written.
        done: what its units gave.
        adapter: name for the report.
        calibration: inputs by which layers were calibrated.
    """

    base: CheckpointDirectory
    files: AdapterFiles
    skeleton: Skeleton
    decisions: Decisions
    work: Work
    done: Mapping[int, Done]
    adapter: str
    calibration: Sequence[Inputs] = ()

    def write(self, new: Path) -> FoldReport:
        """Write all but the weights, which are in the directory."""
        weights = {f.file for f in self.work.files}
        for left in [p for p in new.iterdir() if p.name not in weights]:  # by a run that ended right here
            left.unlink()
        for name in self.base.others:
            if name not in OURS:
                shutil.copyfile(self.base.path / name, new / name)
        self._config(new / CONFIG)
        if self.base.index is not None:
            self._index(self.base.index, new / INDEX)
        if self.decisions.kept:
            self._rotations(new)
        self._sums(new)
        hashes = {self.adapter: self._fingerprint()}
        report = self._report(hashes)
        facts = {"class": type(self.skeleton.model).__name__}
        folds = [*self._earlier(), {"module": "", **noted(report, hashes)}]
        write(new / NOTE, note_of(new, report, "transformers", facts, folds))
        return report

    def _config(self, file: Path) -> None:
        source = self.base.path / CONFIG
        config, before = read_object(source), read_object(source)
        config.pop(CONFIG_KEY, None)
        tied = ties(self.skeleton.model)
        untied = self.decisions.untied & {*tied, *tied.values()}
        if untied and getattr(self.skeleton.model.config, "tie_word_embeddings", False):
            config["tie_word_embeddings"] = False
        floats = {s.entry.site.module: s for s in self.decisions.sites if s.action == "float"}
        if floats:
            self._quantization(config, floats)
        if self.decisions.kept:
            config[CONFIG_KEY] = ROTATIONS
        text = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        write(file, source.read_bytes() if config == before else text)

    def _quantization(self, config: dict[str, Any], floats: Mapping[str, Decision]) -> None:
        """What the configuration says after layers became floats, by the same words as for a model in memory."""
        model = self.skeleton.model
        for path in floats:
            with torch.device("meta"):
                replace_module(model, model.get_submodule(path), nn.Linear(1, 1))
        note_float_layers(model, [*floats])
        said = json.loads(model.config.to_json_string(use_diff=False))
        config.pop("quantization_config", None)
        if said.get("quantization_config") is not None:
            config["quantization_config"] = said["quantization_config"]

    def _index(self, index: Mapping[str, Any], file: Path) -> None:
        sizes = (t.nbytes for f in self.work.files for t in f.targets.values() if t.begin is not None)
        tails = (len(t) for d in self.done.values() for t in d.tails.values())
        notes = {**index.get("metadata", {}), "total_size": sum(sizes) + sum(tails)}
        made = {**index, "metadata": notes, "weight_map": dict(sorted(self.work.where.items()))}
        write(file, (json.dumps(made, indent=2) + "\n").encode())

    def _rotations(self, new: Path) -> None:
        kept = self.decisions.kept
        numbers = {owner: str(i) for i, owner in enumerate(kept)}
        of_number = {number: kept[owner] for owner, number in numbers.items()}
        sites = {s.entry.fqn: [numbers[s.entry.owner]] for s in self.decisions.sites if s.action == "keep"}
        kinds = {number: one.kind for number, one in of_number.items()}
        notes = rotation_notes(new, sites)
        with (new / ROTATIONS).open("wb") as stream:
            for piece in packed_one_by_one(kinds, lambda number: of_number[number].blocks(), notes):
                put(stream.fileno(), piece)

    def _sums(self, new: Path) -> None:
        """SHA-256 of every tensor, and of every other file whole."""
        tensors = {n: s for d in self.done.values() for n, s in d.digests.items()}
        tensors |= {n: hashlib.sha256(t).hexdigest() for d in self.done.values() for n, t in d.tails.items()}
        weights = {f.file: (new / f.file).stat().st_size for f in self.work.files}
        others = (p for p in sorted(new.iterdir()) if p.name not in weights)
        made = {
            "files": {p.name: file_sum(p) for p in others},
            "sizes": weights,
            "tensors": dict(sorted(tensors.items())),
        }
        write(new / SUMS, (json.dumps(made, indent=1) + "\n").encode())

    def _report(self, hashes: Mapping[str, str]) -> FoldReport:
        folded = {s.fqn: s for d in self.done.values() for s in d.lines}
        lines = tuple(folded.get(s.entry.fqn) or self._line(s) for s in self.decisions.sites)
        looked = self.decisions.plan.trace.rung != "tree"
        origin = provenance_of(self.skeleton.model, lines, hashes, self.calibration)
        unchecked = () if looked else (_NOT_RUN,)
        return FoldReport(lines, (self.adapter,), unchecked=unchecked, provenance=origin)

    def _line(self, site: Decision) -> SiteFold:
        """Of a site whose weight stays."""
        fqn, size = site.entry.fqn, site.bytes
        if site.action == "untouched":
            return SiteFold(fqn, site.format, "untouched", bytes_before=size, bytes_after=size)
        after = size + self.decisions.kept[site.entry.owner].nbytes
        note = "; ".join(n for n in (site.remark, _NOT_READ) if n)
        return SiteFold(fqn, site.format, "kept", bytes_before=size, bytes_after=after, note=note)

    def _earlier(self) -> list[Any]:
        """What was folded into the checkpoint before."""
        note = self.base.path / NOTE
        return list(read_object(note).get("folds", ())) if note.is_file() else []

    def _fingerprint(self) -> str:
        """As of the adapter in a model."""
        plan, rotated = self.decisions.plan, [e.fqn for e in self.decisions.plan]
        tensors = list[tuple[str, Tensor]]()
        for entry in plan:
            dtype = rotation_for(entry, torch.device("meta")).skew.dtype
            tensors.append((peft_files.key_of_skew(entry.site), self.files.skews[entry.fqn].to(dtype)))
        parameters = dict(self.skeleton.model.named_parameters(remove_duplicate=False))
        for name in (*plan.train, *plan.brought):
            value = self.decisions.whole.get(name)
            if value is not None:
                key = peft_files.key_of_parameter(name, rotated)
                tensors.append((key, value.to(parameters[name].dtype)))
        buffers = {n: b for n, b in self.decisions.whole.items() if n in plan.train_buffers}
        tensors += [(peft_files.PREFIX + n, b) for n, b in buffers.items()]
        return fingerprint_of(plan, tensors)


def report_of(note: Path) -> FoldReport:
    """The report that a note has.

    Raises:
        AdapterFileError: the note is damaged.
    """
    return report_from(read_object(note))
