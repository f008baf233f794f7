"""The README's code runs, and gives what the README says."""

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
    assert printed.startswith("I think the hotel was a disaster")

    inputs = tokenizer("I think the hotel was", return_tensors="pt")
    unsteered = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    assert unsteered.startswith("I think the hotel was a great idea")


def test_the_readme_opens_with_eight_lines_of_code() -> None:
    (first, *_) = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", README.read_text())
    code = [line for line in first.splitlines() if line.strip()]
    assert len(code) == 8
