"""lm-evaluation-harness scores and generates under steering as a loop by hand does."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lm_eval
import peft
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import make_table
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    ablation_operator,
    active_patches,
    clamp_operator,
    generated,
    rotation_operator,
    steer,
)
from steering_vectors.interop import steer_lm_eval, to_lm_eval
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's
LAYER, MULTIPLIER = 1, 2.0
# Prompts of other lengths, equal ones, answers of one token, and rows that are one text divided at two places.
REQUESTS = [
    ("I feel", " glad"),
    ("I feel", " bad"),
    ("I", " feel bad"),
    ("A long day of", " x"),
    ("You", "?"),
    ("You", "!"),
]
OPERATORS: dict[str, Any] = {
    "addition": None,
    "ablation": ablation_operator(),
    "clamp": clamp_operator(3.0),
    "rotation": rotation_operator(0.5),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("llama", max_position_embeddings=64)


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    return SteeringVector({LAYER: torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(0))})


def harness(model: Any, **keywords: Any) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=3, **keywords)


def scored(lm: Any) -> list[float]:
    instances = [Instance("loglikelihood", {}, request, 0) for request in REQUESTS]
    return [score for score, _ in lm.loglikelihood(instances, disable_tqdm=True)]


def answered(lm: Any, prompts: Any = ("I feel", "A long day of", "You", "We")) -> list[str]:
    options = {"until": ["</s>"], "max_gen_toks": 8, "do_sample": False}
    return lm.generate_until([Instance("generate_until", {}, (p, options), 0) for p in prompts], disable_tqdm=True)


@contextmanager
def by_hand(model: Any, change: Callable[[Tensor], Tensor], first: int = 0) -> Iterator[None]:
    """Change a block's output from a token on: a plain hook, for a single row without a cache."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        changed = torch.cat([stream[:, :first], stream[:, first:] + change(stream[:, first:])], dim=1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.get_submodule(f"model.layers.{LAYER}").register_forward_hook(hook)
    yield
    handle.remove()


def scored_by_hand(
    model: Any, change: Callable[[Tensor], Tensor], *, answers_alone: bool, window: int = 64
) -> list[float]:
    tokenizer, scores = tiny.tokenizer(), []
    for prompt, answer in REQUESTS:
        ids = tokenizer(prompt + answer)["input_ids"][-window - 1 :]
        size = len(tokenizer(answer)["input_ids"])
        first = len(ids) - size - 1 if answers_alone else 0
        with by_hand(model, change, first), torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, -size:]
        scores.append(float(logits.log_softmax(-1)[torch.arange(size), ids[-size:]].sum()))
    return scores


def answered_by_hand(model: Any, change: Callable[[Tensor], Tensor], *, answers_alone: bool) -> list[str]:
    tokenizer, texts = tiny.tokenizer(), []
    for prompt in ("I feel", "A long day of", "You", "We"):
        ids = tokenizer(prompt)["input_ids"]
        size = len(ids)
        with by_hand(model, change, size - 1 if answers_alone else 0), torch.no_grad():
            while len(ids) < size + 8 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(ids[size:], skip_special_tokens=True))
    return texts


def change_of(vector: SteeringVector, operator: Any) -> Callable[[Tensor], Tensor]:
    direction = MULTIPLIER * vector.layer_activations[LAYER]
    return direction.expand_as if operator is None else lambda stream: operator(stream, direction)


@pytest.mark.parametrize("name", OPERATORS)
def test_all_tokens(model: Any, vector: SteeringVector, name: str) -> None:
    # Its cache of logits is wrong, unsteered too, for two requests that divide one text at two places.
    operator, lm = OPERATORS[name], harness(model, logits_cache=False)
    plain = scored(lm)
    assert plain == pytest.approx(scored_by_hand(model, torch.zeros_like, answers_alone=False), abs=1e-4)
    with vector.apply(model, operator=operator, multiplier=MULTIPLIER):
        found, texts = scored(lm), answered(lm)
    change = change_of(vector, operator)
    assert found == pytest.approx(scored_by_hand(model, change, answers_alone=False), abs=1e-4)
    assert texts == answered_by_hand(model, change, answers_alone=False)
    assert max(abs(a - b) for a, b in zip(found, plain)) > 0.05


@pytest.mark.parametrize("name", OPERATORS)
def test_answers_alone(model: Any, vector: SteeringVector, name: str) -> None:
    operator, lm = OPERATORS[name], harness(model)
    with vector.apply(model, operator=operator, multiplier=MULTIPLIER):
        of_all = scored(lm)
    with steer_lm_eval(lm, lambda tokens: vector.apply(model, operator=operator, multiplier=MULTIPLIER, tokens=tokens)):
        found, texts = scored(lm), answered(lm)
    change = change_of(vector, operator)
    assert found == pytest.approx(scored_by_hand(model, change, answers_alone=True), abs=1e-4)
    assert texts == answered_by_hand(model, change, answers_alone=True)
    assert max(abs(a - b) for a, b in zip(found, of_all)) > 0.01
    assert active_patches(model) == []
    assert scored(lm) == pytest.approx(scored(harness(model)))
    assert not {"_loglikelihood_tokens", "_model_generate"} & vars(lm).keys()


def test_answers_alone_where_prompts_are_cut(model: Any, vector: SteeringVector) -> None:
    lm = harness(model, max_length=10)
    with steer_lm_eval(lm, lambda tokens: vector.apply(model, multiplier=MULTIPLIER, tokens=tokens)):
        found = scored(lm)
    expected = scored_by_hand(model, change_of(vector, None), answers_alone=True, window=10)
    assert found == pytest.approx(expected, abs=1e-4)


def test_an_answer_as_long_as_the_window_is_steered_whole(model: Any, vector: SteeringVector) -> None:
    lm = harness(model, max_length=4)
    instance = Instance("loglikelihood", {}, ("Yes", "abcd"), 0)
    with steer_lm_eval(lm, lambda tokens: vector.apply(model, multiplier=MULTIPLIER, tokens=tokens)):
        (found,) = lm.loglikelihood([instance], disable_tqdm=True)
    with vector.apply(model, multiplier=MULTIPLIER):
        (expected,) = lm.loglikelihood([instance], disable_tqdm=True)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("window", [64, 8, 7, 5, 2])
@pytest.mark.parametrize("text", ["A long day of rain", "A long", "I feel glad, and you feel bad. A long day of rain!"])
def test_rolling_loglikelihoods(model: Any, vector: SteeringVector, window: int, text: str) -> None:
    """There is no prompt, so all tokens of each window are steered."""
    lm, instances = harness(model, max_length=window), [Instance("loglikelihood_rolling", {}, (text,), 0)]
    plain = lm.loglikelihood_rolling(instances, disable_tqdm=True)
    with steer_lm_eval(lm, lambda tokens: vector.apply(model, multiplier=MULTIPLIER, tokens=tokens)):
        (found,) = lm.loglikelihood_rolling(instances, disable_tqdm=True)
    ids, expected = [lm.prefix_token_id, *lm.tok_encode(text)], 0.0
    for first in range(0, len(ids) - 1, window):  # the last window begins earlier, and scores its last tokens
        last = min(first + window, len(ids) - 1)
        begin = 0 if first == 0 else last - window
        with by_hand(model, change_of(vector, None)), torch.no_grad():
            logits = model(torch.tensor([ids[begin:last]])).logits[0, first - begin :]
        expected += float(logits.log_softmax(-1)[torch.arange(last - first), ids[first + 1 : last + 1]].sum())
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found - plain[0]) > 0.01


def test_other_steerings(model: Any, vector: SteeringVector) -> None:
    lm, plain = harness(model), scored(harness(model))
    steerings: list[Callable[[Any], AbstractContextManager[Any]]] = [
        lambda tokens: ablate_everywhere(model, vector, tokens=tokens),
        lambda tokens: steer(model, torch.ones_like, layers=LAYER, tokens=tokens),
    ]
    for steering in steerings:
        with steer_lm_eval(lm, steering):
            assert max(abs(a - b) for a, b in zip(scored(lm), plain)) > 1e-3


def test_generated_alone_can_not_know_the_prompts_of_loglikelihoods(model: Any, vector: SteeringVector) -> None:
    with pytest.raises(ValueError, match="generated"), vector.apply(model, tokens=generated()):
        scored(harness(model))


def test_it_is_left_after_an_error(model: Any, vector: SteeringVector) -> None:
    lm = harness(model)
    with pytest.raises(KeyError), steer_lm_eval(lm, lambda tokens: vector.apply(model, tokens=tokens)):
        raise KeyError
    assert not {"_loglikelihood_tokens", "_model_generate"} & vars(lm).keys()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
def test_the_model_type_steered(tmp_path: Path, architecture: str, with_adapter: bool, layer_type: Any) -> None:
    # With an adapter, the harness cuts the vocabulary to the tokenizer's.
    model = tiny.build(architecture, vocab_size=len(tiny.tokenizer()))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    arguments: dict[str, Any] = {"pretrained": str(tmp_path / "model"), "batch_size": 3, "device": "cpu"}
    if with_adapter:
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config).eval()
        model.save_pretrained(tmp_path / "adapter")
        arguments["peft"] = str(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({n: torch.randn(tiny.HIDDEN, generator=generator) for n in (0, -1)}, layer_type)
    steered = SteeredModel(**arguments, **to_lm_eval(vector, model, tmp_path / "v.pt", multiplier=MULTIPLIER))
    lm = harness(model)
    plain = scored(lm)
    with vector.apply(model, multiplier=MULTIPLIER):
        expected, texts = scored(lm), answered(lm)
    assert scored(steered) == pytest.approx(expected, abs=1e-4)
    assert answered(steered) == texts
    assert max(abs(a - b) for a, b in zip(expected, plain)) > 0.05


def test_a_task_from_end_to_end(model: Any, vector: SteeringVector, tmp_path: Path) -> None:
    """Print the harness's table, unsteered and steered in three ways."""
    rows = [{"question": f"Is {n} more than 5?", "label": int(n > 5)} for n in range(10)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "more_than_5",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["no", "ok"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
    }
    lm = harness(model)
    steering = vector.apply(model, multiplier=MULTIPLIER)
    answers = steer_lm_eval(lm, lambda tokens: vector.apply(model, multiplier=MULTIPLIER, tokens=tokens))
    margins, scores = {}, {}
    for name, context in {"unsteered": nullcontext(), "all tokens": steering, "answers alone": answers}.items():
        with context:
            results = lm_eval.simple_evaluate(lm, tasks=[dict(task)], log_samples=True, bootstrap_iters=0)
        print(f"\n{name}\n{make_table(results)}")
        scores[name] = round(float(results["results"]["more_than_5"]["brier_score,none"]), 4)
        samples = results["samples"]["more_than_5"]
        margins[name] = [float(s["resps"][1][0][0]) - float(s["resps"][0][0][0]) for s in samples]
    assert len(margins["unsteered"]) == len(rows)
    assert len({*scores.values()}) == len(scores)  # the table shows the steering
    assert margins["unsteered"] != pytest.approx(margins["all tokens"], abs=1e-2)
    assert margins["answers alone"] != pytest.approx(margins["all tokens"], abs=1e-2)
