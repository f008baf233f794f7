"""Run prompts with images through the whole model, one at a time, as its user would run them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steering_vectors._extraction.read_model import ReadModel, ReadPrompt, Reads
from steering_vectors._extraction.verification import alike, check_finite

# The number of tokens that are compared, spread over the prompt.
_COMPARED = 16


class ImagePasses:
    """Passes of the model over prompts with images.

    Before the first one, a prompt is run with one more token behind it. That shows whether activations change with the
    tokens that follow, and whether a pass may end after the last layer to read.
    """

    def __init__(self, source: ReadModel, *, stop_early: bool) -> None:
        self._source = source
        self._stop_early = stop_early
        self._is_checked = False

    def rows(self, prompts: Sequence[ReadPrompt]) -> dict[int, Tensor]:
        """Return the rows of one prompt by layer; ``prompts`` differ only in what is read of it.

        Raises ValueError for activations that aren't finite, and where they change with the tokens that follow.
        """
        inputs = self._on_device(prompts[0].inputs or {})
        if not self._is_checked:
            self._check(inputs)
        reads = Reads()
        for prompt in prompts:
            reads.add(0, prompt.positions, prompt.weights)
        return self._read(inputs, reads, stop_early=self._stop_early)

    def _read(self, inputs: Mapping[str, Any], reads: Reads, *, stop_early: bool) -> dict[int, Tensor]:
        return self._source.read(self._source.anatomy.model, inputs, reads, stop_early=stop_early)

    def _check(self, inputs: Mapping[str, Any]) -> None:
        length = inputs["input_ids"].shape[1]
        if length == self._source.anatomy.most_tokens:  # another prompt may leave a place for one more token
            return
        reads, model = Reads(), self._source.anatomy.model
        for place in sorted({(n + 1) * length // _COMPARED - 1 for n in range(_COMPARED)} - {-1}):
            reads.add(0, [place], None)
        followed = self._read(_followed(inputs), reads, stop_early=False)
        for stop_early in sorted({self._stop_early, False}, reverse=True):
            plain = self._read(inputs, reads, stop_early=stop_early)
            check_finite(model, plain)
            every = not self._source.rounding_decides
            if all(alike(followed[layer], rows, all_of_them=every) for layer, rows in plain.items()):
                self._stop_early, self._is_checked = stop_early, True
                return
        raise ValueError(
            f"{type(model).__name__} can't be read: in a prompt with images, an activation changes with the tokens "
            f"that follow it"
        )

    def _on_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        anatomy = self._source.anatomy
        dtype = next(weight.dtype for weight in anatomy.model.parameters() if weight.is_floating_point())
        return {name: _moved(value, anatomy.input_device, dtype) for name, value in inputs.items()}


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return an input on the device, numbers of pixels in the model's dtype as well."""
    if isinstance(value, (list, tuple)):
        return [_moved(part, device, dtype) for part in value]
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _followed(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with one more token: the rarest again, which is none of an image's."""
    ids = inputs["input_ids"][0].tolist()
    counts = Counter(ids)
    place = max(range(len(ids)), key=lambda n: (-counts[ids[n]], n))
    by_token = {
        name: torch.cat([value, value[:, place : place + 1]], dim=1)
        for name, value in inputs.items()
        if name.endswith(("_ids", "_mask")) and tuple(value.shape[:2]) == (1, len(ids))
    }
    return {**inputs, **by_token}
