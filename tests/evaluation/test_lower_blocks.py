"""The blocks below a steered layer run once, for all multipliers and layers; other threads' passes run them."""

import threading
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector, generated
from steering_vectors.evaluation import scoring
from steering_vectors.evaluation.lower_blocks import LowerBlocks
from steering_vectors.evaluation.manner import Manner, Steering
from steering_vectors.evaluation.scoring import Row, Scorer
from tests import tiny
from tests.evaluation.test_scoring import CONTINUATIONS, PROMPTS
from tests.together import run_together

DEPTH = 4
ROWS = [Row(number, multiplier) for number in range(len(CONTINUATIONS)) for multiplier in (-1.0, 2.0)]


def deep(architecture: str = "llama") -> Any:
    name = {"gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    return tiny.build(architecture, **{name: DEPTH})


def at(model: Any, layer: int, layer_type: Any = "decoder_block") -> Steering:
    direction = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(layer))
    return Steering(model, SteeringVector({layer: direction}, layer_type), Manner(generated))


def expected(model: Any, steering: Steering) -> list[torch.Tensor]:
    """The scores of each row in a pass of its own."""
    with torch.no_grad():
        passes = dict(scoring._one_by_one(model, Scorer(model).batch(CONTINUATIONS), ROWS, steering))
    answers = [torch.tensor(CONTINUATIONS[row.number].answer)[:, None] for row in ROWS]
    return [passes[n].log_softmax(dim=-1).gather(-1, answer)[:, 0] for n, answer in enumerate(answers)]


def count_runs(model: Any, counts: Counter[int]) -> ExitStack:
    """Count the calls of what stands in each block: a block that is replaced doesn't call it."""
    stack = ExitStack()
    for number, block in enumerate(tiny.blocks(model)):
        stack.callback(block.mlp.register_forward_hook(lambda *_, number=number: counts.update([number])).remove)
    return stack


@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_scores_are_those_of_passes_alone_whatever_layers_came_before(architecture: str, layer_type: str) -> None:
    model = deep(architecture)
    scorer = Scorer(model)
    batch = scorer.batch(CONTINUATIONS)
    for layer in (1, 3, 2, -1, 0):
        steering = at(model, layer, layer_type)
        found = batch.scores(ROWS, steering)
        for answer, right in zip(found, expected(model, steering), strict=True):
            torch.testing.assert_close(answer.tokens, right, atol=1e-5, rtol=1e-5)
    if not (architecture == "gpt2" and tiny.ON_TRANSFORMERS_4):  # its cache is a tuple, which isn't shared
        assert scorer._ways[0] is scoring._above_known_blocks


def test_lower_blocks_run_once_for_all_layers_and_multipliers() -> None:
    model = deep()
    scorer = Scorer(model)
    batch = scorer.batch(CONTINUATIONS)
    for layer in range(DEPTH):
        batch.scores(ROWS, at(model, layer))  # each layer's way is compared with a pass alone the first time
    again = scorer.batch(CONTINUATIONS)
    counts: Counter[int] = Counter()
    with count_runs(model, counts):
        for layer in range(DEPTH):
            for multiplier in (1.0, 2.0):
                again.scores([Row(number, multiplier) for number in range(len(CONTINUATIONS))], at(model, layer))
    # Each block once for the prompts' cache and once for the answers; then those above the steered layer, twice each.
    assert [counts[block] for block in range(DEPTH)] == [2 + 2 * block for block in range(DEPTH)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_done_to_a_block_already_is_done_once(dtype: torch.dtype) -> None:
    """A steering of the same block around it, whose effect on an output that is kept would be doubled."""
    model = deep().to(dtype)
    steering, around = at(model, 1), at(model, 2).vector
    with SteeringVector({1: 0.5 * around.layer_activations[2]}).apply(model, tokens=slice(1, None)):
        assert LowerBlocks(model).below(at(model, 3).vector) == 1
        found = Scorer(model).batch(CONTINUATIONS).scores(ROWS, steering)
        for answer, right in zip(found, expected(model, steering), strict=True):
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(answer.tokens, right.float(), atol=tolerance, rtol=1e-5)


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = deep()
    tiny.blocks(model)[0].forward = forward = tiny.blocks(model)[0].forward
    lower = LowerBlocks(model)
    state = lower.output(2, lambda: model(torch.tensor([PROMPTS[0]])))
    with pytest.raises(ZeroDivisionError), lower.returning(2, state):
        raise ZeroDivisionError
    assert tiny.blocks(model)[0].forward is forward
    assert all("forward" not in block.__dict__ for block in list(tiny.blocks(model))[1:])
    assert not any(block._forward_hooks for block in tiny.blocks(model))


def test_passes_of_other_threads_run_all_blocks() -> None:
    model = deep()
    ids = torch.tensor([PROMPTS[1]])
    lower = LowerBlocks(model)
    with torch.no_grad():
        plain = model(ids).logits
        state = lower.output(2, lambda: model(ids)) + 1
        found: list[torch.Tensor] = []
        with lower.returning(2, state):
            thread = threading.Thread(target=torch.no_grad()(lambda: found.append(model(ids).logits)))
            thread.start()
            thread.join()
            assert not torch.allclose(model(ids).logits, plain)
        assert torch.equal(found[0], plain)


def test_a_model_whose_blocks_depend_on_more_than_their_input_is_scored_otherwise() -> None:
    """Each block here adds what the first one left on the side, which a block that doesn't run can't leave."""
    model = deep()
    first, *others = tiny.blocks(model)
    side: list[Any] = [0.0]
    first.mlp.register_forward_hook(lambda _module, _args, output: side.__setitem__(0, output.mean(-1, keepdim=True)))
    for block in others:
        block.mlp.register_forward_hook(lambda _module, _args, output: output + 10 * side[0])
    scorer = Scorer(model)
    steering = at(model, 1)
    found = scorer.batch(CONTINUATIONS).scores(ROWS, steering)
    for answer, right in zip(found, expected(model, steering), strict=True):
        torch.testing.assert_close(answer.tokens, right, atol=1e-5, rtol=1e-5)
    assert scorer._ways[0] is scoring._after_shared_cache


def test_evaluations_in_threads_take_turns() -> None:
    """Of one model, which is left as it was; a pass of another thread meanwhile isn't steered."""
    model = deep()
    model.train()
    steerings = [at(model, layer) for layer in range(DEPTH)]
    alone = [Scorer(model).batch(CONTINUATIONS).scores(ROWS, steering) for steering in steerings]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = model(ids).logits
    found: dict[int, list[Any]] = {}
    passes: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda n=n: found.update({n: scores(n)})) for n in range(DEPTH)]
    threads.append(
        threading.Thread(target=torch.no_grad()(lambda: passes.extend(model(ids).logits for _ in range(30))))
    )

    def scores(number: int) -> list[Any]:
        return [Scorer(model).batch(CONTINUATIONS).scores(ROWS, steerings[number]) for _ in range(3)]

    run_together(threads)
    for number, expected_scores in enumerate(alone):
        for again in found[number]:
            for one, other in zip(again, expected_scores, strict=True):
                torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
    assert len(passes) == 30
    assert all(torch.allclose(one, plain, atol=1e-5) for one in passes)
    assert all("forward" not in block.__dict__ for block in tiny.blocks(model))
    assert all(module.training for module in model.modules())


def test_a_compiled_model_is_scored() -> None:
    model = tiny.build("llama")
    steering = at(model, 1)
    right = Scorer(model).batch(CONTINUATIONS).scores(ROWS[:4], steering)
    compiled = torch.compile(model, backend="eager")
    found = Scorer(compiled).batch(CONTINUATIONS).scores(ROWS[:4], Steering(compiled, steering.vector, steering.how))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", ["model", "block"])
def test_compiled_models_run_whole(compiled: str) -> None:
    model = deep()
    if compiled == "model":
        model = torch.compile(model, backend="eager")
    else:
        tiny.blocks(model)[1].compile(backend="eager")
    assert LowerBlocks(model).below(at(model, 2).vector) == 0
