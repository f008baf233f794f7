"""Control vectors of llama.cpp and repeng: GGUF files."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steering_vectors._arguments import finite_number, is_whole_number
from steering_vectors._vectors import derived, inherited
from steering_vectors._whole_files import whole_file
from steering_vectors.interop.exported import exported
from steering_vectors.interop.gguf_file import load_gguf
from steering_vectors.steering_vector import SteeringVector

_ARCHITECTURE = "controlvector"
_OURS = "steering_vectors."
# Readers of control vectors look at none of these, and a person who prints the file's metadata sees its meaning.
_MEANING = {
    "operation": "add",
    "site": "residual_stream_post_layer",
    "layer_convention": "direction.N is added to the output of block N, from 0",
}
_LAST_LAYER = 999_999_999  # llama.cpp reads the number as 32 bits
_RESIDUAL_STREAM = _MEANING["site"]


@dataclass(frozen=True)
class LlamaCppOptions:
    """Options of llama.cpp's programs that apply a control vector; ``str`` makes a command line of them.

    Attributes:
        path: The control vector's file.
        strength: The factor on the file's directions.
        first_layer: The first layer to steer.
        last_layer: The last layer to steer; llama.cpp includes it.

    >>> print(LlamaCppOptions("joy.gguf", 1.0, 10, 16))
    --control-vector-scaled joy.gguf:1.0 --control-vector-layer-range 10 16
    """

    path: str
    strength: float
    first_layer: int
    last_layer: int

    @property
    def arguments(self) -> list[str]:
        """The options as a list, for ``subprocess.run(["llama-server", …, *options.arguments])``."""
        if ":" in self.path and self.strength == 1:  # llama.cpp takes a colon for the beginning of the strength
            named = ["--control-vector", _in_csv(self.path)]
        else:
            named = ["--control-vector-scaled", _in_csv(f"{self.path}:{self.strength}")]
        return [*named, "--control-vector-layer-range", str(self.first_layer), str(self.last_layer)]

    def __str__(self) -> str:
        """Return the options as one line for a shell."""
        return shlex.join(self.arguments)


def to_gguf(
    vector: SteeringVector,
    path: str | os.PathLike[str],
    *,
    multiplier: float = 1.0,
    model_hint: str | None = None,
) -> LlamaCppOptions:
    """Write a control vector for llama.cpp, and return the options that apply it.

    ``direction.N`` is layer N of this library: llama.cpp adds it to the output of block N, at all
    tokens. The file is written whole or not at all. It needs the extra ``gguf``.

    llama.cpp can't express other operators than addition, a selection of tokens, layer 0, and
    layer types other than decoder blocks.

    Args:
        vector: The vector, of decoder blocks from layer 1 on. Negative layers count from the end of
            the model, if the metadata record its depth.
        path: The file's path.
        multiplier: The factor that the written directions are multiplied with, in float64, before
            they are rounded to float32.
        model_hint: The model's type, such as ``"llama"``, which llama.cpp doesn't look at; by
            default the one in the metadata.

    Raises:
        ImportError: If the gguf package isn't installed.
        FileNotFoundError: If the folder doesn't exist.
        IsADirectoryError: If ``path`` is a folder.
        PermissionError: If no file can be written in the folder.
        TypeError: If an argument has the wrong type.
        ValueError: If the vector has no directions, if llama.cpp can't apply it, if a number is not
            finite in float32, or if a text is not Unicode.

    >>> options = to_gguf(vector, folder / "joy.gguf", multiplier=2.0)
    >>> options.first_layer, options.last_layer
    (1, 1)
    """
    gguf = _imported_gguf()
    factor = finite_number(multiplier, "multiplier")
    if not (model_hint is None or isinstance(model_hint, str)):
        raise TypeError(f"model_hint must be a text such as 'llama', got {model_hint!r}")
    directions = _added(vector, factor)
    texts = {
        **_written_metadata(vector, factor),
        f"{_ARCHITECTURE}.model_hint": model_hint or _hint_of(vector),
    }
    _check_utf8(texts)
    with whole_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        try:
            for name, value in texts.items():
                writer.add_string(name, value)
            writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
            for layer, direction in directions.items():
                writer.add_tensor(f"direction.{layer}", direction.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return LlamaCppOptions(os.fspath(path), 1.0, min(directions), max(directions))


def from_gguf(path: str | os.PathLike[str], *, layer_offset: int = 0) -> SteeringVector:
    """Load a control vector of llama.cpp: ``direction.N`` becomes layer ``N + layer_offset``.

    With the default, the vector steers where llama.cpp would steer with the file, whoever wrote it.
    Files by :func:`to_gguf` and by repeng were measured there too.

    llama.cpp's own ``cvector-generator`` numbers otherwise: its ``direction.N`` was measured at the
    output of block N - 1, since it counts from 1, and llama.cpp adds it to the output of block N.
    ``layer_offset=-1`` steers such files' directions where they were measured.

    The file is read without trust, and nothing in it is executed.

    Args:
        path: The file's path.
        layer_offset: The number to add to those in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``layer_offset`` is not a whole number.
        ValueError: If the file is no complete control vector that llama.cpp would load: if it has
            ``direction.0``, other types of numbers or more dimensions, or numbers that aren't
            finite. If it says that its directions are not to be added to the output of blocks, as
            files with ``glp.mode = "project"`` do. If a layer would be negative.

    >>> _ = to_gguf(vector, folder / "joy.gguf")
    >>> from_gguf(folder / "joy.gguf") == vector
    True
    """
    if not is_whole_number(layer_offset):
        raise TypeError(f"layer_offset must be a whole number, such as -1, got {layer_offset!r}")
    return _loaded(path, first=1, offset=int(layer_offset), hint="model_hint")


def load_repeng(path: str | os.PathLike[str]) -> SteeringVector:
    """Load the GGUF file that ``ControlVector.export_gguf`` of repeng writes.

    repeng's layer numbers are those of this library. Its layer 0, which llama.cpp can't apply, is
    kept; the last block of a model was read after the final norm. The file is read without trust,
    as :func:`from_gguf` reads it.

    Source: https://github.com/vgel/repeng.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no complete control vector, as in :func:`from_gguf`.

    >>> _ = to_gguf(vector, folder / "joy.gguf")
    >>> load_repeng(folder / "joy.gguf").layers
    [1]
    """
    return _loaded(path, first=0, offset=0, hint="model_type")


def _imported_gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("to_gguf needs the gguf package: pip install 'steering-vectors[gguf]'") from error
    return gguf


def _added(vector: SteeringVector, factor: float) -> dict[int, Tensor]:
    """Return the directions that llama.cpp adds, in float32, by layer."""
    added = exported(vector, factor, "llama.cpp")
    if 0 in added:
        rest = "write vector[1:] without it, or " if len(added) > 1 else ""
        raise ValueError(
            f"llama.cpp can't steer layer 0, and refuses a file that has it: {rest}merge the direction into "
            "the weights, by steering_vectors.merging.merge"
        )
    if max(added) > _LAST_LAYER:
        raise ValueError(f"the vector has layer {max(added)}, and llama.cpp reads layers up to {_LAST_LAYER}")
    return added


def _hint_of(vector: SteeringVector) -> str:
    return vector.metadata.get("model_type") or vector.metadata.get("model_hint", "")


def _check_utf8(texts: Mapping[str, str]) -> None:
    """Raise ValueError if a name or a text can't be written, such as halves of characters from files' names."""
    for name, text in texts.items():
        try:
            (name + text).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name!a} can't be written into the file: {ascii(text)[:60]} has characters that are not Unicode"
            ) from error


def _written_metadata(vector: SteeringVector, factor: float) -> dict[str, str]:
    kept = inherited(vector.metadata) if factor == 1 else derived(f"{factor:g} * {{}}", vector.metadata)
    return {_OURS + name: value for name, value in {**kept, **_MEANING}.items()}


def _loaded(path: str | os.PathLike[str], *, first: int, offset: int, hint: str) -> SteeringVector:
    """Return the file's vector. ``hint`` is the name of the model hint in its metadata."""
    tensors, metadata = load_gguf(path, _ARCHITECTURE)
    try:
        _check_meaning(metadata)
        directions = {_layer_of(name, first) + offset: direction for name, direction in tensors.items()}
        if not directions:
            raise ValueError("the file has no directions")
        if min(directions) < 0:
            raise ValueError(f"with layer_offset={offset}, its first layer would be {min(directions)}")
        if max(directions) > _LAST_LAYER:
            raise ValueError(f"with layer_offset={offset}, its last layer would be {max(directions)}")
        return SteeringVector(dict(sorted(directions.items())), metadata=_read_metadata(metadata, hint))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_meaning(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if the metadata say that the directions are not to be added to the outputs of blocks."""
    for name in (f"{_OURS}operation", "glp.mode"):
        if metadata.get(name, "add") != "add":
            raise ValueError(
                f"its {name} is {str(metadata[name])[:40]!r}: the directions are not to be added. To take them out of "
                f"the activations, read them with the gguf package and apply them with ablation_operator()"
            )
    for name in (f"{_OURS}site", "glp.hook_point"):
        if metadata.get(name, _RESIDUAL_STREAM) != _RESIDUAL_STREAM:
            raise ValueError(f"its {name} is {str(metadata[name])[:40]!r}, expected {_RESIDUAL_STREAM!r}")


def _layer_of(name: str, first: int) -> int:
    match = re.fullmatch(r"direction\.(0|[1-9][0-9]{0,8})", name, re.ASCII)
    if match is None:
        raise ValueError(f"its tensor {name[:60]!r} has no layer: expected a name such as 'direction.16'")
    layer = int(match[1])
    if layer < first:
        raise ValueError("it has direction.0, which llama.cpp refuses: for a file by repeng, use load_repeng")
    return layer


def _read_metadata(metadata: Mapping[str, Any], hint: str) -> dict[str, str]:
    ours = {name.removeprefix(_OURS): text for name, text in metadata.items() if name.startswith(_OURS)}
    found = {hint: metadata.get(f"{_ARCHITECTURE}.model_hint"), **ours}
    # layer_config names modules to steer, and the directions of a control vector have no others than blocks.
    wanted = {name: text for name, text in found.items() if name not in {*_MEANING, "layer_config"}}
    return dict(inherited({name: text for name, text in wanted.items() if text and isinstance(text, str)}))


def _in_csv(text: str) -> str:
    """Return a text as one field of a row: llama.cpp takes commas for the ends of files' names."""
    return '"' + text.replace('"', '""') + '"' if "," in text or text.startswith('"') else text
