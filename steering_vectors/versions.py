"""Print the versions that a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    *("steering-vectors", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy"),
    *("accelerate", "peft", "bitsandbytes", "torchao", "scikit-learn"),
)


def show_versions() -> None:
    """Print the versions of Python, of this package, and of the packages that it runs with.

    >>> show_versions()
    Python ...
    """
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
