"""Models compiled by torch.compile, as a whole or in parts, before a hook is attached and after.

Code that was compiled before a hook was attached doesn't look for it again. So expectations come from a bare twin.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationMixin

from steering_vectors import (
    SteeringVector,
    TokenPositions,
    active_patches,
    after,
    clamp_operator,
    from_index,
    generated,
    projection_quantiles,
    select,
    steer,
    train_steering_vector,
)
from steering_vectors.layer_matching import find_layers
from tests import families, tiny
from tests.wrapped.promises import (
    INPUTS,
    LAYER,
    SAMPLES,
    SELECTIONS,
    answer,
    answer_by_hand,
    assert_close,
    assert_moved,
    assert_vectors_close,
    recorded,
    some_vector,
    steered_by_hand,
    unchanged,
    vector_by_hand,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, when its compiler is imported

# Also "generated(inputs)" under another selection than the one that was compiled: a callable's own.
Way = Callable[[Any], Any]


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def whole_in_one_graph(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def forward_method(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def decoder_in_place(model: Any) -> Any:
    model.model.compile(backend="eager")
    return model


def each_block_in_place(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def each_block_wrapped(model: Any) -> Any:
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    return model


# Selections that go by more than positions.
BY_MORE_THAN_POSITIONS: dict[str, Any] = {
    "after": after([12, 13]) | after(22, until=26),
    "strength": generated(INPUTS, strength=lambda step: 0.5**step),
    "combined": ~generated(INPUTS) & select([0, 2]) | 0.5 * from_index(3),
    "arguments": lambda p: (p.arguments["input_ids"][:, -1:] % 2 == 0) & (p.index >= 2),
}
LEARNED = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1, 0, 0]])
COMPILES_EACH_BLOCK = torch.__version__ < (2, 8)  # the versions before compare the changes by identity
OPERATORS = [case.make() for case in families.OPERATORS.values()]
AS_A_WHOLE: list[Way] = [whole, in_place, forward_method, decoder_in_place]
BY_BLOCKS: list[Way] = [each_block_in_place, each_block_wrapped]
EACH_WAY = AS_A_WHOLE + BY_BLOCKS


def named(way: Way) -> str:
    return way.__name__


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Models of a class share their code: after eight compilations it would run uncompiled, whatever we do."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def bare() -> Any:
    return tiny.shared("llama")


def blocks_of(model: Any) -> nn.ModuleList:
    return getattr(model, "_orig_mod", model).model.layers


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS, use_cache=False).logits


def logits_by_hand(first_column: int) -> Tensor:
    with steered_by_hand(tiny.blocks(bare()), some_vector(), first_column):
        return logits(bare())


class Backend:
    """A backend of torch.compile's that counts how often what it compiled ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, _inputs: Any, **_options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run

    def __deepcopy__(self, _memo: Any) -> "Backend":
        return self  # generate copies its configuration

    def runs_of(self, function: Callable[..., Any], *args: Any) -> int:
        before = self.runs
        function(*args)
        return self.runs - before


class TestLayers:
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_are_found(self, way: Way) -> None:
        model = way(tiny.build("llama"))
        names = find_layers(model).names
        assert [model.get_submodule(names[n]) for n in range(tiny.LAYERS)] == list(blocks_of(model))

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_have_their_parts(self, way: Way, layer_type: Any) -> None:
        model = way(tiny.build("llama"))
        found = [model.get_submodule(name) for name in find_layers(model, layer_type).names.values()]
        assert found == [block.get_submodule(layer_type) for block in map(uncompiled, blocks_of(model))]


def uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner


class TestTraining:
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_gives_the_bare_models_vector_before_compilation_and_after(self, way: Way) -> None:
        expected = vector_by_hand(bare(), tiny.blocks(bare()))
        model = way(tiny.build("llama"))
        for _ in ("before", "after"):
            with unchanged(model):
                vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=3)
            assert_vectors_close(vector, expected)
            logits(model)


class TestRecording:
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_sees_the_passes_of_a_compiled_model(self, way: Way) -> None:
        expected = recorded(bare(), bare())
        model = way(tiny.build("llama"))
        logits(model)
        with unchanged(model):
            found = recorded(model, model)
        assert found.keys() == expected.keys()
        for layer, activation in expected.items():
            assert_close(found[layer], activation)


class TestSteering:
    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_of_passes_is_as_by_hand_before_compilation_and_after(self, way: Way, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        plain, expected = logits(bare()), logits_by_hand(first_column)
        model = way(tiny.build("llama"))
        with unchanged(model):
            for _ in ("before", "after"):
                with some_vector().apply(model, tokens=tokens):
                    assert_close(logits(model), expected)
                    assert_close(logits(model), expected)
                assert_close(logits(model), plain)

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_moves_the_activations_by_exactly_the_direction(self, way: Way, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        model = way(tiny.build("llama"))
        logits(model)
        before = recorded(model, model)
        with some_vector().apply(model, tokens=tokens):
            after = recorded(model, model)
        assert_moved(before, after, some_vector(), first_column)

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("way", [whole, in_place, each_block_wrapped], ids=named)
    def test_of_generation_is_as_by_hand(self, way: Way, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        with steered_by_hand(tiny.blocks(bare()), some_vector(), first_column):
            expected = answer_by_hand(bare())
        model = way(tiny.build("llama"))
        plain = answer(model)
        for use_cache in (True, False):
            with some_vector().apply(model, tokens=tokens):
                assert_close(answer(model, use_cache=use_cache), expected)
        assert_close(answer(model), plain)

    @pytest.mark.parametrize("tokens", BY_MORE_THAN_POSITIONS.values(), ids=BY_MORE_THAN_POSITIONS)
    def test_by_ids_steps_and_arguments_is_that_of_plain_code(self, tokens: Any) -> None:
        model, plain = whole(tiny.build("llama")), answer(bare())
        answer(model)
        with some_vector().apply(bare(), tokens=tokens):
            expected = answer(bare())
        assert (expected - plain).abs().max() > 1e-2
        for use_cache in (True, False):
            with some_vector().apply(model, tokens=tokens):
                assert_close(answer(model, use_cache=use_cache), expected)

    @pytest.mark.parametrize("way", [whole, each_block_wrapped], ids=named)
    def test_by_the_labels_of_the_call_is_as_by_hand(self, way: Way) -> None:
        model, labels = way(tiny.build("llama")), INPUTS["input_ids"].masked_fill(LEARNED == 0, -100)
        change = LEARNED[..., None] * some_vector().layer_activations[LAYER]
        handle = tiny.blocks(bare())[LAYER].register_forward_hook(
            lambda _m, _a, out: out + change if isinstance(out, Tensor) else (out[0] + change, *out[1:])
        )
        expected = logits(bare())
        handle.remove()
        with some_vector().apply(model, tokens=lambda p: p.arguments["labels"] != -100), torch.no_grad():
            assert_close(model(**INPUTS, labels=labels, use_cache=False).logits, expected)

    def test_follows_from_one_selection_to_the_next(self) -> None:
        model = whole(tiny.build("llama"))
        for first_column in (0, 2, 5):
            inputs = {"input_ids": torch.arange(10, 26).reshape(2, 8)}
            with steered_by_hand(tiny.blocks(bare()), some_vector(), first_column), torch.no_grad():
                expected = bare()(**inputs).logits
            with some_vector().apply(model, tokens=from_index(first_column)), torch.no_grad():
                assert_close(model(**inputs).logits, expected)

    @pytest.mark.parametrize("multiplier", [1.0, -2.0, 0.0])
    def test_follows_the_multiplier(self, multiplier: float) -> None:
        model = whole(tiny.build("llama"))
        logits(model)
        with some_vector().apply(bare(), multiplier=multiplier):
            expected = logits(bare())
        with some_vector().apply(model), some_vector().apply(model, multiplier=multiplier - 1):
            assert_close(logits(model), expected)

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of the compiler's own looking at tensors
    @pytest.mark.parametrize("way", [whole, each_block_in_place], ids=named)
    def test_lets_gradients_through(self, way: Way) -> None:
        gradients = []
        for model in (bare(), way(tiny.build("llama"))):
            model(**INPUTS)
            direction = some_vector().layer_activations[LAYER].requires_grad_()
            with SteeringVector({LAYER: direction}).apply(model):
                (gradient,) = torch.autograd.grad(model(**INPUTS).logits.logsumexp(dim=-1).sum(), direction)
            gradients.append(gradient)
        assert gradients[0].abs().max() > 0.1
        assert_close(*gradients)


def curling(activation: Tensor, *, layer: int) -> Tensor:
    """An operator without a direction that asks for its layer."""
    return (layer + 1) * activation.roll(1, dims=-1).tanh()


def growing(activation: Tensor, direction: Tensor, *, positions: TokenPositions) -> Tensor:
    """An operator that asks for positions."""
    return direction * positions.index[..., None] / 4


STEERINGS: dict[str, Callable[[Any], Any]] = {
    "steer": lambda model: steer(model, curling, layers=[0, 2], multiplier=[1.5, -2]),
    "steer at tokens": lambda model: steer(model, curling, layers=[0, 2], tokens=from_index(2)),
    "positions": lambda model: some_vector().apply(model, operator=growing),
    "positions and rows": lambda model: some_vector().apply(model, operator=growing, multiplier=[1, 0]),
}


class TestOperatorsThatAskOrNeedNoDirection:
    @pytest.mark.parametrize("steering", STEERINGS)
    @pytest.mark.parametrize("way", EACH_WAY, ids=named)
    def test_compiled_code_is_steered_as_plain_code(self, way: Way, steering: str) -> None:
        apply, model = STEERINGS[steering], way(tiny.build("llama"))
        with apply(bare()):
            expected, expected_answer = logits(bare()), answer(bare())
        with unchanged(model):
            for _ in ("before compilation", "after"):
                with apply(model):
                    assert_close(logits(model), expected)
                    assert_close(answer(model), expected_answer)
                assert_close(logits(model), logits(bare()))

    @pytest.mark.parametrize(("layer_type", "path"), [("heads", "self_attn.o_proj"), ("neurons", "mlp.down_proj")])
    @pytest.mark.parametrize("way", [whole, each_block_in_place, whole_in_one_graph], ids=named)
    def test_inputs_of_projections_are_steered_before_compilation_and_after(
        self, way: Way, layer_type: Any, path: str
    ) -> None:
        generator = torch.Generator().manual_seed(2)
        direction = torch.randn(tiny.HIDDEN if layer_type == "heads" else 48, generator=generator)
        projection, model = tiny.blocks(bare())[1].get_submodule(path), way(tiny.build("llama"))
        plain = logits(bare())
        for tokens, first_column in list(SELECTIONS.values())[: 1 if way is whole_in_one_graph else 2]:
            added = torch.zeros(INPUTS["input_ids"].shape[1], len(direction))
            added[first_column:] = direction
            hook = projection.register_forward_pre_hook(lambda _m, args, added=added: (args[0] + added,))
            expected = logits(bare())
            hook.remove()
            assert not torch.allclose(expected, plain, atol=1e-2)
            for _ in ("before compilation", "after"):
                with unchanged(model), SteeringVector({1: direction}, layer_type).apply(model, tokens=tokens):
                    assert_close(logits(model), expected)
                assert_close(logits(model), plain)

    def test_one_graph_is_steered_and_compiled_once_for_all_multipliers(self) -> None:
        compilations: list[Any] = []
        compiled = torch.compile(tiny.build("llama"), backend=partial(_counted, compilations), fullgraph=True)
        assert_close(logits(compiled), logits(bare()))
        for multiplier in (1.0, 2.0, -3, 0.5, 7.25):
            with steer(bare(), curling, layers=[0, 2], multiplier=multiplier):
                expected = logits(bare())
            with steer(compiled, curling, layers=[0, 2], multiplier=multiplier):
                assert_close(logits(compiled), expected)
        assert len(compilations) == 2 or COMPILES_EACH_BLOCK

    def test_one_graph_is_clamped_at_the_bounds_of_each_layer(self) -> None:
        vector = SteeringVector({n: torch.linspace(-1, 1, tiny.HIDDEN) + n for n in range(tiny.LAYERS)})
        [low] = projection_quantiles(bare(), tiny.tokenizer(), ["some text", "another"], vector, [0.8])
        compiled = whole_in_one_graph(tiny.build("llama"))
        with vector.apply(bare(), operator=clamp_operator(min=low)):
            expected = logits(bare())
        with vector.apply(compiled, operator=clamp_operator(min=low)):
            assert_close(logits(compiled), expected)

    def test_one_graph_has_no_positions_and_the_error_says_so(self) -> None:
        model = whole_in_one_graph(tiny.build("llama"))
        with some_vector().apply(model, operator=growing), pytest.raises(Exception, match="steer all tokens"):
            logits(model)
        assert_close(logits(model), logits(bare()))


class TestGenerationThatTransformersCompiles:
    """With a static cache it compiles the decoding passes by itself: on GPUs always, on CPUs when asked to."""

    @pytest.mark.parametrize("tokens", [None, generated(INPUTS), generated()], ids=["all", "with inputs", "bare"])
    def test_is_steered_in_every_step(self, tokens: Any) -> None:
        first_column = 0 if tokens is None else 7
        with steered_by_hand(tiny.blocks(bare()), some_vector(), first_column):
            expected = answer_by_hand(bare())
        model, backend = tiny.build("llama"), Backend()
        settings = {"cache_implementation": "static", "compile_config": on_cpus(backend)}
        plain = answer(model, **settings)
        assert backend.runs
        for _ in range(2):
            with some_vector().apply(model, tokens=tokens):
                assert_close(answer(model, **settings), expected)
            assert_close(answer(model, **settings), plain)


def on_cpus(backend: Backend) -> Any:
    if not hasattr(GenerationMixin, "_valid_auto_compile_criteria"):
        pytest.skip("this transformers compiles on GPUs only")
    config = transformers.CompileConfig(backend=backend, fullgraph=False)
    config._compile_all_devices = True
    return config


class TestOneGraph:
    """``fullgraph=True``: nothing of a pass may run outside the compiled code."""

    @pytest.mark.parametrize("operator", [None, *OPERATORS], ids=repr)
    def test_all_tokens_are_steered_as_by_plain_code_without_compiling_for_each_multiplier(self, operator: Any) -> None:
        compilations: list[Any] = []
        backend = partial(_counted, compilations)
        compiled = torch.compile(tiny.build("llama"), backend=backend, fullgraph=True)
        assert_close(logits(compiled), logits(bare()))
        for multiplier in (1.0, 2.0, -3, 0.5, 7.25):
            with some_vector().apply(bare(), operator=operator, multiplier=multiplier):
                expected = logits(bare())
            with some_vector().apply(compiled, operator=operator, multiplier=multiplier):
                assert_close(logits(compiled), expected)
            assert_close(logits(compiled), logits(bare()))
        assert len(compilations) == 2 or COMPILES_EACH_BLOCK

    @pytest.mark.parametrize("operator", [None, *OPERATORS], ids=repr)
    def test_rows_have_multipliers_of_their_own(self, operator: Any) -> None:
        compiled = whole_in_one_graph(tiny.build("llama"))
        logits(compiled)
        torch._dynamo.utils.counters.clear()
        for multiplier in ([1.0, -2.0], [3.0, 0.5], [0.0, 2.0], [-1.0, 0.0]):
            with some_vector().apply(bare(), operator=operator, multiplier=multiplier):
                expected = logits(bare())
            with some_vector().apply(compiled, operator=operator, multiplier=multiplier):
                assert_close(logits(compiled), expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 2 or COMPILES_EACH_BLOCK  # with a row left as it is, and without

    def test_code_of_other_classes_is_left_alone(self) -> None:
        compilations: list[Any] = []
        other = torch.compile(tiny.build("gpt2"), backend=partial(_counted, compilations), fullgraph=True)
        logits(other)
        before = len(compilations)
        model = whole_in_one_graph(tiny.build("llama"))
        with some_vector().apply(model):
            logits(model)
        logits(other)
        assert len(compilations) == before

    def test_two_steerings_and_another_direction_are_followed(self) -> None:
        compiled = whole_in_one_graph(tiny.build("llama"))
        other = SteeringVector({0: torch.linspace(-3, 3, tiny.HIDDEN), LAYER: torch.linspace(2, 1, tiny.HIDDEN)})
        for vectors in ([some_vector()], [other], [some_vector(), other], [other, some_vector()]):
            with ExitStack() as stack:
                for model in (bare(), compiled):
                    for vector in vectors:
                        stack.enter_context(vector.apply(model))
                assert_close(logits(compiled), logits(bare()))

    def test_tokens_can_t_be_selected_in_it_and_the_error_says_so(self) -> None:
        model = whole_in_one_graph(tiny.build("llama"))
        logits(model)
        with some_vector().apply(model, tokens=from_index(1)), pytest.raises(Exception, match="steer all tokens"):
            logits(model)
        assert_close(logits(model), logits(bare()))

    def test_training_runs_the_plain_code(self) -> None:
        model = whole_in_one_graph(tiny.build("llama"))
        logits(model)
        expected = vector_by_hand(bare(), tiny.blocks(bare()))
        assert_vectors_close(train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=3), expected)


def _counted(compilations: list[Any], graph: Any, _inputs: Any) -> Callable[..., Any]:
    compilations.append(graph)
    forward: Callable[..., Any] = graph.forward
    return forward


class TestAfterTheBlock:
    """Where compiled code is kept from running while hooks are attached, it runs again afterwards."""

    @pytest.fixture
    def backend(self) -> Backend:
        return Backend()

    @pytest.fixture
    def model(self, backend: Backend) -> Any:
        compiled = torch.compile(tiny.build("llama"), backend=backend)
        logits(compiled)
        return compiled

    @pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
    def test_compiled_code_runs_as_before(self, model: Any, backend: Backend, error: Any) -> None:
        runs = backend.runs_of(logits, model)
        assert runs
        try:
            with some_vector().apply(model):
                logits(model)
                if error is not None:
                    raise error
        except (KeyboardInterrupt, RuntimeError):
            pass
        assert backend.runs_of(logits, model) == runs

    def test_compiled_code_runs_after_handles_are_removed_in_any_order(self, model: Any, backend: Backend) -> None:
        runs = backend.runs_of(logits, model)
        handles = [some_vector().patch(model) for _ in range(3)]
        for handle in handles:
            logits(model)
            handle.remove()
        handles[0].remove()
        assert active_patches(model) == []
        assert backend.runs_of(logits, model) == runs

    def test_a_stance_of_the_users_own_stays(self, model: Any, backend: Backend) -> None:
        runs = backend.runs_of(logits, model)
        with torch.compiler.set_stance("force_eager"):
            with some_vector().apply(model):
                logits(model)
            assert backend.runs_of(logits, model) == 0
        assert backend.runs_of(logits, model) == runs

    def test_a_model_that_is_deleted_while_it_is_patched_stops_no_other_from_running_compiled(
        self, model: Any, backend: Backend
    ) -> None:
        runs = backend.runs_of(logits, model)
        other = tiny.build("llama")
        handle = some_vector().patch(other)
        del other
        gc.collect()
        assert backend.runs_of(logits, model) == runs
        handle.remove()
        assert backend.runs_of(logits, model) == runs
