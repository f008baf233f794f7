"""Colour tokens by their projections on a vector, as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from math import isnan

from steering_vectors.cli.playground.answering import Token

STYLE = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; }
.tokens span { padding: 0.1em 0; border-radius: 0.15em; }
.token-key { font-size: 0.85em; opacity: 0.8; }
.token-key b { font-weight: 400; padding: 0.1em 0.4em; border-radius: 0.15em; }
.token-key .towards { background: rgba(214, 69, 65, 0.5); }
.token-key .away { background: rgba(49, 110, 204, 0.5); }
"""
_STRONGEST = 0.6  # opacity: the text stays readable on a light and on a dark page
_TOWARDS, _AWAY = "214, 69, 65", "49, 110, 204"


def coloured(tokens: Mapping[str, Sequence[Sequence[Token]]], name: str) -> tuple[str, str]:
    """Return both sequences with a vector's colours: red towards it, blue away from it.

    Both have one scale: the largest projection, but for those of the first tokens, which are far larger in many models.
    """
    rows = tokens.get(name, [])
    most = max((abs(value) for row in rows for _, value in row[1:] if not isnan(value)), default=0.0) or 1.0
    texts = [f'<div class="tokens">{"".join(_span(*token, most) for token in row)}</div>' for row in rows]
    first, second = texts or ("", "")
    return first, second


def _span(text: str, value: float, most: float) -> str:
    strength = 0.0 if isnan(value) else min(abs(value) / most, 1.0) * _STRONGEST
    colour = _TOWARDS if value > 0 else _AWAY
    return f'<span title="{value:+.3g}" style="background: rgba({colour}, {strength:.2f})">{html.escape(text)}</span>'
