"""Train the demo's vectors on SmolLM2 and save them: ``python -m tests.playground.vectors FOLDER``."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import unpack_smollm2
from steering_vectors import train_steering_vector
from steering_vectors.demo import Idea, Speaker

MODEL = Path(sys.prefix) / "share" / "smollm2-135m-instruct"
LAYER = 16
IDEAS = {
    "child": Idea(),
    "joy": Idea("Answer with joy and enthusiasm.", "Answer in a sad and hopeless way."),
}


def main(folder: Path) -> None:
    if not MODEL.exists():
        unpack_smollm2(MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    speaker = Speaker(AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL))
    for name, idea in IDEAS.items():
        vector = train_steering_vector(speaker.model, speaker.tokenizer, speaker.pairs(idea), layers=LAYER)
        vector.save(folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
