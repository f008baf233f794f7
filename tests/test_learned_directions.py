"""The losses of the page on learned directions: their values and gradients, against models that are steered by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import takewhile
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import logsigmoid

from steering_vectors import from_index, record_activations, steer
from tests import tiny
from tests.pages.test_docs import code_and_output

PAGE = "howto/learned_directions.rst"
LAYER = 16


@cache
def page() -> dict[str, Any]:
    """The names of the page up to where it learns, on a tiny model in float64."""
    model = tiny.build("llama", num_hidden_layers=LAYER + 2, max_position_embeddings=256).double()
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    namespace: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
        for code in takewhile(lambda code: "def learn(" not in code, (code for code, _ in code_and_output(PAGE))):
            exec(code, namespace)
    return namespace


def direction() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tiny.HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()


@contextmanager
def by_hand(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Add to layer 16's output in a plain forward hook."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        activation = output if isinstance(output, Tensor) else output[0]
        steered = activation + change(activation)
        return steered if isinstance(output, Tensor) else (steered, *output[1:])

    handle = page()["model"].model.layers[LAYER].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def alone(question: str, answer: str) -> tuple[Tensor, int]:
    """The log-likelihood of an answer, and its number of tokens, of one row without padding."""
    model, tokenizer = page()["model"], page()["tokenizer"]
    prompt = f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
    scores = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(dim=-1)
    places = range(len(before), len(ids))
    return torch.stack([scores[place - 1, ids[place]] for place in places]).sum(), len(places)


def bipo(found: Tensor) -> Tensor:
    """The loss of arXiv 2406.00045, in expectation over both signs."""
    losses = []
    for question, good, bad in page()["answers"]:
        with torch.no_grad():
            plain = [alone(question, answer)[0] for answer in (good, bad)]
        for sign in (1, -1):
            with by_hand(lambda h, sign=sign: sign * found):  # type: ignore[misc]
                ratios = [alone(question, answer)[0] - was for answer, was in zip((good, bad), plain)]
            losses.append(-logsigmoid(sign * 0.1 * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()


def reps(found: Tensor) -> Tensor:
    """The two sides' losses of arXiv 2505.20809, with the direction subtracted on the second."""
    losses = []
    for question, good, bad in page()["answers"]:
        for sign, winner, loser in ((1, good, bad), (-1, bad, good)):
            with torch.no_grad():
                weight = max(float(alone(question, loser)[0] - alone(question, winner)[0]), 1.0)
            with by_hand(lambda h, sign=sign: sign * found):  # type: ignore[misc]
                (won, tokens), (lost, others) = alone(question, winner), alone(question, loser)
            losses.append(-logsigmoid(weight / tokens * won - lost / others))
    return torch.stack(losses).mean()


def reft(found: Tensor) -> Tensor:
    """The language-modelling loss and the penalty of arXiv 2501.17148, with texts on both sides."""
    likelihoods, penalties = [], []
    unit = found / found.norm()
    for question, good, bad in page()["answers"]:
        for sign, answer in ((1, good), (-1, bad)):

            def change(activation: Tensor, sign: int = sign) -> Tensor:
                latents = torch.relu(activation[0, 1:] @ unit)
                largest = latents.sort(descending=True).values
                penalties.append(largest[4:].sum())
                return sign * largest[:4].mean() * unit

            with by_hand(change):
                total, tokens = alone(question, answer)
            likelihoods.append(total / tokens)
    return 0.005 * torch.stack(penalties).mean() - torch.stack(likelihoods).mean()


@pytest.mark.parametrize("oracle", [bipo, reps, reft])
def test_losses_and_gradients_are_those_of_a_model_steered_by_hand(oracle: Callable[[Tensor], Tensor]) -> None:
    found, expected = (of(start) for of, start in ((page()[oracle.__name__], direction()), (oracle, direction())))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    start = direction()
    (gradient,) = torch.autograd.grad(page()[oracle.__name__](start), start)
    (by_oracle,) = torch.autograd.grad(oracle(start), start)
    assert float(by_oracle.norm()) > 1e-3
    torch.testing.assert_close(gradient, by_oracle, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["bipo", "reps", "reft"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    # Llama's norms are in float32 in any model, so the step can't be as small as in float64.
    loss, start = page()[name], direction()
    (gradient,) = torch.autograd.grad(loss(start), start)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            step = 1e-3 * torch.randn(tiny.HIDDEN, generator=generator, dtype=torch.float64)
            change = (loss(start + step) - loss(start - step)) / 2
            torch.testing.assert_close(change, gradient @ step, rtol=1e-3, atol=1e-8)


def test_at_zero_bipo_is_log_two_and_points_from_the_bad_answers_to_the_good() -> None:
    start = torch.zeros(tiny.HIDDEN, dtype=torch.float64, requires_grad=True)
    loss = page()["bipo"](start)
    assert float(loss.detach()) == pytest.approx(0.6931471805599453)
    (gradient,) = torch.autograd.grad(loss, start)
    with torch.no_grad():
        assert float(page()["bipo"](-1e-3 * gradient)) < float(loss)


def test_the_strength_is_the_solution_of_the_ridge_regression() -> None:
    names = page()
    rows = {system: names["rows_under"](system, names["good"] + names["bad"]) for system in (*told(), "")}
    change = rows[told()[0]] - rows[told()[1]]
    found, strength = names["imitated"](names["good"] + names["bad"], ridge=2.0)
    torch.testing.assert_close(found, change.mean(dim=0) / change.mean(dim=0).norm())
    targets, inputs = (change @ found).numpy(), rows[""].numpy()
    sklearn = pytest.importorskip("sklearn.linear_model")
    expected = sklearn.Ridge(alpha=2.0).fit(inputs, targets).predict(inputs)
    torch.testing.assert_close(strength(rows[""]), torch.from_numpy(expected).clamp(min=0), rtol=1e-5, atol=1e-6)


def test_each_answer_token_is_changed_by_its_strength() -> None:
    names = page()
    (inputs, _), model = names["batch_of"](names["good"]), names["model"]
    with record_activations(model, layers=LAYER) as plain:
        model(**inputs)
    (activation,) = plain[LAYER]
    steering = steer(model, names["imitate"], layers=LAYER, tokens=from_index(1), multiplier=[1.0, -1.0, 0.5, 0.0])
    with steering, record_activations(model, layers=LAYER) as steered:
        model(**inputs)
    factors = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)[:, None, None]
    expected = factors * names["strength"](activation)[..., None] * names["direction"]
    own = inputs["attention_mask"].bool()
    own[:, 0] = False
    torch.testing.assert_close((steered[LAYER][0] - activation)[own], expected.expand_as(activation)[own])
    assert torch.equal(steered[LAYER][0][:, 0], activation[:, 0])
    assert float(expected.abs().max()) > 1e-3


def told() -> tuple[str, str]:
    return page()["cheerful"], page()["gloomy"]
