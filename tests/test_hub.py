"""Vectors in folders, and on a stand-in of the Hugging Face hub."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steering_vectors import SteeringVector, generated, hub, train_steering_vector
from tests import tiny
from tests.hub_stand_in import Repository, running_hub
from tests.test_files import run_python


def trained() -> SteeringVector:
    vector = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), [("I love it", "I hate it")], layers=[0, 2])
    return SteeringVector(vector.layer_activations, metadata={**vector.metadata, "base_model": "someone/some-model"})


class TestFolders:
    def test_a_vector_comes_back_as_it_was(self, tmp_path: Path) -> None:
        vector = trained()
        vector.save_pretrained(tmp_path / "new" / "joy")
        loaded = SteeringVector.from_pretrained(tmp_path / "new" / "joy")
        assert loaded == vector == SteeringVector.from_pretrained(str(tmp_path / "new" / "joy"))
        assert loaded.metadata.items() >= vector.metadata.items()

    def test_a_card_that_is_there_stays(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        trained().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_a_folder_without_a_vector_and_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"there is no file .*steering_vector\.safetensors"):
            SteeringVector.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is neither an existing folder nor a valid repository name"):
            SteeringVector.from_pretrained(tmp_path / "not there")
        with pytest.raises(ValueError, match="is a folder, so it has no revision 'v1'"):
            SteeringVector.from_pretrained(tmp_path, revision="v1")


class TestTheCard:
    def test_says_what_the_vector_is_and_how_it_was_made(self) -> None:
        card = hub.model_card(trained(), "me/joy")
        assert card.startswith("---\nbase_model: someone/some-model\nlibrary_name: steering-vectors\ntags:\n")
        for words in (
            "# me/joy",
            "for [someone/some-model](https://huggingface.co/someone/some-model)",
            "directions of 32 numbers\nfor the outputs of layers 0, 2 (`decoder_block`, counted from 0)",
            "| as shares of the activations' norms | 0: ",
            "| method | `mean_aggregator()` |",
            "| samples | `1` |",
            "| what was read | `read_token_index=-1` |",
            "| norms by layer | 0: ",
        ):
            assert words in card

    @pytest.mark.parametrize("name", ["/home/me/model", "./model/here", "model", "a/b/c", ""])
    def test_names_no_model_that_is_a_path(self, name: str) -> None:
        card = hub.model_card(SteeringVector({1: [1.0]}, metadata={"base_model": name}), "me/joy")
        assert "base_model" not in card.split("\n---")[0]
        assert "huggingface.co" not in card
        shown = name.rpartition("/")[2]
        assert (f"| model | `{shown} (a local folder)` |" in card) == bool(shown)

    def test_a_path_is_not_told_to_the_world(self) -> None:
        card = hub.model_card(SteeringVector({1: [1.0]}, metadata={"base_model": "/home/me/model"}), "me/joy")
        assert "/home/me" not in card

    def test_metadata_can_not_break_out_of_its_table(self) -> None:
        card = hub.model_card(SteeringVector({1: [1.0]}, metadata={"method": "a`|b\n# c"}), "me/joy")
        assert "| method | `a'\\|b # c` |" in card

    def test_its_snippet_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vector = trained()
        hub.save_pretrained(vector, tmp_path / "me" / "joy", repo_id="me/joy")
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "me" / "joy" / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)  # there "me/joy" is the folder
        model: Any = tiny.build("llama")
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: model)
        tokenizer = tiny.tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids by default
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
        names: dict[str, Any] = {}
        exec(code, names)
        inputs = tokenizer("I think", return_tensors="pt")
        with vector[2].apply(model, tokens=generated(inputs)):  # the snippet names one layer of several
            assert torch.equal(names["output"], model.generate(**inputs, max_new_tokens=40))


PROGRAM = """
import json, sys, torch
from steering_vectors import SteeringVector

found = {}
vector = SteeringVector.load(sys.argv[1])
found["first"] = vector.push_to_hub("me/joy", private=True)
(2 * vector).push_to_hub("me/joy", commit_message="Twice as strong")
found["loaded"] = SteeringVector.from_pretrained("me/joy") == 2 * vector
found["at the first commit"] = SteeringVector.from_pretrained("me/joy", revision=found["first"].split("/")[-1]) == vector
found["metadata"] = dict(SteeringVector.from_pretrained("me/joy").metadata)
vector.push_to_hub("calm")
found["by its short name"] = SteeringVector.from_pretrained("me/calm") == vector
try:
    SteeringVector({}).push_to_hub("me/nothing")
except ValueError as error:
    found["nothing"] = str(error)
for name in ("me/none", "me/empty"):
    try:
        SteeringVector.from_pretrained(name)
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
json.dump(found, open(sys.argv[2], "w"))
"""


def test_a_vector_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    vector = trained()
    vector.save(tmp_path / "vector.safetensors")
    with running_hub() as stand_in:
        stand_in.repositories["me/empty"] = Repository(private=False, commits=[{}])
        run_python(
            PROGRAM,
            str(tmp_path / "vector.safetensors"),
            str(tmp_path / "found.json"),
            HF_ENDPOINT=stand_in.url,
            HF_HOME=str(tmp_path / "home"),
            HF_TOKEN="hf_secret",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_OFFLINE="0",
        )
    found = json.loads((tmp_path / "found.json").read_text())
    repository = stand_in.repositories["me/joy"]
    assert found["first"] == f"{stand_in.url}/me/joy/commit/{1:040x}"
    assert found["loaded"]
    assert found["at the first commit"]
    assert found["by its short name"]
    assert found["nothing"] == "this steering vector has no directions: there is nothing to save"
    assert sorted(stand_in.repositories) == ["me/calm", "me/empty", "me/joy"]
    assert found["metadata"]["derivation"].startswith("2 * [mean_aggregator() of 1 samples ")
    assert repository.private
    assert stand_in.messages == ["Upload a steering vector", "Twice as strong", "Upload a steering vector"]
    assert stand_in.tokens == {"Bearer hf_secret"}
    assert sorted(repository.files) == ["README.md", "steering_vector.safetensors"]
    assert repository.commits[0]["README.md"] == repository.commits[1]["README.md"]  # a card that is there stays
    assert found["me/none"][0] == "RepositoryNotFoundError"
    assert found["me/empty"][0] == "FileNotFoundError"
    assert "me/empty on the Hugging Face hub has no steering_vector.safetensors" in found["me/empty"][1]
    assert os.environ.get("HF_ENDPOINT") != stand_in.url


def test_without_a_connection_nothing_is_said_of_the_repository(tmp_path: Path) -> None:
    program = (
        "from steering_vectors import SteeringVector\n"
        "try:\n    SteeringVector.from_pretrained('me/joy')\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run_python(program, **offline).stdout.strip() in ("LocalEntryNotFoundError", "OfflineModeIsEnabled")


@pytest.mark.parametrize("text", ["a\rb", "a\u2028b", "a\n\nb"], ids=repr)
def test_lines_of_the_card_stay_lines(text: str) -> None:
    card = hub.model_card(SteeringVector({1: [1.0]}, metadata={"method": text}), 'me/"joy')
    assert "| method | `a b` |" in card.split("\n")
    assert 'from_pretrained("me/\\"joy")' in card


def test_nothing_is_made_for_a_vector_without_directions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directions"):
        SteeringVector({}).save_pretrained(tmp_path / "none")
    assert os.listdir(tmp_path) == []
