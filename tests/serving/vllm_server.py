"""vLLM's server for the OpenAI API, really started on a CPU, and its engine for one checkpoint after another."""

import json
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.serving.servers import Server, environment, free_ports
from tools.bench import bench_vllm

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LIMITS = {"max-model-len": 128, "max-num-seqs": 8, "max-num-batched-tokens": 512}


class OpenAI(Server):
    """``vllm serve``; prompts are lists of tokens, so no tokenizer is needed.

    Args:
        model: checkpoint directory, served as ``base``.
        folder: for the log, and what a server takes for its home.
        options: further arguments.
        more: environment variables.
    """

    ready = "/health"

    def __init__(self, model, folder, *options, **more):
        (port,) = free_ports(1)
        limits = " ".join(f"--{name} {value}" for name, value in LIMITS.items())
        command = (
            f"{environment('vllm') / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server --host 127.0.0.1 "
            f"--port {port} --model {model} --served-model-name base --skip-tokenizer-init --enforce-eager "
            f"--dtype float32 {limits} {' '.join(options)}"
        )
        super().__init__("vllm", SimpleNamespace(command=command, path=str(Path(folder) / "model")), port, 0)
        self.more = QUIET | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} | more

    def surroundings(self):
        return self.more

    def wait(self, seconds=400):
        return super().wait(seconds)

    def post(self, path, body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model, prompt, count=16):
        """Greedy tokens; the status and text of an answer that is none."""
        body = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "return_token_ids": True}
        status, text = self.post("/v1/completions", body | {"detokenize": False, "ignore_eos": True})
        return json.loads(text)["choices"][0]["token_ids"] if status == 200 else (status, text)


def engine(folder, runs, prompts, count=16, *, plugins=True, scored=False, **more):
    """Greedy tokens of each of ``runs``, ``{name: [directory, dtype]}``, from vLLM's engine in one process.

    Args:
        folder: for what is handed over.
        runs: see above.
        prompts: lists of tokens.
        count: tokens to generate.
        plugins: whether vLLM loads plugins, of which ours is one.
        scored: give ``[tokens, scores]`` instead, with the log-probabilities of the prompts' own tokens.
        **more: options of the engine.
    """
    task, result = folder / "task.json", folder / "tokens.json"
    task.write_text(json.dumps({"runs": runs, "prompts": prompts, "count": count, "limits": LIMITS, "scored": scored,
                                "more": more}))  # fmt: skip
    script = Path(__file__).with_name("vllm_engine.py")
    command = [environment("vllm") / "bin" / "python", script, task, result]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **QUIET} | ({} if plugins else {"VLLM_PLUGINS": ""})
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def greedy(model, prompt, count=16):
    """torch's greedy tokens, and by how much each was ahead of the second best."""
    return bench_vllm.greedy(model, prompt, count)


def same(got, expected, tie):
    """Whether tokens are torch's, up to the first near tie that went the other way: from there texts differ."""
    tokens, margins = expected
    first = next((i for i, (a, b) in enumerate(zip(got, tokens, strict=True)) if a != b), None)
    return first is None or margins[first] < tie


def spread(model, std=0.15):
    """Weights by which the best token is well ahead of the second."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=std)
    return model
