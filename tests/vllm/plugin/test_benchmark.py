"""The benchmark says why an engine has ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.vllm.plugin.comparison import SIZES

pytest.importorskip("vllm")
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "vllm.py"


def test_the_end_of_the_log_is_shown_when_an_engine_ends(tmp_path: Path) -> None:
    tiny.build("llama", **SIZES, max_position_embeddings=256).save_pretrained(tmp_path)  # without a tokenizer
    command = [sys.executable, str(BENCHMARK), "--model", str(tmp_path), "--rounds", "1"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "Couldn't instantiate the backend tokenizer" in ended.stderr
    assert ended.stderr.endswith("The engine 'absent' has ended; above is the end of what it wrote.\n")
