"""Find a model's config, its text decoder, the decoder's blocks, and the modules that take a whole pass."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from steering_vectors._locks import computed_once

# Models without a list of blocks, but with a list for each part. A block's last part returns its output.
_TEMPLATES: dict[str, dict[str, str]] = {
    "xlm": {
        "decoder_block": "transformer.layer_norm2.{num}",
        "self_attn": "transformer.attentions.{num}",
        "mlp": "transformer.ffns.{num}",
        "heads": "transformer.attentions.{num}.out_lin",
        "neurons": "transformer.ffns.{num}.lin2",
        "post_attention_layernorm": "transformer.layer_norm1.{num}",
    }
}
_LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Names that decoders use for their list of blocks. They decide if several lists have the right length.
_BLOCK_LIST_NAMES = {"layers", "layer", "blocks", "block", "h"}
_DECODER_NAMES = ("language_model", "text_model", "text_decoder", "decoder")
# Model types whose activations are (seq, batch, hidden).
_COLUMNS_FIRST = ("fsmt", "xlnet")
_POSITION_COUNTS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
# Model types whose positions have a table of fixed size that is no nn.Embedding.
_POSITIONS_IN_TENSORS = ("codegen", "ctrl", "gptj", "mpt", "reformer")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A model's structure: its configs, its text decoder, and its blocks.

    ``configured`` is the outermost module with a config, inside wrappers such as DistributedDataParallel.
    ``pass_modules`` are the modules that take a whole pass's arguments, from the model to its text decoder.
    """

    model: nn.Module
    configured: nn.Module
    pass_modules: tuple[nn.Module, ...]
    config: Any = field(repr=False)
    text_config: Any = field(repr=False)

    @property
    def decoder(self) -> nn.Module:
        """The innermost module that holds the text decoder, without vision towers or an encoder beside it."""
        return self.pass_modules[-1]

    @property
    def widths(self) -> list[int]:
        """The activation widths that the config allows in the text decoder; empty if the config names no width.

        A few models pass several times their width from block to block.
        """
        width = getattr(self.text_config, "hidden_size", None)
        return [width, width * getattr(self.text_config, "hc_count", 1)] if isinstance(width, int) else []

    @property
    def is_encoder_decoder(self) -> bool:
        """The config's ``is_encoder_decoder`` flag."""
        return bool(getattr(self.config, "is_encoder_decoder", False))

    @computed_once
    def columns_first(self) -> bool | None:
        """True if activations are ``(seq, batch, hidden)``, False if ``(batch, seq, hidden)``.

        None for other people's classes, as of remote code, of which only a pass shows it.
        """
        if getattr(self.config, "model_type", None) in _COLUMNS_FIRST:
            return True
        known = [self.configured]
        with suppress(ValueError):
            known += self.blocks
        return False if all(map(_is_of_transformers, known)) else None

    @property
    def takes_tokens_again(self) -> bool:
        """True if a pass may compute tokens of a row a second time and in another order, as XLNet does."""
        return any("perm_mask" in parameters_of(module) for module in self.pass_modules)

    @property
    def learns_prompts(self) -> bool:
        """True if a PEFT wrapper puts virtual tokens before each prompt, or before its keys and values."""
        return learns_prompts(self.model)

    @property
    def virtual_tokens(self) -> int:
        """The number of columns that prompt tuning with PEFT puts before the prompt."""
        if not self.learns_prompts or "PREFIX" in str(getattr(self._prompt_config, "peft_type", "")):
            return 0
        return int(getattr(self._prompt_config, "num_virtual_tokens", 0))

    @property
    def _prompt_config(self) -> Any:
        return getattr(self.model, "active_peft_config", None)

    @computed_once
    def blocks(self) -> nn.ModuleList:
        """The text decoder's blocks. Raises ValueError unless exactly one list of blocks is found."""
        return self._found_blocks[1]

    @property
    def blocks_path(self) -> str:
        """The dotted name of the list of blocks. Raises the errors of :attr:`blocks`."""
        return self._found_blocks[0]

    @computed_once
    def _found_blocks(self) -> tuple[str, nn.ModuleList]:
        candidates = [found for found in _block_lists(self.model) if _contains(self.decoder, found[1])]
        for count in _layer_counts(self.text_config):
            if fitting := [found for found in candidates if len(found[1]) == count]:
                candidates = fitting
                break
        named = [found for found in candidates if found[0].rpartition(".")[2] in _BLOCK_LIST_NAMES]
        candidates = named or candidates
        if len(candidates) != 1:
            paths = [f"{path}.{{num}}" for path, _ in candidates] or self.lists_of_modules
            raise ValueError(
                f"can't tell which modules are the decoder blocks of {type(self.model).__name__}; candidates: {paths}; "
                f"choose one with layer_config={{'decoder_block': 'PATH.{{num}}'}}"
            )
        return candidates[0]

    @property
    def lists_of_modules(self) -> list[str]:
        """A template for each list of modules, such as ``model.layers.{num}``."""
        return [f"{path}.{{num}}" for path, module in self.model.named_modules() if isinstance(module, nn.ModuleList)]

    def known_templates(self, layer_type: str) -> list[str]:
        """Return a layer type's known templates, for a causal model and for its base model; empty for most models."""
        by_layer_type = _TEMPLATES.get(getattr(self.config, "model_type", ""), {})
        if layer_type not in by_layer_type:
            return []
        outer = next((name for name, module in self.model.named_modules() if module is self.configured), "")
        path = by_layer_type[layer_type]
        return [".".join(filter(None, (outer, inside))) for inside in (path, path.partition(".")[2])]

    @property
    def input_device(self) -> torch.device:
        """The device that the model's input belongs on."""
        modules = [module for module in (self._embeddings, self.model) if module is not None]
        devices = (parameter.device for module in modules for parameter in module.parameters())
        # Offloaded weights are on the meta device; the hooks that load them move the input too.
        return next((device for device in devices if device.type != "meta"), torch.device("cpu"))

    @property
    def image_tokens(self) -> set[int]:
        """The token ids that hold an image's place, which may lie outside the vocabulary."""
        found = (getattr(self.config, name, None) for name in ("image_token_id", "image_token_index"))
        return {token for token in found if isinstance(token, int)}

    @computed_once
    def arguments(self) -> set[str]:
        """The arguments of the model's forward method, with those that it passes on to the modules inside it."""
        return taken_arguments(self.pass_modules)

    @property
    def vocabulary(self) -> int | None:
        """The number of token ids that the model has embeddings for; None if unknown."""
        return self._embeddings.num_embeddings if isinstance(self._embeddings, nn.Embedding) else None

    @computed_once
    def most_tokens(self) -> int | None:
        """The number of tokens that the model has position embeddings for; None if it computes positions as needed.

        Virtual tokens that PEFT puts before each prompt take some of the positions.
        """
        counts = (getattr(self.text_config, name, None) for name in _POSITION_COUNTS)
        count = next((count for count in counts if isinstance(count, int)), None)
        virtual = int(getattr(self._prompt_config, "num_virtual_tokens", 0)) if self.learns_prompts else 0
        if count is None:
            return None
        if getattr(self.text_config, "model_type", None) in _POSITIONS_IN_TENSORS:
            return count - virtual
        for table in self.decoder.modules():
            if isinstance(table, nn.Embedding) and table is not self._embeddings:
                before = getattr(table, "offset", 0)  # rows before that of the first token
                if table.num_embeddings == count + before:
                    before += 0 if table.padding_idx is None else table.padding_idx + 1
                    return table.num_embeddings - before - virtual
        return None

    @computed_once
    def _embeddings(self) -> nn.Module | None:
        get_embeddings = getattr(self.configured, "get_input_embeddings", None)
        with suppress(NotImplementedError, AttributeError):
            embeddings = get_embeddings() if callable(get_embeddings) else None
            return embeddings if isinstance(embeddings, nn.Module) else None
        return None


def anatomy_of(model: nn.Module) -> Anatomy:
    """Return a model's anatomy. Raises TypeError unless ``model`` is a module."""
    check_model(model)
    configured = next((module for module in model.modules() if hasattr(module, "config")), model)
    decoder = configured
    while (inner := next(_inner_decoders(decoder), None)) is not None:
        decoder = inner
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    names = path.split(".") if path else []
    around = tuple(model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1))
    config = getattr(configured, "config", None)
    return Anatomy(model, configured, around, config, _text_config(config))


def learns_prompts(module: nn.Module) -> bool:
    """Return True for a PEFT wrapper that puts virtual tokens before each prompt, or before its keys and values."""
    return bool(getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False))


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if isinstance(model, nn.Module):
        return
    advice = ": pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    raise TypeError(f"model must be a torch.nn.Module such as a Hugging Face model, got {type(model).__name__}{advice}")


def parameters_of(module: nn.Module) -> Mapping[str, Any]:
    """Return the parameters of a module's forward method, each with its kind."""
    method = getattr(type(module), "forward", None)
    if getattr(module.forward, "__func__", None) is method and method is not None:
        return dict(list(_parameters_of(method).items())[1:])  # without self
    return _kinds(module.forward)


def taken_arguments(modules: Sequence[nn.Module]) -> set[str]:
    """Return the arguments that the first module takes, by name; the others are inside it and take the same."""
    known: set[str] = set()
    for module in modules:
        parameters = parameters_of(module)
        known |= parameters.keys()
        # A wrapper such as PEFT's passes other arguments on to the model inside it.
        if inspect.Parameter.VAR_KEYWORD not in parameters.values():
            break
    return known


def _kinds(function: Any) -> dict[str, Any]:
    return {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}


# Reading a signature takes longer than running a layer of a small model. The cache holds classes' methods alone, since
# other functions could keep a model in memory.
_parameters_of = lru_cache(maxsize=256)(_kinds)


def _inner_decoders(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the submodules with blocks that a module names as its decoder, or the model inside a wrapper."""
    get_decoder = getattr(module, "get_decoder", None)
    found = [getattr(module, name, None) for name in _DECODER_NAMES]
    if callable(get_decoder):
        with suppress(AttributeError, NotImplementedError):
            found.append(get_decoder())
    found.append(getattr(module, "base_model", None))
    if not hasattr(module, "base_model"):  # no model of transformers, but perhaps a wrapper that adds a value head
        found += [child for child in module.children() if hasattr(child, "base_model")]
    for inner in found:
        if (
            isinstance(inner, nn.Module)
            and inner is not module
            and _contains(module, inner)
            and any(_block_lists(inner))
        ):
            yield inner


def _text_config(config: Any) -> Any:
    get_text_config = getattr(config, "get_text_config", None)
    if not callable(get_text_config):
        return config
    try:
        return get_text_config(decoder=True)
    except (TypeError, ValueError):
        return config


def _layer_counts(config: Any) -> list[int]:
    counts = (getattr(config, name, None) for name in _LAYER_COUNTS)
    return [count for count in counts if isinstance(count, int)]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield each list whose modules have submodules, with its path. Lists inside lists, as of experts, are left out."""
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[nn.Module] = set()
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if not isinstance(module, nn.ModuleList):
            children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
            waiting.extend(reversed(children))
        elif len(module) > 0 and all(any(True for _ in member.children()) for member in module):
            yield path, module


def every_module(model: nn.Module) -> list[nn.Module]:
    """Return the model's modules, each once, several times as fast as ``model.modules()``."""
    found = {model: None}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _is_of_transformers(module: nn.Module) -> bool:
    """Return True for a class of a model in transformers or one made from it, and for PyTorch's wrappers."""
    kinds = type(module).__mro__
    return kinds[0].__module__.startswith("torch.") or any(
        c.__module__.startswith("transformers.models.") for c in kinds
    )


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in module.modules())
