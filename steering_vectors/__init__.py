"""Train, apply and record steering vectors for Hugging Face language models.

Each name is imported when it is first used, so that to import the package imports no PyTorch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from steering_vectors._version import __version__ as __version__

if TYPE_CHECKING:
    from steering_vectors._steering import SteeringContext, active_patches
    from steering_vectors.ablation import ablate_everywhere
    from steering_vectors.aggregators import (
        Accumulator,
        Aggregator,
        SetAggregator,
        StreamingAggregator,
        geometric_median_aggregator,
        logistic_aggregator,
        mean_aggregator,
        pca_aggregator,
        winsorized_aggregator,
    )
    from steering_vectors.layer_matching import (
        LayerMatcher,
        LayerType,
        ModelLayerConfig,
        get_num_matching_layers,
        guess_and_enhance_layer_config,
    )
    from steering_vectors.monitoring import SteeringMonitor, monitor
    from steering_vectors.prompts import answer_ids, prompt_ids
    from steering_vectors.reading import projection_quantiles, read_activations, residual_norms
    from steering_vectors.record_activations import record_activations
    from steering_vectors.steering import steer
    from steering_vectors.steering_operators import (
        PatchDeltaOperator,
        ablation_operator,
        ablation_then_addition_operator,
        addition_operator,
        clamp_operator,
        norm_preserving_operator,
        rotation_operator,
    )
    from steering_vectors.steering_vector import SteeringPatchHandle, SteeringVector
    from steering_vectors.token_selection import (
        CombinableSelector,
        Selector,
        TokenPositions,
        after,
        at,
        completion,
        from_index,
        generated,
        prompted,
        select,
    )
    from steering_vectors.tracing import LayerSummary, SteeringTrace, trace_steering
    from steering_vectors.train_steering_vector import (
        SteeringVectorTrainingSample,
        aggregate_activations,
        extract_activations,
        train_steering_vector,
    )
    from steering_vectors.unembedding import LayerTokens, TopTokens, unembed
    from steering_vectors.versions import show_versions

__all__ = [
    "Accumulator",
    "Aggregator",
    "CombinableSelector",
    "LayerMatcher",
    "LayerSummary",
    "LayerTokens",
    "LayerType",
    "ModelLayerConfig",
    "PatchDeltaOperator",
    "Selector",
    "SetAggregator",
    "SteeringContext",
    "SteeringMonitor",
    "SteeringPatchHandle",
    "SteeringTrace",
    "SteeringVector",
    "SteeringVectorTrainingSample",
    "StreamingAggregator",
    "TokenPositions",
    "TopTokens",
    "ablate_everywhere",
    "ablation_operator",
    "ablation_then_addition_operator",
    "active_patches",
    "addition_operator",
    "after",
    "aggregate_activations",
    "answer_ids",
    "at",
    "clamp_operator",
    "completion",
    "extract_activations",
    "from_index",
    "generated",
    "geometric_median_aggregator",
    "get_num_matching_layers",
    "guess_and_enhance_layer_config",
    "logistic_aggregator",
    "mean_aggregator",
    "monitor",
    "norm_preserving_operator",
    "pca_aggregator",
    "projection_quantiles",
    "prompt_ids",
    "prompted",
    "read_activations",
    "record_activations",
    "residual_norms",
    "rotation_operator",
    "select",
    "show_versions",
    "steer",
    "trace_steering",
    "train_steering_vector",
    "unembed",
    "winsorized_aggregator",
]

# By module, the public names that are imported when they are first used.
_NAMES = {
    "_steering": ("SteeringContext", "active_patches"),
    "ablation": ("ablate_everywhere",),
    "aggregators": (
        "Accumulator",
        "Aggregator",
        "SetAggregator",
        "StreamingAggregator",
        "geometric_median_aggregator",
        "logistic_aggregator",
        "mean_aggregator",
        "pca_aggregator",
        "winsorized_aggregator",
    ),
    "layer_matching": (
        "LayerMatcher",
        "LayerType",
        "ModelLayerConfig",
        "get_num_matching_layers",
        "guess_and_enhance_layer_config",
    ),
    "monitoring": ("SteeringMonitor", "monitor"),
    "prompts": ("answer_ids", "prompt_ids"),
    "reading": (
        "projection_quantiles",
        "read_activations",
        "residual_norms",
    ),
    "record_activations": ("record_activations",),
    "steering": ("steer",),
    "steering_operators": (
        "PatchDeltaOperator",
        "ablation_operator",
        "ablation_then_addition_operator",
        "addition_operator",
        "clamp_operator",
        "norm_preserving_operator",
        "rotation_operator",
    ),
    "steering_vector": (
        "SteeringPatchHandle",
        "SteeringVector",
    ),
    "token_selection": (
        "CombinableSelector",
        "Selector",
        "TokenPositions",
        "after",
        "at",
        "completion",
        "from_index",
        "generated",
        "prompted",
        "select",
    ),
    "tracing": (
        "LayerSummary",
        "SteeringTrace",
        "trace_steering",
    ),
    "train_steering_vector": (
        "SteeringVectorTrainingSample",
        "aggregate_activations",
        "extract_activations",
        "train_steering_vector",
    ),
    "unembedding": ("LayerTokens", "TopTokens", "unembed"),
    "versions": ("show_versions",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
# Public modules, whose attributes are reached without importing them.
_MODULES = {
    *(
        "ablation",
        "aggregators",
        "evaluation",
        "hub",
        "interop",
        "layer_matching",
        "merging",
        "monitoring",
        "plots",
        "prompts",
        "reading",
        "serving",
        "steering",
    ),
    *("steering_operators", "steering_vector", "token_selection", "torch_utils", "tracing", "unembedding", "versions"),
}

if not TYPE_CHECKING:  # to a type checker any name would be there

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *_MODULES})


class _Package(ModuleType):
    """The package, in which no module takes the place of the function that bears its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule in its package once it is imported.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
