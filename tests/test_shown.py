"""Vectors and traces as notebooks show them: in HTML that any theme can colour, whatever a file's metadata hold."""

import pickle
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector, trace_steering, train_steering_vector
from steering_vectors._html import MOST_ROWS
from tests import tiny

HOSTILE = "<script>alert('&\"')</script></td></table><img src=x onerror=alert(1)>"
TAGS = {"div", "strong", "table", "thead", "tbody", "tr", "th", "td"}


class Parsed(HTMLParser):
    """The tables of a piece of HTML, as rows of texts. Fails for tags that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.title = ""
        self.styles: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        assert {name for name, _ in attrs} <= {"style", "colspan"}
        self.styles |= {value or "" for name, value in attrs if name == "style"}
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "strong":
            self.title += data
        else:
            self.tables[-1][-1][-1] += data


def shown(value: Any) -> Parsed:
    return Parsed(value._repr_html_())


def test_a_trained_vector_shows_its_origin_norms_and_shares() -> None:
    vector = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), [("I love it", "I hate it")], layers=[0, 1])
    page = shown(vector)
    facts, (heads, *rows) = page.tables
    assert page.title == "SteeringVector"
    assert dict(facts) == {
        "layers": "[0, 1]",
        "layer type": "decoder_block",
        "hidden size": str(tiny.HIDDEN),
        "method": "mean_aggregator()",
        "read": "read_token_index=-1",
        "samples": "1",
    }
    assert heads == ["layer", "norm", "share of the activations' norm"]
    assert [row[0] for row in rows] == ["0", "1"]
    for (_, norm, share), layer in zip(rows, vector.layers):
        assert float(norm) == pytest.approx(vector.norms()[layer], rel=1e-3)
        assert float(share.rstrip("%")) == pytest.approx(100 * vector.shares()[layer], abs=0.06)


def test_shares_that_are_not_known_are_left_out() -> None:
    assert shown(SteeringVector({3: [3.0, 4.0]})).tables[1] == [["layer", "norm"], ["3", "5"]]
    partly = SteeringVector({3: [3.0, 4.0], 4: [0.0, 1.0]}, metadata={"activation_norms": '{"3": 10}'})
    assert shown(partly).tables[1][1:] == [["3", "5", "50.0%"], ["4", "1", "unknown"]]


def test_a_vector_without_directions() -> None:
    facts, rows = shown(SteeringVector({})).tables
    assert dict(facts) == {"layers": "[]", "layer type": "decoder_block"}
    assert rows == [["layer", "norm"]]


def test_metadata_of_a_file_are_escaped_and_cut() -> None:
    metadata = {"base_model": HOSTILE, "method": "x" * 10_000, "activation_norms": HOSTILE, HOSTILE: "ignored"}
    page = shown(SteeringVector({1: [3.0, 4.0]}, metadata=metadata))
    facts = dict(page.tables[0])
    assert facts["model"] == HOSTILE
    assert facts["method"] == "x" * 200 + "…"
    assert facts.keys() == {"layers", "layer type", "hidden size", "model", "method"}


def test_colours_are_the_themes() -> None:
    with trace_steering(tiny.shared("llama")) as trace:
        pass
    for value in (trace, SteeringVector({1: [3.0, 4.0]}, metadata={"method": "a"})):
        for style in shown(value).styles:
            assert "color" not in style
            assert "background" not in style


def test_a_vector_with_very_many_layers_is_cut() -> None:
    rows = shown(SteeringVector({layer: [1.0] for layer in range(5000)})).tables[1]
    assert len(rows) == 1 + MOST_ROWS + 1
    assert rows[-1] == [f"… and {5000 - MOST_ROWS} more"]


def test_directions_without_numbers_are_shown() -> None:
    vector = SteeringVector({0: [3.0, 4.0], 1: [0.0, 1.0]})
    vector.layer_activations[1] = torch.empty(2, device="meta")
    assert shown(vector).tables[1][1:] == [["0", "5"], ["1", "unknown"]]
    assert repr(vector) == "SteeringVector(layers=[0, 1], hidden_size=2, layer_type='decoder_block', norms=5)"
    del vector.layer_activations[0]
    assert shown(vector).tables[1][1:] == [["1", "unknown"]]
    assert repr(vector) == "SteeringVector(layers=[1], hidden_size=2, layer_type='decoder_block')"


def test_directions_with_gradients_are_shown() -> None:
    direction = torch.tensor([3.0, 4.0], requires_grad=True)
    assert shown(SteeringVector({0: direction, 1: direction * 2})).tables[1][1:] == [["0", "5"], ["1", "10"]]


def test_showing_changes_nothing() -> None:
    vector = SteeringVector({0: [3.0, 4.0]}, metadata={"method": "a"})
    before = pickle.dumps(vector)
    vector._repr_html_()
    assert pickle.dumps(vector) == before
    assert vector == SteeringVector({0: [3.0, 4.0]})


def test_a_trace_shows_its_layers() -> None:
    model = tiny.shared("llama")
    vector = SteeringVector({0: torch.ones(tiny.HIDDEN), 1: torch.ones(tiny.HIDDEN)})
    with trace_steering(model) as trace, vector.apply(model, tokens=slice(1, None)):
        model(torch.tensor([[5, 6, 7]]))
    (rows,) = shown(trace).tables
    assert [" ".join(row).split() for row in rows] == [line.split() for line in str(trace).splitlines()]
    assert [row[:3] for row in rows[1:]] == [["0", "1", "2"], ["1", "1", "2"]]
    assert shown(trace).title == "SteeringTrace"


def test_an_empty_trace() -> None:
    with trace_steering(tiny.shared("llama")) as trace:
        pass
    assert shown(trace).title == "SteeringTrace: no steered layer ran"
    assert shown(trace).tables == [[["layer", "runs", "steered tokens", "change"]]]
