"""The clients of bench_serving.py: serving_load.py PLAN.json, in a server's environment, which has tritonclient.

Writes, as JSON, what `load` returns.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Ask = Callable[[str, Any], np.ndarray]


def load(
    connect: Callable[[], Ask], plan: Mapping[str, Any], expected: Mapping[Any, np.ndarray]
) -> list[dict[str, Any]]:
    """Each variant in turn, round after round, after one round of a single request that is not counted.

    Args:
        connect: makes a client of its own for a thread: a function of variant and adapter that returns the answer.
        plan: ``variants`` (what its requests name, in turn), ``clients``, ``requests`` of each, ``rounds``.
        expected: the answers by ``(variant, adapter)``.

    Returns:
        For each number of clients and variant: seconds of every request, seconds of every round, the largest error.
    """
    found = []
    for clients in plan["clients"]:
        rows = {
            v: {"variant": v, "clients": clients, "seconds": [], "walls": [], "errors": []} for v in plan["variants"]
        }
        asks = [connect() for _ in range(clients)]
        for round_ in range(plan["rounds"] + 1):
            for variant, names in plan["variants"].items():
                seconds, wall, error = _round(asks, variant, names, plan["requests"] if round_ else 1, expected)
                if round_:
                    rows[variant]["seconds"] += seconds
                    rows[variant]["walls"].append(wall)
                rows[variant]["errors"].append(error)
        found += [{**row, "errors": max(row["errors"])} for row in rows.values()]
    return found


def _round(asks, variant, names, requests, expected):
    seconds, errors, failures = [], [], []

    def client(index, ask):
        try:
            for number in range(requests):
                name = names[(index + number) % len(names)]
                start = time.perf_counter()
                answer = ask(variant, name)
                seconds.append(time.perf_counter() - start)
                errors.append(float(np.abs(answer - expected[variant, name]).max()))
        except Exception as error:
            failures.append(error)

    time.sleep(0.05)  # ONNX Runtime's threads of the variant before spin for a while
    threads = [threading.Thread(target=client, args=pair) for pair in enumerate(asks)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    if failures:
        raise failures[0]
    if max(errors) > 1e-3:
        raise RuntimeError(f"{variant}: an answer is off by {max(errors)}: another adapter's?")
    return seconds, wall, max(errors)


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Throughput and quantiles of latency."""
    rows = []
    for row in found:
        cuts = statistics.quantiles(row["seconds"], n=20, method="inclusive")
        rows.append(
            {
                "variant": row["variant"],
                "clients": row["clients"],
                "requests_per_second": len(row["seconds"]) / sum(row["walls"]),
                "p50_ms": 1000 * statistics.median(row["seconds"]),
                "p95_ms": 1000 * cuts[-1],
                "largest_error": row["errors"],
            }
        )
    return rows


def main() -> None:
    import tritonclient.grpc as grpc
    from tritonclient.utils import np_to_triton_dtype

    plan = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(plan["folder"])
    tensors = []
    for name, array in np.load(folder / "inputs.npz").items():
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    expected = {}
    for key, array in np.load(folder / "expected.npz").items():
        variant, _, name = key.partition("/")
        expected[variant, None if name == "None" else name] = array

    def connect() -> Ask:
        client = grpc.InferenceServerClient(plan["url"])

        def ask(variant: str, name: str | None) -> np.ndarray:
            result = client.infer(variant, tensors, parameters={"adapter": name} if name else None)
            return result.as_numpy(result.get_response().outputs[0].name)

        return ask

    json.dump(load(connect, plan, expected), sys.stdout)


if __name__ == "__main__":
    main()
