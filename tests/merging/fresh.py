"""Models that a fresh process loads, without this library, and the logits that they give there."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tests import tiny

IDS = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 300, 24, 5, 6]])
_SCRIPT = """
import sys
sys.modules["steering_vectors"] = None  # an import of it fails
import torch, transformers
ids, folders = torch.load(sys.argv[1])
made = {}
for folder in folders:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        made[folder] = model(ids, use_cache=False).logits
torch.save(made, sys.argv[2])
"""


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(ids, use_cache=False).logits
    return made


def logits_in_a_fresh_process(
    folders: Iterable[Path | str], beside: Path, ids: Tensor = IDS, script: str = _SCRIPT
) -> dict[str, Tensor]:
    """The logits by folder; the process is stopped by missing weights, and by those that it has no place for."""
    given, made = beside / "given.pt", beside / "made.pt"
    torch.save((ids, [str(folder) for folder in folders]), given)
    run = subprocess.run(
        [sys.executable, "-c", script, str(given), str(made)], cwd=beside, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(torch.load(made))


def lively(name: str, **overrides: object) -> torch.nn.Module:
    """A tiny model whose biases and norms are random too."""
    model = tiny.build(name, **overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
