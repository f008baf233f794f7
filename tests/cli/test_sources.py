"""Files, models and settings that can't be used are refused in a line, before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.cli.conftest import Run

FILES = {
    "latin.jsonl": '{"positive": "a", "negative": "b"}\n{"positive": "café", "negative": "b"}\n'.encode("latin-1"),
    "latin.csv": "positive,negative\na,b\ncafé,b\n".encode("latin-1"),
    "utf16.csv": "positive,negative\na,b\n".encode("utf-16"),
    "latin.txt": "Rain falls here.\nUn café.\n".encode("latin-1"),
    "number.jsonl": b'{"positive": "a", "negative": "b"}\n{"positive": 3, "negative": "b"}\n',
    "object.jsonl": b'{"positive": {"role": "user"}, "negative": "b"}\n',
    "list.jsonl": b'{"positive": ["a", "b"], "negative": "b"}\n',
    "commas.csv": b"positive,negative\nI love it, truly,I hate it\n",
    "calibration.json": b'{"multiplier": 1.0, "kl_p95": 1.0, "max_kl": 1.0, "evaluations": []}',
    "broken.json": b'{"pairs": 3',
    "rows.json": b'{"pairs": 3, "rows": [{"layer": 1}]}',
    "sweep.json": b'{"chosen": 3}',
    "array.json": b"[1, 2]",
    "model.gguf": b"",
}
NO_RESULT = "is nothing that evaluate, sweep or diagnose wrote with -o"


@pytest.fixture(autouse=True)
def _files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    for name, contents in FILES.items():
        (folder / name).write_bytes(contents)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "ggufs").mkdir(exist_ok=True)
    (folder / "ggufs" / "small.gguf").write_bytes(b"")


def train(*arguments: str) -> list[str]:
    return ["train", *arguments, "-o", "x"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (train("model", "latin.jsonl"), 1, "error: latin.jsonl, line 2: not UTF-8: save the file in that encoding"),
        (train("model", "latin.csv"), 1, "error: latin.csv, line 3: not UTF-8"),
        (train("model", "utf16.csv"), 1, "error: utf16.csv, line 1: not UTF-8"),
        (["calibrate", "model", "joy.safetensors", "--texts", "latin.txt"], 1, "error: latin.txt, line 2: not UTF-8"),
        (["plot", "latin.csv", "-o", "x.png"], 1, "error: latin.csv, line 3: not UTF-8"),
        (train("model", "none.csv"), 1, "error: there is no file none.csv"),
        (train("model", "empty"), 1, "error: empty is a folder: name a file in it"),
        (
            train("model", "number.jsonl"),
            1,
            "error: number.jsonl, line 2: positive is 3, not a text or a list of chat messages",
        ),
        (train("model", "object.jsonl"), 1, "line 1: positive is {'role': 'user'}, not a text"),
        (train("model", "list.jsonl"), 1, "line 1: positive is ['a', 'b'], not a text"),
        (train("model", "commas.csv"), 1, "commas.csv, line 2: more columns than the 2 of the first line"),
        (["calibrate", "model", "joy.safetensors", "--max-kl", "-1"], 2, "--max-kl: -1 is not more than 0"),
        (["plot"], 2, "Missing argument 'RESULT'"),
        (["plot", "array.json"], 2, "Missing option '-o'"),
        (["plot", "none.json", "-o", "x.png"], 1, "error: there is no file none.json"),
        (["plot", "empty", "-o", "x.png"], 1, "error: empty is a folder"),
        *((["plot", name, "-o", "x.png"], 1, f"error: {name} {NO_RESULT}") for name in FILES if name.endswith(".json")),
        (train("model", "pairs.csv", "--dtype", "half_float"), 2, "--dtype: 'half_float' is no dtype of models"),
        (train("model", "pairs.csv", "--dtype", "int8"), 2, "--dtype: 'int8' is no dtype of models"),
        (train("model", "pairs.csv", "--dtype", "nn"), 2, "--dtype: 'nn' is no dtype of models"),
        (train("model", "pairs.csv", "--device", "gpu"), 2, "--device: 'gpu' can't be used here"),
        (train("model", "pairs.csv", "--device", "meta"), 2, "--device: 'meta' can't be used here"),
        (train("model", "pairs.csv", "--device", "cpu:x"), 2, "--device: 'cpu:x' can't be used here"),
        (train("model", "pairs.csv", "--layers", "1-3"), 1, "layer 3 does not exist: the model has 3 layers, 0 to 2"),
        (train("model", "pairs.csv", "--layers", "-4"), 1, "layer -4 does not exist: the model has 3 layers"),
        (["diagnose", "model", "pairs.csv", "--layers", "9"], 1, "layer 9 does not exist: the model has 3 layers"),
        (train("./none", "pairs.csv"), 1, "error: there is no folder ./none with a model"),
        (train("some/where/else", "pairs.csv"), 1, "error: there is no folder some/where/else with a model"),
        (train("none/", "pairs.csv"), 1, "error: there is no folder none/ with a model"),
        (train("empty", "pairs.csv"), 1, "error: the folder empty has no model: there is no config.json"),
        (train("ggufs", "pairs.csv"), 1, "but GGUF files, one of which --gguf-file can name: small.gguf"),
        (
            train("ggufs", "pairs.csv", "--gguf-file", "big.gguf"),
            1,
            "error: the folder ggufs has no file big.gguf; its GGUF files: small.gguf",
        ),
        (train("model.gguf", "pairs.csv"), 1, "is a file: write its folder, and --gguf-file model.gguf"),
        (train("pairs.jsonl", "pairs.csv"), 1, "error: the model pairs.jsonl is a file: name a folder"),
        (["show", "./none"], 1, "error: there is no file ./none"),
        (["show", "model"], 1, "error: the folder model has no vector: there is no steering_vector.safetensors in it"),
        (["export", "adapter", "model", "./none", "-o", "x"], 1, "error: there is no file ./none"),
        (["export", "lm-eval", "model", "./none", "-o", "x"], 1, "error: there is no file ./none"),
    ],
)
def test_what_cannot_be_read_is_said_before_a_model_is_loaded(
    run: Run, folder: Path, arguments: list[str], code: int, message: str
) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in " ".join(err.split())
    if code == 1:
        assert err.count("\n") == 1
    assert not list(folder.glob("x*"))


@pytest.mark.parametrize(
    ("arguments", "what"), [(train("none", "pairs.csv"), "the model none"), (["show", "user/none"], "the vector")]
)
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_said_in_a_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run(*arguments)
    looking, error = err.splitlines()
    assert (code, out) == (1, "")
    assert looking.endswith("looking for it on the Hugging Face hub")
    assert error.startswith(f"error: {what}")
    assert "is no folder, and didn't come from the hub: " in error
    assert error.count(". ") == 0


def test_chats_are_read_and_other_lists_are_for_prompts_alone(run: Run, folder: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    (folder / "chats.jsonl").write_text(json.dumps({"positive": chat, "negative": chat}))
    with pytest.raises(AssertionError, match="a model was loaded"):
        run("--debug", *train("model", "chats.jsonl"))
