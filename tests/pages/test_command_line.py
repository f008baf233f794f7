"""The terminal session in the documentation prints what the page says it prints."""

import contextlib
import copy
import io
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from steering_vectors import SteeringVector, train_steering_vector
from steering_vectors.cli import loading, main
from steering_vectors.cli.app import app
from steering_vectors.evaluation import evaluate
from steering_vectors.interop import from_gguf
from tests import tiny

PAGE = Path(__file__).parents[2] / "docs" / "command_line.rst"
HELP_PAGES = PAGE.parent / "api" / "commands.rst"
_BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n(?:    :caption: (\S+)\n)?\n((?:    .*\n|\s*\n)+)", re.MULTILINE)


def blocks() -> Iterator[tuple[str, str | None, str]]:
    for kind, caption, body in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        yield kind, caption or None, textwrap.dedent(body).strip("\n")


def commands(session: str) -> Iterator[tuple[str, str]]:
    """Each command of a session, with what it prints."""
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        command, _, printed = part.replace("\\\n", " ").partition("\n")
        yield command, printed


def test_the_session_prints_what_the_page_says(
    smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = smollm2

    def load(name: str | None, **_options: Any) -> tuple[Any, Any]:
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return copy.deepcopy(model), tokenizer

    for module in ("vectors", "measuring", "talking", "exporting"):
        monkeypatch.setattr(f"steering_vectors.cli.{module}.load_model", load)
    assert loading.load_model is not load
    variables: dict[str, str] = {}
    ran = 0
    for kind, caption, body in blocks():
        if caption is not None:
            (tmp_path / caption).write_text(body, encoding="utf-8")
        for command, printed in commands(body) if kind == "console" else ():
            name, equals, value = command.partition("=")
            if equals and name.isupper():
                variables[f"${name}"] = value
                continue
            program, *arguments = (variables.get(word, word) for word in shlex.split(command))
            assert program == "steering-vectors"
            with monkeypatch.context() as patched:
                if arguments[0] == "chat":
                    typed = re.findall(r"^> (.*\n)", printed, re.MULTILINE)
                    patched.setattr(sys, "stdin", Typed("".join(typed)))
                    patched.setattr(sys, "stderr", sys.stdout)
                with pytest.raises(SystemExit) as ended:
                    main(arguments)
            assert ended.value.code == 0
            assert capsys.readouterr().out.rstrip("> \n").split() == printed.split(), command
            ran += 1
    assert ran == 10
    for made in ("result.png", "joy.gguf", "joy.pt", "no-joy", "joyful-model"):
        assert (tmp_path / made).exists()


class Typed(io.StringIO):
    """A terminal, which shows what is typed."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_size: Any) -> str:
        line = super().readline()
        sys.stdout.write(line)
        return line


LINES = re.findall(r"^    \* - ``(.+)``\n      - ``(.+)``$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_all_commands_but_two_have_a_line() -> None:
    listed = re.findall(r"^\.\. command-help:: (.+)$", HELP_PAGES.read_text(encoding="utf-8"), re.MULTILINE)
    for command in {*listed} - {"chat", "playground"}:
        assert any(line.startswith(f"{command} ") for line, _ in LINES)


def contents(path: Path) -> Any:
    """A file's bytes; of a vector its directions, since files also say how they came about."""
    read = {"joy.gguf": from_gguf, "joy.safetensors": SteeringVector.load, "both.safetensors": SteeringVector.load}
    if path.name not in read:
        return path.read_bytes()
    return {layer: values.tolist() for layer, values in read[path.name](path).layer_activations.items()}


@pytest.mark.parametrize(
    ("command", "line"), LINES, ids=[re.sub(" [^a-z].*| [a-z]+[.].*", "", line) for line, _ in LINES]
)
def test_a_command_does_what_its_line_of_python_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, line: str
) -> None:
    transformers.utils.logging.disable_progress_bar()
    tiny.build("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer(chat_template=tiny.CHATML).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    pairs = [("so good", "so bad"), ("a warm day", "a cold day"), ("Great", "Awful"), ("I love it", "I hate it")]
    items = [("I say", " yes", " no!"), ("Then we", " are glad", " weep"), ("It", " works", " fails now")]
    vector = train_steering_vector(model, tokenizer, pairs, layers=1) * 20
    inputs = {name: value.repeat(2, 1) for name, value in tokenizer("Hi", return_tensors="pt").items()}
    made = {"model": model, "tokenizer": tokenizer, "pairs": pairs, "items": items, "vector": vector, "joy": vector}
    namespace = {
        **made,
        "formal": vector * 3,
        "inputs": {name: inputs[name] for name in ("input_ids", "attention_mask")},
    }
    (imports,) = (body for kind, _, body in blocks() if kind == "python")
    results, printed = [], []
    for side in ("command", "python"):
        folder = tmp_path / side
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name in ("joy", "refusal"):
            vector.save(f"{name}.safetensors")
        namespace["formal"].save("formal.safetensors")
        for name, columns, rows in (
            ("pairs.csv", "positive,negative", pairs),
            ("items.jsonl", "prompt,matching,not_matching", items),
        ):
            lines = [",".join(row) for row in rows] if name.endswith("csv") else []
            texts = [json.dumps(dict(zip(columns.split(","), row))) for row in rows]
            Path(name).write_text("\n".join([columns, *lines] if lines else texts))
        evaluate(model, tokenizer, vector, items).to_json("result.json")
        with contextlib.suppress(SystemExit):
            if side == "command":
                main([str(tmp_path / "model") if word == "MODEL" else word for word in shlex.split(command)])
            else:
                exec(f"{imports}\n{line}", namespace)
        printed.append(capsys.readouterr().out)
        results.append({path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()})
    by_command, by_python = results
    assert by_python.keys() <= by_command.keys()
    for name, path in by_python.items():
        assert contents(path) == contents(by_command[name]), name
    if "print(" in line and not command.startswith("show "):
        assert printed[0] == printed[1] != ""
    if command.startswith("show "):
        assert all(f"{norm:.3g}" in printed[0] for norm in vector.norms().values())
    if command.startswith("generate "):
        for row, shown in zip(namespace["rows"], printed[0].splitlines()[1:]):
            assert shown.split()[1:] == tokenizer.decode(row[inputs["input_ids"].shape[1] :]).split()


def test_the_reference_has_the_help_page_of_each_command() -> None:
    from typer.main import get_command

    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    exports = commands.pop("export").commands
    listed = re.findall(r"^\.\. command-help:: (.+)$", HELP_PAGES.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted([*commands, *(f"export {name}" for name in exports)])


def test_a_help_page_is_what_help_prints_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PAGE.parent)
    import command_help

    page = command_help.help_page("export gguf")
    assert page.startswith("Usage: steering-vectors export gguf [OPTIONS]")
    assert max(map(len, page.splitlines())) <= 80
    with pytest.raises(RuntimeError, match="there is no command 'wander'"):
        command_help.help_page("wander")
