"""What the model was called with, as a selector sees it while the pass lasts."""

import functools
import gc
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from steering_vectors import SteeringVector, TokenPositions, at, record_activations, select, train_steering_vector
from tests import tiny
from tests.test_laws import PROMPTS, padded
from tests.test_threads import in_threads
from tests.test_training_through import enable_checkpointing

LABELS = torch.tensor([[-100, -100, 13, 14, -100], [-100, 22, -100, 24, 25]])
IDS = torch.tensor([PROMPTS[0], PROMPTS[1][:5]])


def vector() -> SteeringVector:
    return SteeringVector({1: torch.linspace(-2, 2, tiny.HIDDEN)})


def labelled(positions: TokenPositions) -> Tensor:
    return positions.arguments["labels"] != -100


class Passing(nn.Module):
    """A wrapper such as DistributedDataParallel, which passes on what it gets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Renaming(nn.Module):
    """A wrapper whose arguments the model inside doesn't have."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, answer: Tensor) -> Any:
        return self.model(input_ids, use_cache=False)


class TestTheCall:
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_shows_the_labels_of_each_batch(self, architecture: str) -> None:
        model, steering = tiny.shared(architecture), vector()
        for labels in (LABELS, LABELS.flip(0)):
            with record_activations(model, layers=1) as plain:
                model(IDS, labels=labels, use_cache=False)
            with steering.apply(model, tokens=labelled), record_activations(model, layers=1) as steered:
                model(IDS, labels=labels, use_cache=False)
            expected = plain[1][0] + (labels != -100)[..., None] * steering.layer_activations[1]
            torch.testing.assert_close(steered[1][0], expected, atol=1e-5, rtol=1e-5)

    def test_is_that_of_the_outermost_model_by_name(self) -> None:
        model, seen = tiny.build("llama"), {}

        def note(positions: TokenPositions) -> Tensor:
            seen.update({name: value for name, value in positions.arguments.items() if isinstance(value, Tensor)})
            return positions.index >= 0

        mask = torch.ones_like(IDS)
        for wrapped in (model, Passing(model), Passing(Passing(model))):
            seen.clear()
            with vector().apply(wrapped, tokens=note):
                wrapped(IDS, mask, labels=LABELS)
            assert {*seen} == {"input_ids", "attention_mask", "labels"}
            assert seen["input_ids"] is IDS
            assert seen["attention_mask"] is mask
            assert seen["labels"] is LABELS
        renaming = Renaming(model)
        with vector().apply(renaming, tokens=lambda p: p.arguments["answer"] != -100):
            renaming(IDS, LABELS)

    def test_is_that_of_the_part_where_a_part_is_called_alone(self) -> None:
        model = tiny.build("llama")
        names: list[str] = []

        def note(positions: TokenPositions) -> Tensor:
            names.extend(positions.arguments)
            return positions.index >= 0

        with vector().apply(model, tokens=note):
            model.model(input_ids=IDS)
        assert names == ["input_ids"]

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="transformers 4.46 runs LLaVA with images only")
    def test_is_the_whole_model_s_where_a_text_decoder_gets_less(self) -> None:
        model = tiny.llava()
        with vector().apply(model, tokens=labelled), record_activations(model, layers=1) as steered:
            model(input_ids=IDS, labels=LABELS)
        with record_activations(model, layers=1) as plain:
            model(input_ids=IDS, labels=LABELS)
        assert torch.equal((steered[1][0] != plain[1][0]).any(dim=-1), LABELS != -100)

    def test_is_each_thread_s_own(self) -> None:
        model, meeting = tiny.shared("llama"), threading.Barrier(3, timeout=20)
        batches = [LABELS, LABELS.flip(0), LABELS.flip(1)]

        def meet(*_: Any) -> None:
            meeting.wait()  # all are in the midst of a pass

        hook = tiny.blocks(model)[0].register_forward_hook(meet)

        def run(labels: Tensor) -> Tensor:
            with vector().apply(model, tokens=labelled, this_thread_only=True), torch.no_grad():
                meeting.wait()
                got: Tensor = model(IDS, labels=labels, use_cache=False).logits
                meeting.wait()
            return got

        got = in_threads(*(functools.partial(run, labels) for labels in batches))
        hook.remove()
        for one, labels in zip(got, batches, strict=True):
            with vector().apply(model, tokens=labels != -100), torch.no_grad():
                assert torch.equal(one, model(IDS, use_cache=False).logits)

    def test_combines(self) -> None:
        model = tiny.shared("llama")
        with vector().apply(model, tokens=select(labelled) & ~at(3)), record_activations(model, layers=1) as steered:
            model(IDS, labels=LABELS)
        with record_activations(model, layers=1) as plain:
            model(IDS, labels=LABELS)
        expected = (LABELS != -100) & (torch.arange(5) != 3)
        assert torch.equal((steered[1][0] != plain[1][0]).any(dim=-1), expected)


class TestNothingElse:
    def test_can_be_written(self) -> None:
        def write(positions: TokenPositions) -> Tensor:
            positions.arguments["labels"] = None  # type: ignore[index]
            return positions.index >= 0

        with (
            vector().apply(tiny.shared("llama"), tokens=write),
            pytest.raises(TypeError, match="does not support item assignment"),
        ):
            tiny.shared("llama")(IDS, labels=LABELS)

    def test_is_there_and_the_error_says_what_is(self) -> None:
        with (
            vector().apply(tiny.shared("llama"), tokens=labelled),
            pytest.raises(KeyError, match="the model was called without labels, with input_ids, use_cache"),
        ):
            tiny.shared("llama")(IDS, use_cache=False)

    def test_is_kept_after_the_pass(self) -> None:
        model, kept = tiny.shared("llama"), []

        def note(positions: TokenPositions) -> Tensor:
            kept.append(positions)
            assert positions.arguments.get("labels") is not None
            assert {*positions.arguments} == {"input_ids", "labels", "use_cache"}
            return positions.index >= 0

        labels = LABELS.clone()
        gone = weakref.ref(labels)
        with vector().apply(model, tokens=note), torch.no_grad():
            model(IDS, labels=labels, use_cache=False)
            del labels
            gc.collect()
            assert gone() is None
        arguments: Mapping[str, Any] = kept[0].arguments
        for use in (lambda: arguments["labels"], lambda: len(arguments), lambda: "labels" in arguments):
            with pytest.raises(RuntimeError, match="the pass of the model is over"):
                use()

    def test_is_kept_after_an_error(self) -> None:
        model, kept = tiny.shared("llama"), []

        def fail(positions: TokenPositions) -> Tensor:
            kept.append(positions)
            raise OSError

        with vector().apply(model, tokens=fail), pytest.raises(OSError):  # noqa: PT011
            model(IDS, labels=LABELS)
        with pytest.raises(RuntimeError, match="the pass of the model is over"):
            kept[0].arguments["labels"]

    def test_is_there_where_training_chooses_the_tokens_to_read(self) -> None:
        with pytest.raises(ValueError, match="KeyError: 'labels'"):
            train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), [("a b", "c d")], tokens=labelled)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_sees_the_call_again(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.build("llama").train()
        if checkpointing:
            enable_checkpointing(model, reentrant=reentrant)
        gate = torch.zeros((), requires_grad=True)
        within = SteeringVector(vector().layer_activations, "mlp")  # a part that is rerun with its block
        with within.apply(model, tokens=lambda p, gate=gate: gate * labelled(p)):
            for _ in range(2):
                model(IDS, labels=LABELS, use_cache=False).loss.backward()
        assert gate.grad is not None
        assert bool(gate.grad != 0)
        grads.append(gate.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_a_generation_has_its_arguments_in_each_pass() -> None:
    model, shapes = tiny.shared("llama"), []

    def note(positions: TokenPositions) -> Tensor:
        shapes.append(tuple(positions.arguments["input_ids"].shape))
        return positions.index >= 0

    with vector().apply(model, tokens=note):
        model.generate(**padded(PROMPTS[:2]), max_new_tokens=3, do_sample=False)
    assert shapes == [(2, 8), (2, 1), (2, 1)]


def test_under_a_trainer_each_batch_is_steered_by_its_own_labels(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [
        {"input_ids": row, "labels": labels}
        for row, labels in zip(torch.randint(5, 300, (6, 5)), LABELS.repeat(3, 1), strict=True)
    ]
    trained, by_hand = tiny.build("llama"), tiny.build("llama")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    steering, seen = vector(), []

    def note(positions: TokenPositions) -> Tensor:
        seen.append({name: positions.arguments[name].clone() for name in ("input_ids", "labels")})
        return labelled(positions)

    with steering.apply(trained, tokens=note):
        transformers.Trainer(trained, arguments, train_dataset=rows).train()
    by_hand.train()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    assert len(seen) == 3
    for batch in seen:
        weights = (batch["labels"] != -100)[..., None]

        def add(_m: nn.Module, _a: Any, output: Any, weights: Tensor = weights) -> Any:
            moved = (output if isinstance(output, Tensor) else output[0]) + weights * steering.layer_activations[1]
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        handle = tiny.blocks(by_hand)[1].register_forward_hook(add)
        by_hand(**batch, use_cache=False).loss.backward()
        handle.remove()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in trained.state_dict().items():
        torch.testing.assert_close(weight, by_hand.state_dict()[name], atol=1e-5, rtol=1e-4)
