"""Trace what steerings change while a model runs: which tokens, at which layers, and by how much."""

from __future__ import annotations

import html
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._html import block, table
from steering_vectors._models import Attachment, along_tokens, check_model
from steering_vectors._passes import ForwardPass
from steering_vectors._precision import wide
from steering_vectors._rows_of_passes import Recorder, joined_rows, pieces_of
from steering_vectors._steering import AttachedTrace, changes_of


def trace_steering(model: nn.Module) -> SteeringTrace:
    """Return a context manager that records what steerings do in the passes of ``model`` inside it.

    Entering it returns a :class:`SteeringTrace`, which can be read inside the block or after it.
    Steerings may be entered before it or inside it. An entered trace keeps the token ids, and a bit
    for each token and layer; it waits for no device until it is read. Without one, nothing is
    recorded and there is no cost.

    Raises:
        TypeError: If ``model`` is not a module.

    >>> with trace_steering(model) as trace, vector.apply(model, tokens=slice(1, None)):
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> trace.summary()
    {1: LayerSummary(runs=1, steered_tokens=2, change=...)}
    """
    check_model(model)
    return SteeringTrace(model)


@dataclass(frozen=True)
class LayerSummary:
    """Summary of the steering at one layer.

    Attributes:
        runs: The number of times that the layer ran.
        steered_tokens: The number of changed tokens, without padding.
        change: The mean of the change's norm as a fraction of the activation's norm, over these
            tokens and the steered modules; NaN if there are none.

    >>> LayerSummary(runs=5, steered_tokens=4, change=0.25)
    LayerSummary(runs=5, steered_tokens=4, change=0.25)
    """

    runs: int
    steered_tokens: int
    change: float


class SteeringTrace(Recorder):
    """Record of what steerings did, made by :func:`trace_steering`; printed, a table of the layers.

    >>> with trace_steering(model) as trace, vector.apply(model, multiplier=0):
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> print(trace)
    layer    runs  steered tokens    change
        1       1               0         -
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "trace", "trace_steering(model)")
        # By layer, and by module and side, for each run: the sum of the changes' relative sizes, and the number of
        # tokens summed.
        self._notes: dict[int, dict[tuple[int, str], list[tuple[Tensor, Tensor]]]] = {}
        self._passes: dict[int, _TracedPass] = {}
        self._modules: set[int] = set()

    def _attachments(self, model: nn.Module) -> Sequence[Attachment]:
        self._modules = {id(module) for module in model.modules()}
        note = weakref.WeakMethod(self._note)
        return [AttachedTrace(lambda *steered: (noted := note()) and noted(*steered))]

    def summary(self) -> dict[int, LayerSummary]:
        """Return the summary of each layer that was steered and ran, by the layer's number."""
        return {layer: self._summary_of(layer) for layer in sorted(self._notes)}

    def show(self, tokenizer: Any) -> None:
        """Print the tokens of the passes, row by row, with the steered ones marked.

        A token is marked if it was steered at any layer: by colour in a notebook or a terminal,
        elsewhere by double brackets. Beams are not distinguished, since they change rows.

        Args:
            tokenizer: The model's tokenizer, whose ``decode`` turns token ids into text.

        Raises:
            ValueError: If the model got embeddings instead of token ids, or several prompts in one
                row.
        """
        by_thread: dict[object, list[_TracedPass]] = {}
        for one in list(self._passes.values()):  # a copy, as other threads may add to it
            by_thread.setdefault(one.thread, []).append(one)
        texts = [_pieces(tokenizer, row) for passes in by_thread.values() for row in _sequences(passes)]
        ipython: Any = sys.modules.get("IPython")
        if ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
            lines = [f"<pre style='white-space: pre-wrap'>{_marked(text, _HTML, html.escape)}</pre>" for text in texts]
            ipython.display.display(ipython.display.HTML("".join(lines)))
            return
        for text in texts:
            print(_marked(text, _COLOUR if sys.stdout.isatty() else _BRACKETS))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self._notes:
            return "SteeringTrace: no steered layer ran"
        return "\n".join(f"{a:>5}  {b:>6}  {c:>14}  {d:>8}" for a, b, c, d in [_COLUMNS, *self._rows()])

    def _repr_html_(self) -> str:
        rows = self._rows()
        return block("SteeringTrace" if rows else "SteeringTrace: no steered layer ran", table(_COLUMNS, rows))

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                str(layer),
                str(found.runs),
                str(found.steered_tokens),
                "-" if math.isnan(found.change) else f"{found.change:.1%}",
            )
            for layer, found in self.summary().items()
        ]

    def _summary_of(self, layer: int) -> LayerSummary:
        by_module = [list(notes) for notes in list(self._notes[layer].values())]
        tokens = sum(int(one.steered[layer].sum()) for one in list(self._passes.values()) if layer in one.steered)
        shares = sum(float(share) for notes in by_module for share, _ in notes)
        measured = sum(int(count) for notes in by_module for _, count in notes)
        return LayerSummary(max(map(len, by_module)), tokens, shares / measured if measured else float("nan"))

    def _note(self, module: nn.Module, side: str, before: Tensor, after: Tensor) -> None:
        """Record a run of a steered layer, unless gradient checkpointing repeats it."""
        current = None if self._tracker is None else self._tracker.current
        if id(module) not in self._modules or current is None or current.ended:
            return
        one = self._pass_of(current)
        batch, seq = one.is_token.shape
        places = along_tokens(torch.arange(batch * seq, device=before.device).reshape(batch, seq, 1), before)
        places = places.expand(*before.shape[:-1], 1).squeeze(-1)
        moved = (after != before).any(dim=-1) & one.is_token.to(before.device).flatten()[places]
        with torch.no_grad():
            exact = wide(before)
            size = exact.norm(dim=-1)
            measured = moved & (size > 0)
            share = torch.where(measured, (after - exact).norm(dim=-1) / torch.where(measured, size, 1), 0)
            steered = torch.zeros(batch * seq, dtype=torch.long, device=before.device)
            steered = steered.index_add_(0, places.flatten(), moved.flatten().long()) > 0
        layer = changes_of(module, side)[0].layer
        one.add(layer, steered.reshape(batch, seq))
        self._notes.setdefault(layer, {}).setdefault((id(module), side), []).append((share.sum(), measured.sum()))

    def _pass_of(self, current: ForwardPass) -> _TracedPass:
        if current.number not in self._passes:
            try:
                positions = current.positions
            except ValueError:  # several prompts in one row: all places count as tokens, and no text can be shown
                every = torch.ones(current.shape, dtype=torch.bool, device="cpu")
                self._passes[current.number] = _TracedPass(current.thread, None, None, every)
            else:
                ids = None if positions.input_ids is None else positions.input_ids.detach().clone()
                self._passes[current.number] = _TracedPass(current.thread, ids, positions.index, positions.index >= 0)
        return self._passes[current.number]


@dataclass
class _TracedPass:
    """A traced pass: ``is_token (batch, seq)`` and, by layer, the tokens that were steered."""

    thread: object
    input_ids: Tensor | None
    index: Tensor | None
    is_token: Tensor
    steered: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, steered: Tensor) -> None:
        steered = steered.to(self.is_token.device)
        self.steered[layer] = steered | self.steered[layer] if layer in self.steered else steered


_COLUMNS = ("layer", "runs", "steered tokens", "change")
# Token ids, each with True if it was steered.
_Sequence = list[tuple[int, bool]]
_HTML, _COLOUR, _BRACKETS = ("<mark>", "</mark>"), ("\x1b[7m", "\x1b[0m"), ("[[", "]]")


def _sequences(passes: Sequence[_TracedPass]) -> Iterator[_Sequence]:
    """Yield the rows that went through the model."""
    rows = []
    for one in passes:
        if one.input_ids is None or one.index is None:
            raise ValueError(
                "the model got embeddings, not token ids, or several prompts in one row, so there is no text to show: "
                "use summary()"
            )
        steered = torch.stack(list(one.steered.values())).any(dim=0).tolist()
        rows.append((one.input_ids.tolist(), one.index.tolist(), steered))
    for ids, marks in joined_rows(rows):
        yield [(token or 0, mark) for token, mark in zip(ids, marks, strict=True)]


def _pieces(tokenizer: Any, row: _Sequence) -> list[tuple[str, bool]]:
    """Return the row's text, cut where steered tokens begin or end."""
    pieces = pieces_of(tokenizer, [token for token, _ in row])
    together = groupby(zip(pieces, row, strict=True), key=lambda piece: piece[1][1])
    texts = [("".join(text for text, _ in group), steered) for steered, group in together]
    return [piece for piece in texts if piece[0]]


def _marked(text: Sequence[tuple[str, bool]], marks: tuple[str, str], escape: Callable[[str], str] = str) -> str:
    return "".join(f"{marks[0]}{escape(part)}{marks[1]}" if steered else escape(part) for part, steered in text)
