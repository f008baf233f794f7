"""One batch of requests to vLLM, in a process of its own: log-probabilities of the next tokens, by request.

The first argument is a file of JSON with the model, the engine's arguments, and requests: token ids, and an adapter's
name, number and folder, or null for the base. The second is the file for the answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(given: str, made: str) -> None:
    asked: dict[str, Any] = json.loads(Path(given).read_text())
    engine = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **asked["engine"],
    )
    sampling = SamplingParams(max_tokens=4, temperature=0, logprobs=20, detokenize=False, ignore_eos=True)
    answers = engine.generate(
        [{"prompt_token_ids": ids} for ids, _ in asked["requests"]],
        sampling,
        lora_request=[adapter and LoRARequest(*adapter) for _, adapter in asked["requests"]],
    )
    rows = []
    for answer in answers:
        output = answer.outputs[0]
        steps = [{token: found.logprob for token, found in step.items()} for step in output.logprobs]
        rows.append({"tokens": list(output.token_ids), "steps": steps})
    Path(made).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
