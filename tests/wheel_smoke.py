"""Run by the wheel's test in an environment that has the wheel and nothing of the source."""

from importlib.metadata import version
from importlib.resources import files
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import steering_vectors
from steering_vectors import generated, train_steering_vector


def main() -> None:
    assert "site-packages" in steering_vectors.__file__, steering_vectors.__file__
    assert steering_vectors.__version__ == version("steering-vectors")
    assert files("steering_vectors").joinpath("py.typed").is_file()

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "day": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    ).eval()
    vector = train_steering_vector(model, tokenizer, [("good day", "bad day"), ("good", "bad")], batch_size=2)
    inputs = {"input_ids": torch.tensor([[1, 3]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    with vector.apply(model, multiplier=5, tokens=generated(inputs)):
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, 5)
    with TemporaryDirectory() as folder:
        vector.save_pretrained(folder)
        assert steering_vectors.SteeringVector.from_pretrained(folder) == vector
    steering_vectors.show_versions()


if __name__ == "__main__":
    main()
