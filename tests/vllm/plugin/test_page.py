"""The page on serving: its commands start a server, and its clients print what the page says."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.pages.test_docs import DOCS
from tests.vllm.plugin.comparison import Served
from tests.vllm.plugin.over_http import asked, server

pytest.importorskip("vllm")
PAGE = (DOCS / "howto" / "serving.rst").read_text()
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^\.\. code-block:: {language}\n\n((?: +.*\n|\s*\n)+)", PAGE, re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found]


def test_the_clients_print_what_the_page_says(
    smollm2: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    path = smollm2[0].name_or_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _: smollm2[0])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda _: smollm2[1])
    exec(blocks("python")[0], {})
    served = Served(smollm2[0], Path(path), tmp_path / "vectors")
    with server(served, tmp_path / "log", "--served-model-name", NAME) as running:
        capsys.readouterr()
        exec("\n".join(blocks("python3")).replace("http://localhost:8000", running.url), {})
        assert capsys.readouterr().out.strip().splitlines() == "\n".join(blocks("text")).splitlines()
        body = re.search(r"-d '(.*)'", blocks("shell")[1], re.DOTALL)
        assert body is not None
        status, answer, header = asked(f"{running.url}/v1/chat/completions", json.loads(body[1]))
        assert (status, header) == (200, "simple:1@generated")
        assert answer["choices"][0]["message"]["content"] in " ".join(blocks("text")).replace("\n", " ")
