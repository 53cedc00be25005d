"""Build wheel and sdist, install them with each extra alone in a fresh environment, and use what the extra is for.

.venv/bin/python tools/extras/try_extras.py [EXTRA ...] [--oldest] [--torch VERSION] [--work FOLDER] [--keep] [--again]

Without names: every extra of `jobs.JOBS` that has not worked yet, so a run that was stopped goes on, or all anew with
`--again`. With names: these. pip resolves what it finds today; only torch is held to a version (by default the one of
`tools/constraints.txt`), so that no other build of it is pulled in. `--oldest` holds everything that the extra itself
asks for to its lower bound, torch included.

An environment with torch alone is made once in FOLDER and copied by hard links; the copy is removed after its trial
(`--keep` leaves it). Logs stay in FOLDER. Results go to tools/results/extras.json: versions, seconds, each step and
what it said where it failed. Then `tools/extras/tested.py` writes what `oftfx doctor` tells.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, it knows its own folder only

from tools.extras.jobs import JOBS, PREPARED, README, REASONS  # noqa: E402
from tools.extras.required import floors, required  # noqa: E402

RESULTS = ROOT / "tools/results/extras.json"
STEPS = ROOT / "tools/extras/steps"
CORE = ("none", "sdist", "core")
PYTEST = ("-q", "-m", "not slow or server", "-p", "no:cacheprovider")
PYTEST += ("-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning")  # of old packages, about each other
LIMIT = 1800
"""Seconds for one step."""


def main():
    arguments = _arguments()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    wheel, sdist = built(work)
    kind = "oldest" if arguments.oldest else "newest"
    done = set() if arguments.again else {e for e, found in read()[kind].items() if found["state"] == "works"}
    for extra in arguments.extras or [e for e in JOBS if e not in done and e not in REASONS[kind]]:
        torch = arguments.torch or (floors(extra)["torch"] if arguments.oldest else pinned("torch"))
        print(f"{extra} ({kind}, torch {torch})", flush=True)
        found = trial(extra, sdist if extra == "sdist" else wheel, torch, arguments, work)
        print(
            f"  {found['state']} " + "; ".join(s["said"] for s in found["steps"] if s["state"] != "works"), flush=True
        )
        results = read()  # again: another run may have written meanwhile
        results[kind][extra] = found
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def read():
    return (json.loads(RESULTS.read_text()) if RESULTS.exists() else {"newest": {}, "oldest": {}}) | {
        "reasons": REASONS
    }


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--torch")
    parser.add_argument("--work", type=Path, default=ROOT / ".mypy_cache/extras")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--again", action="store_true")
    return parser.parse_args()


def pinned(name):
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def built(work):
    """The wheel and the sdist of this checkout; `python -m build` makes the wheel from the sdist."""
    folder = work / "dist"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def trial(extra, package, torch, arguments, work):
    """Install ``package`` with one extra, and take the steps of its job."""
    log = work / f"{extra}{'-oldest' if arguments.oldest else ''}.log"
    log.write_text("")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {"BUILD_CUDA_EXT": "0", "NO_MKDOCS_2_WARNING": "1"}
    base = _with_torch(torch, work, env, log)
    place = work / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    venv = place / "venv"
    subprocess.run(["cp", "-al", base, venv], check=True)
    bounds = {"torch": torch} | ({n: v for n, v in floors(extra).items() if n != "torch"} if arguments.oldest else {})
    constraints = place / "constraints.txt"
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in bounds.items()))
    env["PIP_CONSTRAINT"] = str(constraints)
    env["PATH"] = f"{venv}/bin:{env['PATH']}"
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet"]
    target = README if extra == "readme" else "" if extra in CORE else extra
    found = {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(), "steps": []}
    start = time.monotonic()
    state, said = _run([*pip, f"{package}[{target}]" if target else package], place, env, log)
    if state == "works" and extra in PREPARED:
        state, said = _run([*pip, *PREPARED[extra]], place, env, log)
    found["installed_in_s"] = round(time.monotonic() - start)
    found["steps"].append({"step": "pip install", "state": state, "said": said})
    if state == "works":
        found["versions"] = _versions(extra, venv, env)
        start = time.monotonic()
        for number, step in enumerate(JOBS[extra]):
            state, said = _step(step, place / f"step{number}", venv, env, log)
            found["steps"].append({"step": step, "state": state, "said": said})
        found["used_in_s"] = round(time.monotonic() - start)
    found["state"] = "works" if all(s["state"] == "works" for s in found["steps"]) else "fails"
    if not arguments.keep:
        shutil.rmtree(place)
    return found


def _with_torch(version, work, env, log):
    base = work / f"torch-{version}"
    if not (base / "done").exists():
        shutil.rmtree(base, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", base], check=True)
        pip = [base / "bin/python", "-m", "pip", "install", "--quiet", f"torch=={version}"]
        state, said = _run(pip, work, env | {"PIP_CONSTRAINT": os.devnull}, log)
        if state != "works":
            sys.exit(f"torch {version} does not install: {said}")
        (base / "done").touch()
    return base


def _step(step, place, venv, env, log):
    kind, *words = step.split()
    python = venv / "bin/python"
    if kind in ("tests", "module", "run"):
        _checkout(place, whole=kind == "run")
        if kind == "run":
            return _run(words, place, env | {"PYTHON": str(python)}, log)
        if kind == "module":
            return _run([python, "-m", *words], place, env, log)
        extra_of_tests = [python, "-m", "pip", "install", "--quiet", "pytest>=8", "hypothesis>=6.100"]
        state, said = _run(extra_of_tests, place, env, log)
        if state != "works":
            return state, said
        state, said = _run([python, "-m", "pytest", *PYTEST, *words], place, env, log)
        return ("works" if state == "works" and " passed" in said else "fails"), said
    place.mkdir()
    if kind == "oftfx":
        return _run([venv / "bin/oftfx", *words], place, env, log)
    folder = STEPS if kind == "step" else ROOT / "tests/examples"
    return _run([python, "-P", folder / f"{words[0]}.py", *words[1:]], place, env, log)


def _checkout(place, whole):
    """What git has of the checkout; without ``whole``, the package is left out, so the installed one is used."""
    left_out = [] if whole else [":!oftfx", ":!passes"]
    names = subprocess.run(["git", "ls-files", ".", *left_out], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)


def _run(command, place, env, log):
    """Whether it ends well, and its last line, or that of its error."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n")
    try:
        done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return "fails", f"not done after {LIMIT} s"
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == 0:
        return "works", next((n for n in reversed(lines) if " passed" in n), "")
    errors = [n for n in lines if n.startswith(("ERROR", "E  ", "AssertionError")) or "Error: " in n]
    return "fails", ((errors or lines or [f"status {done.returncode}"])[-1])[:300]


def _versions(extra, venv, env):
    """Of torch and of what the extra itself asks for, as pip resolved it."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    names = sorted({Requirement(str(r)).name for r in required(extra)})
    done = subprocess.run(
        [venv / "bin/python", "-c", code, *names], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
