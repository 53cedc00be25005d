"""Twelve requests at once to the runtime inside MLServer's own environment: together.py MODEL_DIRECTORY.

Writes, as JSON, the rows of each run and the largest error of an answer; the adapters multiply by the blocks in their
``.npy`` files beside the model directory's adapters.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from mlserver.settings import ModelSettings
from mlserver.types import InferenceRequest, Parameters, RequestInput


async def main():
    folder = Path(sys.argv[1])
    settings = ModelSettings.parse_file(str(folder / "model-settings.json"))
    model = settings.implementation(settings)
    assert await model.load()
    runs, inner = [], model._model.run_all

    def noting(requests):
        runs.append([len(r.inputs["x"]) for r in requests])
        return inner(requests)

    model._model.run_all = noting

    async def ask(index, name):
        x = np.random.default_rng(index).standard_normal((1 + index % 2, 2, 4)).astype(np.float32)
        tensor = RequestInput(name="x", datatype="FP32", shape=list(x.shape), data=x.reshape(-1).tolist())
        parameters = Parameters(adapter=name) if name else None
        answer = await model.predict(InferenceRequest(inputs=[tensor], parameters=parameters))
        (output,) = answer.outputs
        got = np.array(output.data.root, dtype=np.float32).reshape(output.shape)
        blocks = np.load(folder / f"{name}.npy") if name else np.eye(4)
        return float(np.abs(got - x.astype(np.float64) @ blocks).max())

    names = [None, "a1", "a2", "a1"] * 3
    errors = await asyncio.gather(*(ask(i, n) for i, n in enumerate(names)))
    # A client that goes away while it waits costs nothing and does not hold up those after it.
    leaving = asyncio.create_task(ask(0, "a1"))
    await asyncio.sleep(0)
    leaving.cancel()
    errors.append(await ask(1, "a2"))
    await model.unload()
    sys.stdout.write(json.dumps({"runs": runs, "error": max(errors)}) + "\n")


asyncio.run(main())
