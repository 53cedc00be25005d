"""Unloading and loading again, with the runtime inside MLServer's own environment: lifecycle.py MODEL_DIRECTORY.

Writes, as JSON, what became of requests around an unload, and of a runtime file that fails and then is mended.
"""

import asyncio
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
from mlserver.settings import ModelSettings
from mlserver.types import InferenceRequest, RequestInput

FOLDER = Path(sys.argv[1])


def made():
    settings = ModelSettings.parse_file(str(FOLDER / "model-settings.json"))
    return settings.implementation(settings)


async def ask(model, value):
    data = np.full((1, 2, 4), value, np.float32)
    tensor = RequestInput(name="x", datatype="FP32", shape=list(data.shape), data=data.reshape(-1).tolist())
    try:
        answer = await asyncio.wait_for(model.predict(InferenceRequest(inputs=[tensor])), 20)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return answer.outputs[0].data.root[0]


async def unloading():
    """Three requests are in a run that takes its time, three wait behind it, one comes while the model unloads."""
    model = made()
    assert await model.load()
    running, go, inner = threading.Event(), threading.Event(), model._model.run_all

    def slow(requests):
        running.set()
        assert go.wait(20)
        return inner(requests)

    model._model.run_all = slow
    first = [asyncio.create_task(ask(model, i)) for i in range(3)]
    assert await asyncio.to_thread(running.wait, 20)
    first += [asyncio.create_task(ask(model, i)) for i in range(3, 6)]
    await asyncio.sleep(0.01)
    unload = asyncio.create_task(model.unload())
    await asyncio.sleep(0.01)
    late = asyncio.create_task(ask(model, 6))
    await asyncio.sleep(0.01)
    go.set()
    answers = await asyncio.gather(*first)
    assert await asyncio.wait_for(unload, 20)
    return {"before": answers, "during": await late, "after": await asyncio.wait_for(ask(model, 7), 25)}


async def loading():
    """A runtime file that raises, then the same one mended, then another: each load reads what is there."""
    file = FOLDER / "oftfx_runtime/served_model.py"
    source, found = file.read_text(), []
    texts = [f"{source}\nraise RuntimeError('half')\n", *(f"{source}\nMARK = {i}\n" for i in range(2))]
    for text in texts:
        file.write_text(text)
        model = made()
        try:
            assert await model.load()
            found.append(model._module.served_model.MARK)
        except Exception as error:
            found.append(str(error))
        await model.unload()
    return {
        "loads": found,
        "modules": sum(re.fullmatch(r"oftfx_runtime_\w+", name) is not None for name in sys.modules),
    }


async def main():
    sys.stdout.write(json.dumps(await unloading() | await loading()) + "\n")


asyncio.run(main())
