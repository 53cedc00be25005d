"""Runtimes that run in node, from the packages of tools/environment-serve."""

import json
import os
import subprocess
from pathlib import Path

from tests.serving.servers import environment


def node(script, folder, **task):
    """What a script of this folder makes of a task; both are JSON."""
    modules = environment("node") / "node_modules"
    asked, result = folder / "task.json", folder / "result.json"
    asked.write_text(json.dumps(task))
    command = ["node", Path(__file__).with_name(script), modules, asked, result]
    surroundings = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(command, env=surroundings, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())
