"""Follow a model's forward passes: which one a thread is in, and where its tokens stand.

A pass's arguments and its cache say which of a row's tokens each column holds.
Hooks on the modules around a pass note both, and gradient checkpointing finds its first pass again.
Nothing here changes an activation.
"""

from steering_vectors._passes.tracker import ForwardPass, Need, PassTracker, this_thread

__all__ = ["ForwardPass", "Need", "PassTracker", "this_thread"]
