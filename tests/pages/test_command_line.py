"""The terminal session in the documentation prints what the page says it prints."""

import copy
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.cli import loading, main
from steering_vectors.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "command_line.rst"
HELP_PAGES = PAGE.parent / "api" / "commands.rst"
_BLOCK = re.compile(r"^\.\. code-block:: (\w+)\n(?:    :caption: (\S+)\n)?\n((?:    .*\n|\s*\n)+)", re.MULTILINE)


def blocks() -> Iterator[tuple[str, str | None, str]]:
    for kind, caption, body in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        yield kind, caption or None, textwrap.dedent(body).strip("\n")


def commands(session: str) -> Iterator[tuple[str, str]]:
    """Each command of a session, with what it prints."""
    for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def test_the_session_prints_what_the_page_says(
    smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = smollm2

    def load(name: str | None, **_options: Any) -> tuple[Any, Any]:
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return copy.deepcopy(model), tokenizer

    for module in ("vectors", "measuring", "talking"):
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
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code == 0
            assert capsys.readouterr().out.rstrip().split() == printed.split(), command
            ran += 1
    assert ran == 6
    assert (tmp_path / "result.png").is_file()
    assert (tmp_path / "joy.gguf").is_file()


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
