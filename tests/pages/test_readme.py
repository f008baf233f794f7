"""The README's code and its demo run, and give what the README says."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import transformers

from steering_vectors import demo

README = Path(__file__).parents[2] / "README.rst"


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
    shown = re.findall(r"\.\. code-block:: text\n\n((?:    .*\n|\n)+)", README.read_text())
    assert len(shown) == 2
    assert printed.startswith("\n".join(textwrap.dedent(block).strip() for block in shown))
    assert "\nsteers: " in shown[1].replace("    ", "")
    assert max(len(line) for line in textwrap.dedent(shown[1]).splitlines()) <= 80


def test_the_demo_shows_an_effect_in_both_directions_measures_it_and_fits_a_terminal(
    smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load", lambda name: smollm2)
    monkeypatch.setattr(demo, "NEW_TOKENS", 16)
    demo.main([])
    printed = capsys.readouterr().out
    assert "+1  Rain is a big, fluffy thing that falls from the sky." in printed
    assert re.search(r"^vector .* 0 of 16 ", printed, flags=re.MULTILINE)
    assert re.search(r"^random 1 ", printed, flags=re.MULTILINE)
    assert re.search(r"^permuted 1 ", printed, flags=re.MULTILINE)
    assert re.search(r"^steers: its slope is \+", printed, flags=re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 80


def test_the_first_example_fits_a_narrow_window_with_one_statement_a_line() -> None:
    (first, *_) = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text())
    code = textwrap.dedent(first)
    assert max(map(len, code.splitlines())) <= 80
    statements = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    assert len({node.lineno for node in statements}) == len(statements)


def test_the_picture_shows_the_first_examples_answers() -> None:
    text = README.read_text()
    (shown, *_) = re.findall(r"\.\. code-block:: text\n\n((?:    .*\n|\n)+)", text)
    picture = (README.parent / "docs" / "_static" / "steered.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'<text id="([^"]*)">(.*)</text>', picture)
    assert [f"{multiplier} {re.sub('<[^>]*>', '', answer)}" for multiplier, answer in drawn] == textwrap.dedent(
        shown
    ).strip().splitlines()


def test_links_lead_to_files_of_the_project() -> None:
    text = README.read_text()
    links = [*re.findall(r"`[^`<]+<([^>]+)>`_", text), *re.findall(r"\.\. image:: (.+)", text)]
    local = [link for link in links if "://" not in link]
    assert len(local) > 8
    assert all((README.parent / link).exists() for link in local)


def test_badges_say_what_is_supported() -> None:
    text, project = README.read_text(), (README.parent / "pyproject.toml").read_text()
    assert re.search(r'requires-python = ">=3\.10"', project)
    assert re.search(r'"transformers>=4\.46"', project)
    assert re.search(r"strict = true", project)
    assert re.search(r'license = "MIT"', project)
    for badge in ("python-3.10%20to%203.13", "transformers-4.46%20to%205", "types-mypy%20strict", "licence-MIT"):
        assert f"https://img.shields.io/badge/{badge}-blue" in text
