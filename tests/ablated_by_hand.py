"""A direction that is taken out of the stream by plain hooks on modules that are named here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests import tiny

DIRECTION = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(4))
UNIT = DIRECTION / DIRECTION.norm()

# What is added to the stream in each block, told by hand.
WRITTEN = {
    "bloom": ["self_attention.dense", "mlp.dense_4h_to_h"],
    "falcon": ["self_attention", "mlp"],
    "gemma2": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "gemma3": ["post_attention_layernorm", "post_feedforward_layernorm"],
    "gpt2": ["attn", "mlp"],
    "gpt_neo": ["attn", "mlp"],
    "gpt_neox": ["attention", "mlp"],
    "gptj": ["attn", "mlp"],
    "llama": ["self_attn", "mlp"],
    "mamba": ["mixer"],
    "mistral": ["self_attn", "mlp"],
    "mixtral": ["self_attn", "mlp" if not tiny.ON_TRANSFORMERS_4 else "block_sparse_moe"],
    "mpt": ["attn", "ffn.down_proj"],
    "opt": ["self_attn", "fc2"],
    "phi": ["self_attn", "mlp"],
    "qwen2": ["self_attn", "mlp"],
    "qwen3": ["self_attn", "mlp"],
    "stablelm": ["self_attn", "mlp"],
}


def without(activation: Tensor) -> Tensor:
    unit = UNIT.to(activation.dtype)
    return activation - (activation @ unit)[..., None] * unit


@contextmanager
def ablated_by_hand(
    model: nn.Module,
    architecture: str,
    by_layer: Callable[[int], Callable[[Tensor], Tensor]] = lambda layer: without,
    at_outputs: bool = False,
) -> Iterator[None]:
    """``by_layer`` ablates what is written in each layer; ``at_outputs``, also what each block returns."""

    def after(layer: int, output: Any) -> Any:
        activation = by_layer(layer)(output if isinstance(output, Tensor) else output[0])
        return activation if isinstance(output, Tensor) else (activation, *output[1:])

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (by_layer(0)(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": by_layer(0)(kwargs["hidden_states"])}

    blocks = tiny.blocks(model)  # type: ignore[arg-type]
    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        for module in (*map(block.get_submodule, WRITTEN[architecture]), *([block] if at_outputs else [])):
            handles.append(module.register_forward_hook(lambda _m, _a, output, layer=layer: after(layer, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
