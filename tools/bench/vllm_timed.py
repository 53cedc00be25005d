"""vLLM's engine that does what it is told: vllm_timed.py CHECKPOINT DTYPE [SLOTS]; JSON by line. Needs vLLM alone.

A line ``{"adapter": directory or null, "prompts": [[token, ...], ...], "count": n}`` is answered by ``{"seconds": s,
"tokens": [[token, ...], ...]}``, a line on standard output that begins with ``=``; the log stands between them.
"""

import json
import os
import sys
import time


def main():
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    path, dtype, slots = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0
    adapters = {"enable_lora": True, "max_loras": slots, "max_lora_rank": 16} if slots else {}
    limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 2048, "enable_prefix_caching": False}
    # Folds with rotations that stay have code beside their weights, which is ours.
    own = {"enforce_eager": True, "skip_tokenizer_init": True, "trust_remote_code": True}
    llm = LLM(model=path, dtype=dtype, **own, **limits, **adapters)
    print("={}", flush=True)
    known = {}
    for line in sys.stdin:
        task = json.loads(line)
        name = task["adapter"]
        request = LoRARequest(name, known.setdefault(name, len(known) + 1), name) if name else None
        prompts = [TokensPrompt(prompt_token_ids=p) for p in task["prompts"]]
        params = SamplingParams(temperature=0, max_tokens=task["count"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False, lora_request=request)
        seconds = time.perf_counter() - start
        print(
            "=" + json.dumps({"seconds": seconds, "tokens": [list(o.outputs[0].token_ids) for o in done]}), flush=True
        )


if __name__ == "__main__":
    main()
