"""Writers that are killed at any moment: killed_writers.py KILLS SEED FOLDER. In a process of its own, for it forks.

Each child writes adapters, folds, ONNX files and training progress over older ones, again and again, until it is killed
by SIGKILL. After each kill everything has to load, as one of the versions that were written. Prints, as JSON, what was
found how often.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch

import oftfx
from oftfx import OFT
from oftfx.onnx.checks.verify import open_session
from oftfx.training.progress import resume, save_progress

torch.set_num_threads(1)
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def base():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 6))


def rotated(version):
    model = oftfx.transform(base(), {"*": OFT(4 if version else 6)})
    with torch.no_grad():
        for parameter in oftfx.adapter_parameters(model):
            parameter.fill_(0.1 * (1 + version))
    return model.eval()


MODELS = [rotated(0), rotated(1)]
FOLDS = [oftfx.fold(m) for m in MODELS]
OUTPUTS = [m(X).detach() for m in MODELS]


def trained(version):
    """A parameter with its optimiser after some steps."""
    parameter = torch.nn.Parameter(torch.full((40, 30), float(version)))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    return [parameter], optimizer, [float(version)] * (version + 1)


RUNS = [trained(0), trained(1)]
WRITERS = {
    "adapter": lambda p, v: oftfx.save_adapter(MODELS[v], p / "adapter", convention=("peft", "oftfx")[v]),
    "convert": lambda p, v: oftfx.save_adapter(MODELS[v], p / "file.safetensors", convention="oft_v2"),
    "fold": lambda p, v: FOLDS[v].save(p / "fold"),
    "export": lambda p, v: oftfx.export_onnx(FOLDS[v].model, p / "m.onnx", (X,), verify=False),
    "train": lambda p, v: save_progress(p, *RUNS[v]),
}


def which(output):
    return next((v for v, wanted in enumerate(OUTPUTS) if torch.allclose(output, wanted, atol=1e-5)), "wrong")


def read_training(path):
    parameters, optimizer, _ = trained(5)
    losses = resume(path, parameters, optimizer)
    moment = optimizer.state[parameters[0]]["exp_avg"]
    fits = torch.equal(parameters[0], RUNS[len(losses) - 1][0][0]) and losses == RUNS[len(losses) - 1][2]
    return len(losses) - 1 if fits and moment.abs().sum() > 0 else "wrong"


def read_graph(path):
    session = open_session(path / "m.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return which(torch.from_numpy(output))


READERS = {
    "adapter": lambda p: which(oftfx.load_adapter(base(), p / "adapter").eval()(X).detach()),
    "convert": lambda p: which(oftfx.load_adapter(base(), p / "file.safetensors").eval()(X).detach()),
    "fold": lambda p: which(oftfx.load_folded(p / "fold", base())(X).detach()),
    "export": read_graph,
    "train": read_training,
}


def main(kills, seed, folder):
    chance, found, faults = random.Random(seed), Counter(), []
    for write in WRITERS.values():
        write(folder, 0)
    for kill in range(kills):
        # One kind at a time, so that kills fall into its writing; an export traces first, which takes its time.
        name = [*WRITERS][kill % len(WRITERS)]
        child = os.fork()
        if not child:
            version = kill % 2
            while True:
                version = 1 - version
                WRITERS[name](folder, version)
        time.sleep(chance.uniform(0.0, 2.5 if name == "export" else 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for other, read in READERS.items():
            try:
                state = read(folder)
            except Exception as error:
                state = f"{type(error).__name__}: {error}"
            found[f"{other}: {state}"] += 1
            if state not in (0, 1):
                faults.append([kill, name, other, str(state)])
    sys.stdout.write(json.dumps({"kills": kills, "found": found, "faults": faults[:10]}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
