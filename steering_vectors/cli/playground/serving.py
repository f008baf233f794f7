"""Load a model and vectors, and serve the playground until it is interrupted."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from steering_vectors.cli.loading import load_model, load_vector, model_and_rest, read_texts, short_names
from steering_vectors.cli.playground.addresses import check_address, in_brackets, is_loopback
from steering_vectors.cli.screen import note, shows_progress
from steering_vectors.cli.usage import BadParameter
from steering_vectors.cli.vectors import OfModel

if TYPE_CHECKING:
    from steering_vectors.cli.playground.answering import Speaker
    from steering_vectors.cli.playground.ranges import Range
    from steering_vectors.cli.playground.script import Source


def playground(
    arguments: Sequence[str],
    layers: str | None,
    texts: Path | None,
    limit: float | None,
    most_new_tokens: int,
    address: tuple[str, int | None],
    of_model: OfModel,
) -> None:
    """Serve the page."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the playground needs gradio: pip install 'steering-vectors[playground]'")
    name, paths = model_and_rest(arguments, least=1, usage="[MODEL] VECTOR...")
    check_address(*address)
    given, neutral = None if limit is None else _range(limit), read_texts(texts)
    from steering_vectors.cli.playground.answering import Speaker
    from steering_vectors.cli.playground.script import Source

    named = dict(zip(short_names(paths), paths, strict=True))
    vectors = {short: load_vector(path, layers) for short, path in named.items()}
    gguf_file, dtype, device = of_model
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device)
    speaker = Speaker(model, tokenizer, vectors, most_new_tokens=most_new_tokens)
    ranges = dict.fromkeys(vectors, given) if given else _calibrated(speaker, neutral)
    _serve(speaker, ranges, Source(name, named, layers, gguf_file, dtype, device), *address)


def _range(limit: float) -> Range:
    from steering_vectors.cli.playground.ranges import range_up_to

    try:
        return range_up_to(limit)
    except ValueError as error:
        raise BadParameter(str(error), param_hint="--range") from None


def _calibrated(speaker: Speaker, texts: Sequence[str] | None) -> dict[str, Range]:
    from steering_vectors.cli.playground.ranges import calibrated_range

    found = {}
    for name, vector in speaker.vectors.items():
        note(f"calibrating {name} (--range NUMBER leaves this out)")
        found[name] = calibrated_range(speaker.model, speaker.tokenizer, vector, texts, show_progress=shows_progress())
    return found


def _serve(speaker: Speaker, ranges: Mapping[str, Range], source: Source, host: str, port: int | None) -> None:
    """Serve until an interrupt."""
    from steering_vectors.cli.playground.page import Page

    page = Page(speaker, ranges, source)
    url = page.launch(in_brackets(host), port).replace("//[::]", "//localhost")
    if not is_loopback(host):
        note(f"anyone who reaches this machine at {host} can use the model")
    note("Ctrl-C ends it")
    try:
        print(url, flush=True)
        Event().wait()
    finally:
        page.close()
