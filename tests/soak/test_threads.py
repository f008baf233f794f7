"""Eight threads that enter, generate and leave at random beside unsteered ones: each answer is that of its single run."""

import os
import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    ablation_operator,
    active_patches,
    at,
    clamp_operator,
    from_index,
    generated,
    rotation_operator,
)
from tests import tiny
from tests.test_steering import hooks_of, padded, vector
from tests.together import run_together

PASSES = int(os.environ.get("SOAK_PASSES", "20000"))
STEERED, UNSTEERED = 8, 2
STEPS = 3  # passes of one answer

PROMPTS = [padded([11, 12, 13, 14, 15], [21, 22]), padded([31, 32, 33], [41, 42, 43]), padded([51], [61, 62, 63, 64])]
VECTORS = [vector(0, 1, 2, seed=1, scale=2.0), vector(1, seed=2, scale=3.0), vector(2, layer_type="mlp", scale=4.0)]
TOKENS: list[Callable[[dict[str, Tensor]], Any]] = [
    lambda _inputs: None,
    lambda _inputs: from_index(1),
    lambda _inputs: at(0),
    generated,
    lambda _inputs: generated(),
    lambda _inputs: lambda positions: 0.5 * (positions.index % 2),
]
OPERATORS = [None, ablation_operator(), rotation_operator(0.5), clamp_operator(2.0)]
MULTIPLIERS: list[Any] = [1.0, -2.0, [1.5, -1.0], [0.0, 2.0]]


class Job:
    """One answer, steered in one way or not at all."""

    def __init__(self, generator: random.Random, *, steered: bool) -> None:
        self.inputs = generator.choice(PROMPTS)
        self.vector: SteeringVector | None = generator.choice(VECTORS) if steered else None
        self.tokens = generator.choice(TOKENS)
        self.operator = generator.choice(OPERATORS)
        self.multiplier = generator.choice(MULTIPLIERS)

    def run(self, model: Any) -> Tensor:
        """The answer's logits, ``(steps, batch, vocabulary)``."""
        steering = (
            nullcontext()
            if self.vector is None
            else self.vector.apply(
                model,
                operator=self.operator,
                multiplier=self.multiplier,
                tokens=self.tokens(self.inputs),
                this_thread_only=True,
            )
        )
        with steering:
            out = model.generate(
                **self.inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack(out.logits)


def test_each_thread_s_answers_are_those_of_single_runs() -> None:
    model = tiny.build("llama")
    generator = random.Random(0)
    jobs = [[Job(generator, steered=number < STEERED) for _ in range(12)] for number in range(STEERED + UNSTEERED)]
    expected = [[job.run(model) for job in of_thread] for of_thread in jobs]
    wrong: list[str] = []
    answers = max(1, PASSES // STEPS // len(jobs))

    def work(number: int) -> None:
        choice = random.Random(number)
        try:
            for turn in range(answers):
                which = choice.randrange(len(jobs[number]))
                got = jobs[number][which].run(model)
                if not torch.equal(got, expected[number][which]):
                    wrong.append(
                        f"thread {number}, answer {turn}: {(got - expected[number][which]).abs().max():.2g} off"
                    )
        except BaseException as error:
            wrong.append(f"thread {number}: {error!r}")
            raise

    run_together([threading.Thread(target=work, args=(number,)) for number in range(len(jobs))])
    assert not wrong, "\n".join(wrong[:20])
    assert active_patches(model) == []
    assert hooks_of(model) == {}
