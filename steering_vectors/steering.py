"""Steer a model by a function of the activation, without a direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from steering_vectors._arguments import with_hints
from steering_vectors._steering import Numbers, Steering, SteeringContext, as_multiplier, steering_alone
from steering_vectors._tokens import TokenSelection, as_selector
from steering_vectors.layer_matching import LayerType, ModelLayerConfig

_HINTS = dict.fromkeys(("strength", "scale", "coefficient"), "the argument is multiplier=")


@with_hints(missing="the arguments begin with model, operator", layer="the argument is layers=", **_HINTS)
def steer(
    model: nn.Module,
    operator: Callable[..., Tensor],
    *,
    layers: int | Iterable[int] | None = None,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    tokens: TokenSelection | None = None,
    multiplier: Numbers = 1.0,
    this_thread_only: bool = False,
) -> SteeringContext:
    """Return a context manager, also a decorator, in which ``operator`` changes activations.

    For changes that no single direction describes: features of an autoencoder, an affine map, a
    rotation in a fixed plane, the gradient of a classifier. At each layer, ``h`` becomes
    ``h + multiplier * operator(h)``. Everything else is as in :meth:`SteeringVector.apply`, with
    its guarantees and warnings. ``steer(…).patch()`` steers until the returned handle is removed.

    Source: for a learned affine map, LoReFT, arXiv 2404.03592.

    Args:
        model: The model to steer.
        operator: A callable from the activation ``(batch, seq, hidden)``, or of whichever shape the
            layer has, in the model's dtype, to the change: a tensor of any dtype, of a shape that
            broadcasts to it. It may ask by keyword-only parameters for the layer's number and for
            the tokens' positions, ``operator(activation, *, layer, positions)``, as a
            :class:`~steering_vectors.PatchDeltaOperator` may. A module is left on its device.
        layers: The layers to steer, as numbers from 0, or negative ones from the end. None steers
            all.
        layer_type: The kind of activation that is steered, as in :class:`SteeringVector`.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        tokens: The tokens to steer, as in :meth:`SteeringVector.apply`; by default all.
        multiplier: The factor on the change: one number, or one for each row of a batch. At 0 the
            model runs as if it weren't steered.
        this_thread_only: True to steer only the passes in the thread that enters the block.

    Raises:
        TypeError: If an argument has the wrong type, or if the operator takes another number of
            arguments.
        ValueError: If the model doesn't have one of the layers, or if numbers aren't finite. In the
            model's pass, if the change has another shape, or is too large for the activation's
            dtype.

    >>> with steer(model, lambda activation: -0.1 * activation, layers=[0, 1]):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> shifts = {0: torch.ones(32), 1: -torch.ones(32)}
    >>> with steer(model, lambda activation, *, layer: shifts[layer], multiplier=[1.0, 0.5]):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """
    asked = list(layers) if isinstance(layers, Iterator) else layers  # it is read again on entering

    def steering() -> Steering:
        selector = None if tokens is None else as_selector(tokens)
        factor = as_multiplier(multiplier)
        return steering_alone(model, operator, asked, layer_type, layer_config, factor, selector, this_thread_only)

    return SteeringContext(steering, shown=repr(steering()))
