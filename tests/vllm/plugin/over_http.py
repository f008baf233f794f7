"""A server of vLLM with the plugin on loopback, and requests to it."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.vllm.plugin.comparison import ENVIRONMENT, Request, Served


@dataclass(frozen=True)
class Server:
    """A server's address and its process."""

    url: str
    process: int

    def memory(self) -> float:
        """The megabytes of all its processes that no other program shares."""
        parent = psutil.Process(self.process)
        return sum(one.memory_full_info().uss for one in [parent, *parent.children(recursive=True)]) / 1e6


@contextmanager
def server(served: Served, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.path)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    command += ["--enforce-eager", "--served-model-name", "base", *options]
    variables = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    variables["STEERING_VECTORS_DIR"] = str(served.vectors)
    with log.open("w") as output, subprocess.Popen(command, env=variables, stdout=output, stderr=output) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-6000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(1)
            yield Server(url, process.pid)
        finally:
            process.terminate()
            process.wait(60)


def asked(url: str, body: Any = None, method: str | None = None) -> tuple[int, Any, str | None]:
    """The status, the answer, and the header that says how it was steered."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read()), answer.headers["x-steering"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers["x-steering"]


def body(request: Request, **more: Any) -> dict[str, Any]:
    """The body of a completion, whose answer has the log-probabilities of token ids."""
    ids, steering, length = request
    settings = {"model": "base", "prompt": ids, "max_tokens": length, "temperature": 0, "logprobs": 20}
    settings |= {"ignore_eos": True, "return_tokens_as_token_ids": True}
    return {**settings, **({"vllm_xargs": {"steering": steering}} if steering else {}), **more}


def answer_of(found: Any) -> dict[str, Any]:
    """A completion's tokens and the log-probabilities of each step."""
    logprobs = found["choices"][0]["logprobs"]
    steps = [
        {token.removeprefix("token_id:"): value for token, value in step.items()} for step in logprobs["top_logprobs"]
    ]
    return {"tokens": [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]], "steps": steps}
