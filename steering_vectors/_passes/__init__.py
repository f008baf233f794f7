"""Follow a model's forward passes: the pass that each thread is in, and the positions of its tokens.

A pass's arguments and its cache determine which of a row's tokens each column holds.
Hooks on the modules around a pass record both. Parts that gradient checkpointing reruns belong to their first pass.
Nothing here changes an activation.
"""

from steering_vectors._passes.tracker import ForwardPass, Need, PassTracker, this_thread

__all__ = ["ForwardPass", "Need", "PassTracker", "this_thread"]
