"""Record activations at layers during the caller's own passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from steering_vectors._arguments import with_hints
from steering_vectors._models import Attached
from steering_vectors.layer_matching import LayerType, ModelLayerConfig, find_layers


@with_hints(layer="the argument is layers=")
@contextmanager
def record_activations(
    model: nn.Module,
    layer_type: LayerType = "decoder_block",
    layer_config: ModelLayerConfig | None = None,
    clone_activations: bool = True,
    layer_nums: int | Iterable[int] | None = None,
    *,
    layers: int | Iterable[int] | None = None,
) -> Generator[dict[int, list[Tensor]], None, None]:
    """Yield a dictionary that fills while the model runs: layer number → one activation per pass.

    The caller runs the passes inside the block, and decides about gradients and training mode. A
    steered model's activations are recorded as steered.

    Args:
        model: The model to record.
        layer_type: The kind of activation that is recorded at each layer: the decoder block's
            output, or that of a part of it such as ``"mlp"``; or ``"heads"`` or ``"neurons"``.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.
        clone_activations: False to keep the activation itself, with its gradients, instead of a
            detached copy.
        layer_nums: The older name of ``layers``. Pass only one of the two.
        layers: The layers to record, as numbers from 0, or negative ones from the end. None records
            all.

    Yields:
        The activations ``(batch, seq, hidden)`` by layer, in the model's dtype, on the device where
        the layer ran. Heads and neurons have widths of their own.

    Raises:
        ValueError: If the model doesn't have one of the layers, or if both ``layers`` and
            ``layer_nums`` are passed.

    >>> with record_activations(model, layers=[0, -1]) as activations:
    ...     _ = model(**inputs)
    >>> {layer: tuple(passes[0].shape) for layer, passes in activations.items()}
    {0: (2, 5, 32), 1: (2, 5, 32)}
    """
    if layer_nums is not None and layers is not None:
        raise ValueError("layers and layer_nums are two names of one parameter: pass only one of them")
    found = find_layers(model, layer_type, layer_config)
    numbers = found.numbers(layer_nums if layers is None else layers)
    records: dict[int, list[Tensor]] = defaultdict(list)

    def record(number: int, activation: Tensor) -> None:
        records[number].append(activation.detach().clone() if clone_activations else activation)

    hooks = [site.hook(partial(record, number)) for number, site in found.sites_of(numbers).items()]
    with Attached(hooks):
        yield records
