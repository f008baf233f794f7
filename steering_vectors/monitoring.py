"""Monitor a model's activations along directions while it runs, without keeping the activations."""

from __future__ import annotations

import html
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import with_hints
from steering_vectors._models import Attachment, anatomy_of, by_tokens, check_model
from steering_vectors._passes import ForwardPass
from steering_vectors._rows_of_passes import Recorder, joined_rows, pieces_of
from steering_vectors._steering import as_multiplier, config_for, steering_of
from steering_vectors._vectors import projections
from steering_vectors.layer_matching import ModelLayerConfig, find_layers
from steering_vectors.steering_vector import SteeringVector


@with_hints(missing="the arguments are model, vector")
def monitor(
    model: nn.Module, vector: SteeringVector, *, layer_config: ModelLayerConfig | None = None
) -> SteeringMonitor:
    """Return a context manager that notes how far each token is along a vector's directions.

    Entering it returns a :class:`SteeringMonitor`, which can be read inside the block or after it.
    In all passes inside the block, those of ``model.generate`` too, the projection ``h·u`` of each
    token's activation is kept, with ``u`` the direction at norm 1: one number in float32 for each
    token and layer. No activation is kept, nothing is changed, and no device is waited for until it
    is read.

    Inside ``apply``, what is read is the steered activation: where the same vector is added, it has
    the multiplier times the direction's norm more at the steered tokens.

    Args:
        model: The model to watch.
        vector: The directions. Their lengths don't matter.
        layer_config: The layers' names, as in :meth:`SteeringVector.apply`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the vector doesn't fit the model, or if a direction is all zeros.

    >>> with monitor(model, vector) as watched:
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> watched.projections()[1][0].shape
    torch.Size([1, 3])
    """
    check_model(model)
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"vector must be a SteeringVector, got {type(vector).__name__}")
    return SteeringMonitor(model, vector, layer_config)


class SteeringMonitor(Recorder):
    """Record of how far tokens were along a vector's directions, made by :func:`monitor`.

    >>> with monitor(model, vector) as watched:
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> watched
    SteeringMonitor(layers=[1], passes=1)
    """

    def __init__(self, model: nn.Module, vector: SteeringVector, layer_config: ModelLayerConfig | None) -> None:
        super().__init__(model, "monitor", "monitor(model, vector)")
        anatomy = anatomy_of(model)
        directions = steering_of(vector, model, layer_config, None, as_multiplier(1), None, False).directions
        assert directions is not None
        projections(directions, directions)  # raises for a direction of zeros
        config = config_for(anatomy, vector, layer_config)
        self._sites = find_layers(model, vector.layer_type, config).sites_of(list(directions))
        self._directions = dict(directions)
        self._passes: dict[int, _WatchedPass] = {}

    def _attachments(self, model: nn.Module) -> Sequence[Attachment]:
        note = weakref.WeakMethod(self._note)

        def read(layer: int, activation: Tensor) -> None:
            noted = note()
            if noted is not None:
                noted(layer, activation)

        return [site.hook(partial(read, layer)) for layer, site in self._sites.items()]

    @property
    def layers(self) -> list[int]:
        """The layers that are watched."""
        return sorted(self._directions)

    def projections(self) -> dict[int, list[Tensor]]:
        """Return the projections ``(batch, seq)`` of each pass, by layer, on the CPU; NaN on padding.

        Projections are in units of the activations.
        """
        return {
            layer: [one.projections[layer].cpu() for one in list(self._passes.values()) if layer in one.projections]
            for layer in self.layers
        }

    def by_sequence(self) -> dict[int, list[Tensor]]:
        """Return the projections ``(tokens,)`` of each sequence, by layer.

        Those of a prompt and of its answer are joined: a pass that continues a cache continues the
        rows of the pass before it. Padding is left out. Beams are not distinguished, since they
        change rows.

        Raises:
            ValueError: If rows held several texts each.
        """
        found: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for _, values in self._sequences():
            for place, layer in enumerate(self.layers):
                found[layer].append(torch.tensor([of_token[place] for of_token in values], device="cpu"))
        return found

    def token_ids(self) -> list[list[int | None]]:
        """Return the token ids of each sequence, as :meth:`by_sequence` joins them.

        They are None where the model got embeddings.

        Raises:
            ValueError: If rows held several texts each.
        """
        return [ids for ids, _ in self._sequences()]

    def token_texts(self, tokenizer: Any) -> list[list[str]]:
        """Return the text of each token of each sequence, as :meth:`by_sequence` joins them.

        Together, a sequence's texts are its decoded text: a token that ends within a character has
        none, and the token that completes the character has it all.

        Args:
            tokenizer: The model's tokenizer, whose ``decode`` turns token ids into text.

        Raises:
            ValueError: If the model got embeddings instead of token ids, or several texts in a row.
        """
        found = []
        for ids in self.token_ids():
            if any(token is None for token in ids):
                raise ValueError("the model got embeddings, not token ids, so there is no text to show")
            found.append(pieces_of(tokenizer, [token or 0 for token in ids]))
        return found

    def show(self, tokenizer: Any, *, layer: int | None = None) -> None:
        """Print the tokens, coloured by their projections: red towards the direction, blue away from it.

        In a notebook and on a terminal, colours are as strong as the projection is large beside the
        largest of all tokens but the first of each sequence. Elsewhere, each token is followed by its
        projection.

        Args:
            tokenizer: The model's tokenizer, whose ``decode`` turns token ids into text.
            layer: The layer; by default the last one that is watched.

        Raises:
            LookupError: If the layer isn't watched.
            ValueError: If the model got embeddings instead of token ids, or several texts in a row.
        """
        number = self.layers[-1] if layer is None else layer
        if number not in self._directions:
            raise LookupError(f"layer {number} is not watched; those that are: {self.layers}")
        along = self.by_sequence()[number]
        rows = [
            list(zip(texts, values.tolist(), strict=True))
            for texts, values in zip(self.token_texts(tokenizer), along, strict=True)
        ]
        most = max((abs(value) for row in rows for _, value in row[1:]), default=0.0) or 1.0
        _show(rows, most)

    def __repr__(self) -> str:
        return f"SteeringMonitor(layers={self.layers}, passes={len(self._passes)})"

    def _sequences(self) -> list[tuple[list[int | None], list[list[float]]]]:
        by_thread: dict[object, list[_WatchedPass]] = {}
        for one in list(self._passes.values()):  # a copy, as other threads may add to it
            by_thread.setdefault(one.thread, []).append(one)
        return [
            (ids, values)
            for passes in by_thread.values()
            for ids, values in joined_rows([one.rows(self.layers) for one in passes])
        ]

    def _note(self, layer: int, activation: Tensor) -> None:
        """Note a run of a layer, unless gradient checkpointing repeats it."""
        current = None if self._tracker is None else self._tracker.current
        if current is None or current.ended:
            return
        one = self._pass_of(current)
        batch, seq = current.shape
        direction = self._directions[layer].detach()
        with torch.no_grad():
            along: Tensor = projections({layer: direction}, {layer: activation.detach()})[layer]
            one.projections[layer] = by_tokens(along.unsqueeze(-1), batch, seq).squeeze(-1).float()
            if one.index is not None:
                padding = (one.index < 0).to(along.device)
                one.projections[layer] = one.projections[layer].masked_fill(padding, torch.nan)

    def _pass_of(self, current: ForwardPass) -> _WatchedPass:
        if current.number not in self._passes:
            try:
                positions = current.positions
                several = positions.several_texts
            except ValueError:  # several texts in one row, and a cache
                several = True
            if several:
                self._passes[current.number] = _WatchedPass(current.thread, None, None)
            else:
                ids = None if positions.input_ids is None else positions.input_ids.detach().clone()
                self._passes[current.number] = _WatchedPass(current.thread, ids, positions.index)
        return self._passes[current.number]


@dataclass
class _WatchedPass:
    """A pass: its tokens and, by layer, their projections ``(batch, seq)``."""

    thread: object
    input_ids: Tensor | None
    index: Tensor | None
    projections: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, layers: Sequence[int]) -> tuple[list[list[int | None]], list[list[int]], list[list[list[float]]]]:
        """Return token ids, indices, and for each token its projections at the layers, row by row."""
        if self.index is None:
            raise ValueError(
                "the model got several texts in one row, whose sequences can't be joined: use projections()"
            )
        index = self.index.tolist()
        ids: list[list[int | None]] = [[None] * len(row) for row in index]
        if self.input_ids is not None:
            ids = self.input_ids.tolist()
        missing = torch.full(self.index.shape, torch.nan, device="cpu")
        values = torch.stack([self.projections.get(layer, missing).cpu() for layer in layers], dim=-1)
        return ids, index, values.tolist()


def _show(rows: Sequence[Sequence[tuple[str, float]]], most: float) -> None:
    """Print rows of texts with their projections, in the way that the screen allows."""
    ipython: Any = sys.modules.get("IPython")
    if ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
        ipython.display.display(ipython.display.HTML("".join(_as_html(row, most) for row in rows)))
        return
    write = _in_colours if sys.stdout.isatty() else _with_numbers
    for row in rows:
        print(write(row, most))


def _as_html(row: Sequence[tuple[str, float]], most: float) -> str:
    spans = []
    for text, value in row:
        red, green, blue = (214, 69, 65) if value > 0 else (49, 110, 204)
        strength = 0.0 if isnan(value) else min(abs(value) / most, 1.0)
        spans.append(
            f'<span title="{value:+.3g}" style="background: rgba({red}, {green}, {blue}, {strength:.2f})">'
            f"{html.escape(text)}</span>"
        )
    return f"<pre style='white-space: pre-wrap'>{''.join(spans)}</pre>"


# Of the 256 colours of terminals, from weak to strong.
_REDS, _BLUES = (224, 217, 210, 203), (189, 153, 117, 75)


def _in_colours(row: Sequence[tuple[str, float]], most: float) -> str:
    written = []
    for text, value in row:
        step = 0 if isnan(value) else int(min(abs(value) / most, 0.999) * 5)
        colour = (_REDS if value > 0 else _BLUES)[step - 1]
        written.append(f"\x1b[30;48;5;{colour}m{text}\x1b[0m" if step else text)
    return "".join(written)


def _with_numbers(row: Sequence[tuple[str, float]], _most: float) -> str:
    return "".join(f"{text}({value:+.1f})" for text, value in row)
