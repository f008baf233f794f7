"""The notebooks' model out of the environment, under its name on the Hugging Face hub, so that no network is needed."""

import sys
from pathlib import Path

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# A build stays within its time on a busy machine if its processes don't fight for the cores.
ONE_THREAD = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"], "1")
FOLDER = Path(sys.prefix) / "share" / "smollm2-135m-instruct"


def offline_environment(cache: Path) -> dict[str, str]:
    """Environment variables with which ``from_pretrained(NAME)`` reads FOLDER; ``cache`` is made for it."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    if not repository.exists():
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("local", encoding="utf-8")
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / "local").symlink_to(FOLDER, target_is_directory=True)
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
