"""Save and load steering vectors in folders and on the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from steering_vectors.steering_vector import SteeringVector

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

FILE, CARD = "steering_vector.safetensors", "README.md"
_LABELS = {  # of the metadata that the card shows
    "base_model": "model",
    "base_model_revision": "revision of the model",
    "dtype": "dtype of the model",
    "method": "method",
    "read": "what was read",
    "layer_config": "modules",
    "samples": "samples",
    "samples_hash": "SHA-256 of their token ids",
    "chat_template_hash": "SHA-256 of the chat template",
    "derivation": "made as",
    "versions": "versions",
}


def save_pretrained(vector: SteeringVector, folder: str | os.PathLike[str], *, repo_id: str | None = None) -> None:
    """Write ``steering_vector.safetensors`` and a model card into a folder, created if needed.

    The card is ``README.md``; an existing one is kept. Errors are those of
    :meth:`~steering_vectors.SteeringVector.save`.

    Args:
        vector: The vector to save.
        folder: The folder's path.
        repo_id: The name in the card's example of loading the vector; by default the folder's.

    >>> save_pretrained(vector, folder / "joy")
    >>> sorted(path.name for path in (folder / "joy").iterdir())
    ['README.md', 'steering_vector.safetensors']
    """
    target = Path(folder)
    card = model_card(vector, repo_id or target.resolve().name)  # raises for a vector without directions
    target.mkdir(parents=True, exist_ok=True)
    vector.save(target / FILE)
    if not (target / CARD).exists():
        (target / CARD).write_text(card, encoding="utf-8")


def push_to_hub(
    vector: SteeringVector,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a steering vector",
    create_pr: bool = False,
) -> str:
    """Upload the vector, with a model card if the repository has none, and return the commit's URL.

    Errors are those of :meth:`~steering_vectors.SteeringVector.save` and of huggingface_hub.

    Args:
        vector: The vector to upload.
        repo_id: The repository's name, such as ``"user/joy"``. It is created if needed.
        token: A token of the hub; by default that of ``hf auth login``.
        private: True to make a created repository private.
        revision: The branch.
        commit_message: The commit's message.
        create_pr: True to open a pull request with the commit.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        vector.save(os.path.join(folder, FILE))  # raises for a bad vector before a repository is created
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
        save_pretrained(vector, folder, repo_id=repo_id)
        if api.file_exists(repo_id, CARD, revision=revision):
            os.unlink(os.path.join(folder, CARD))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def from_pretrained(
    repo_id_or_folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> SteeringVector:
    """Load a vector from a folder that :func:`save_pretrained` wrote, or from a repository on the hub.

    Errors of huggingface_hub are raised too.

    Args:
        repo_id_or_folder: The folder's path, or the repository's name.
        revision: A branch, tag or commit of the repository.
        token: A token of the hub; by default that of ``hf auth login``.

    Raises:
        FileNotFoundError: If there is no vector in the folder or repository.
        ValueError: If the name is neither a folder nor valid for a repository, or as in
            :meth:`~steering_vectors.SteeringVector.load`.

    >>> save_pretrained(vector, folder / "joy")
    >>> from_pretrained(folder / "joy") == vector
    True
    """
    if os.path.isdir(repo_id_or_folder):
        if revision is not None:
            raise ValueError(f"{repo_id_or_folder} is a folder, so it has no revision {revision!r}: leave revision out")
        return SteeringVector.load(os.path.join(repo_id_or_folder, FILE))
    repo_id = os.fspath(repo_id_or_folder)
    if os.path.isfile(repo_id):
        raise ValueError(f"{repo_id} is a file: load it with SteeringVector.load, or give its folder")
    try:
        return SteeringVector.load(hf_hub_download(repo_id, FILE, revision=revision, token=token))
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is neither an existing folder nor a valid repository name: {error}") from error
    except LocalEntryNotFoundError:  # no connection: the file may well be there
        raise
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} on the Hugging Face hub has no {FILE}: no steering vector to load"
        ) from error


def model_card(vector: SteeringVector, repo_id: str) -> str:
    """Return a model card for the hub: what the vector is, how to use it, and how it was made."""
    base = _name_on_the_hub(vector.metadata)
    header = ModelCardData(
        base_model=base, library_name="steering-vectors", tags=["steering-vectors", "activation-steering"]
    ).to_yaml()
    layers = ", ".join(map(str, vector.layers))
    chosen = f"[{vector.layers[len(vector) // 2]}]" if len(vector) > 1 else ""
    for_model = f" for [{base}](https://huggingface.co/{base})" if base else ""
    kind = f"layer{'s' if len(vector) > 1 else ''} {layers} (`{vector.layer_type}`, counted from 0)"
    place = {"heads": "the attention heads in", "neurons": "the MLP's neurons in"}.get(
        vector.layer_type, "the outputs of"
    )
    return f"""---
{header}
---

# {repo_id}

A [steering vector](https://pypi.org/project/steering-vectors/){for_model}: directions of {vector.hidden_size} numbers
for {place} {kind}.
Added to a model's activations while it runs, times a multiplier, they change its behaviour.

{_snippet(base, repo_id, chosen)}

This needs version 1.0 or newer of the library; until that is on PyPI, install it from a clone of its repository.

## How it was made

| | |
|---|---|
{chr(10).join(_made(vector, base))}
"""


def _snippet(base: str | None, repo_id: str, chosen: str) -> str:
    """Return the card's code: load the model, load the vector, and steer."""
    return f"""```python
from steering_vectors import SteeringVector, generated
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {json.dumps(base or "the name of the model")}
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer("I think", return_tensors="pt")

vector = SteeringVector.from_pretrained({json.dumps(repo_id)})
with vector{chosen}.apply(model, multiplier=1.0, tokens=generated(inputs)):
    output = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(output[0]))
```"""


def _made(vector: SteeringVector, base: str | None) -> list[str]:
    """Return the rows of the card's table."""
    entries = dict(vector.metadata)
    if not base and entries.get("base_model"):
        folder = re.split(r"[/\\]", entries["base_model"])[-1]
        entries["base_model"] = f"{folder} (a local folder)"
    rows = {words: f"`{_in_code(entries[name])}`" for name, words in _LABELS.items() if name in entries}
    rows["norms by layer"] = ", ".join(f"{layer}: {norm:.4g}" for layer, norm in vector.norms().items())
    shares = vector.shares()
    if shares:
        rows["as shares of the activations' norms"] = ", ".join(f"{n}: {share:.2g}" for n, share in shares.items())
    return [f"| {words} | {text} |" for words, text in rows.items()]


def _name_on_the_hub(metadata: Mapping[str, str]) -> str | None:
    """Return the base model's name, or None if it is a local path or isn't known."""
    name = metadata.get("base_model", "")
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII) and not os.path.exists(name) else None


def _in_code(text: str) -> str:
    return " ".join(text.replace("`", "'").replace("|", "\\|").split())
