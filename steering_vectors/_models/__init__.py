"""Find a model's parts, attach hooks to them, and run the model.

This subpackage alone knows how Hugging Face's models are built.
It finds the text decoder, its blocks and their parts, attaches hooks to them, and runs passes that read layers.
It knows nothing of directions, selectors or prompts.
"""

from steering_vectors._models.activations import activation_of, input_of, with_activation, with_input
from steering_vectors._models.anatomy import (
    Anatomy,
    anatomy_of,
    check_model,
    every_module,
    learns_prompts,
    parameters_of,
)
from steering_vectors._models.attention import Attention, MaskKinds
from steering_vectors._models.axes import along_tokens, are_columns_first, by_tokens, expand_rows
from steering_vectors._models.head import logits_of
from steering_vectors._models.hooks import (
    INPUT,
    OUTPUT,
    Attached,
    Attachment,
    Hook,
    Wrapper,
    attach_all,
    has_hooks_of_users,
    mark,
    never_compiled,
    remove_all,
    unmark,
)
from steering_vectors._models.parts import part_path
from steering_vectors._models.running import (
    check_unsharded,
    has_experts,
    is_sharded,
    kept_states,
    read_pass,
    stateful_modules,
    without_data_parallelism,
)
from steering_vectors._models.sites import Site

__all__ = [
    "INPUT",
    "OUTPUT",
    "Anatomy",
    "Attached",
    "Attachment",
    "Attention",
    "Hook",
    "MaskKinds",
    "Site",
    "Wrapper",
    "activation_of",
    "along_tokens",
    "anatomy_of",
    "are_columns_first",
    "attach_all",
    "by_tokens",
    "check_model",
    "check_unsharded",
    "every_module",
    "expand_rows",
    "has_experts",
    "has_hooks_of_users",
    "input_of",
    "is_sharded",
    "kept_states",
    "learns_prompts",
    "logits_of",
    "mark",
    "never_compiled",
    "parameters_of",
    "part_path",
    "read_pass",
    "remove_all",
    "stateful_modules",
    "unmark",
    "with_activation",
    "with_input",
    "without_data_parallelism",
]
