"""The README's code runs, and gives what the README says."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import transformers

README = Path(__file__).parent.parent / "README.rst"


def test_the_readme_runs_as_one_script(
    smollm2: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = smollm2
    monkeypatch.chdir(tmp_path)  # it writes a file
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text())
    assert len(blocks) >= 4
    script = "\n".join(textwrap.dedent(block) for block in blocks)
    exec(compile(script, str(README), "exec"), {})
    printed = capsys.readouterr().out
    (shown, *_) = re.findall(r"\.\. code-block:: text\n\n((?:    .*\n|\n)+)", README.read_text())
    assert printed.startswith(textwrap.dedent(shown).rstrip())


def test_the_first_example_fits_a_narrow_window_with_one_statement_a_line() -> None:
    (first, *_) = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text())
    code = textwrap.dedent(first)
    assert max(map(len, code.splitlines())) <= 80
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    assert len({node.lineno for node in statements}) == len(statements)
