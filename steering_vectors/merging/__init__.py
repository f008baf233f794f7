"""Write steering into weights: merged models and adapters, which run where this library isn't installed.

Everything here calls the library's public functions only.
"""

from steering_vectors.merging.adapters import Adapter, to_adapter
from steering_vectors.merging.biases import merge
from steering_vectors.merging.folders import check_base
from steering_vectors.merging.projecting import merge_ablation

__all__ = ["Adapter", "check_base", "merge", "merge_ablation", "to_adapter"]
