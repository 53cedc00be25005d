"""Start a real server on loopback, talk to it by HTTP, stop it."""

import json
import os
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
DTYPES = {"BOOL": np.bool_, "FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BYTES": object} | {
    f"{sign.upper()}INT{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)
}
DATATYPES = {np.dtype(dtype): word for word, dtype in DTYPES.items()}


def environment(kind):
    """The environment of tools/environment-serve; without it a test is skipped, or fails where all is required."""
    path = ROOT / f".venv-{kind}"
    if not (path / "oftfx.stamp").exists():
        message = f"needs {path.name}: run tools/environment-serve"
        if os.environ.get("OFTFX_REQUIRE_ALL"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def free_ports(count=2):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Answer:
    status: int
    error: str | None
    outputs: dict
    text: str


class Server:
    """The command that `write_repository` gave, run from a server's environment; a context manager."""

    ready = "/v2/health/ready"

    def __init__(self, kind, repository, http_port, grpc_port):
        self.kind, self.venv, self.repository = kind, environment(kind), repository
        self.http_port, self.grpc_port = http_port, grpc_port
        self.url, self.grpc = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"
        self.log = Path(repository.path).parent / f"{kind}-{http_port}.log"

    def surroundings(self):
        """Environment variables besides those that every command has."""
        return {}

    def start(self, wait=True):
        # Nothing of the surroundings: what the README says has to be enough.
        path = f"{self.venv / 'bin'}:{os.environ['PATH']}"
        surroundings = {"PATH": path, "HOME": str(self.log.parent), **self.surroundings()}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                shlex.split(self.repository.command),
                stdout=log,
                stderr=log,
                env=surroundings,
                cwd=self.log.parent,
                start_new_session=True,
            )
        return self.wait() if wait else self

    def wait(self, seconds=90):
        """Until every model answers; a server that ends before that is shown with its log."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.kind} ended with {self.process.returncode}:\n{self.log.read_text()[-6000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}{self.ready}", timeout=2) as response:
                    if response.status == 200:
                        return self
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"{self.kind} is not ready after {seconds} s:\n{self.log.read_text()[-6000:]}")

    def stop(self):
        """Ask it to end, as an operator does; returns its status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            for pid in self.processes():  # only ours: those of the session that was made for it
                os.kill(pid, signal.SIGKILL)

    def processes(self):
        """Processes of the server that live: all of its session, also those that its own parent left."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()

    def get(self, path):
        try:
            with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def infer(self, model, arrays, parameters=None, version=None, **more):
        """The Open Inference Protocol in JSON, written out; `more` goes into the request as it is."""
        tensors = [
            {"name": n, "datatype": DATATYPES[a.dtype], "shape": list(a.shape), "data": a.reshape(-1).tolist()}
            for n, a in arrays.items()
        ]
        body = {"inputs": tensors, **({"parameters": parameters} if parameters is not None else {}), **more}
        path = f"/v2/models/{model}{f'/versions/{version}' if version else ''}/infer"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        answer = json.loads(text)
        outputs = {
            o["name"]: np.array(o["data"], dtype=DTYPES[o["datatype"]]).reshape(o["shape"])
            for o in answer.get("outputs", [])
        }
        return Answer(status, answer.get("error"), outputs, text)

    def call(self, folder, calls):
        """By gRPC, in the server's environment, which has the client: see ``client.py``."""
        arrays, plan = {}, []
        for index, (model, inputs, parameters, version) in enumerate(calls):
            arrays |= {f"{index}/{n}": a.astype(str) if a.dtype == object else a for n, a in inputs.items()}
            plan.append({"model": model, "version": version, "parameters": parameters, "inputs": list(inputs)})
        folder.mkdir(exist_ok=True)
        np.savez(folder / "inputs.npz", **arrays)
        (folder / "calls.json").write_text(json.dumps(plan))
        client = [str(self.venv / "bin/python"), str(Path(__file__).with_name("client.py")), self.grpc, str(folder)]
        subprocess.run(client, check=True, capture_output=True, text=True)
        answers = json.loads((folder / "answers.json").read_text())
        with np.load(folder / "outputs.npz") as found:
            for index, one in enumerate(answers["calls"]):
                one["outputs"] = {n: found[f"{index}/{n}"] for n in one["outputs"]}
        return answers
