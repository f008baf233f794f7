"""Reading and replacing a module's output, and attaching all hooks or none."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from steering_vectors._models.activations import activation_of, with_activation
from steering_vectors._models.hooks import attach_all, remove_all

OLD = torch.tensor([[[1.0, 2.0]]])
NEW = torch.tensor([[[3.0, 4.0]]])
OTHER = torch.tensor([5.0])


class TypedPair(NamedTuple):
    hidden: Tensor
    weights: Any


PlainPair = namedtuple("PlainPair", ["hidden", "weights"])


@dataclass
class LateOutput(ModelOutput):
    """Its first tensor isn't its first field."""

    loss: Tensor | None = None
    hidden: Tensor | None = None
    cache: Any = None


# name → (an output with the activation it is given, where that stands in it)
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda h: h, lambda out: out),
    "tuple of one": (lambda h: (h,), lambda out: out[0]),
    "tuple": (lambda h: (h, OTHER, None), lambda out: out[0]),
    "nested tuple": (lambda h: ((h, OTHER), OTHER), lambda out: out[0][0]),
    "list": (lambda h: [h, OTHER], lambda out: out[0]),
    "list in a tuple": (lambda h: ([h, OTHER], OTHER), lambda out: out[0][0]),
    "typed named tuple": (lambda h: TypedPair(h, OTHER), lambda out: out.hidden),
    "plain named tuple": (lambda h: PlainPair(h, OTHER), lambda out: out.hidden),
    "tuple in a named tuple": (lambda h: TypedPair((h, OTHER), None), lambda out: out.hidden[0]),  # type: ignore[arg-type]
    "ModelOutput": (lambda h: BaseModelOutputWithPast(last_hidden_state=h), lambda out: out.last_hidden_state),
    "ModelOutput with empty first field": (lambda h: LateOutput(hidden=h, cache=(OTHER,)), lambda out: out.hidden),
    "ModelOutput in a tuple": (
        lambda h: (BaseModelOutputWithPast(last_hidden_state=h), OTHER),
        lambda out: out[0].last_hidden_state,
    ),
    "dict": (lambda h: {"step": 3, "hidden": h, "late": OTHER}, lambda out: out["hidden"]),
    "ordered dict": (lambda h: OrderedDict(hidden=h, late=OTHER), lambda out: out["hidden"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
class TestOutputs:
    def test_the_activation_is_the_first_tensor(self, kind: str) -> None:
        make, _ = OUTPUTS[kind]
        assert activation_of(make(OLD)) is OLD

    def test_a_replaced_output_differs_in_its_activation_only(self, kind: str) -> None:
        make, get = OUTPUTS[kind]
        old, wanted = make(OLD), make(NEW)
        replaced = with_activation(old, NEW)
        assert type(replaced) is type(old)
        assert activation_of(replaced) is NEW
        assert get(replaced) is NEW
        assert list(leaves(replaced)) == list(leaves(wanted))

    def test_the_given_output_is_not_changed(self, kind: str) -> None:
        make, get = OUTPUTS[kind]
        old, before = make(OLD), OLD.clone()
        leaves_before = list(leaves(old))
        with_activation(old, NEW)
        assert list(leaves(old)) == leaves_before
        assert get(old) is OLD
        assert torch.equal(OLD, before)


def leaves(output: Any) -> Any:
    """What an output holds: the identity of each leaf, with the way to it by key and by attribute."""
    if isinstance(output, dict):
        for key, value in output.items():
            yield from ((key, leaf) for leaf in leaves(value))
            if isinstance(output, ModelOutput):
                assert getattr(output, key) is output[key]
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from ((number, leaf) for leaf in leaves(value))
    else:
        yield id(output)


@pytest.mark.parametrize("output", [None, (), [], 3.0, (None, OTHER), {}, {"step": 3}, BaseModelOutputWithPast()])
def test_an_output_that_does_not_begin_with_a_tensor_is_refused(output: Any) -> None:
    with pytest.raises(TypeError, match="a layer's output must be a tensor or begin with one, got "):
        activation_of(output)


class Recorded:
    """An attachment that records when it is attached and removed."""

    is_attached = False

    def __init__(self, log: list[str], name: str, error: BaseException | None = None) -> None:
        self.log, self.name, self.error = log, name, error

    def attach(self) -> None:
        self.log.append(f"+{self.name}")
        if self.error is not None:  # after it was attached: an interrupt may come then
            raise self.error

    def remove(self) -> None:
        self.log.append(f"-{self.name}")


def test_all_are_attached_in_order() -> None:
    log: list[str] = []
    recorded = [Recorded(log, name) for name in "abc"]
    attach_all(recorded)
    assert log == ["+a", "+b", "+c"]
    remove_all(recorded)
    assert log[3:] == ["-a", "-b", "-c"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit()])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_raises_none_stays_attached(failing: int, error: BaseException) -> None:
    log: list[str] = []
    recorded = [Recorded(log, str(n), error if n == failing else None) for n in range(3)]
    with pytest.raises(type(error)):
        attach_all(recorded)
    assert {name for name in log if name.startswith("-")} >= {f"-{n}" for n in range(failing + 1)}
