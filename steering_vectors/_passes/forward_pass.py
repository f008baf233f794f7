"""One forward pass through a model, and the positions of its tokens."""

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import learns_prompts
from steering_vectors._passes.arguments import PassArguments, describe_same_tokens, merge_arguments, pass_arguments
from steering_vectors._passes.caches import CacheMemory
from steering_vectors._passes.threads import calls_and_generations, this_thread
from steering_vectors._tokens import TokenPositions

_NUMBERS = itertools.count()


class CallArguments(Mapping[str, Any]):
    """The arguments of a model's call by name, for as long as the call lasts: nothing is kept alive after it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments: Mapping[str, Any] | None = dict(arguments)

    def clear(self) -> None:
        """Drop the arguments."""
        self._arguments = None

    def _known(self) -> Mapping[str, Any]:
        if self._arguments is None:
            raise RuntimeError("the pass of the model is over, and its arguments are kept no longer: read them in it")
        return self._arguments

    def __getitem__(self, name: str) -> Any:
        if name not in self._known():
            raise KeyError(f"the model was called without {name}, with {', '.join(self._known())}")
        return self._known()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __repr__(self) -> str:
        return f"CallArguments({', '.join(self._arguments or ())})"


class ForwardPass:
    """A forward pass; its :attr:`positions` are computed on first access.

    ``layers_run`` are the steered layers that have run in it. ``thread`` is the mark of the thread that began it: a
    backward pass may rerun parts of it in another one, and ``reruns`` counts the parts that are rerun now. The model's
    arguments are dropped at its end unless ``will_rerun`` is set.
    """

    def __init__(self, begun_by: nn.Module, memory: CacheMemory | None) -> None:
        self.begun_by = weakref.ref(begun_by)
        self.number = next(_NUMBERS)
        self.thread = this_thread()
        self.ended = False
        self.reruns = 0
        self.will_rerun = False
        self.depth = -1
        self.layers_run: set[int] = set()
        self.weights: dict[torch.device, Tensor | bool] = {}  # the selection in this pass, once computed
        self._calls: list[PassArguments] = []
        self._memory = memory
        self._given: Mapping[str, Any] | None = None
        self._model_call: CallArguments | None = None
        self._merged: PassArguments | None = None
        self._positions: dict[torch.device | None, TokenPositions] = {}

    def enter(self, depth: int, arguments: Mapping[str, Any] | None, parameters: Sequence[str]) -> None:
        """Record the call of a module that is ``depth`` steps inside the outermost one."""
        self.depth = depth
        if arguments is not None and self._model_call is None and self._memory is not None:
            self._model_call = CallArguments(arguments)
        if arguments is not None and (self._given is None or not describe_same_tokens(arguments, self._given)):
            self._given = arguments
            self._calls.append(pass_arguments(arguments, parameters))
            self._merged = None
            if len(self._calls) == 1:
                self._check_no_prompt_is_learned(self._calls[0])

    def _check_no_prompt_is_learned(self, call: PassArguments) -> None:
        """Raise ValueError if virtual tokens stand among embeddings, or in a cache that no pass has filled.

        Other passes are not looked at, since that takes longer than a pass over one token should.
        """
        if self._memory is None:
            return
        is_filled = isinstance(call.cached, int) and call.cached > 0 and not self._memory.knows(call.cache)
        if (call.inputs_embeds is not None or is_filled) and any(map(learns_prompts, calls_and_generations())):
            raise ValueError(
                "prompt learning puts virtual tokens before the prompt's own, so the tokens to steer can't be located "
                "exactly: steer all tokens, or remove the steering before the model is wrapped"
            )

    def leave(self) -> None:
        """End the pass and drop its arguments. Parts that gradient checkpointing reruns may need the model's."""
        self._given = None
        if self._model_call is not None and not self.will_rerun:
            self._model_call.clear()
        self.ended = True

    @property
    def shape(self) -> tuple[int, int]:
        """The pass's ``(batch, seq)``. Raises ValueError if no module's arguments show it."""
        shape = self._arguments().shape
        assert shape is not None
        return shape

    @property
    def positions(self) -> TokenPositions:
        """The positions of the pass's tokens. Raises ValueError if they can't be determined."""
        assert self._memory is not None
        if None not in self._positions:
            assert self._model_call is not None
            self._positions[None] = replace(self._memory.positions(self._arguments()), arguments=self._model_call)
        return self._positions[None]

    def positions_on(self, device: torch.device) -> TokenPositions:
        """Return the positions with all their tensors on a device."""
        if self.positions.index.device == device:
            return self.positions
        if device not in self._positions:
            values = vars(self.positions).items()
            moved: dict[str, Any] = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in values}
            self._positions[device] = TokenPositions(**moved)
        return self._positions[device]

    def _arguments(self) -> PassArguments:
        call = self._merged_arguments()
        if call is None:
            raise ValueError(
                f"can't determine the token positions: {type(self.begun_by()).__name__} was called without input_ids "
                f"and without inputs_embeds. Call it with one of them, or steer all tokens."
            )
        return call

    def _merged_arguments(self) -> PassArguments | None:
        if self._merged is None:
            self._merged = merge_arguments(self._calls)
        return self._merged

    def remember(self, output: Any) -> None:
        """Record the tokens that this pass put into its cache."""
        call = None if self._memory is None else self._merged_arguments()
        if call is not None and self._memory is not None and not call.packs_rows:
            self._memory.remember(call, output, lambda: self.positions)
