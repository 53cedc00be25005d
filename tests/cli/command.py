"""The command in this process, which saves importing torch, or in one of its own."""

import subprocess
import sys
from types import SimpleNamespace


def run(*arguments):
    """Status, standard output and standard error of one call."""
    from typer.testing import CliRunner

    from oftfx.cli.main import app

    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="oftfx")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return SimpleNamespace(
        status=done.exit_code, out=done.stdout, err=" ".join(done.stderr.split()), lines=done.stderr.splitlines()
    )


def start(*arguments, **more):
    """The same as a process."""
    command = [sys.executable, "-m", "oftfx", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
