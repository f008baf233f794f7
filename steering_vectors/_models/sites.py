"""The places of a model where activations are read and changed: a module's output, or its input."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from steering_vectors._models.activations import activation_of, input_of
from steering_vectors._models.hooks import INPUT, OUTPUT, Hook


class Site(NamedTuple):
    """A module and the side of it, ``OUTPUT`` or ``INPUT``, at which its activation is read."""

    module: nn.Module
    side: str = OUTPUT

    @property
    def input_width(self) -> int | None:
        """The width of the activation that a projection gets; None for outputs and for other modules."""
        # Conv1D of transformers, as in GPT-2, has another name for it.
        width = getattr(self.module, "in_features", None) or getattr(self.module, "nx", None)
        return width if self.side == INPUT and isinstance(width, int) else None

    def hook(self, read: Callable[[Tensor], object]) -> Hook:
        """Return a hook that calls ``read`` with the activation in each pass, after all steerings have changed it."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read(input_of(args, kwargs))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            read(activation_of(output))

        return Hook(self.module, before, before=True) if self.side == INPUT else Hook(self.module, after)
