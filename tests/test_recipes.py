"""The recipes of the documentation's pages, each against plain forward hooks and tensors, without the library."""

import ast
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from steering_vectors import (
    SteeringVector,
    addition_operator,
    after,
    at,
    clamp_operator,
    completion,
    from_index,
    generated,
    logistic_aggregator,
    norm_preserving_operator,
    pca_aggregator,
    projection_quantiles,
    read_activations,
    record_activations,
    steer,
    train_steering_vector,
)
from tests import families, tiny

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
STEPS = 5
PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]
PROMPT = torch.tensor([PROMPTS[1]])
PAIRS = [("I love it.", "I hate it!"), ("Good", "Bad."), ("yes", "no"), ("So it went well", "So it went")]
SETS: dict[str, Any] = {"positive": ["some text", "a b", "more text than that"], "negative": ["longer than it", "no"]}


def from_page(page: str, **given: Any) -> dict[str, Any]:
    """The functions and classes that a page defines. They find the names that are ``given`` in place of the page's."""
    names: dict[str, Any] = {}
    block: list[str] = []
    in_code = False
    for line in [*(HOWTO / page).read_text(encoding="utf-8").splitlines(), "end"]:
        if in_code and line and not line.startswith(" "):
            parsed = ast.parse(textwrap.dedent("\n".join(block)))
            parsed.body = [node for node in parsed.body if is_definition(node)]
            exec(compile(parsed, page, "exec"), names)
            block, in_code = [], False
        if in_code:
            block.append(line)
        in_code |= line == ".. code-block:: python"
    names.update(given)
    return names


def is_definition(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "steering_vectors"
    return isinstance(node, (ast.Import, ast.FunctionDef, ast.ClassDef))


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny.shared(request.param)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer(chat_template=tiny.CHATML)


@contextmanager
def hooked(modules: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Forward hooks that replace each module's activation."""

    def hook(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
            return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

        return replace

    handles = [module.register_forward_hook(hook(change)) for module, change in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at_layers(model: Any, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Any:
    return hooked({tiny.blocks(model)[layer]: change for layer, change in changes.items()})


def logits(model: Any, ids: Tensor = PROMPT) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def check(steered: Any, by_hand: Any, model: Any, ids: Tensor = PROMPT) -> None:
    """Compare all logits of a pass, and see that they moved."""
    with steered:
        found = logits(model, ids)
    with by_hand:
        expected = logits(model, ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert (expected - logits(model, ids)).abs().max() > 1e-2


def states(model: Any, ids: Sequence[int]) -> list[Tensor]:
    return tiny.hidden_states(model, list(ids))


def last(model: Any, tokenizer: Any, texts: Sequence[str], layer: int) -> Tensor:
    return torch.stack([states(model, tokenizer(text)["input_ids"])[layer][-1] for text in texts])


def unit(direction: Tensor) -> Tensor:
    return direction / direction.norm()


def random_direction(seed: int = 0) -> Tensor:
    return rows_of(tiny.HIDDEN, seed=seed)


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model: Any, inputs: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
    """The answers' ids."""
    output: Tensor = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :]


def loop(model: Any, prompt: Sequence[int], layer: int, moves: Callable[[int], Tensor]) -> list[int]:
    """The answer of a loop without a cache; ``moves`` is what is added at a token of the row, by index."""
    ids = list(prompt)
    for _ in range(STEPS):
        change = torch.stack([moves(n) for n in range(len(ids))])
        with at_layers(model, {layer: lambda h, change=change: h + change}):  # type: ignore[misc]
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_contrastive_activation_addition(model: Any, tokenizer: Any) -> None:
    vector = train_steering_vector(model, tokenizer, PAIRS, layers=range(3))
    sides = [last(model, tokenizer, side, 1) for side in zip(*PAIRS, strict=True)]
    direction = (sides[0] - sides[1]).mean(dim=0)
    torch.testing.assert_close(vector.layer_activations[1], direction, atol=1e-5, rtol=1e-5)
    inputs = padded(PROMPTS)
    with vector[1].apply(model, multiplier=3, tokens=generated(inputs)):
        answers = generate(model, inputs)
    for prompt, answer in zip(PROMPTS, answers.tolist(), strict=True):
        moves = [3 * direction * (n >= len(prompt) - 1) for n in range(len(prompt) + STEPS)]
        assert answer == loop(model, prompt, 1, moves.__getitem__)


def test_activation_addition_of_one_pair(model: Any, tokenizer: Any) -> None:
    at_the_front = from_page("recipes.rst")["at_the_front"]
    ids = [[41, 42, 43, 44], [51, 52, 53, 36]]
    rows = read_activations(model, tokenizer, ids, layers=0, read_token_index=range(4))[0]
    difference = states(model, ids[0])[0] - states(model, ids[1])[0]
    torch.testing.assert_close(rows[0] - rows[1], difference, atol=1e-5, rtol=1e-5)
    inputs = padded(PROMPTS)
    with steer(model, at_the_front(rows[0] - rows[1]), layers=0, tokens=at(range(4)), multiplier=2):
        answers = generate(model, inputs)
    for prompt, answer in zip(PROMPTS, answers.tolist(), strict=True):
        assert answer == loop(model, prompt, 0, lambda n: 2 * difference[n] if n < 4 else torch.zeros(tiny.HIDDEN))


def test_mean_centring(model: Any, tokenizer: Any) -> None:
    vector = train_steering_vector(model, tokenizer, SETS, layers=1, tokens=from_index(1))
    positive, negative = (
        torch.stack([states(model, tokenizer(text)["input_ids"])[1][1:].mean(dim=0) for text in texts]).mean(dim=0)
        for texts in SETS.values()
    )
    torch.testing.assert_close(vector.layer_activations[1], positive - negative, atol=1e-5, rtol=1e-5)


def test_representation_reading(model: Any, tokenizer: Any) -> None:
    vector = train_steering_vector(model, tokenizer, PAIRS, layers=1, aggregator=pca_aggregator())
    positive, negative = (last(model, tokenizer, side, 1).double() for side in zip(*PAIRS, strict=True))
    _, vectors = torch.linalg.eigh((positive - negative).T @ (positive - negative))
    component = vectors[:, -1] * torch.sign(vectors[:, -1] @ (positive - negative).mean(dim=0))
    torch.testing.assert_close(vector.layer_activations[1].double(), component, atol=1e-4, rtol=1e-4)
    rows = read_activations(model, tokenizer, ["So it went"], layers=1)
    score = last(model, tokenizer, ["So it went"], 1).double() @ component
    torch.testing.assert_close(vector.project(rows)[1].double(), score, atol=1e-4, rtol=1e-4)


def test_a_linear_probe_of_sets(model: Any, tokenizer: Any) -> None:
    vector = train_steering_vector(model, tokenizer, SETS, layers=1, aggregator=logistic_aggregator())
    rows = torch.cat([last(model, tokenizer, texts, 1) for texts in SETS.values()]).double()
    probe = LogisticRegression(tol=1e-8, max_iter=1000).fit(rows.numpy(), [1, 1, 1, 0, 0])
    direction = unit(torch.tensor(probe.coef_[0]))
    torch.testing.assert_close(vector.layer_activations[1].double(), direction, atol=1e-3, rtol=1e-3)


def test_in_context_vectors(model: Any, tokenizer: Any) -> None:
    page = from_page("recipes.rst", model=model, tokenizer=tokenizer)
    vector = page["in_context_vector"](*zip(*PAIRS, strict=True))
    layers = range(len(tiny.blocks(model)))
    positive, negative = (
        torch.cat([last(model, tokenizer, side, layer) for layer in layers], dim=1) for side in zip(*PAIRS, strict=True)
    )
    differences = (positive - negative).double()
    component = torch.linalg.svd(differences).Vh[0]
    component = (component * torch.sign(component @ differences.mean(dim=0))).float().reshape(len(layers), -1)
    for layer in layers:
        torch.testing.assert_close(vector.layer_activations[layer], component[layer], atol=1e-4, rtol=1e-4)

    def kept(direction: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h: torch.nn.functional.normalize(h + 3 * direction, dim=-1) * h.norm(dim=-1, keepdim=True)

    steered = vector.apply(model, multiplier=3, operator=norm_preserving_operator(addition_operator()))
    check(steered, at_layers(model, {layer: kept(component[layer]) for layer in layers}), model)


def test_persona_vectors_of_answers(model: Any, tokenizer: Any) -> None:
    def answered(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "How?"}, {"role": "assistant", "content": text}]

    answers = {"positive": ["Oh, a big one!", "So nice"], "negative": ["A large one.", "Good", "It rains"]}
    sets: Any = {side: list(map(answered, texts)) for side, texts in answers.items()}
    vector = train_steering_vector(model, tokenizer, sets, layers=1, tokens=completion())
    before = tokenizer("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n")["input_ids"]

    def mean(text: str) -> Tensor:
        ids = tokenizer(text)["input_ids"]
        return states(model, [*before, *ids])[1][len(before) :].mean(dim=0)

    positive, negative = (torch.stack(list(map(mean, texts))).mean(dim=0) for texts in answers.values())
    torch.testing.assert_close(vector.layer_activations[1], positive - negative, atol=1e-5, rtol=1e-5)


def test_preventative_steering_changes_the_gradients_of_the_weights() -> None:
    model, vector = tiny.build("llama"), SteeringVector({1: random_direction()})
    labels = PROMPT.clone()
    labels[:, :4] = -100
    learned = labels[0, :, None] != -100
    grads = []
    for steering in (
        vector.apply(model, tokens=lambda p: p.arguments["labels"] != -100),
        at_layers(model, {1: lambda h: h + learned * vector.layer_activations[1]}),
    ):
        model.zero_grad()
        with steering:
            model(PROMPT, labels=labels, use_cache=False).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters()})
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_the_search_for_a_refusal_direction(tokenizer: Any) -> None:
    model = tiny.shared("llama")

    def chats(*texts: str) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": text}] for text in texts]

    def ids_of(chat: list[dict[str, str]]) -> list[int]:
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered)["input_ids"])

    page = from_page(
        "recipes.rst", model=model, tokenizer=tokenizer, asked=lambda p: {"input_ids": torch.tensor([ids_of(p[0])])}
    )
    training = {"refused": chats("Do it", "Go on, or else"), "followed": chats("Sit", "Wait here", "So?")}
    held_out = {"refused": chats("Run", "Tell"), "followed": chats("Sing it", "Be")}
    tokens, layers, positions = [70, 80, 90], [0, 2], [-1, -3]
    found = list(page["refusal_scores"](training, held_out, tokens, layers, positions))
    assert [(score["layer"], score["position"]) for score in found] == [(0, -1), (0, -3), (2, -1), (2, -3)]

    def probabilities(side: str) -> Tensor:
        rows = [logits(model, torch.tensor([ids_of(chat)]))[0, -1] for chat in held_out[side]]
        return torch.stack(rows).double().softmax(dim=-1)

    def log_odds(rows: Tensor) -> float:
        refusing = rows[:, tokens].sum(dim=1)
        return float((refusing / (1 - refusing)).log().mean())

    plain = probabilities("followed")
    for score in found:
        layer, position = score["layer"], score["position"]
        means = {s: torch.stack([states(model, ids_of(c))[layer][position] for c in training[s]]) for s in training}
        direction = means["refused"].mean(dim=0) - means["followed"].mean(dim=0)
        torch.testing.assert_close(score["direction"], direction, atol=1e-5, rtol=1e-5)
        axis = unit(direction)

        def without(h: Tensor, axis: Tensor = axis) -> Tensor:
            return h - (h @ axis)[..., None] * axis

        writers = [part for block in tiny.blocks(model) for part in (block.self_attn, block.mlp)]
        with hooked(dict.fromkeys((model.get_input_embeddings(), *writers), without)):
            bypass, ablated = log_odds(probabilities("refused")), probabilities("followed")
        with at_layers(model, {layer: lambda h, d=direction: h + d}):  # type: ignore[misc]
            induce = log_odds(probabilities("followed"))
        kl = float((plain * (plain / ablated).log()).sum(dim=1).mean())
        assert (score["bypass"], score["induce"], score["kl"]) == pytest.approx((bypass, induce, kl), abs=1e-4)


def test_the_best_direction_is_the_least_bypass_that_is_allowed() -> None:
    best = from_page("recipes.rst")["best"]
    right = {"layer": 5, "bypass": -2.0, "induce": 0.5, "kl": 0.05}
    scores = [
        {**right, "bypass": -1.0},
        right,
        {**right, "bypass": -3.0, "induce": -0.1},
        {**right, "bypass": -3.0, "kl": 0.2},
        {**right, "bypass": -3.0, "layer": 8},
    ]
    assert best(scores, depth=10) is right
    assert best(scores[2:], depth=10) is None


def test_affine_concept_editing(model: Any) -> None:
    direction, reference, alpha = random_direction(), 3 * random_direction(1), 0.7
    operator = from_page("recipes.rst")["affine_edit"](direction, reference, alpha)
    projector = torch.outer(unit(direction), unit(direction))

    def edited(h: Tensor) -> Tensor:
        return h - h @ projector + reference @ projector + alpha * direction

    check(SteeringVector({1: direction}).apply(model, operator=operator), at_layers(model, {1: edited}), model)


def test_activation_capping(model: Any, tokenizer: Any) -> None:
    vector = SteeringVector({layer: random_direction(layer) for layer in (0, 2)})
    texts = ["some text", "more text than that"]
    [low] = projection_quantiles(model, tokenizer, texts, vector, [0.7])
    changes: dict[int, Callable[[Tensor], Tensor]] = {}
    for layer, direction in vector.layer_activations.items():
        axis = unit(direction)
        rows = torch.cat([states(model, tokenizer(text)["input_ids"])[layer] for text in texts])
        bound = float(np.quantile((rows @ axis).double().numpy(), 0.7))
        assert low[layer] == pytest.approx(bound, abs=1e-4)

        def capped(h: Tensor, axis: Tensor = axis, bound: float = bound) -> Tensor:
            return h - ((h @ axis) - bound).clamp(max=0)[..., None] * axis

        changes[layer] = capped
    check(vector.apply(model, operator=clamp_operator(min=low)), at_layers(model, changes), model)


@pytest.mark.parametrize("adaptive", [False, True])
def test_angular_steering(adaptive: bool) -> None:
    model, page = tiny.shared("llama"), from_page("recipes.rst")
    candidates = torch.stack([random_direction(n) for n in range(4)])
    plane = page["steering_plane"](candidates[0], candidates)
    centred = (candidates - candidates.mean(dim=0)).double()
    component = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1].float()
    first = unit(candidates[0])
    second = unit(component - (component @ first) * first)
    torch.testing.assert_close(plane[0], first)
    torch.testing.assert_close(plane[1] * torch.sign(plane[1] @ second), second, atol=1e-4, rtol=1e-4)

    def turned(h: Tensor) -> Tensor:
        rows = []
        for row in h.reshape(-1, h.shape[-1]):
            x, y = float(row @ plane[0]), float(row @ plane[1])
            angle = math.radians(40) if x > 0 or not adaptive else math.atan2(y, x)
            rest, radius = row - x * plane[0] - y * plane[1], math.hypot(x, y)
            rows.append(rest + radius * (math.cos(angle) * plane[0] + math.sin(angle) * plane[1]))
        return torch.stack(rows).reshape(h.shape)

    operator = page["to_angle"](plane, math.radians(40), adaptive=adaptive)
    norms = [m for block in tiny.blocks(model) for m in (block.input_layernorm, block.post_attention_layernorm)]
    with (
        steer(model, operator, layer_type="input_layernorm"),
        steer(model, operator, layer_type="post_attention_layernorm"),
    ):
        found = logits(model)
    with hooked(dict.fromkeys(norms, turned)):
        torch.testing.assert_close(found, logits(model), atol=2e-4, rtol=1e-3)
    assert (found - logits(model)).abs().max() > 1e-2


def test_spherical_steering(model: Any) -> None:
    direction, operator = random_direction(), from_page("recipes.rst")["towards"](0.3)

    def turned(h: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        shares = [0.3 * math.acos(float(unit(row) @ unit(direction))) for row in rows]
        turns = [families.turned(angle)(row, direction) for angle, row in zip(shares, rows, strict=True)]
        return torch.stack(turns).reshape(h.shape)

    check(SteeringVector({1: direction}).apply(model, operator=operator), at_layers(model, {1: turned}), model)


def test_several_behaviours_at_once(model: Any) -> None:
    one, other = ({layer: random_direction(seed + layer) for layer in (0, 1)} for seed in (0, 5))
    summed = SteeringVector({1: one[1]}) + 0.5 * SteeringVector({1: other[1]})
    check(summed.apply(model), at_layers(model, {1: lambda h: h + one[1] + 0.5 * other[1]}), model)
    with SteeringVector({0: one[0]}).apply(model), SteeringVector({1: other[1]}).apply(model, multiplier=0.5):
        found = logits(model)
    with at_layers(model, {0: lambda h: h + one[0], 1: lambda h: h + 0.5 * other[1]}):
        torch.testing.assert_close(found, logits(model), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_strength_that_fades(model: Any, use_cache: bool) -> None:
    direction, inputs = 3 * random_direction(), padded(PROMPTS)
    falling = from_page("recipes.rst")["falling"]
    vector = SteeringVector({1: direction})
    with vector.apply(model, tokens=generated(inputs, strength=falling)):
        answers = generate(model, inputs, use_cache=use_cache)
    for prompt, answer in zip(PROMPTS, answers.tolist(), strict=True):
        start = len(prompt) - 1

        def moves(n: int, start: int = start) -> Tensor:
            return direction * max(0, 1 - (n - start) / 12) * (n >= start)

        assert answer == loop(model, prompt, 1, moves)


def test_low_rank_edits_and_their_gradients(model: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        edit = from_page("recipes.rst")["LoReFT"](tiny.HIDDEN, rank=4)
    weight, bias = (p.detach().clone().requires_grad_() for p in edit.learned.parameters())
    subspace = edit.rotation.weight.detach().clone()  # (rank, hidden)
    torch.testing.assert_close(subspace @ subspace.T, torch.eye(4), atol=1e-5, rtol=0)

    def edited(h: Tensor) -> Tensor:
        steered = h.clone()
        for n in (0, 1, 6, 7):
            steered[0, n] = h[0, n] + subspace.T @ (weight @ h[0, n] + bias - subspace @ h[0, n])
        return steered

    steered = steer(model, edit, layers=1, tokens=at([0, 1, 6, 7]))
    check(steered, at_layers(model, {1: edited}), model)
    with steered:
        model(PROMPT, use_cache=False).logits.square().mean().backward()
    with at_layers(model, {1: edited}):
        model(PROMPT, use_cache=False).logits.square().mean().backward()
    torch.testing.assert_close(edit.learned.weight.grad, weight.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(edit.learned.bias.grad, bias.grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()


def test_features_by_contrast(model: Any, tokenizer: Any) -> None:
    class Autoencoder:
        W_enc, W_dec = rows_of(32, 60), rows_of(60, 32, seed=1)

        def encode(self, h: Tensor) -> Tensor:
            return torch.relu(h @ self.W_enc)

    sae = Autoencoder()
    page = from_page("sae.rst", model=model, tokenizer=tokenizer)
    rows = {side: torch.cat([states(model, tokenizer(t)["input_ids"])[1][1:] for t in SETS[side]]) for side in SETS}
    found = page["by_contrast"](sae, rows["positive"], rows["negative"], k=3)
    difference = sae.encode(rows["positive"]).mean(dim=0) - sae.encode(rows["negative"]).mean(dim=0)
    chosen = sorted(range(60), key=lambda n: -float(difference[n]))[:3]
    expected = torch.stack([difference[n] * sae.W_dec[n] for n in chosen]).sum(dim=0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    read = read_activations(model, tokenizer, SETS["positive"], layers=1, tokens=from_index(1), pool=False)
    torch.testing.assert_close(torch.cat(read[1]), rows["positive"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_answer_is_steered_and_not_the_thought(model: Any, use_cache: bool) -> None:
    direction, inputs = 3 * random_direction(), padded(PROMPTS[1:2])
    plain = generate(model, inputs)[0].tolist()
    think_end = plain[1]  # said once the second token was decided
    with SteeringVector({1: direction}).apply(model, tokens=generated(inputs) & after(think_end)):
        answer = generate(model, inputs, use_cache=use_cache)[0].tolist()
    ids = list(PROMPTS[1])
    for _ in range(STEPS):
        said = think_end in ids[len(PROMPTS[1]) :]
        begin = len(PROMPTS[1]) + ids[len(PROMPTS[1]) :].index(think_end) if said else len(ids)
        change = (torch.arange(len(ids)) >= begin)[:, None] * direction
        with at_layers(model, {1: lambda h, change=change: h + change}):  # type: ignore[misc]
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert answer == ids[len(PROMPTS[1]) :]


class Conditional:
    """A condition at layer 0 and a behaviour at layer 2, by which some of the prompts are steered, and by hand."""

    def __init__(self, model: Any) -> None:
        self.model, self.condition, self.behaviour = model, random_direction(), 4 * random_direction(1)
        along = [float((states(model, p)[0][1:] @ unit(self.condition)).mean()) for p in PROMPTS]
        lowest, second, _ = sorted(along)
        self.threshold = second - (second - lowest) / 1000  # so that tokens read too many would decide otherwise
        self.met = [one > self.threshold for one in along]
        assert sorted(self.met) == [False, True, True]

    def steered(self, inputs: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
        """Answers that are steered by the selector of the page on conditional steering, in one pass."""
        page = from_page("conditional.rst")
        # The page looks at layer 12.
        page.update(condition=self, threshold=self.threshold)
        with record_activations(self.model, layers=0) as activations:
            met = page["about_animals"](inputs, {12: activations[0]})
            with SteeringVector({2: self.behaviour}).apply(self.model, tokens=generated(inputs) & met):
                return generate(self.model, inputs, **kwargs)

    def project(self, activations: Mapping[int, Tensor]) -> dict[int, Tensor]:
        projected = SteeringVector({0: self.condition}).project({0: activations[12]})[0]
        return {12: projected}

    def by_hand(self, row: int) -> list[int]:
        prompt = PROMPTS[row]
        return loop(self.model, prompt, 2, lambda n: self.met[row] * (n >= len(prompt) - 1) * self.behaviour)


def test_conditional_steering_in_two_steps(model: Any, tokenizer: Any) -> None:
    case, inputs = Conditional(model), padded(PROMPTS)
    rows = read_activations(model, tokenizer, PROMPTS, layers=0, tokens=from_index(1))
    met = SteeringVector({0: case.condition}).project(rows)[0] > case.threshold
    assert met.tolist() == case.met
    with SteeringVector({2: case.behaviour}).apply(model, multiplier=met, tokens=generated(inputs)):
        answers = generate(model, inputs).tolist()
    assert answers == [case.by_hand(row) for row in range(3)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_conditional_steering_in_one_pass(model: Any, use_cache: bool) -> None:
    case = Conditional(model)
    expected = [case.by_hand(row) for row in range(3)]
    assert case.steered(padded(PROMPTS), use_cache=use_cache).tolist() == expected
    assert generate(model, padded(PROMPTS)).tolist() != expected
    for row, prompt in enumerate(PROMPTS):
        if case.met[row]:
            assert case.steered(padded([prompt]), use_cache=use_cache)[0].tolist() == expected[row]
        else:
            with pytest.warns(RuntimeWarning, match="selected none of its tokens"):
                assert case.steered(padded([prompt]), use_cache=use_cache)[0].tolist() == expected[row]


@pytest.mark.parametrize("chunk", [2, 3])
@pytest.mark.skipif(
    tiny.CHUNKS_ARE_ONE_GRAPH or not hasattr(transformers.GenerationConfig(), "prefill_chunk_size"),
    reason="generate has no prefill_chunk_size, or compiles the chunks as one graph",
)
def test_conditional_steering_in_one_pass_of_several_chunks(model: Any, chunk: int) -> None:
    case = Conditional(model)
    answers = case.steered(padded(PROMPTS), prefill_chunk_size=chunk)
    assert answers.tolist() == [case.by_hand(row) for row in range(3)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_conditional_steering_in_one_pass_under_beams(model: Any, use_cache: bool) -> None:
    case, inputs = Conditional(model), padded(PROMPTS)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    found = case.steered(inputs, use_cache=use_cache, **beams)
    starts, met = inputs["input_ids"].shape[1] - 1, torch.tensor(case.met).repeat_interleave(3)

    def moved(h: Tensor) -> Tensor:
        steered = h.clone()
        steered[:, starts:] += met[:, None, None] * case.behaviour
        return steered

    with at_layers(model, {2: moved}):
        expected = generate(model, inputs, use_cache=False, **beams)
    assert torch.equal(found, expected)
    assert not torch.equal(found, generate(model, inputs, **beams))


def test_conditions_by_nearest_neighbours() -> None:
    share_of_neighbours = from_page("recipes.rst")["share_of_neighbours"]
    rows, known = rows_of(4, 8), rows_of(9, 8, seed=1)
    labels = torch.tensor([True, False, True, True, False, False, True, False, True])
    shares = []
    for row in rows:
        similar = [float(row @ one) / float(row.norm() * one.norm()) for one in known]
        nearest = sorted(range(9), key=similar.__getitem__)[-3:]
        shares.append(sum(bool(labels[n]) for n in nearest) / 3)
    assert share_of_neighbours(rows, known, labels, k=3).tolist() == pytest.approx(shares)
