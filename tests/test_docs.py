"""The documentation's code runs, page by page as one script, and prints what the page says it prints."""

import doctest
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from steering_vectors import (
    SteeringVector,
    active_patches,
    at,
    completion,
    from_index,
    generated,
    prompted,
    record_activations,
)
from tests import tiny

DOCS = Path(__file__).parent.parent / "docs"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.rst"))]
ON_SMOLLM2 = [page for page in PAGES if SMOLLM2 in (DOCS / page).read_text(encoding="utf-8")]
ON_TINY_MODELS = [page for page in PAGES if page not in ON_SMOLLM2 and "code-block:: python" in (DOCS / page).read_text(encoding="utf-8")]

_BLOCK = re.compile(r"^( *)\.\. code-block:: (python|text)\n\n((?:\1 +.*\n|\s*\n)+)", re.MULTILINE)
_FREE_WORDING = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def code_and_output(page: str) -> Iterator[tuple[str, str | None]]:
    """Each python block of a page, with the text block where one follows it at once: what it prints."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(_BLOCK.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[2] == "python":
            prints = following is not None and following[2] == "text" and following.start() == block.end()
            line = text.count("\n", 0, block.start(3))
            yield "\n" * line + textwrap.dedent(block[3]), textwrap.dedent(following[3]) if prints else None


def run_page(page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code, output in code_and_output(page):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, str(DOCS / page), "exec"), namespace)
        if output is not None:
            fits = doctest.OutputChecker().check_output(output, printed.getvalue(), _FREE_WORDING)
            assert fits, f"{page} says\n{output}\nand its code prints\n{printed.getvalue()}"


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What ``from_pretrained`` gives by name; afterwards the models must be as they were."""
    models: dict[str, tuple[Any, Any]] = {}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: models[name][0])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: models[name][1])
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield models
    for model, _tokenizer in models.values():
        assert not model.training
        assert not active_patches(model)
        model.requires_grad_(True)


@pytest.mark.parametrize("page", ON_SMOLLM2)
def test_the_page_runs_on_smollm2(page: str, smollm2: tuple[Any, Any], stand_ins: dict[str, Any]) -> None:
    model, tokenizer = smollm2
    side = tokenizer.padding_side
    stand_ins[SMOLLM2] = (model, tokenizer)
    run_page(page)
    tokenizer.padding_side = side


@pytest.mark.parametrize("page", ON_TINY_MODELS)
def test_the_page_runs_on_tiny_models(
    page: str, stand_ins: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins["gpt2"] = (tiny.build("gpt2", n_layer=12), tiny.tokenizer())
    run_page(page)


SELECTIONS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "all tokens": lambda inputs: None,
    "generated(inputs)": generated,
    "prompted(inputs)": prompted,
    "completion()": lambda inputs: completion(),
    "from_index(1)": lambda inputs: from_index(1),
    "at([0, 3])": lambda inputs: at([0, 3]),
    "slice(1, 4)": lambda inputs: slice(1, 4),
    "slice(-2, None)": lambda inputs: slice(-2, None),
    "slice(1, -1)": lambda inputs: slice(1, -1),
    "[0, -1]": lambda inputs: [0, -1],
    "tensor([[0,1,1,0,1],[1,0,0,1,0]])": lambda inputs: torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]),
}


def steered_columns(tokens: Callable[[dict[str, Tensor]], Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """For each pass of a generation from two prompts, which places ``(batch, seq)`` of the activation were changed."""
    model = tiny.shared("llama")
    inputs = {
        "input_ids": torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    before: list[Tensor] = []

    def noting(activation: Tensor, direction: Tensor) -> Tensor:
        before.append(activation.clone())
        return direction

    vector = SteeringVector({1: torch.ones(tiny.HIDDEN)})
    with vector.apply(model, operator=noting, tokens=tokens(inputs)), record_activations(model, layers=1) as after:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [(a != b).any(dim=-1) for a, b in zip(after[1], before, strict=True)], inputs


def drawing() -> str:
    """What each selection steers, drawn: the prompt's columns, then one for each decoding step."""
    _, inputs = steered_columns(SELECTIONS["all tokens"])
    mask = inputs["attention_mask"]
    numbers = [[str(n) if is_token else "-" for n, is_token in zip(row, own, strict=True)]
               for row, own in zip((mask.cumsum(1) - 1).tolist(), mask.tolist(), strict=True)]
    lines = ["            prefill      decoding", "own tokens"]
    for row, (own, length) in enumerate(zip(numbers, mask.sum(1).tolist(), strict=True)):
        lines.append(f"  row {row}     {' '.join(own)}    {'   '.join(str(length + step) for step in range(3))}")
    for name, tokens in SELECTIONS.items():
        passes, _ = steered_columns(tokens)
        lines += ["", name]
        for row in range(2):
            cells = [["#" if steered else "." if is_token else "-" for steered, is_token in zip(p[row].tolist(), own, strict=True)]
                     for p, own in zip(passes, [mask[row].tolist(), *[[1]] * 3], strict=True)]
            lines.append(f"  row {row}     {' '.join(cells[0])}    {'   '.join(step[0] for step in cells[1:])}")
    return "\n".join(lines)
