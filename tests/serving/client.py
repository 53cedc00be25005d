"""Calls of the Open Inference Protocol by gRPC: client.py HOST:PORT FOLDER; needs tritonclient and numpy alone.

FOLDER/calls.json says what to call and FOLDER/inputs.npz with what; answers.json and outputs.npz are written.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype


def tensor(name, array):
    if array.dtype.kind == "U":
        flat = [text.encode() for text in array.reshape(-1).tolist()]
        array = np.array(flat, dtype=object).reshape(array.shape)
    made = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def plain(array):
    if array.dtype == object:
        return np.array([text.decode() for text in array.reshape(-1)]).reshape(array.shape)
    return array


def main():
    url, folder = sys.argv[1], Path(sys.argv[2])
    client = grpc.InferenceServerClient(url)
    inputs = np.load(folder / "inputs.npz")
    calls, answers, outputs = json.loads((folder / "calls.json").read_text()), [], {}
    for index, call in enumerate(calls):
        tensors = [tensor(n, inputs[f"{index}/{n}"]) for n in call["inputs"]]
        try:
            result = client.infer(
                call["model"], tensors, model_version=call["version"] or "", parameters=call["parameters"]
            )
        except InferenceServerException as error:
            answers.append({"status": error.status(), "error": error.message(), "outputs": []})
            continue
        names = [o.name for o in result.get_response().outputs]
        outputs |= {f"{index}/{n}": plain(result.as_numpy(n)) for n in names}
        answers.append({"status": "OK", "error": None, "outputs": names})
    models = sorted({call["model"] for call in calls})
    state = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models": {m: client.is_model_ready(m) for m in models},
        "metadata": {m: client.get_model_metadata(m, as_json=True) for m in models},
    }
    np.savez(folder / "outputs.npz", **outputs)
    (folder / "answers.json").write_text(json.dumps({"calls": answers, **state}))


if __name__ == "__main__":
    main()
