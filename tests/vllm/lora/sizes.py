"""Sizes of tiny models that vLLM takes: its attention on CPUs needs heads of 32 numbers."""

from typing import Any

WIDTH = 64
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 1}
WITH_HEAD_SIZES = {**GROUPED, "head_dim": 32}
