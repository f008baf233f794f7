"""Where a model's parts stand, and how to run it and listen to it.

This wing alone knows how Hugging Face's models are built.
It finds the text decoder, its blocks and their parts, attaches hooks to them, and runs passes in which layers are read.
It knows nothing of directions, selectors or prompts.
"""

from steering_vectors._models.anatomy import (
    configured,
    decoder_blocks,
    is_encoder_decoder,
    known_templates,
    layer_widths,
    learns_prompts,
    list_paths,
    part_path,
    pass_modules,
    puts_columns_first,
    takes_tokens_again,
    text_config,
)
from steering_vectors._models.axes import along_tokens, by_tokens
from steering_vectors._models.hooks import (
    Removable,
    activation_of,
    after_forward,
    attach_all,
    before_forward,
    has_hooks_of_users,
    input_of,
    never_compiled,
    remove_all,
    unless_removed,
    with_activation,
    with_input,
)
from steering_vectors._models.running import (
    check_unsharded,
    input_device,
    is_sharded,
    kept_states,
    read_pass,
    stateful_modules,
    virtual_tokens,
    without_data_parallelism,
)

__all__ = [
    "Removable",
    "activation_of",
    "after_forward",
    "along_tokens",
    "attach_all",
    "before_forward",
    "by_tokens",
    "check_unsharded",
    "configured",
    "decoder_blocks",
    "has_hooks_of_users",
    "input_device",
    "input_of",
    "is_encoder_decoder",
    "is_sharded",
    "kept_states",
    "known_templates",
    "layer_widths",
    "learns_prompts",
    "list_paths",
    "never_compiled",
    "part_path",
    "pass_modules",
    "puts_columns_first",
    "read_pass",
    "remove_all",
    "stateful_modules",
    "takes_tokens_again",
    "text_config",
    "unless_removed",
    "virtual_tokens",
    "with_activation",
    "with_input",
    "without_data_parallelism",
]
