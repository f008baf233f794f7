"""Every decoder-only class of the installed transformers, built from a tiny config."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import SteeringVector, ablate_everywhere, from_index, generated, record_activations
from steering_vectors._models import anatomy_of
from steering_vectors._steering.stream_parts import written_parts
from steering_vectors.layer_matching import find_layers
from tests.architectures.reading import check_reading
from tests.architectures.tiny_models import BERT_LIKE, POSITIONS, causal_model_types, tiny_causal_model

Note = Callable[[str, str, str], None]

PROMPTS = [[11, 12, 13], [21, 22, 23, 24, 25]]
STEPS = 3

# What can't be steered, or not by token, and the words in which it is refused.
NO_LAYERS = {
    "hrm_text": "can't tell which modules are the decoder blocks",  # two stacks that take turns
}
NO_SELECTION = {
    "cpmant": "can't find the tokens",  # 32 columns of its own before the prompt
    "prophetnet": "can't find the tokens",  # its n-grams' streams stand among the tokens
    "xlm": "can't find the tokens",  # cuts off cached tokens inside the pass
    "xlnet": "can't locate the tokens",  # computes some tokens again, in another order
}
# Cross-attention blocks, which run with images only.
NEVER_RUN = {("mllama", 1)}
# Models whose hidden_states are something else than what goes from block to block.
HIDDEN_STATES_DIFFER = {
    "blt": "of all its stacks",
    "cpmant": "without its own columns",
    "inkling2_loop_text": "as its loops run",
    "prophetnet": "without the streams",
    "xlnet": "transposed",
}
PARTS_BESIDE_BLOCKS = {"xlm"}
# Models that are no language models by themselves.
NEEDS_ANOTHER_MODEL = {"gemma4_assistant", "gemma4_unified_assistant"}
# Models of codes of sound, whose generate delays and changes the prompt.
NO_TEXT = {"musicgen", "musicgen_melody"}
# Cached, their sparse attention may pick other keys, whoever steers them.
CACHED_DIFFERS = {"dots3_note", "dots3_note_text"}
# Blocks whose output is (streams, batch, seq, hidden).
STREAMS_FIRST = {"gemma3n", "gemma3n_text"}

# What can't be read for training, and the words in which it is refused.
_ODD_SHAPE = "can't find the tokens of a pass"
NOT_READ = {
    **dict.fromkeys(
        ("cpmant", "deepseek_v4", "gemma3n", "gemma3n_text", "hy_v4", "prophetnet", "reformer"), _ODD_SHAPE
    ),
    "xlm": "an activation changes with the tokens that follow it",  # no decoder by its defaults
    "xlnet": "takes some of a row's tokens again",
    "mllama": "did not run in a pass",  # its cross-attention blocks
}

TYPES = [name for name in causal_model_types() if name not in NEEDS_ANOTHER_MODEL]


@lru_cache(maxsize=2)  # the tests of one model follow each other
def model_of(model_type: str) -> Any:
    torch.set_num_threads(1)
    model = tiny_causal_model(model_type)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.15, generator=generator)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def directions(model: Any, layers: list[int]) -> dict[int, Tensor]:
    with record_activations(model, layers=layers) as activations, torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    generator = torch.Generator().manual_seed(1)
    return {layer: torch.randn(activations[layer][0].shape[-1], generator=generator) for layer in layers}


def activation(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else activation(output[0])


def with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return output._replace(**{output._fields[0]: new})
    if hasattr(output, "keys"):
        return type(output)(**{**output, next(iter(output)): new})
    return type(output)([new, *output[1:]])


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_are_those_of_hidden_states(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    if model_type in NO_LAYERS:
        with pytest.raises(ValueError, match=NO_LAYERS[model_type]):
            find_layers(model)
        note(model_type, "layers", "refused")
        return
    found = find_layers(model)
    with record_activations(model) as activations, torch.no_grad():
        states = model(torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states
    assert sorted(activations) == [layer for layer in range(found.count) if (model_type, layer) not in NEVER_RUN]
    if any(never == model_type for never, _ in NEVER_RUN):
        note(model_type, "layers", "some with images only")
        return
    runs = len(activations[0])  # a few models run through their blocks more than once
    outputs = [activations[layer][run] for run in range(runs) for layer in range(found.count)]
    # The last hidden state comes after the final norm; some models leave out the embeddings.
    matches = [
        all(output.shape == state.shape and torch.equal(output, state) for output, state in zip(outputs, shifted))
        for shifted in (states[1:-1], states[:-1])
        if len(shifted) >= len(outputs) - 1
    ]
    note(model_type, "layers", "as hidden_states" if any(matches) else HIDDEN_STATES_DIFFER[model_type])
    with pytest.raises(ValueError, match=f"layer {found.count} does not exist: the model has {found.count} layers"):
        SteeringVector({found.count: torch.ones(32)}).apply(model)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in {*NOT_READ, *NO_TEXT}])
def test_position_embeddings_end_where_it_is_said(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    most = anatomy_of(model).most_tokens
    note(model_type, "most tokens", str(most))

    def run(tokens: int) -> None:
        ids = torch.full((1, tokens), 11)
        with torch.no_grad():
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)

    run(most or 2 * POSITIONS)
    if most is not None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            run(most + 1)


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_LAYERS])
def test_the_output_moves_by_exactly_the_direction(model_type: str, note: Note) -> None:
    model, ids = model_of(model_type), torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    last, hooks = find_layers(model).count - 1, count_hooks(model)
    for layer in {0, last}:
        vector = SteeringVector(directions(model, [layer]))
        with record_activations(model, layers=layer) as plain, torch.no_grad():
            model(ids)
        with vector.apply(model), record_activations(model, layers=layer) as steered, torch.no_grad():
            model(ids)
        assert torch.equal(steered[layer][0], plain[layer][0] + vector.layer_activations[layer])
    assert count_hooks(model) == hooks
    shape = tuple(plain[last][0].shape)
    note(model_type, "adds", "yes" if shape == (2, 5, 32) else f"yes, {shape}")


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_TEXT | NO_LAYERS.keys()])
def test_cached_generation_is_a_loop_steered_by_hand(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    found = find_layers(model)
    vector = SteeringVector(directions(model, [0, found.count - 1]))
    if model_type in NO_SELECTION:
        inputs = batch(PROMPTS[:1])
        with (
            pytest.raises(ValueError, match=NO_SELECTION[model_type]),
            vector.apply(model, tokens=generated(inputs)),
        ):
            answer_logits(model, inputs)
        note(model_type, "generates", "refused by token")
        return
    batches = [PROMPTS] if takes_padding(model) else [[prompt] for prompt in PROMPTS]
    faithful = model_type not in CACHED_DIFFERS and all(
        close(answer_logits(model, batch([prompt]))[0], loop(model, prompt)) for prompt in PROMPTS
    )
    for prompts in batches:
        inputs = batch(prompts)
        with vector.apply(model, tokens=generated(inputs)):
            logits = answer_logits(model, inputs)
        with by_hand(model, vector, model_type, first_column=inputs["input_ids"].shape[1] - 1, cached=True):
            assert close(logits, answer_logits(model, inputs))
        assert not close(logits, answer_logits(model, inputs))
        if faithful:
            for row, prompt in enumerate(prompts):
                with by_hand(model, vector, model_type, first_column=len(prompt) - 1, cached=False):
                    expected = loop(model, prompt)
                assert close(logits[row], expected)
    rows = "a padded batch" if len(batches) == 1 else "single rows"
    note(model_type, "generates", rows if faithful else f"{rows}, cached")


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_TEXT | NO_LAYERS.keys()])
def test_a_loop_by_hand_steers_the_tokens_beyond_the_prompt(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    vector = SteeringVector(directions(model, [0]))
    text = [11, 12, 13, 14, 15, 16, 17]
    if model_type in NO_SELECTION | dict.fromkeys(CACHED_DIFFERS | STREAMS_FIRST | {"deepseek_v32"}):
        pytest.skip("its tokens or its cache are odd, or rounding decides which tokens it attends to")
    with by_hand(model, vector, model_type, first_column=5, cached=False), torch.no_grad():
        expected = model(torch.tensor([text]), use_cache=False).logits[0]
    checked = []
    for cuts in ([7], [3, 1, 1, 1, 1], [1] * 7, [3, 2, 2]):
        plain = by_pieces(model, text, cuts)
        with torch.no_grad():
            whole = model(torch.tensor([text]), use_cache=False).logits[0]
        if plain is None or not close(plain, whole):
            continue  # the model itself takes no such pieces, whoever steers it
        with vector.apply(model, tokens=from_index(5)):
            steered = by_pieces(model, text, cuts)
        assert steered is not None
        assert close(steered, expected), cuts
        checked.append(str(len(cuts)))
    note(model_type, "loops", f"in {', '.join(checked)}" if checked else "by generate only")


def by_pieces(model: Any, text: list[int], cuts: list[int]) -> Tensor | None:
    """The logits of a text that runs piece by piece over the model's own cache; None if the model can't."""
    parameters = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "cache_params", "state", "past_key_values") if name in parameters), None)
    logits, cache, start = [], None, 0
    for length in cuts:
        given = {} if cache is None else {name: cache}
        try:
            with torch.no_grad():
                out = model(torch.tensor([text[start : start + length]]), use_cache=True, **given)
        except ValueError as error:
            if "can't determine the token positions" in str(error):
                raise
            return None
        except (RuntimeError, TypeError, IndexError, AttributeError):
            return None
        cache, start = None if name is None else out.get(name), start + length
        if cache is None and start < len(text):
            return None
        logits.append(out.logits[0])
    return torch.cat(logits)


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "heads", "neurons")


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_LAYERS])
def test_parts_stand_inside_their_own_block_and_run(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    blocks = find_layers(model)
    found: dict[str, int] = {}
    for part in PARTS:
        try:
            parts = find_layers(model, part)
        except ValueError as error:
            assert f"no {part} found in the blocks" in str(error) or model_type in PARTS_BESIDE_BLOCKS
            continue
        assert parts.count == blocks.count
        with record_activations(model, part) as activations, torch.no_grad():
            model(torch.tensor([PROMPTS[1]]))
        for number, name in parts.names.items():
            assert model_type in PARTS_BESIDE_BLOCKS or name.startswith(f"{blocks.names[number]}.")
            if (model_type, number) not in NEVER_RUN:
                assert activations[number][0].shape[-1] > 0
        absent = sorted(set(range(blocks.count)) - set(parts.names))
        if absent:
            with pytest.raises(ValueError, match=f"block {absent[0]} of .* has no {part}; blocks that have one"):
                SteeringVector({absent[0]: torch.ones(32)}, part).apply(model)
        found[part] = len(parts.names)
    cells = (f"{found[part]}" if part in found else "-" for part in PARTS)
    note(model_type, "parts", f"{' '.join(cells)} of {blocks.count}")


# Parts that end in something else than the projection: the stream is added, a norm follows, or a gate.
MORE_FOLLOWS = {
    "bloom": {"heads", "neurons"},
    "cpmant": {"heads", "neurons"},
    "mpt": {"neurons"},
    "prophetnet": {"heads"},
    "rwkv": {"neurons"},
    "xlm-prophetnet": {"heads"},
    "xlnet": {"neurons"},
    **dict.fromkeys((*BERT_LIKE, "git"), {"heads"}),
}


@pytest.mark.parametrize("layer_type", ["heads", "neurons"])
@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_LAYERS])
def test_heads_and_neurons_are_what_the_projection_at_the_end_of_a_part_gets(
    model_type: str, layer_type: Any, note: Note
) -> None:
    model, ids = model_of(model_type), torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    try:
        found = find_layers(model, layer_type)
    except ValueError as error:
        assert f"no {layer_type} found in the blocks" in str(error)
        note(model_type, layer_type, "-")
        return
    number = next(n for n in found.names if (model_type, n) not in NEVER_RUN)
    projection = model.get_submodule(found.names[number])
    part = find_layers(model, "self_attn" if layer_type == "heads" else "mlp").modules[number]
    seen: dict[str, Any] = {}
    handles = [
        projection.register_forward_hook(lambda _m, args, output: seen.update(given=args[0], made=activation(output))),
        part.register_forward_hook(lambda _m, _a, output: seen.update(part=activation(output))),
    ]
    with record_activations(model, layer_type, layers=number) as plain, torch.no_grad():
        expected_outside = model(ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(plain[number][-1], seen["given"])
    is_last = seen["part"].numel() == seen["made"].numel() and torch.allclose(
        seen["part"].flatten(), seen["made"].flatten(), atol=1e-5
    )
    assert is_last or layer_type in MORE_FOLLOWS.get(model_type, ())
    direction = torch.randn(seen["given"].shape[-1], generator=torch.Generator().manual_seed(2))
    hook = projection.register_forward_pre_hook(lambda _m, args: (args[0] + direction, *args[1:]))
    with torch.no_grad():
        expected = model(ids).logits
    hook.remove()
    vector = SteeringVector({number: direction}, layer_type)
    with vector.apply(model), record_activations(model, layer_type, layers=number) as steered, torch.no_grad():
        got = model(ids).logits
    assert torch.equal(got, expected)
    if len(plain[number]) == 1:  # some models run through their blocks more than once
        assert torch.equal(steered[number][0], plain[number][0] + direction)
    assert not torch.equal(got, expected_outside)
    note(model_type, layer_type, f"{len(found.names)} of {found.count}{'' if is_last else ', more follows'}")


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_LAYERS])
def test_rows_are_read_as_of_each_prompt_alone(model_type: str, note: Note) -> None:
    note(model_type, "reads", check_reading(model_of(model_type), NOT_READ.get(model_type)))


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_LAYERS])
def test_a_direction_is_ablated_everywhere(model_type: str, note: Note) -> None:
    model = model_of(model_type)
    blocks = [model.get_submodule(name) for name in find_layers(model).names.values()]
    (direction,) = directions(model, [0]).values()
    unit, hooks = direction / direction.norm(), count_hooks(model)
    with ablate_everywhere(model, direction), record_activations(model) as outputs, torch.no_grad():
        model(torch.tensor([PROMPTS[1]]))
    runs = [output for of_layer in outputs.values() for output in of_layer]
    largest = max(float((output @ unit).abs().max() / output.norm(dim=-1).max()) for output in runs)
    assert largest < 1e-5
    assert count_hooks(model) == hooks
    parts = written_parts(model, blocks)
    told = sum(block not in part for part, block in zip(parts, blocks, strict=True))
    note(model_type, "ablates", "each part" if told == len(blocks) else f"parts of {told} of {len(blocks)}")


def batch(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def answer_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1)


def loop(model: Any, prompt: list[int]) -> Tensor:
    ids, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return torch.stack(logits)


def takes_padding(model: Any) -> bool:
    """Whether the model, unsteered, gives for a padded row what it gives for the prompt alone."""
    try:
        together = answer_logits(model, batch(PROMPTS))
    except (RuntimeError, ValueError):
        return False
    return all(close(together[n], loop(model, prompt)) for n, prompt in enumerate(PROMPTS))


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, atol=2e-4, rtol=1e-3)


class by_hand:  # noqa: N801
    """Adds the directions by plain hooks: in a cached run to all columns but the prompt's first ones, which come in the
    first pass; in an uncached one to the same columns of each pass.
    """

    def __init__(self, model: Any, vector: SteeringVector, model_type: str, *, first_column: int, cached: bool) -> None:
        self.model, self.vector, self.first, self.cached = model, vector, first_column, cached
        self.axis = 2 if model_type in STREAMS_FIRST else 1

    def __enter__(self) -> None:
        names = find_layers(self.model).names
        self.handles = [
            self.model.get_submodule(names[layer]).register_forward_hook(self.hook(direction))
            for layer, direction in self.vector.layer_activations.items()
        ]

    def __exit__(self, *_error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def hook(self, direction: Tensor) -> Callable[..., Any]:
        passes = 0

        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal passes
            new = activation(output).clone()
            first = self.first if not self.cached or new.shape[self.axis] > 1 or passes == 0 else 0
            passes += 1
            new.narrow(self.axis, first, new.shape[self.axis] - first).add_(direction)
            return with_first(output, new)

        return steer
