"""Serve many vectors at once from one vLLM server: each request names its vectors.

The server needs ``STEERING_VECTORS_DIR``, a folder of files that :meth:`~steering_vectors.SteeringVector.save` wrote.
What is here is for its clients, which need no vLLM.
"""

from steering_vectors.serving.client import check
from steering_vectors.serving.spec import request

__all__ = ["check", "request"]
