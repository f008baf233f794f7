"""Batches of requests to vLLM with the plugin, in a process of its own: log-probabilities of the tokens, by request.

The first argument is a file of JSON with the model, the engine's arguments and batches of requests, which run one after
the other: each request is a list of token ids, its steering or null, and the number of tokens. The second is the file
for the answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(given: str, made: str) -> None:
    asked: dict[str, Any] = json.loads(Path(given).read_text())
    options = {"dtype": "float32", "max_model_len": 96, "enforce_eager": True, "disable_log_stats": False}
    engine = LLM(asked["model"], skip_tokenizer_init=True, **{**options, **asked["engine"]})
    answers = []
    for requests in asked["batches"]:
        parameters = [
            SamplingParams(
                max_tokens=length,
                temperature=0,
                logprobs=20,
                detokenize=False,
                ignore_eos=True,
                extra_args=steering and {"steering": steering},
            )
            for _, steering, length in requests
        ]
        outputs = engine.generate([{"prompt_token_ids": ids} for ids, _, _ in requests], parameters, use_tqdm=False)
        for output in outputs:
            found = output.outputs[0]
            steps = [{token: value.logprob for token, value in step.items()} for step in found.logprobs]
            cached = output.num_cached_tokens
            answers.append({"tokens": list(found.token_ids), "steps": steps, "cached": cached})
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    Path(made).write_text(json.dumps({"answers": answers, "counters": counters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
