"""The libraries of ``comparison.py``, each used as its documentation says, and the hook by hand that they are held to.

The models are tiny and random, of architectures that are in each library's version of transformers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS, BLOCKS, LAYER, HIDDEN = 120, 4, 2, 32
Inputs = dict[str, Tensor]
Pairs = list[tuple[str, str]]
Directions = dict[int, Tensor]


# The models


@dataclass(frozen=True)
class Architecture:
    """A tiny random model: the name of its config's class, the path of its blocks, and the config's settings."""

    config: str
    blocks: str
    settings: dict[str, Any]

    def build(self) -> Any:
        torch.manual_seed(0)
        special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
        config = getattr(transformers, self.config)(vocab_size=WORDS, **special, **self.settings)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # activations keep their size from layer to layer
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return model


USUAL: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}
GATED = {**USUAL, "intermediate_size": 64, "num_key_value_heads": 2}
OLDER: dict[str, Any] = {"n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "Llama": Architecture("LlamaConfig", "model.layers", GATED),
    "Mistral": Architecture("MistralConfig", "model.layers", GATED),
    "Qwen2": Architecture("Qwen2Config", "model.layers", GATED),
    "Gemma-2": Architecture("Gemma2Config", "model.layers", {**GATED, "head_dim": 8}),
    "Phi": Architecture("PhiConfig", "model.layers", GATED),
    "StableLM": Architecture("StableLmConfig", "model.layers", GATED),
    "GPT-2": Architecture("GPT2Config", "transformer.h", OLDER),
    "GPT-J": Architecture("GPTJConfig", "transformer.h", {**OLDER, "rotary_dim": 4}),
    "GPT-NeoX": Architecture("GPTNeoXConfig", "gpt_neox.layers", {**USUAL, "intermediate_size": 64}),
    "BLOOM": Architecture("BloomConfig", "transformer.h", {"hidden_size": HIDDEN, "n_layer": BLOCKS, "n_head": 4}),
    "OPT": Architecture("OPTConfig", "model.decoder.layers", {**USUAL, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN}),
    "Falcon": Architecture("FalconConfig", "transformer.h", USUAL),
    "MPT": Architecture("MptConfig", "transformer.blocks", {"d_model": HIDDEN, "n_layers": BLOCKS, "n_heads": 4}),
    "Mamba": Architecture("MambaConfig", "backbone.layers", {"hidden_size": HIDDEN, "num_hidden_layers": BLOCKS}),
}


def word_tokenizer(words: list[str], **special: str) -> Any:
    """Return a tokenizer with one token for each word, which has a padding token only where ``special`` names one."""
    from tokenizers import Tokenizer as Built
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    built = Built(WordLevel({word: number for number, word in enumerate(["<pad>", "<unk>", "</s>", *words])}, "<unk>"))
    built.pre_tokenizer = WhitespaceSplit()
    special |= {"unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=built, model_input_names=["input_ids", "attention_mask"], **special)


# The hook by hand


@dataclass(frozen=True)
class Change:
    """A direction to add to the output of block ``LAYER``, perhaps to the answer alone or in a strength for each row.

    The answer begins with the prompt's last token, whose output decides the first new one.
    """

    direction: Tensor
    answer_to: Inputs | None = None
    strengths: Tensor | None = None

    @property
    def first(self) -> int:
        return 0 if self.answer_to is None else self.answer_to["input_ids"].shape[1] - 1

    @property
    def delta(self) -> Tensor:
        """The change of one token: ``(hidden,)``, or ``(batch, 1, hidden)``."""
        return self.direction if self.strengths is None else self.strengths[:, None, None] * self.direction


class Runner(Protocol):
    """A model while it is steered."""

    def logits(self, inputs: Inputs) -> Tensor: ...
    def generate(self, inputs: Inputs, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Called:
    """A model that is steered whoever calls it."""

    model: Any

    def logits(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs).logits

    def generate(self, inputs: Inputs, **options: Any) -> Any:
        return self.model.generate(**inputs, **options)


@contextmanager
def hooked(model: Any, kind: Architecture, asked: Change) -> Iterator[Called]:
    """Steer by a forward hook, which is right for passes over all tokens so far, from the first one on."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[:, asked.first :] += asked.delta
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = model.get_submodule(f"{kind.blocks}.{LAYER}").register_forward_hook(hook)
    try:
        yield Called(model)
    finally:
        handle.remove()


# The libraries


class NotOfferedError(Exception):
    """A library has no such choice."""


class Library(ABC):
    """A way to steer a model, and perhaps to train a vector, as one library's documentation has it."""

    package: str
    sets_pad_token = False  # the library's documentation has users set one before they train

    @abstractmethod
    def steered(self, model: Any, kind: Architecture, asked: Change) -> AbstractContextManager[Runner]: ...

    def train(self, model: Any, tokenizer: Any, pairs: Pairs, **choices: Any) -> Directions:
        """Return directions by layer; ``choices`` are ``layers`` and ``batch_size``, defaults without."""
        raise NotOfferedError

    def aggregate(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the direction of rows ``(pairs, hidden)`` by the library's default method, computed by hand."""
        return (positive - negative).mean(dim=0)


class Ours(Library):
    package = "steering-vectors"

    @contextmanager
    def steered(self, model: Any, kind: Architecture, asked: Change) -> Iterator[Called]:
        from steering_vectors import SteeringVector, generated

        tokens = None if asked.answer_to is None else generated(asked.answer_to)
        multiplier = 1.0 if asked.strengths is None else asked.strengths
        with SteeringVector({LAYER: asked.direction}).apply(model, multiplier=multiplier, tokens=tokens):
            yield Called(model)

    def train(self, model: Any, tokenizer: Any, pairs: Pairs, **choices: Any) -> Directions:
        from steering_vectors import train_steering_vector

        return dict(train_steering_vector(model, tokenizer, pairs, **choices).layer_activations)


class Public(Library):
    package = "steering-vectors"

    @contextmanager
    def steered(self, model: Any, kind: Architecture, asked: Change) -> Iterator[Called]:
        from steering_vectors import SteeringVector

        if asked.strengths is not None:
            raise NotOfferedError
        with SteeringVector({LAYER: asked.direction}).apply(model, min_token_index=asked.first):
            yield Called(model)

    def train(self, model: Any, tokenizer: Any, pairs: Pairs, **choices: Any) -> Directions:
        from steering_vectors import train_steering_vector

        return dict(train_steering_vector(model, tokenizer, pairs, **choices).layer_activations)


class Repeng(Library):
    package = "repeng"
    sets_pad_token = True

    @contextmanager
    def steered(self, model: Any, kind: Architecture, asked: Change) -> Iterator[Called]:
        from repeng import ControlModel, ControlVector

        if asked.answer_to is not None:
            raise NotOfferedError
        control = ControlModel(model, [LAYER])
        if asked.strengths is None:
            control.set_control(ControlVector(model.config.model_type, {LAYER: asked.direction.numpy()}))
        else:
            control.set_raw_control({LAYER: asked.delta})
        try:
            yield Called(control)
        finally:
            control.unwrap()

    def train(self, model: Any, tokenizer: Any, pairs: Pairs, **choices: Any) -> Directions:
        from repeng import ControlVector, DatasetEntry

        names = {"layers": "hidden_layers", "batch_size": "batch_size"}
        given = {names[key]: value for key, value in choices.items()}
        vector = ControlVector.train(model, tokenizer, [DatasetEntry(*pair) for pair in pairs], **given)
        return {layer: torch.from_numpy(row) for layer, row in vector.directions.items()}

    def aggregate(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the first principal component of the differences, of norm 1, towards the positive side."""
        apart = positive - negative
        component = torch.linalg.svd(apart - apart.mean(dim=0), full_matrices=False).Vh[0]
        larger = (positive @ component > negative @ component).float().mean()
        return component if larger >= 0.5 else -component


@dataclass(frozen=True)
class Traced:
    """A model that nnsight wraps, steered in its traces alone; the block and its tokens are named by hand."""

    wrapped: Any
    block: Any
    asked: Change

    def add(self, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        first = 0 if hidden.shape[1] == 1 else self.asked.first  # a pass of one token is a step under a cache
        hidden[:, first:] += self.asked.delta

    def logits(self, inputs: Inputs) -> Tensor:
        with self.wrapped.trace(inputs):
            self.add(self.block.output)
            found = self.wrapped.output.logits.save()
        return found  # noqa: RET504 - a trace ends where its block does

    def generate(self, inputs: Inputs, **options: Any) -> Any:
        with self.wrapped.generate(inputs, **options) as tracer:
            for _step in tracer.iter[: options["max_new_tokens"]]:
                self.add(self.block.output)
            found = tracer.result.save()
        return found  # noqa: RET504


class NNsight(Library):
    package = "nnsight"

    def __init__(self) -> None:
        self.tokenizer = word_tokenizer(["w"])  # it is part of the wrapped model

    @contextmanager
    def steered(self, model: Any, kind: Architecture, asked: Change) -> Iterator[Traced]:
        from nnsight import TransformersModel

        wrapped = TransformersModel(model, tokenizer=self.tokenizer, task="text-generation")
        yield Traced(wrapped, wrapped.get(f"{kind.blocks}.{LAYER}"), asked)


LIBRARIES: dict[str, type[Library]] = {"ours": Ours, "steering-vectors": Public, "repeng": Repeng, "nnsight": NNsight}
