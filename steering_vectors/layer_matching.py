"""From a model, a layer type and layer numbers to modules: the only place that knows how models are built."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import index as as_index
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

LayerType: TypeAlias = Literal["decoder_block", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"]
LayerMatcher: TypeAlias = str | Callable[[nn.Module, int], str]
ModelLayerConfig: TypeAlias = dict[LayerType, LayerMatcher]

# Where a block keeps its parts, by the names that transformers' models use, the most telling ones first.
_PART_PATHS: dict[str, tuple[str, ...]] = {
    "self_attn": (
        *(
            "self_attn",
            "attn",
            "attention",
            "self_attention",
            "self_att",
            "multi_head_attention",
            "rel_attn",
            "dec_attn",
        ),
        *("norm_attn_norm.attn", "temporal_block", "mixer", "layer.0.SelfAttention"),
    ),
    "mlp": (
        *("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "mlp_block", "ff", "pos_ff", "moe", "fc2"),
        *("mixer", "output.dense", "layer.2.DenseReluDense", "layer.1.DenseReluDense"),
    ),
    "input_layernorm": (
        *("input_layernorm", "ln_1", "self_attn_layer_norm", "norm1", "norm_1", "ln1", "layernorm1", "layer_norm1"),
        *("ln_attn", "attn_norm", "attention_layernorm", "operator_norm", "temporal_pre_norm", "norm"),
        *("norm_attn_norm.norm_1", "attention.ln", "attention.layer_norm", "self_att.layernorm_before_attention"),
        "layer.0.layer_norm",
    ),
    "post_attention_layernorm": (
        *(
            "post_attention_layernorm",
            "ln_2",
            "final_layer_norm",
            "norm2",
            "norm_2",
            "ln2",
            "layernorm2",
            "layer_norm2",
        ),
        *("ln_mlp", "mlp_norm", "pre_ff_layernorm", "pre_feedforward_layernorm", "pre_mlp_layernorm"),
        *("feedforward_layernorm", "ffn_norm", "channel_pre_norm", "feed_forward_layer_norm", "norm_ffn"),
        *("norm_attn_norm.norm_2", "feed_forward.layer_norm", "ffn.layernorm_before_ffn"),
        *("layer.2.layer_norm", "layer.1.layer_norm"),
    ),
}
# Names under which hybrid models keep a part of one kind in some blocks and of another in others: the class tells
# which.
_MIXED_PARTS = {"temporal_block", "mixer"}
_CLASS_OF_MIXED_PART = {"self_attn": re.compile("attention|attn", re.I), "mlp": re.compile("mlp|moe|experts", re.I)}

# Models that have no list of blocks, but one for each part: a block's last part gives its output.
_TEMPLATES: dict[str, ModelLayerConfig] = {
    "xlm": {
        "decoder_block": "transformer.layer_norm2.{num}",
        "self_attn": "transformer.attentions.{num}",
        "mlp": "transformer.ffns.{num}",
        "post_attention_layernorm": "transformer.layer_norm1.{num}",
    }
}

_LAYER_COUNTS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DECODER_NAMES = ("language_model", "text_model", "text_decoder", "decoder")


@dataclass(frozen=True)
class Layers:
    """A model's layers of one type: the modules' names by layer number, among ``count`` decoder blocks."""

    model: str
    layer_type: LayerType
    names: dict[int, str]
    count: int

    def numbers(self, layers: int | Iterable[int] | None) -> list[int]:
        """The layers asked for as numbers from 0, ascending, each once; None asks for all.

        Raises TypeError for anything but whole numbers, and ValueError for a layer that the model hasn't.
        """
        if layers is None:
            return sorted(self.names)
        asked = [layers] if hasattr(layers, "__index__") else layers
        if not isinstance(asked, Iterable) or isinstance(asked, (str, bytes)):
            raise TypeError(f"layers must be a layer number or several of them, got {layers!r}")
        numbers = sorted({self.number(layer) for layer in asked})
        if not numbers:
            raise ValueError("layers is empty: give at least one layer number, or None for all")
        return numbers

    def number(self, layer: Any) -> int:
        """One layer as a number from 0. Raises as :meth:`numbers`."""
        if isinstance(layer, bool) or not hasattr(layer, "__index__"):
            raise TypeError(f"a layer is told by a whole number, got {layer!r}")
        given = as_index(layer)
        number = given + self.count if given < 0 else given
        if not 0 <= number < self.count:
            raise ValueError(f"layer {given} of a model with {self.count} layers (0 to {self.count - 1})")
        if number not in self.names:
            raise ValueError(
                f"block {number} of {self.model} has no {self.layer_type}; blocks that have one: {sorted(self.names)}"
            )
        return number


def find_layers(
    model: nn.Module, layer_type: LayerType = "decoder_block", layer_config: ModelLayerConfig | None = None
) -> Layers:
    """The model's layers of a type.

    What ``layer_config`` says of the type is taken as it is; else the text decoder's own list of blocks is looked for,
    and in each block the part that plays the role.

    Raises TypeError if ``model`` is no module or ``layer_config`` no mapping; ValueError for an unknown layer type, a
    matcher that matches nothing, and where it is not sure which modules are meant.
    """
    check_model(model)
    check_layer_type(layer_type)
    matcher = _checked_config(layer_config).get(layer_type) or _template(model, layer_type)
    kind = type(model).__name__
    if matcher is not None:
        names = _matched(model, matcher)
        if not names:
            raise ValueError(
                f"layer_config[{layer_type!r}] = {matcher!r} matches no module of {kind}; its lists of modules: "
                f"{_list_paths(model)}"
            )
        return Layers(kind, layer_type, names, max(names) + 1)
    path, blocks = _decoder_blocks(model)
    if layer_type == "decoder_block":
        return Layers(kind, layer_type, {n: f"{path}.{n}" for n in range(len(blocks))}, len(blocks))
    parts = {n: _part_path(block, layer_type) for n, block in enumerate(blocks)}
    names = {n: f"{path}.{n}.{part}" for n, part in parts.items() if part is not None}
    if not names:
        children = sorted({name for block in blocks for name, _ in block.named_children()})
        raise ValueError(
            f"no {layer_type} found in the blocks of {kind}, whose parts are {children}; if one of them is meant, give "
            f"layer_config={{{layer_type!r}: '{path}.{{num}}.NAME'}}"
        )
    return Layers(kind, layer_type, names, len(blocks))


def collect_matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> list[str]:
    """The names of the modules that ``layer_matcher`` gives for 0, 1, 2, … as far as the model has them.

    ``layer_matcher`` is a template such as ``"transformer.h.{num}.mlp"``, or a callable ``(model, number) → name``.
    Raises ValueError for a template without ``{num}``.

    >>> collect_matching_layers(model, "transformer.h.{num}.mlp")
    ['transformer.h.0.mlp', 'transformer.h.1.mlp']
    """
    matches = _matched(model, layer_matcher)
    return [matches[n] for n in range(len(matches)) if set(range(n + 1)) <= matches.keys()]


def get_num_matching_layers(model: nn.Module, layer_matcher: LayerMatcher) -> int:
    """How many modules :func:`collect_matching_layers` finds.

    >>> get_num_matching_layers(model, "transformer.h.{num}")
    2
    """
    return len(collect_matching_layers(model, layer_matcher))


def guess_and_enhance_layer_config(
    model: nn.Module, layer_config: ModelLayerConfig | None = None, layer_type: LayerType | None = None
) -> ModelLayerConfig:
    """A copy of ``layer_config`` with matchers for the layer types that it lacks, or for ``layer_type`` alone.

    Types that the model hasn't, or that can't be told, stay absent. Errors are those of :func:`find_layers` but for
    that.

    >>> guess_and_enhance_layer_config(model, layer_type="mlp")
    {'mlp': 'transformer.h.{num}.mlp'}
    """
    check_model(model)
    config: ModelLayerConfig = dict(_checked_config(layer_config))
    wanted: Iterable[LayerType] = get_args(LayerType)
    if layer_type is not None:
        check_layer_type(layer_type)
        wanted = [layer_type]
    for kind in wanted:
        if kind not in config:
            try:
                config[kind] = _as_matcher(find_layers(model, kind).names)
            except ValueError:
                continue
    return config


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if isinstance(model, nn.Module):
        return
    advice = ": pass its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
    raise TypeError(f"model must be a torch.nn.Module such as a Hugging Face model, got {type(model).__name__}{advice}")


def check_layer_type(layer_type: object) -> None:
    """Raise ValueError unless ``layer_type`` is a :data:`LayerType`."""
    if layer_type not in get_args(LayerType):
        raise ValueError(f"unknown layer type {layer_type!r}; expected one of {', '.join(get_args(LayerType))}")


def pass_modules(model: nn.Module) -> list[nn.Module]:
    """The modules from ``model`` to its text decoder that take a whole pass's arguments, outermost first."""
    decoder = _text_decoder(model)
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    names = path.split(".") if path else []
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]


def layer_width(model: nn.Module) -> int | None:
    """The width of the text decoder, as its config says; None where it doesn't.

    A few models stream several times that width from block to block.
    """
    width = getattr(_text_config(_configured(model)), "hidden_size", None)
    return width if isinstance(width, int) else None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's config says so."""
    return bool(getattr(getattr(_configured(model), "config", None), "is_encoder_decoder", False))


def input_device(model: nn.Module) -> torch.device:
    """The device that the model's input belongs on."""
    get_embeddings = getattr(_configured(model), "get_input_embeddings", None)
    embeddings = get_embeddings() if callable(get_embeddings) else None
    modules = [module for module in (embeddings, model) if isinstance(module, nn.Module)]
    devices = (parameter.device for module in modules for parameter in module.parameters())
    # Weights that are offloaded stand on no device; the hooks that bring them move the input too.
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def call_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """One pass over ``input_ids``, ``attention_mask`` and ``position_ids``, without a cache and with few logits.

    Arguments that the model's forward method doesn't know are left out.
    """
    known = inspect.signature(_configured(model).forward).parameters
    options = {"use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
    kwargs = {name: value for name, value in {**inputs, **options}.items() if name in known}
    if "input_ids" in kwargs:
        model(**kwargs)
    else:
        model(inputs["input_ids"], **kwargs)


def _decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path in ``model`` and the list of the text decoder's blocks."""
    decoder = _text_decoder(model)
    candidates = [(path, blocks) for path, blocks in _block_lists(model) if _contains(decoder, blocks)]
    counts = _layer_counts(_text_config(_configured(model)))
    fitting = next((found for n in counts if (found := [c for c in candidates if len(c[1]) == n])), candidates)
    if len(fitting) != 1:
        raise ValueError(
            f"can't tell which modules are the decoder blocks of {type(model).__name__}; candidates: "
            f"{[f'{path}.{{num}}' for path, _ in fitting] or _list_paths(model)}; "
            f"name them by layer_config={{'decoder_block': 'PATH.{{num}}'}}"
        )
    return fitting[0]


def _text_decoder(model: nn.Module) -> nn.Module:
    """The innermost module that holds the text decoder: no vision or audio tower, no encoder beside a decoder."""
    decoder = _configured(model)
    while (inner := next(_inner_decoders(decoder), None)) is not None:
        decoder = inner
    return decoder


def _inner_decoders(module: nn.Module) -> Iterator[nn.Module]:
    """What a module itself calls its decoder, of its submodules that have blocks."""
    get_decoder = getattr(module, "get_decoder", None)
    found = [getattr(module, name, None) for name in _DECODER_NAMES]
    if callable(get_decoder):
        with suppress(AttributeError, NotImplementedError):
            found.append(get_decoder())
    found.append(getattr(module, "base_model", None))
    for inner in found:
        if (
            isinstance(inner, nn.Module)
            and inner is not module
            and _contains(module, inner)
            and any(_block_lists(inner))
        ):
            yield inner


def _configured(model: nn.Module) -> nn.Module:
    """The outermost module with a config of its own, inside wrappers such as DistributedDataParallel; else the
    model.
    """
    return next((module for module in model.modules() if hasattr(module, "config")), model)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    if not callable(get_text_config):
        return config
    try:
        return get_text_config(decoder=True)
    except (TypeError, ValueError):
        return config


def _layer_counts(config: Any) -> list[int]:
    counts = (getattr(config, name, None) for name in _LAYER_COUNTS)
    return [count for count in counts if isinstance(count, int)]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of modules with parts of their own that stand in no other list (as experts do)."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(outer) for outer in inside):
            inside.append(f"{path}.")
            if len(module) > 0 and all(any(True for _ in member.children()) for member in module):
                yield path, module


def _template(model: nn.Module, layer_type: LayerType) -> str | None:
    """Where the table says the layers are, from ``model`` on."""
    configured = _configured(model)
    templates = _TEMPLATES.get(getattr(getattr(configured, "config", None), "model_type", ""), {})
    template = templates.get(layer_type)
    if not isinstance(template, str):
        return None
    inside = template.partition(".")[2]  # as the base model names it
    outer = next((name for name, module in model.named_modules() if module is configured), "")
    candidates = [".".join(filter(None, (outer, path))) for path in (template, inside)]
    return next((candidate for candidate in candidates if _matched(model, candidate)), None)


def _list_paths(model: nn.Module) -> list[str]:
    return [f"{path}.{{num}}" for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(part is inner for inner in module.modules())


def _part_path(block: nn.Module, layer_type: str) -> str | None:
    for path in _PART_PATHS[layer_type]:
        try:
            part = block.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(part, (nn.ModuleList, nn.Identity)):
            continue
        class_name = _CLASS_OF_MIXED_PART.get(layer_type) if path in _MIXED_PARTS else None
        if class_name is not None and not class_name.search(type(part).__name__):
            continue
        return path
    return None


def _checked_config(layer_config: object) -> Mapping[LayerType, LayerMatcher]:
    if layer_config is None:
        return {}
    if not isinstance(layer_config, Mapping):
        hint = f"; did you mean multiplier={layer_config}?" if isinstance(layer_config, (int, float)) else ""
        raise TypeError(f"layer_config must be a mapping from layer types to matchers, got {layer_config!r}{hint}")
    for layer_type in layer_config:
        check_layer_type(layer_type)
    return layer_config


def _matched(model: nn.Module, matcher: LayerMatcher) -> dict[int, str]:
    """The names that a matcher gives, by number; a template's numbers may have gaps."""
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if isinstance(matcher, str):
        if "{num}" not in matcher:
            raise ValueError(f"a layer matcher is a callable or a template with {{num}} in it, got {matcher!r}")
        pattern = re.compile(
            re.escape(matcher).replace(re.escape("{num}"), r"(\d+)", 1).replace(re.escape("{num}"), r"\1")
        )
        found = ((match, name) for name in names if (match := pattern.fullmatch(name)))
        return dict(sorted((int(match[1]), name) for match, name in found))
    if not callable(matcher):
        raise TypeError(f"a layer matcher is a callable or a template with {{num}} in it, got {matcher!r}")
    matches: dict[int, str] = {}
    while len(matches) < len(names) and (name := matcher(model, len(matches))) in names:
        matches[len(matches)] = name
    return matches


def _as_matcher(names: dict[int, str]) -> LayerMatcher:
    """A template for the names where one fits all, else a callable."""
    templates = {re.sub(rf"\.{number}(\.|$)", r".{num}\1", name, count=1) for number, name in names.items()}
    template = templates.pop()
    if not templates and all(template.format(num=number) == name for number, name in names.items()):
        return template
    return lambda _model, number: names.get(number, "")
