"""lm-evaluation-harness: steering of a model that it evaluates, and the file of its model type ``steered``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from steering_vectors._arguments import check_takes, finite_number
from steering_vectors._steering import Steering, as_multiplier, steering_of
from steering_vectors._whole_files import whole_file
from steering_vectors.interop.exported import in_float32
from steering_vectors.layer_matching import is_at_input
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.token_selection import Selector, from_index, generated


@contextmanager
def steer_lm_eval(lm: Any, steering: Callable[[Selector], AbstractContextManager[Any]]) -> Iterator[None]:
    """Steer the answers alone in lm-evaluation-harness, from each prompt's last token on.

    Requests are steered as :func:`~steering_vectors.generated` would steer them if the model
    generated the answers that the harness scores. For log-likelihoods the model is run on prompt
    and answer at once, and where the prompt ends stands in the harness's request alone. So requests
    are run together with those whose prompts are of the same length: more, smaller batches, and the
    same numbers. Rolling log-likelihoods have no prompt: the whole text is steered, in each of the
    windows into which the harness divides a long one.

    To steer all tokens, this function isn't needed: ``with vector.apply(model): …`` around the
    evaluation is exact.

    Args:
        lm: The harness's model, ``HFLM(pretrained=model, tokenizer=tokenizer)``, of a decoder-only
            model.
        steering: A function from a selector of tokens to a context manager that steers the model,
            such as ``lambda tokens: vector.apply(model, multiplier=2.0, tokens=tokens)``.

    Raises:
        TypeError: If ``lm`` is another model of the harness, or if ``steering`` can't be called
            with one argument.

    >>> with steer_lm_eval(lm, lambda tokens: vector.apply(model, tokens=tokens)):  # doctest: +SKIP
    ...     results = lm_eval.simple_evaluate(lm, tasks=["truthfulqa_mc1"])
    """
    if getattr(lm, "backend", None) != "causal":
        raise TypeError(f"lm must be lm-evaluation-harness's HFLM of a decoder-only model, got {type(lm).__name__}")
    check_takes(steering, 1, "steering", "lambda tokens: vector.apply(model, tokens=tokens)")
    score, generate = lm._loglikelihood_tokens, lm._model_generate

    def steered_scores(requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
        by_prompt: dict[int, list[int]] = defaultdict(list)
        for number, (texts, prompt, answer) in enumerate(requests):
            cut = max(0, len(prompt) + len(answer) - lm.max_length - 1)  # from the prompt's beginning
            is_rolling = texts is None  # a window, whose prompt is the end of the window before
            by_prompt[0 if is_rolling else max(0, len(prompt) - cut - 1)].append(number)
        scores: dict[int, Any] = {}
        for last, numbers in sorted(by_prompt.items(), reverse=True):  # if memory is too small, this is seen at once
            with steering(from_index(last)):
                found = score([requests[number] for number in numbers], disable_tqdm=True, **kwargs)
            scores.update(zip(numbers, found, strict=True))
        return [scores[number] for number in range(len(requests))]

    def steered_generate(*args: Any, **kwargs: Any) -> Any:
        with steering(generated()):
            return generate(*args, **kwargs)

    kept = {name: vars(lm)[name] for name in ("_loglikelihood_tokens", "_model_generate") if name in vars(lm)}
    lm._loglikelihood_tokens, lm._model_generate = steered_scores, steered_generate
    try:
        yield
    finally:
        del lm._loglikelihood_tokens, lm._model_generate
        vars(lm).update(kept)


def to_lm_eval(
    vector: SteeringVector, model: nn.Module, path: str | os.PathLike[str], *, multiplier: float = 1.0
) -> dict[str, str]:
    """Write the ``.pt`` file that lm-evaluation-harness's model type ``steered`` reads.

    That type adds directions to the outputs of modules, at all tokens:
    ``lm_eval --model steered --model_args pretrained=MODEL,steer_path=PATH``. It names modules from
    ``model.base_model`` on, so the file is made for one model, and for the model with or without a
    PEFT adapter. Directions and coefficients are rounded to the model's dtype one after another
    there; so the multiplier is in the written directions, and the coefficient is 1.

    Args:
        vector: The vector, of any layer type but ``"heads"`` and ``"neurons"``.
        model: The model that the harness will load, of the same class, with its adapter.
        path: The file's path, which must end in ``.pt`` or ``.pth``.
        multiplier: The factor on the directions.

    Returns:
        The file's path as the argument ``steer_path``, for ``--model_args`` or ``model_args=``.

    Raises:
        OSError: If the file can't be written, as in :meth:`~steering_vectors.SteeringVector.save`.
        TypeError: If an argument has the wrong type.
        ValueError: As in :meth:`~steering_vectors.SteeringVector.apply`, and if a direction is of
            a module's input, if a module is outside ``model.base_model``, if ``path`` has another
            ending, or if a number is too large for float32.

    >>> to_lm_eval(vector, model, folder / "joy.pt")
    {'steer_path': '...joy.pt'}
    >>> list(torch.load(folder / "joy.pt"))
    ['h.1']
    """
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"expected a SteeringVector, got {type(vector).__name__}")
    factor = finite_number(multiplier, "multiplier")
    if not os.fspath(path).endswith((".pt", ".pth")):
        raise ValueError(f"lm-evaluation-harness reads files whose names end in .pt or .pth, got {path}")
    if is_at_input(vector.layer_type):
        raise ValueError(
            f"lm-evaluation-harness steers the outputs of modules, but {vector.layer_type} are a module's input: "
            f"evaluate inside vector.apply(model) instead"
        )
    steering = steering_of(vector, model, None, None, as_multiplier(1.0), None, False)
    directions = steering.directions or {}
    entries = {
        hookpoint: {
            "action": "add",
            "steering_vector": in_float32(directions[layer], factor, layer),
            "steering_coefficient": 1.0,
            "bias": None,
            "head_index": None,
        }
        for layer, hookpoint in _hookpoints(steering, model).items()
    }
    with whole_file(path) as temporary:
        torch.save(entries, temporary)
    return {"steer_path": os.fspath(path)}


def _hookpoints(steering: Steering, model: nn.Module) -> dict[int, str]:
    """Return the names of the steered modules inside ``model.base_model``, by layer."""
    base = getattr(model, "base_model", model)
    names = {id(module): name for name, module in base.named_modules()}
    found = {place.layer: names.get(id(place.module)) for place in steering.places}
    outside = [layer for layer, name in found.items() if not name]
    if outside:
        raise ValueError(
            f"lm-evaluation-harness looks for modules in the model's base_model, a {type(base).__name__}, which lacks "
            f"those of layers {outside}: evaluate inside vector.apply(model) instead"
        )
    return {layer: name for layer, name in found.items() if name}
