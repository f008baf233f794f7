"""Steering vectors from and for other projects: their files, tensors, features of sparse autoencoders.

Each function documents how its source or its reader numbers layers. In this library, layer l is the output of block l,
from 0.
"""

from steering_vectors.interop.llama_cpp import LlamaCppOptions, from_gguf, load_repeng, to_gguf
from steering_vectors.interop.lm_eval import steer_lm_eval, to_lm_eval
from steering_vectors.interop.pt_files import (
    load_caa,
    load_persona_vectors,
    load_refusal_direction,
    to_caa,
    to_persona_vectors,
    to_refusal_direction,
)
from steering_vectors.interop.values import from_sae, from_tensors

__all__ = [
    "LlamaCppOptions",
    "from_gguf",
    "from_sae",
    "from_tensors",
    "load_caa",
    "load_persona_vectors",
    "load_refusal_direction",
    "load_repeng",
    "steer_lm_eval",
    "to_caa",
    "to_gguf",
    "to_lm_eval",
    "to_persona_vectors",
    "to_refusal_direction",
]
