"""A folder with a tiny model, a vector and files, and the program run in it."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steering_vectors import SteeringVector
from steering_vectors.cli import main
from tests import tiny

PAIRS = [("I love it", "I hate it"), ("so good", "so bad"), ("a warm day", "a cold day"), ("Great", "Awful")]
ITEMS = [("I say", " yes", " no!"), ("Then we", " are glad", " weep"), ("It", " works", " fails now")]
TEXTS = ["It rains in the morning.", "The house is old."]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a vector, and files of pairs, items and texts."""
    made = tmp_path_factory.mktemp("cli")
    model = tiny.build("llama")
    model.save_pretrained(made / "model")
    tiny.tokenizer(chat_template=tiny.CHATML).save_pretrained(made / "model")
    generator = torch.Generator().manual_seed(0)
    SteeringVector({n: torch.randn(tiny.HIDDEN, generator=generator) for n in (0, 1)}).save(made / "joy.safetensors")
    (made / "pairs.jsonl").write_text("\n".join(json.dumps({"positive": p, "negative": n}) for p, n in PAIRS))
    (made / "pairs.csv").write_text("\n".join(["positive,negative", *(f"{p},{n}" for p, n in PAIRS)]))
    names = ("prompt", "matching", "not_matching")
    (made / "items.jsonl").write_text("\n".join(json.dumps(dict(zip(names, item))) for item in ITEMS))
    (made / "texts.txt").write_text("\n".join(TEXTS))
    return made


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any, SteeringVector]:
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    return model, tokenizer, SteeringVector.load(folder / "joy.safetensors")


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(folder)

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return call
