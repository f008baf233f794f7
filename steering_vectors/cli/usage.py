"""Errors of usage, which end the program with exit code 2."""

from __future__ import annotations

from typing import Any

import typer

# Typer exports only the last of these; before 0.26 the others are click's, and since then its own.
BadParameter = typer.BadParameter
UsageError: Any = BadParameter.__base__
ClickException: Any = UsageError.__base__
