"""How many tokens a model has position embeddings for, against the model itself."""

import pytest
import torch
from transformers import PreTrainedModel

from steering_vectors import read_activations
from steering_vectors._models import anatomy_of
from tests import tiny

POSITIONS = 128


def runs(model: PreTrainedModel, tokens: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.full((1, tokens), 7))
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_are_where_the_model_begins_to_fail(architecture: str) -> None:
    model = tiny.shared(architecture)
    most = anatomy_of(model).most_tokens
    if most is None:
        assert runs(model, 2 * POSITIONS)
    else:
        assert runs(model, most)
        assert not runs(model, most + 1)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's and transformers' own
def test_virtual_tokens_take_some() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.build("gpt2"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    assert anatomy_of(model).most_tokens == POSITIONS - 5
    read_activations(model, tiny.tokenizer(), ["a" * (POSITIONS - 5)], layers=1)
    with pytest.raises(ValueError, match=r"prompt 0: the prompt has 124 tokens, but .* for only 123: shorten it"):
        read_activations(model, tiny.tokenizer(), ["a" * (POSITIONS - 4)], layers=1)
