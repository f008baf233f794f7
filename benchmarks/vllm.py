"""Tokens per second of vLLM, unsteered and steered, on one machine.

Run from a clone, in the environment that ``make test-vllm`` makes::

    OMP_NUM_THREADS=2 .venv-vllm/bin/python benchmarks/vllm.py [--model FOLDER] [--compiled] [--rounds 3]

Columns: tokens generated each second, by batches of 16 requests of 64 tokens in and 64 out; the ratio to the engine
without the plugin, of the same round; and the share of prompt tokens that came from the prefix cache, by requests that
share a beginning of 48 tokens. Rounds are interleaved, and the median of their ratios is shown. Rows:

- absent: vLLM alone (``VLLM_PLUGINS`` leaves the plugin out)
- idle: the plugin serves eight vectors, and no request names one
- one: all requests name the same vector
- eight: the requests name eight different vectors
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

KINDS = {"absent": 0, "idle": 0, "one": 1, "eight": 8}
REQUESTS, PROMPT, ANSWER, SHARED = 16, 64, 64, 48


def prompts(first: int) -> list[list[int]]:
    shared = list(range(1000, 1000 + SHARED))
    return [[*shared, *(2000 + (first + i) * 20 + j for j in range(PROMPT - SHARED))] for i in range(REQUESTS)]


def engine(model: str, compiled: bool, kind: str) -> None:
    """Answer each line of standard input by one batch's tokens per second and the cache's share."""
    sys.path.remove(str(Path(__file__).parent))  # where this file is named as what is imported
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, dtype="float32", max_model_len=256, block_size=32, enforce_eager=not compiled, disable_log_stats=False
    )
    named = KINDS[kind]
    parameters = [
        SamplingParams(
            max_tokens=ANSWER,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"steering": f"v{i % named}:1@generated"} if named else None,
        )
        for i in range(REQUESTS)
    ]
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        inputs = [{"prompt_token_ids": ids} for ids in prompts(REQUESTS * number)]
        start = time.perf_counter()
        answers = llm.generate(inputs, parameters, use_tqdm=False)
        took = time.perf_counter() - start
        cached = sum(answer.num_cached_tokens or 0 for answer in answers) / (REQUESTS * PROMPT)
        print("result", json.dumps([REQUESTS * ANSWER / took, cached]), flush=True)


@dataclass(frozen=True)
class Engine:
    """The process of one engine, and the file of what it writes to standard error."""

    kind: str
    process: "subprocess.Popen[str]"
    log: Path

    def batch(self) -> tuple[float, float]:
        """Return one batch's tokens per second, and the cache's share."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of an engine that has ended
            print("go", file=self.process.stdin, flush=True)
        speed, cached = json.loads(self.answer("result"))
        return speed, cached

    def answer(self, word: str) -> str:
        """Return the rest of the next line that begins with a word."""
        assert self.process.stdout is not None
        printed = deque(maxlen=20)
        while not (line := self.process.stdout.readline()).startswith(word):
            if not line:
                end = "".join([*printed, *self.log.read_text(errors="replace").splitlines(keepends=True)[-60:]])
                raise SystemExit(f"{end}\nThe engine {self.kind!r} has ended; above is the end of what it wrote.")
            printed.append(line)
        return line.removeprefix(word)


def started(kind: str, model: str, vectors: Path, compiled: bool) -> Engine:
    own = {
        "STEERING_VECTORS_DIR": "" if kind == "absent" else str(vectors),
        "VLLM_PLUGINS": "" if kind == "absent" else "steering_vectors",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--engine", kind, "--model", model, *(["--compiled"] if compiled else [])]
    log = vectors.parent / f"{kind}.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    started = Engine(kind, process, log)
    started.answer("ready")
    return started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(Path(sys.prefix) / "share" / "smollm2-135m-instruct"))
    parser.add_argument("--compiled", action="store_true", help="compile the model instead of running it eagerly")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        engine(options.model, options.compiled, options.engine)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    from steering_vectors import SteeringVector

    config = json.loads((Path(options.model) / "config.json").read_text())
    width, depth = config["hidden_size"], config["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors"
        vectors.mkdir()
        for n in range(8):
            rows = torch.randn(2, width, generator=torch.Generator().manual_seed(n)) / 10
            SteeringVector({depth // 3: rows[0], 2 * depth // 3: rows[1]}).save(vectors / f"v{n}.safetensors")
        engines = {kind: started(kind, options.model, vectors, options.compiled) for kind in KINDS}
        for one in engines.values():
            one.batch()  # warm
        rounds = [{kind: one.batch() for kind, one in engines.items()} for _ in range(options.rounds)]
        for one in engines.values():
            one.process.kill()
    print(f"{'compiled' if options.compiled else 'eager':<10} {'tokens/s':>9} {'ratio':>6} {'cached':>7}")
    for kind in KINDS:
        speed = statistics.median(found[kind][0] for found in rounds)
        ratio = statistics.median(found[kind][0] / found["absent"][0] for found in rounds)
        print(f"{kind:<10} {speed:>9.0f} {ratio:>6.2f} {rounds[-1][kind][1]:>7.0%}")


if __name__ == "__main__":
    main()
