"""Find a model's modules by layer type and layer number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from operator import index as as_index
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from steering_vectors._arguments import is_whole_number
from steering_vectors._models import INPUT, OUTPUT, Anatomy, Site, anatomy_of, part_path

LayerType: TypeAlias = Literal[
    "decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "heads", "neurons"
]
LayerMatcher: TypeAlias = str | Callable[[nn.Module, int], str]
ModelLayerConfig: TypeAlias = dict[LayerType, LayerMatcher]

# The layer types whose activation is their module's input: the projection back to the stream of attention, and of the
# MLP.
_AT_INPUT = ("heads", "neurons")
_EXPECTED_MATCHER = (
    "a layer matcher must be a callable or a template with {num} in it, such as 'model.layers.{num}.mlp'"
)


@dataclass(frozen=True)
class Layers:
    """A model's layers of one type: modules and their names by layer number, out of ``count`` decoder blocks."""

    model: str
    layer_type: LayerType
    names: dict[int, str]
    count: int
    modules: dict[int, nn.Module] = field(repr=False, compare=False)

    def numbers(self, layers: int | Iterable[int] | None) -> list[int]:
        """Return the requested layers as numbers from 0, ascending and without duplicates; None requests all.

        Raises TypeError unless the layers are whole numbers, and ValueError for a layer that the model doesn't have.
        """
        if layers is None:
            return sorted(self.names)
        asked = [layers] if is_whole_number(layers) else layers
        if not isinstance(asked, Iterable) or isinstance(asked, (str, bytes)):
            raise TypeError(f"layers must be a layer number or a list of them, such as [5, 6], got {layers!r}")
        numbers = sorted({self.number(layer) for layer in asked})
        if not numbers:
            raise ValueError("layers is empty: pass at least one layer number, or None for all")
        return numbers

    def number(self, layer: Any) -> int:
        """Return one layer as a number from 0. Raises the errors of :meth:`numbers`."""
        if not is_whole_number(layer):
            raise TypeError(f"a layer must be a whole number, such as 0 or -1, got {layer!r}")
        given = as_index(layer)
        number = given + self.count if given < 0 else given
        if not 0 <= number < self.count:
            raise ValueError(
                f"layer {given} does not exist: the model has {self.count} layers, 0 to {self.count - 1}, or "
                f"-{self.count} to -1 from the end"
            )
        if number not in self.names:
            raise ValueError(
                f"block {number} of {self.model} has no {self.layer_type}; blocks that have one: {sorted(self.names)}"
            )
        return number

    def sites_of(self, numbers: Iterable[int]) -> dict[int, Site]:
        """Return the sites of layers by number. Raises ValueError for a module that is another layer too."""
        chosen = {number: self.modules[number] for number in numbers}
        for module in chosen.values():
            same = [number for number, other in self.modules.items() if other is module]
            if len(same) > 1:
                raise ValueError(
                    f"layers {same} of {self.model} share modules: they are one module that runs several times, so "
                    f"none of them can be steered or read separately"
                )
        side = INPUT if is_at_input(self.layer_type) else OUTPUT
        return {number: Site(module, side) for number, module in chosen.items()}


def find_layers(
    model: nn.Module, layer_type: LayerType = "decoder_block", layer_config: ModelLayerConfig | None = None
) -> Layers:
    """Return the model's layers of a type.

    Raises the errors of :func:`layers_of`, and TypeError if ``model`` is not a module.
    """
    return layers_of(anatomy_of(model), layer_type, layer_config)


def layers_of(
    anatomy: Anatomy, layer_type: LayerType = "decoder_block", layer_config: ModelLayerConfig | None = None
) -> Layers:
    """Return a model's layers of a type.

    A matcher for the type in ``layer_config`` decides. Without one, each of the text decoder's blocks is searched for
    its part of the type.

    Raises TypeError if ``layer_config`` is not a mapping. Raises ValueError for an unknown layer type, for a matcher
    that matches nothing, and if the modules can't be determined.
    """
    check_layer_type(layer_type)
    matcher = _checked_config(layer_config).get(layer_type)
    if matcher is None:
        known = anatomy.known_templates(layer_type)
        matcher = next((template for template in known if _matched(anatomy.model, template)), None)
    if matcher is not None:
        return _layers_by_matcher(anatomy, layer_type, matcher)
    path, blocks, kind = anatomy.blocks_path, anatomy.blocks, type(anatomy.model).__name__
    if layer_type == "decoder_block":
        names = {n: f"{path}.{n}" for n in range(len(blocks))}
        return Layers(kind, layer_type, names, len(blocks), dict(enumerate(blocks)))
    parts = {n: part for n, block in enumerate(blocks) if (part := part_path(block, layer_type)) is not None}
    if not parts:
        children = sorted({name for block in blocks for name, _ in block.named_children()})
        raise ValueError(
            f"no {layer_type} found in the blocks of {kind}, whose parts are {children}; {_advice(layer_type, path)}"
        )
    names = {n: f"{path}.{n}.{part}" for n, part in parts.items()}
    modules = {n: blocks[n].get_submodule(part) for n, part in parts.items()}
    return Layers(kind, layer_type, names, len(blocks), modules)


def _advice(layer_type: LayerType, path: str) -> str:
    if not is_at_input(layer_type):
        return f"if one of them is the {layer_type}, pass layer_config={{{layer_type!r}: '{path}.{{num}}.NAME'}}"
    reason = "a mixture of experts has no single down projection; " if layer_type == "neurons" else ""
    return (
        f"{reason}if a module in them projects the {layer_type} back to the stream, pass "
        f"layer_config={{{layer_type!r}: '{path}.{{num}}.NAME'}} with that module's name"
    )


def _layers_by_matcher(anatomy: Anatomy, layer_type: LayerType, matcher: LayerMatcher) -> Layers:
    names, kind = _matched(anatomy.model, matcher), type(anatomy.model).__name__
    if not names:
        raise ValueError(
            f"layer_config[{layer_type!r}] = {matcher!r} matches no module of {kind}; templates that match: "
            f"{anatomy.lists_of_modules}"
        )
    modules = {number: anatomy.model.get_submodule(name) for number, name in names.items()}
    return Layers(kind, layer_type, names, max(names) + 1, modules)


def collect_matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> list[str]:
    """Return the names that ``layer_matcher`` matches for 0, 1, 2, …, up to the first missing module.

    Args:
        model: The model to search.
        layer_matcher: A template such as ``"transformer.h.{num}.mlp"``, or a callable
            ``(model, number) → name``.

    Raises:
        ValueError: If a template lacks ``{num}``.

    >>> collect_matching_layers(model, "transformer.h.{num}.mlp")
    ['transformer.h.0.mlp', 'transformer.h.1.mlp']
    """
    matches = _matched(model, layer_matcher)
    return [matches[n] for n in range(len(matches)) if set(range(n + 1)) <= matches.keys()]


def get_num_matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> int:
    """Return the number of modules that ``collect_matching_layers`` finds.

    Args:
        model: The model to search.
        layer_matcher: A template or a callable, as there.

    >>> get_num_matching_layers(model, "transformer.h.{num}")
    2
    """
    return len(collect_matching_layers(model, layer_matcher))


def guess_and_enhance_layer_config(
    model: nn.Module, layer_config: ModelLayerConfig | None = None, layer_type: LayerType | None = None
) -> ModelLayerConfig:
    """Return a copy of ``layer_config`` with matchers for the layer types that it lacks.

    Types that the model doesn't have, or that can't be determined, stay absent.

    Args:
        model: The model to search.
        layer_config: The matchers that are kept; None for none.
        layer_type: The only layer type to add; None for all.

    Raises:
        TypeError: If ``model`` is not a module or ``layer_config`` is not a mapping.
        ValueError: If a layer type is unknown.

    >>> guess_and_enhance_layer_config(model, layer_type="mlp")
    {'mlp': 'transformer.h.{num}.mlp'}
    """
    anatomy = anatomy_of(model)
    config: ModelLayerConfig = dict(_checked_config(layer_config))
    wanted: Iterable[LayerType] = get_args(LayerType)
    if layer_type is not None:
        check_layer_type(layer_type)
        wanted = [layer_type]
    for kind in wanted:
        if kind not in config:
            try:
                config[kind] = _as_matcher(layers_of(anatomy, kind).names)
            except ValueError:
                continue
    return config


def written_config(
    anatomy: Anatomy, layer_type: LayerType, layer_config: ModelLayerConfig | None, layers: Iterable[int]
) -> str:
    """Return JSON that names the modules of these layers, for :func:`read_config`.

    It is empty if the model's own layers of the type are the same modules. A template is written as it is; for other
    matchers, the names that they returned.
    """
    matcher = _checked_config(layer_config).get(layer_type)
    if matcher is None:
        return ""
    matched, numbers = layers_of(anatomy, layer_type, layer_config), list(layers)
    with suppress(ValueError):  # the model's own layers are not found
        usual = layers_of(anatomy, layer_type).modules
        if all(usual.get(number) is matched.modules[number] for number in numbers):
            return ""
    named: Any = matcher if isinstance(matcher, str) else {number: matched.names[number] for number in numbers}
    return json.dumps({layer_type: named})


def read_config(text: str, layer_type: LayerType) -> ModelLayerConfig | None:
    """Return the ``layer_config`` that :func:`written_config` wrote, None for an empty text.

    Raises ValueError for any other text.
    """
    if not text:
        return None
    try:
        named = json.loads(text)[layer_type]
        if isinstance(named, str) and "{num}" in named:
            return {layer_type: named}
        return {layer_type: _Names({int(number): str(name) for number, name in named.items()})}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"metadata['layer_config'] must be JSON such as '{{\"{layer_type}\": \"PATH.{{num}}\"}}', got {text[:60]!r}"
        ) from error


def is_at_input(layer_type: str) -> bool:
    """Return True for the layer types whose activation is their module's input: ``heads`` and ``neurons``."""
    return layer_type in _AT_INPUT


def check_layer_type(layer_type: object) -> None:
    """Raise ValueError unless ``layer_type`` is a :data:`LayerType`."""
    if layer_type not in get_args(LayerType):
        raise ValueError(f"unknown layer type {layer_type!r}; expected one of {', '.join(get_args(LayerType))}")


def _checked_config(layer_config: object) -> Mapping[LayerType, LayerMatcher]:
    if layer_config is None:
        return {}
    if not isinstance(layer_config, Mapping):
        hint = ""
        if not isinstance(layer_config, str):
            with suppress(TypeError, ValueError, RuntimeError):
                hint = f"; did you mean multiplier={float(layer_config)}?"  # type: ignore[arg-type]
        raise TypeError(
            "layer_config must be a mapping from layer types to matchers, such as "
            f"{{'mlp': 'model.layers.{{num}}.mlp'}}, got {layer_config!r}{hint}"
        )
    for layer_type in layer_config:
        check_layer_type(layer_type)
    return layer_config


def _matched(model: nn.Module, matcher: LayerMatcher) -> dict[int, str]:
    """Return the names of the modules that a matcher matches, by number; a template's numbers may have gaps."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if isinstance(matcher, str):
        if "{num}" not in matcher:
            raise ValueError(f"{_EXPECTED_MATCHER}, got {matcher!r}")
        pattern = re.compile(
            re.escape(matcher).replace(re.escape("{num}"), r"(\d+)", 1).replace(re.escape("{num}"), r"\1")
        )
        found = ((match, name) for name in names if (match := pattern.fullmatch(name)))
        return dict(sorted((int(match[1]), name) for match, name in found))
    if not callable(matcher):
        raise TypeError(f"{_EXPECTED_MATCHER}, got {matcher!r}")
    if isinstance(matcher, _Names):
        return {number: name for number, name in matcher.names.items() if name in names}
    matches: dict[int, str] = {}
    while len(matches) < len(names) and (name := matcher(model, len(matches))) in names:
        matches[len(matches)] = name
    return matches


@dataclass(frozen=True)
class _Names:
    """A matcher for layers that fit no template; unlike other callables it may have gaps."""

    names: dict[int, str]

    def __call__(self, _model: nn.Module, number: int) -> str:
        return self.names.get(number, "")


def _as_matcher(names: dict[int, str]) -> LayerMatcher:
    """Return a template if one fits all names, else a callable."""
    templates = {re.sub(rf"\.{number}(\.|$)", r".{num}\1", name, count=1) for number, name in names.items()}
    template = templates.pop()
    if not templates and all(template.format(num=number) == name for number, name in names.items()):
        return template
    return _Names(names)
