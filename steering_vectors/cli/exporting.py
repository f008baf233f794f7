"""Write vectors for other programs, and models with steered weights."""

from __future__ import annotations

from pathlib import Path

from steering_vectors.cli.loading import check_output, load_model, load_vector, new_folder
from steering_vectors.cli.screen import note
from steering_vectors.cli.vectors import OfModel


def gguf(vector: str, output: Path, multiplier: float) -> None:
    """Write a control vector for llama.cpp."""
    from steering_vectors.interop import to_gguf

    check_output(output, vector)
    print(to_gguf(load_vector(vector), output, multiplier=multiplier))


def adapter(model: str, vector: str, output: Path, multiplier: float, ablate: bool, of_model: OfModel) -> None:
    """Write a PEFT adapter, and print the options with which vLLM serves it, if it can."""
    from steering_vectors import ablation_operator
    from steering_vectors.merging import to_adapter

    gguf_file, dtype, device = of_model
    direction = load_vector(vector)
    loaded = load_model(model, gguf_file=gguf_file, dtype=dtype, device=device)[0]
    operator = ablation_operator() if ablate else None
    made = to_adapter(direction, loaded, output, operator=operator, multiplier=multiplier)
    note(f"{output}: adapter {made.name}, rank {made.rank}")
    if made.vllm_options:
        print(made.vllm_options)
    else:
        note(made.why_not_vllm)


def lm_eval(model: str, vector: str, output: Path, multiplier: float, of_model: OfModel) -> None:
    """Write a file for lm-evaluation-harness."""
    from steering_vectors.interop import to_lm_eval

    check_output(output, vector)
    direction = load_vector(vector)
    written = to_lm_eval(direction, load_model(model, gguf_file=of_model[0])[0], output, multiplier=multiplier)
    print(",".join(f"{name}={value}" for name, value in written.items()))


def weights(model: str, vector: str, output: Path, multiplier: float, of_model: OfModel) -> None:
    """Write a model with the vector in its weights."""
    from steering_vectors.merging import merge

    gguf_file, dtype, device = of_model
    with new_folder(output) as folder:
        direction = load_vector(vector)
        loaded, tokenizer = load_model(model, gguf_file=gguf_file, dtype=dtype, device=device)
        merged = merge(direction, loaded, multiplier=multiplier)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    note(f"{output}: a {type(merged).__name__} that is always steered")


def ablate(model: str, vector: str, output: Path, layers: str | None, of_model: OfModel) -> None:
    """Write a model without a direction."""
    from steering_vectors.merging import merge_ablation

    gguf_file, dtype, device = of_model
    with new_folder(output) as folder:
        direction = load_vector(vector, layers)
        loaded, tokenizer = load_model(model, gguf_file=gguf_file, dtype=dtype, device=device)
        merged = merge_ablation(loaded, direction)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    note(f"{output}: a {type(merged).__name__} without the direction")
