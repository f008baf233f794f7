"""Train, apply and record steering vectors for Hugging Face language models."""

from steering_vectors._steering import active_patches
from steering_vectors._version import __version__ as __version__
from steering_vectors.ablation import ablate_everywhere
from steering_vectors.aggregators import (
    Accumulator,
    Aggregator,
    StreamingAggregator,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
)
from steering_vectors.layer_matching import (
    LayerMatcher,
    LayerType,
    ModelLayerConfig,
    get_num_matching_layers,
    guess_and_enhance_layer_config,
)
from steering_vectors.reading import read_activations, residual_norms
from steering_vectors.record_activations import record_activations
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
    Selector,
    TokenPositions,
    at,
    completion,
    from_index,
    generated,
    prompted,
)
from steering_vectors.tracing import LayerSummary, SteeringTrace, trace_steering
from steering_vectors.train_steering_vector import (
    SteeringVectorTrainingSample,
    aggregate_activations,
    extract_activations,
    train_steering_vector,
)
from steering_vectors.versions import show_versions

__all__ = [
    "Accumulator",
    "Aggregator",
    "LayerMatcher",
    "LayerSummary",
    "LayerType",
    "ModelLayerConfig",
    "PatchDeltaOperator",
    "Selector",
    "SteeringPatchHandle",
    "SteeringTrace",
    "SteeringVector",
    "SteeringVectorTrainingSample",
    "StreamingAggregator",
    "TokenPositions",
    "ablate_everywhere",
    "ablation_operator",
    "ablation_then_addition_operator",
    "active_patches",
    "addition_operator",
    "aggregate_activations",
    "at",
    "clamp_operator",
    "completion",
    "extract_activations",
    "from_index",
    "generated",
    "get_num_matching_layers",
    "guess_and_enhance_layer_config",
    "logistic_aggregator",
    "mean_aggregator",
    "norm_preserving_operator",
    "pca_aggregator",
    "prompted",
    "read_activations",
    "record_activations",
    "residual_norms",
    "rotation_operator",
    "show_versions",
    "trace_steering",
    "train_steering_vector",
]
