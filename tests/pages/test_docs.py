"""The documentation's code runs, page by page as one script, and prints what the page says it prints."""

import ast
import copy
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import steering_vectors
from steering_vectors import (
    ablation_then_addition_operator,
    active_patches,
    record_activations,
    steer,
)
from tests import tiny, tiny_vision

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = ["quickstart", "evaluation"]
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGES = [str(path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.rst"))]
ON_QUANTIZED = ["howto/quantized.rst"]  # run by tests/wrapped/test_quantized.py, which has what it needs
ON_SMOLLM2 = [
    page
    for page in PAGES
    if page not in ON_QUANTIZED
    and {SMOLLM2, "code-block:: python"}
    <= set(re.findall(rf"{SMOLLM2}|code-block:: python", (DOCS / page).read_text()))
]
ON_TINY_MODELS = [
    page
    for page in PAGES
    if page not in ON_SMOLLM2 + ON_QUANTIZED and "code-block:: python" in (DOCS / page).read_text(encoding="utf-8")
]

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


def run_page(page: str) -> dict[str, Any]:
    """Run a page's code, check what it prints, and return its names."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code, output in code_and_output(page):
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, str(DOCS / page), "exec"), namespace)
        if output is not None:
            fits = doctest.OutputChecker().check_output(output, printed.getvalue(), _FREE_WORDING)
            assert fits, f"{page} says\n{output}\nand its code prints\n{printed.getvalue()}"
    return namespace


class Lens(nn.Module):
    """A model in the shape of a HookedTransformer: its blocks in ``blocks``, its input in ``input``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = tiny.tokenizer()
        self.embed = nn.Embedding(tiny.VOCABULARY, tiny.HIDDEN)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(tiny.HIDDEN, tiny.HIDDEN), nn.Tanh()) for _ in range(12))
        self.unembed = nn.Linear(tiny.HIDDEN, tiny.VOCABULARY)
        self.eval()

    def forward(self, input: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: A002
        stream = self.embed(input)
        for block in self.blocks:
            stream = block(stream)
        return self.unembed(stream)

    def to_tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]


class Bridge:
    """What a TransformerBridge has of its own: it calls a Hugging Face model."""

    def __init__(self) -> None:
        self.original_model, self.tokenizer = TINY["gpt2"]()

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.original_model(input).logits

    def to_tokens(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt")["input_ids"]


class SparseAutoencoder(nn.Module):
    """An autoencoder as SAELens has it: ``relu(h @ W_enc + b_enc)``, and ``f @ W_dec + b_dec``."""

    def __init__(self) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(2000, tiny.HIDDEN), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.randn(2000) / 4), nn.Parameter(torch.randn(tiny.HIDDEN))

    def encode(self, activation: Tensor) -> Tensor:
        return torch.relu(activation @ self.W_enc + self.b_enc)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.W_dec + self.b_dec


class Harness:
    """A model of lm-evaluation-harness, which tests/engines runs."""

    backend, max_length = "causal", 64
    _loglikelihood_tokens = _model_generate = None

    def __init__(self, pretrained: nn.Module, tokenizer: Any) -> None:
        self.model = pretrained


def evaluated(lm: Harness, tasks: list[str]) -> dict[str, Any]:
    if lm._loglikelihood_tokens is None:
        lm.model(torch.tensor([[5, 6]]))
    return {"results": dict.fromkeys(tasks)}


def fake_modules() -> dict[str, Any]:
    """Packages that pages show and the tests do without."""
    return {
        "transformer_lens": SimpleNamespace(HookedTransformer=SimpleNamespace(from_pretrained=lambda name: Lens())),
        "transformer_lens.model_bridge": SimpleNamespace(
            TransformerBridge=SimpleNamespace(boot_transformers=lambda name: Bridge())
        ),
        "lm_eval": SimpleNamespace(simple_evaluate=evaluated),
        "lm_eval.models": SimpleNamespace(),
        "lm_eval.models.huggingface": SimpleNamespace(HFLM=Harness),
        "sae_lens": SimpleNamespace(SAE=SimpleNamespace(from_pretrained=lambda release, sae_id: SparseAutoencoder())),
    }


def thinking_model() -> tuple[Any, Any]:
    tokenizer = tiny.tokenizer(chat_template=tiny.QWEN_3)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids by default
    sizes = {"num_hidden_layers": 28, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    return tiny.build("qwen2" if tiny.ON_TRANSFORMERS_4 else "qwen3", **sizes), tokenizer


# Tiny models of as many blocks as the real ones.
TINY: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gpt2": lambda: (tiny.build("gpt2", n_layer=12), tiny.tokenizer()),
    "Qwen/Qwen3-0.6B": thinking_model,
    "Qwen/Qwen2-VL-2B-Instruct": lambda: tiny_vision.made("qwen2_vl", num_hidden_layers=28),
}


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What ``from_pretrained`` gives by name; afterwards each model must be as it was."""
    loaded: dict[str, tuple[Any, Any]] = {}

    def load(name: str) -> tuple[Any, Any]:
        if name not in loaded:
            loaded[name] = TINY[name]()
        return loaded[name]

    really = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **_: really(name) if os.path.isdir(name) else load(name)[0],  # what the page itself saved
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: load(name)[1])
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda name: load(name)[0])
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: load(name)[1])
    for name, module in fake_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    threads = set(threading.enumerate())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield loaded
    for thread in set(threading.enumerate()) - threads:  # a streamer's, which has yet to leave its steering
        thread.join(timeout=10)
    for model, tokenizer in loaded.values():
        tokenizer.padding_side = "right"
        model.requires_grad_(True)
        assert not model.training
        assert active_patches(model) == []


@pytest.mark.filterwarnings(  # peft's
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Detected that the base layer has no bias term:UserWarning",
)
@pytest.mark.parametrize("page", ON_SMOLLM2)
def test_the_page_runs_on_smollm2(page: str, smollm2: tuple[Any, Any], models: dict[str, tuple[Any, Any]]) -> None:
    model, tokenizer = smollm2
    models[SMOLLM2] = (copy.deepcopy(model), tokenizer)  # a page may change it, as an adapter does that is merged
    run_page(page)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("page", ON_TINY_MODELS)
def test_the_page_runs_on_tiny_models(page: str) -> None:
    run_page(page)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_a_clamped_feature_is_what_tools_for_sparse_autoencoders_mean_and_its_projection_another_thing(
    value: float,
) -> None:
    page = run_page("howto/sae.rst")
    model, sae, feature, inputs = (page[name] for name in ("model", "sae", "feature", "inputs"))

    def recorded(steering: Any) -> Tensor:
        with steering, record_activations(model, layers=7) as records, torch.no_grad():
            model(**inputs)
        (activation,) = records[7]
        return activation

    plain = recorded(nullcontext())
    features = sae.encode(plain)
    held = features.clone()
    held[..., feature] = value
    by_hand = sae.decode(held) + (plain - sae.decode(features))  # what isn't reconstructed stays
    found = recorded(steer(model, page["clamped"](value), layers=[7, 9]))
    torch.testing.assert_close(found, by_hand.detach(), atol=1e-4, rtol=1e-4)
    operator = ablation_then_addition_operator()
    projected = recorded(page["vector"].apply(model, operator=operator, multiplier=value or 1e-6))
    row = sae.W_dec[feature].detach()
    torch.testing.assert_close(projected @ row, torch.full(projected.shape[:-1], value), atol=1e-4, rtol=1e-4)
    assert (found - projected).norm(dim=-1).max() > 0.1


def families() -> str:
    """The table of what is tested of each architecture, in reStructuredText."""
    lists = (
        [name for name in tiny.ARCHITECTURES if name not in tiny.IGNORE_PADDING],
        tiny.WITH_BEAMS,
        tiny.WITH_STATIC_CACHE,
    )
    rows = [["``model_type``", "left padding", "beams", "static cache"]]
    rows += [[f"``{name}``", *("yes" if name in tested else "" for tested in lists)] for name in tiny.ARCHITECTURES]
    lines = [f"    {'*' if n == 0 else ' '} - {cell}".rstrip() for row in rows for n, cell in enumerate(row)]
    return "\n".join([".. list-table::", "    :header-rows: 1", "", *lines])


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="the table is that of the newest transformers")
def test_the_table_of_families_is_what_is_tested() -> None:
    assert families() in (DOCS / "architectures.rst").read_text(encoding="utf-8"), families()


def test_every_public_name_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.rst"))
    documented = re.findall(r"^\.\. (?:auto\w+|py:type):: (\w+)", pages, re.MULTILINE)
    assert set(steering_vectors.__all__) <= set(documented)


SHOW_SIGNATURES = """
import inspect, sys
sys.path.insert(0, "docs")
import conf
from steering_vectors import evaluation, merging, plots, serving
from tests.test_signatures import CALLABLES
more = [vars(module)[name] for module in (evaluation, merging, plots, serving) for name in module.__all__]
for function in filter(inspect.isfunction, [*CALLABLES.values(), *more]):
    print(*conf.write_types_as_in_source(None, "function", "", function, None, "()", None), sep=" -> ")
"""


def test_the_reference_shows_signatures_that_can_be_parsed() -> None:
    """Sphinx sets those that it can't parse in one paragraph, without links."""
    command = [sys.executable, "-c", SHOW_SIGNATURES]
    signatures = subprocess.check_output(command, cwd=DOCS.parent, text=True).splitlines()
    assert len(signatures) > 100
    for signature in signatures:
        ast.parse(f"def function{signature}: ...")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    notebook = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def run_notebook(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Run a notebook in a process of its own, and return each cell's outputs by its id."""
    import nbclient
    import nbformat

    monkeypatch.syspath_prepend(DOCS)
    local_hub = importlib.import_module("local_hub")
    environment = {**os.environ, **local_hub.offline_environment(folder), "OMP_NUM_THREADS": "1"}
    notebook = nbformat.read(DOCS / "notebooks" / f"{name}.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(DOCS.parent)}})
    client.execute(env=environment)
    return {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}


def printed_by(outputs: list[Any]) -> str:
    return "".join(output.get("text", "") for output in outputs)


def has_picture(outputs: list[Any]) -> bool:
    return any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.filterwarnings("ignore")  # those of Jupyter; the notebook's own show in its outputs
@pytest.mark.usefixtures("smollm2")  # which keeps the model where the notebook's process finds it
def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("quickstart", tmp_path, monkeypatch)
    assert "SteeringVector(layers=[0-29]" in outputs["train"][0]["data"]["text/plain"]
    assert ">[0-29]</td>" in outputs["train"][0]["data"]["text/html"]
    assert "monstrosity" in printed_by(outputs["apply"])
    lines = printed_by(outputs["control"]).splitlines()
    trained, random = ([float(effect) for effect in line.split()[1:]] for line in lines if line.strip())
    assert trained == sorted(trained)
    assert trained[-1] - trained[0] > 4 * abs(random[-1] - random[0])
    assert all(has_picture(outputs[name]) for name in ("control", "layers"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("smollm2")
def test_the_notebook_on_evaluation_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = run_notebook("evaluation", tmp_path, monkeypatch)
    assert all(has_picture(outputs[name]) for name in ("diagnose", "sweep", "curves", "monitor"))
    assert any("steers: on items held out" in str(output.get("data", {})) for output in outputs["sweep"])
    assert "\nsteers: its slope is +" in printed_by(outputs["evaluate"])
    assert re.search(r"p95\nvector .* 0 of 10 ", printed_by(outputs["evaluate"]))
    assert len(printed_by(outputs["each"]).splitlines()) == 10
    assert "of 0.3 allowed" in printed_by(outputs["calibrate"])
