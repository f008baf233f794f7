"""Write the Python that does what the page does."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steering_vectors.cli.loading import layers_of
from steering_vectors.cli.playground.answering import Asked

_SELECTORS = {"generated": "generated", "prompt": "prompted"}


@dataclass(frozen=True)
class Source:
    """The model and the vectors as the command named them: what a script loads."""

    model: str | None
    vectors: Mapping[str, str]
    layers: str | None = None
    gguf_file: str | None = None
    dtype: str | None = None
    device: str | None = None


def script(source: Source, asked: Asked) -> str:
    """Return a script that writes both answers to a request."""
    used = {name: strength for name, strength in asked.strengths.items() if strength}
    names = dict(zip(used, _variables(list(used)), strict=True))
    selector = _SELECTORS.get(asked.tokens) if used else None
    lines = [*_imports(source, bool(used), selector), "", *_loading(source)]
    numbers = layers_of(source.layers)
    for name, variable in names.items():
        lines.append(f"{variable} = {_loaded_vector(source.vectors[name])}{'' if numbers is None else f'[{numbers}]'}")
    lines += ["", *_inputs(source, asked)]
    tokens = f", tokens={selector}(inputs)" if selector else ""
    if used:
        applied = [
            f"{names[name]}.apply(model, multiplier=[0, {strength:.12g}]{tokens})" for name, strength in used.items()
        ]
        lines += _with(applied)
    indent = "    " if used else ""
    generate = f"output = model.generate(**inputs, max_new_tokens={asked.max_new_tokens}, do_sample=False)"
    answers = 'output[:, inputs["input_ids"].shape[1] :]'
    written = ["", f"for answer in tokenizer.batch_decode({answers}, skip_special_tokens=True):", "    print(answer)"]
    return "\n".join([*lines, indent + generate, *written]) + "\n"


def _imports(source: Source, steers: bool, selector: str | None) -> list[str]:
    names = (["SteeringVector"] if steers else []) + ([selector] if selector else [])
    found = ["import torch"] if source.dtype else []
    if names and not all(Path(path).is_file() for path in source.vectors.values()):
        names.append("hub")
    if names:
        found.append(f"from steering_vectors import {', '.join(names)}")
    if source.model is None:
        return [*found, "from steering_vectors.demo import load"]
    return [*found, "from transformers import AutoModelForCausalLM, AutoTokenizer"]


def _loading(source: Source) -> list[str]:
    given = f", gguf_file={source.gguf_file!r}" if source.gguf_file else ""
    moved = ", ".join(
        [*([repr(source.device)] if source.device else []), *([f"torch.{source.dtype}"] if source.dtype else [])]
    )
    to = f".to({moved})" if moved else ""
    if source.model is None:
        return ["model, tokenizer = load(None)", *([f"model = model{to}"] if to else [])]
    return [
        f"model = AutoModelForCausalLM.from_pretrained({source.model!r}{given}){to}",
        f"tokenizer = AutoTokenizer.from_pretrained({source.model!r}{given})",
    ]


def _loaded_vector(path: str) -> str:
    return f"SteeringVector.load({path!r})" if Path(path).is_file() else f"hub.from_pretrained({path!r})"


def _inputs(source: Source, asked: Asked) -> list[str]:
    """Return the lines that make a batch of the prompt twice: for the unsteered row, and for the steered one."""
    to = ".to(model.device)" if source.device else ""
    if not asked.is_chat:
        return [f"prompt = {asked.prompt!r}", f'inputs = tokenizer([prompt] * 2, return_tensors="pt"){to}']
    return [
        f'chat = [{{"role": "user", "content": {asked.prompt!r}}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    [chat] * 2, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        f"){to}",
    ]


def _with(contexts: list[str]) -> list[str]:
    if len(contexts) == 1:
        return [f"with {contexts[0]}:"]
    return ["with (", *(f"    {context}," for context in contexts), "):"]


def _variables(names: list[str]) -> list[str]:
    """Return a different Python name for each vector, that is none of the script's others."""
    taken = {"answer", "chat", "generated", "hub", "inputs", "load", "model", "output", "prompt", "prompted"}
    taken |= {"tokenizer", "torch", "AutoModelForCausalLM", "AutoTokenizer", "SteeringVector", "print"}
    found: list[str] = []
    for name in names:
        variable = re.sub(r"\W", "_", name).strip("_") or "vector"
        variable = f"vector_{variable}" if variable[0].isdigit() or keyword.iskeyword(variable) else variable
        number = 2
        chosen = variable
        while chosen in taken:
            chosen, number = f"{variable}_{number}", number + 1
        taken.add(chosen)
        found.append(chosen)
    return found
