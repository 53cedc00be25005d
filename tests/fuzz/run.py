"""Run targets for long, led by what of oftfx is reached (`atheris`, the extra ``fuzz``), each in a process of its own.

    tools/fuzz [TARGET ...] [--runs 15000] [--seed 0] [--out FOLDER] [--results FILE]
    tools/fuzz TARGET --again FILE

What is found lands in the folder, an input and its traceback a place in our code, and the run goes on. ``--results``
adds executions and findings of each target to a JSON file. Without atheris the same changes are made blindly.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOM = 6 * 2**30
"""By how much the address space may grow: what a header claims is more."""


class Run:
    """One target in this process.

    Args:
        name: of the target.
        runs: executions.
        seed: of what is changed.
        out: what is found goes there.
    """

    def __init__(self, name: str, runs: int, seed: int, out: Path) -> None:
        from tests.fuzz.guard import Watch
        from tests.fuzz.targets import TARGETS

        self.target, self.runs, self.seed, self.out = TARGETS[name], runs, seed, out
        shm = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
        self.watch, self.room = Watch(self.root / "outside"), self.root / "input"
        scratch = self.root / "seeds"
        scratch.mkdir()
        self.seeds = list(self.target.seeds(scratch))
        shutil.rmtree(scratch)
        self.count, self.found = 0, dict[str, str]()

    def read(self, data: bytes) -> None:
        """In an empty directory."""
        self.room.mkdir()
        try:
            self.target.read(data, self.room)
        finally:
            shutil.rmtree(self.room)

    def one(self, data: bytes) -> None:
        """Count, run, keep what is found."""
        (self.out / "last").write_bytes(data)
        found = self.watch.run(self.read, data)
        self.count += 1
        if found is not None:
            key = hashlib.sha256(f"{found.kind} {found.place}".encode()).hexdigest()[:12]
            kept = self.out / f"{key}.input"
            if key not in self.found or len(data) < kept.stat().st_size:
                self.found[key] = f"{found.kind} {found.place}"
                kept.write_bytes(data)
                (self.out / f"{key}.txt").write_text(f"{self.found[key]}\n{found.said}\n", errors="replace")
        if found is not None or self.count % 100 == 0 or self.count >= self.runs:
            (self.out / "state.json").write_text(json.dumps({"executions": self.count, "findings": self.found}))

    def go(self, atheris: Any) -> None:
        """All executions."""
        from tests.fuzz.mutate import mutated

        words = self.target.words
        for data in self.seeds:
            self.one(data)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        if atheris is None:
            rng = random.Random(self.seed)
            while self.count < self.runs:
                self.one(mutated(rng.choice(self.seeds), rng, words))
            return

        def changed(data: bytes, size: int, seed: int) -> bytes:
            return mutated(bytes(data), random.Random(seed), words)[:size]

        corpus = self.root / "corpus"
        corpus.mkdir()
        for index, data in enumerate(self.seeds):
            (corpus / str(index)).write_bytes(data)
        limits = ("-max_len=200000", "-timeout=120", "-rss_limit_mb=0", "-verbosity=0", "-len_control=0")
        options = ["fuzz", str(corpus), f"-runs={self.runs - self.count}", f"-seed={self.seed + 1}", *limits]
        options.append(f"-artifact_prefix={self.out}/")  # else in the working directory
        atheris.Setup(options, self.one, custom_mutator=changed)
        atheris.Fuzz()  # which ends the process


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--runs", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("oftfx-fuzz"))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--again", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child or asked.again:
        return _child(asked)
    from oftfx.terminal import render
    from tests.fuzz.targets import TARGETS

    said = json.loads(asked.results.read_text()) if asked.results and asked.results.is_file() else {"targets": {}}
    rows = []
    for name in asked.targets or TARGETS:
        out = asked.out / name
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        command = [sys.executable, "-m", "tests.fuzz.run", name, "--child", "--out", str(out)]
        with (out / "log").open("w") as log:
            done = subprocess.run(
                [*command, "--runs", str(asked.runs), "--seed", str(asked.seed)], stdout=log, stderr=log, check=False
            )
        state = json.loads((out / "state.json").read_text()) if (out / "state.json").is_file() else {}
        findings = list(state.get("findings", {}).values())
        if done.returncode:
            findings.append(f"the process ended with {done.returncode} at {out / 'last'}")
        rows.append((name, f"{state.get('executions', 0):,}", str(len(findings)), "; ".join(findings)))
        before = said["targets"].get(name, {"executions": 0})
        said["targets"][name] = {
            "executions": before["executions"] + state.get("executions", 0),
            "open": len(findings),
        }
        print(*rows[-1], flush=True)  # noqa: T201
    if asked.results:
        said["executions"] = sum(t["executions"] for t in said["targets"].values())
        asked.results.write_text(json.dumps(said, indent=1) + "\n")
    print(render("Fuzzing", ("target", "executions", "findings", "what"), rows))  # noqa: T201
    return int(any(row[2] != "0" for row in rows))


def _child(asked: argparse.Namespace) -> int:
    (name,) = asked.targets
    atheris: Any = None
    if not asked.again:
        try:
            import atheris
        except ImportError:
            print("no atheris here (pip install 'oftfx[fuzz]'), so nothing leads the changes")  # noqa: T201
    if atheris is None:
        from tests.fuzz import targets
    else:
        with atheris.instrument_imports(include=["oftfx"], enable_loader_override=False):
            from tests.fuzz import targets  # noqa: F401
    asked.out.mkdir(parents=True, exist_ok=True)
    run = Run(name, asked.runs, asked.seed, asked.out)
    if asked.again:
        found = run.watch.run(run.read, asked.again.read_bytes())
        print(found.said if found else "all is well")  # noqa: T201
        return int(found is not None)
    run.go(atheris)
    return 0


if __name__ == "__main__":
    sys.exit(main())
