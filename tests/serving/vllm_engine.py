"""vLLM's engine: vllm_engine.py TASK RESULT, both JSON; see `tests.serving.vllm_server.engine`. Needs vLLM alone."""

import gc
import json
import os
import sys
from pathlib import Path


def main():
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    task = json.loads(Path(sys.argv[1]).read_text())
    limits = {name.replace("-", "_"): value for name, value in task["limits"].items()}
    more = {"prompt_logprobs": 0} if task["scored"] else {}
    params = SamplingParams(temperature=0, max_tokens=task["count"], ignore_eos=True, detokenize=False, **more)
    result = {}
    for name, (path, dtype) in task["runs"].items():
        try:
            llm = LLM(model=path, dtype=dtype, enforce_eager=True, skip_tokenizer_init=True, **limits, **task["more"])
            prompts = [TokensPrompt(prompt_token_ids=p) for p in task["prompts"]]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            result[name] = [list(o.outputs[0].token_ids) for o in outputs]
            if task["scored"]:
                result[name] = [result[name], [scores(o) for o in outputs]]
            del llm
        except Exception as error:  # the test says what was expected
            result[name] = f"{type(error).__name__}: {error}"
        cleanup_dist_env_and_memory()
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(result))


def scores(output):
    """Log-probability of each token of the prompt but the first."""
    tokens = output.prompt_token_ids
    return [at[t].logprob for at, t in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]


if __name__ == "__main__":
    main()
