"""Run a model over prompts, and yield the rows that were asked for, layer by layer.

Each row is the same as if its prompt were run alone. The model may compute it together with other prompts: in packs, in
which each distinct prefix occurs once, or else in padded rows. That the rows are the same then is checked, not assumed;
if they aren't, each prompt is run alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from steering_vectors._extraction.conditions import Steered, conditions_of
from steering_vectors._extraction.image_passes import ImagePasses
from steering_vectors._extraction.memory import Memory
from steering_vectors._extraction.read_model import ReadModel, ReadPrompt
from steering_vectors._extraction.verification import alike, check_finite, differ
from steering_vectors._extraction.ways import UnlikeError, Way, find_ways
from steering_vectors._models import Site, anatomy_of, without_data_parallelism

__all__ = ["Extractor", "LayerRows", "ReadPrompt"]

_FROM_END = " Or remove the steering whose selector counts from a row's end: it changes with the tokens that follow."
# Causality is a matter of the model's masks: a few tokens show it as well as many.
_SHORT = 16


@dataclass(frozen=True, eq=False)
class LayerRows:
    """Some prompts' rows at one layer: ``rows (n, hidden)``, in which row i is that of prompt number ``prompts[i]``."""

    layer: int
    rows: Tensor
    prompts: Sequence[int]


class Extractor:
    """A model that is run over prompts, and what was learnt of it on the way.

    A pass takes at most the tokens of ``batch_size`` pairs of the longest prompts, or one pack. ``steered`` returns the
    model's steerings of the moment. It raises ValueError under a steering in which prompts can't be read.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[int, Site],
        *,
        batch_size: int,
        steered: Callable[[], Steered] = Steered,
    ) -> None:
        self._model = without_data_parallelism(model)
        self.layers = sorted(sites)
        self._sites = sites
        self._batch_size = batch_size
        self._steered = steered
        self._memory = Memory()
        self._conditions: object = None
        self._ways: list[Way] = []
        self._look_again()

    def __call__(self, prompts: Sequence[ReadPrompt]) -> Iterator[LayerRows]:
        """Yield each prompt's row at each layer, in no promised order, layer after layer for each pass.

        The model is in evaluation mode while it runs, and afterwards, module by module, as it was.

        Raises ValueError for a model in which what follows a token changes its activation, as in encoders.
        """
        texts = [number for number, prompt in enumerate(prompts) if prompt.inputs is None]
        for part in self._of_texts([prompts[number] for number in texts]):
            yield replace(part, prompts=[texts[n] for n in part.prompts])
        yield from self._with_images(prompts)

    def _with_images(self, prompts: Sequence[ReadPrompt]) -> Iterator[LayerRows]:
        """Yield the rows of the prompts with images, of one prompt at a time."""
        by_prompt: dict[int, list[int]] = {}  # there may be several reads of one
        for number, prompt in enumerate(prompts):
            if prompt.inputs is not None:
                by_prompt.setdefault(id(prompt.inputs), []).append(number)
        for numbers in by_prompt.values():
            self._look_again()
            rows = self._image_passes.rows([prompts[number] for number in numbers])
            yield from (LayerRows(layer, rows.pop(layer), numbers) for layer in self._sites)

    def _of_texts(self, prompts: Sequence[ReadPrompt]) -> Iterator[LayerRows]:
        left = set(range(len(prompts)))
        while left:
            self._look_again()
            sparse = self._source.attention.sparse_beyond
            if sparse is not None and max(map(len, self._ids(prompts))) > sparse:
                self._ways = self._ways[-1:]
            try:
                for numbers, rows in self._rows(self._ways[0], prompts, sorted(left)):
                    self._check_causal(prompts)
                    left.difference_update(numbers)
                    yield from (LayerRows(layer, rows.pop(layer), numbers) for layer in self._sites)
                    if left and self._look_again():
                        break
            except UnlikeError:
                self._check_causal(prompts)
                self._ways.pop(0)

    def _rows(
        self, way: Way, prompts: Sequence[ReadPrompt], numbers: Sequence[int]
    ) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
        """Yield the prompts' numbers and their rows by layer, of each pass."""
        as_run = way.as_run(prompts)
        for packs in way.passes(as_run, numbers, self._batch_size, self._memory):
            yield from self._memory.run(packs, partial(way.run, prompts=as_run), partial(way.split, prompts=as_run))

    def _look_again(self) -> bool:
        """Drop what was learnt under other conditions, and return whether they have changed.

        The user's code runs between two passes, in an iterator of samples as in an aggregator.
        """
        steered = self._steered()
        anatomy = anatomy_of(self._model)
        conditions = conditions_of(anatomy, steered)
        if conditions == self._conditions:
            return False
        self._conditions = conditions
        self._source = ReadModel(anatomy, self._sites)
        self._ways = find_ways(self._source, steered)
        self._image_passes = ImagePasses(self._source, stop_early=self._ways[0].stop_early)
        self._perhaps_by_row = steered.perhaps_by_row
        self._is_causal = False  # until it was seen
        return True

    def _ids(self, prompts: Sequence[ReadPrompt]) -> list[list[int]]:
        return [prompt.input_ids for prompt in self._ways[0].as_run(prompts)]

    def _check_causal(self, prompts: Sequence[ReadPrompt]) -> None:
        """Check once that a token's activation is the same without those that follow; a comparison may have shown it.

        Some prompt's first tokens are run alone, and with those that follow.
        """
        way = self._ways[0]
        if self._is_causal or way.verification.shows_causality:
            self._is_causal = True
            return
        sparse = self._source.attention.sparse_beyond
        row, followed = _followed([ids[: min(_SHORT, sparse or _SHORT)] for ids in self._ids(prompts)])
        layer = self.layers[-1]
        alone, with_more = (
            self._source.alone(ids, range(len(row)), stop_early=way.stop_early)[layer] for ids in (row, followed)
        )
        check_finite(self._model, {layer: alone})
        # Where tokens that follow are seen, they change all others; rounding sends only some to other experts.
        if not alike(with_more, alone, all_of_them=not self._source.rounding_decides):
            raise ValueError(
                f"{type(self._model).__name__} is not a decoder-only language model: an activation changes with the "
                f"tokens that follow it. "
                f"For a BERT-like model, set is_decoder=True in its config.{_FROM_END if self._perhaps_by_row else ''}"
            )
        self._is_causal = True


def _followed(prompts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Return some prompt's first tokens, and the same ones followed by more, of another kind if there are any."""
    prompt = max(prompts, key=lambda ids: (len(set(ids)), len(ids)))
    half = (len(prompt) + 1) // 2
    row, more = prompt[:half], prompt[half:]
    if not more or not differ(row, more):  # a repeated token is none the other for seeing itself
        more = list({token for ids in prompts for token in ids} - set(row))[:half] or row
    return row, [*row, *more]
