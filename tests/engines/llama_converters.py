"""llama.cpp's own converters, out of its source: models and adapters of Hugging Face as GGUF files in F32."""

import subprocess
import sys
from pathlib import Path

SOURCE = Path(sys.prefix) / "llama.cpp"
# Converts a model as the program convert_hf_to_gguf.py does, but without a tokenizer.
_MODEL = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf, torch
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

def without_vocabulary(self):
    self.gguf_writer.add_tokenizer_model("none")
    if not any(key.endswith(".vocab_size") for data in self.gguf_writer.kv_data for key in data):
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

folder, path = map(Path, sys.argv[2:])
kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
kind.set_vocab = without_vocabulary
with torch.inference_mode():
    kind(folder, gguf.LlamaFileType.ALL_F32, path).write()
"""


def convert_model(folder: Path, path: Path) -> Path:
    """Convert a model that was saved by ``save_pretrained``."""
    return _run(["-c", _MODEL, str(SOURCE), str(folder), str(path)], path)


def convert_adapter(folder: Path, base: Path, path: Path) -> Path:
    """Convert a LoRA adapter of PEFT as a user does."""
    program = str(SOURCE / "convert_lora_to_gguf.py")
    return _run([program, "--base", str(base), "--outfile", str(path), "--outtype", "f32", str(folder)], path)


def _run(arguments: list[str], path: Path) -> Path:
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(run.stderr[-2000:])
    assert path.is_file()
    return path
