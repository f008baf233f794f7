"""Follow a model's forward passes: the pass that each thread is in, and the positions of its tokens.

A pass's arguments and its cache determine which of a row's tokens each column holds.
Hooks on the modules around a pass record both. Parts that gradient checkpointing reruns belong to their first pass.
Nothing here changes an activation.
"""

from steering_vectors._passes.forward_pass import ForwardPass
from steering_vectors._passes.threads import this_thread
from steering_vectors._passes.tracker import Need, PassTracker

__all__ = ["ForwardPass", "Need", "PassTracker", "this_thread"]
