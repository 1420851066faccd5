"""Runs one vLLM engine on given prompts and prints the outcome as JSON; tests start it as a process of its own.

Reads a JSON object from standard input: ``engine`` (arguments of ``vllm.LLM``), ``prompts`` (lists of token ids),
``max_tokens``. Prints one JSON line: ``tokens`` and ``logits`` (the two highest per step) of every prompt, and
``totals``, the worker's counters (None without TOPTHETA).
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # sends the function below to the worker


def worker_totals(worker: object) -> dict[str, float] | None:
    """Runs in the worker process."""
    module = sys.modules.get("topt_vllm.backend.metrics")
    return module.recorder().totals() if module else None


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    llm = LLM(logprobs_mode="raw_logits", **request["engine"])
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_tokens"], logprobs=2, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False
    )
    completions = [output.outputs[0] for output in outputs]
    result = {
        "tokens": [list(completion.token_ids) for completion in completions],
        "texts": [completion.text for completion in completions],
        "logits": [
            [
                sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
                for step in completion.logprobs
            ]
            for completion in completions
        ],
        "totals": llm.collective_rpc(worker_totals)[0],
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
