"""Batches of requests to vLLM with the plugin: log-probabilities of the tokens, by request.

vLLM is imported once; each line of JSON on standard input is then a job in a forked process, as an engine needs one of
its own: a file with the model, the engine's arguments and batches of requests, which run one after the other, a file for
the answers, a file for what is printed, the environment, and perhaps the name of a fault. A request is a list of token
ids, or a text and perhaps the path of an image; its steering or null; and the number of tokens; every second one of a batch may have a LoRA adapter. The answer on standard output is the job's status.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from tests.vllm.plugin import faults


def prompted(prompt: Any) -> dict[str, Any]:
    """A prompt as vLLM takes it, of token ids or of a text with the path of its image or null."""
    if isinstance(prompt[0], int):
        return {"prompt_token_ids": prompt}
    text, image = prompt
    return {"prompt": text, **({"multi_modal_data": {"image": Image.open(image)}} if image else {})}


def run(given: Path, made: Path) -> None:
    asked: dict[str, Any] = json.loads(given.read_text())
    options = {"dtype": "float32", "max_model_len": 96, "enforce_eager": True, "disable_log_stats": False}
    engine = LLM(asked["model"], **{"skip_tokenizer_init": True, **options, **asked["engine"]})
    adapter = asked["adapter"] and LoRARequest("adapter", 1, asked["adapter"])
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
        prompts = [prompted(prompt) for prompt, _, _ in requests]
        adapters = [adapter if i % 2 else None for i in range(len(requests))]
        outputs = engine.generate(prompts, parameters, use_tqdm=False, lora_request=adapters)
        for output in outputs:
            found = output.outputs[0]
            steps = [{token: value.logprob for token, value in step.items()} for step in found.logprobs]
            made_of = {"prompt": list(output.prompt_token_ids), "cached": output.num_cached_tokens}
            answers.append({"tokens": list(found.token_ids), "steps": steps, **made_of})
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    made.write_text(json.dumps({"answers": answers, "counters": counters}))


def forked(job: dict[str, Any]) -> int:
    """Run a job in a child, and return its status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({name: value for name, value in job["environment"].items() if value is not None})
    status = 1
    try:
        faults.plant(job["fault"])
        run(Path(job["given"]), Path(job["made"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(f"status {forked(json.loads(line))}", flush=True)
