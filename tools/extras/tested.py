"""Write oftfx/inspecting/tested.json, which `oftfx doctor` tells, from the trials in tools/results/extras.json.

.venv/bin/python tools/extras/tested.py. Of each package that `pyproject.toml` asks for: the oldest and the newest
version with which a job worked.
"""

import json
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILE = ROOT / "oftfx/inspecting/tested.json"


def ranges(results):
    found = {}
    for kind in ("newest", "oldest"):
        for trial in results[kind].values():
            if trial["state"] == "works":
                for name, version in trial["versions"].items():
                    found.setdefault(name, set()).add(version.partition("+")[0])
    return {
        name: {"oldest": min(versions, key=Version), "newest": max(versions, key=Version)}
        for name, versions in sorted(found.items())
    }


if __name__ == "__main__":
    made = ranges(json.loads((ROOT / "tools/results/extras.json").read_text()))
    rows = [f"  {json.dumps(name)}: {json.dumps(known)}" for name, known in made.items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
