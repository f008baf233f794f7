"""The command line, each command of which does what a line or two of Python does."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from steering_vectors import SteeringVector, __version__, from_index, generated, train_steering_vector
from steering_vectors.cli import main
from steering_vectors.cli.loading import layers_of
from steering_vectors.evaluation import (
    Diagnosis,
    Evaluation,
    Sweep,
    calibrate,
    choice_propensity,
    diagnose,
    evaluate,
    sweep,
)
from tests import tiny
from tests.cli.conftest import ITEMS, PAIRS, TEXTS, Run


@pytest.mark.parametrize("pairs", ["pairs.jsonl", "pairs.csv"])
def test_train_is_the_training_call(run: Run, folder: Path, loaded: Any, tmp_path: Path, pairs: str) -> None:
    path = tmp_path / "made.safetensors"
    code, out, err = run("train", "model", pairs, "-o", path, "--layers", "0-1", "--tokens", "mean")
    assert (code, out) == (0, "")
    assert "4 pairs, layers 0 to 1" in err
    expected = train_steering_vector(*loaded[:2], PAIRS, layers=[0, 1], tokens=from_index(1), batch_size=8)
    assert SteeringVector.load(path) == expected


def test_generate_writes_what_generate_writes(run: Run, loaded: Any) -> None:
    model, tokenizer, vector = loaded
    arguments = ("joy.safetensors", "I say", "-m", 0, "-m", 3, "--max-new-tokens", 5)
    code, out, err = run("generate", "model", *arguments)
    assert (code, err) == (0, "")
    inputs = tokenizer("I say", return_tensors="pt")
    for multiplier, line in zip((0, 3), out.splitlines()[1:]):
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with vector.apply(model, multiplier=multiplier, tokens=generated(kept)):
            output = model.generate(**kept, max_new_tokens=5, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(output[0, 5:], skip_special_tokens=True)
        assert line.split()[1:] == text.split()
    assert out.splitlines()[0] == "I say"


def test_generate_puts_a_prompt_into_the_template(run: Run, loaded: Any) -> None:
    plain = run("generate", "model", "joy.safetensors", "I say", "-m", 0, "--tokens", "all")[1]
    as_chat = run("generate", "model", "joy.safetensors", "I say", "-m", 0, "--chat")[1]
    assert plain != as_chat


def test_generate_steers_the_layers_that_are_named(run: Run, loaded: Any, folder: Path) -> None:
    loaded[2][0].save(folder / "one.safetensors")
    asked = ("I say", "-m", 0, "-m", 2, "--max-new-tokens", 9)
    at_one = run("generate", "model", "joy.safetensors", *asked, "--layers", 0)[1]
    assert at_one == run("generate", "model", "one.safetensors", *asked)[1]
    assert at_one != run("generate", "model", "joy.safetensors", *asked)[1]
    assert " \n" not in at_one


def test_warnings_are_lines_without_places_in_the_code(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    run("train", "model", "pairs.csv", "-o", path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run("generate", "model", path, "I say", "-m", 90, "--max-new-tokens", 2)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("warning: this steering adds ")
    assert "talking.py" not in err


def test_chat_changes_the_strength_and_traces(run: Run) -> None:
    lines = "/trace\nHi\n/trace\n/off\nHi\n/m joy 2\n/m x 2\n/m much\n/help\n/trace\n"
    code, out, err = run("chat", "model", "joy.safetensors", "-m", 5, "--max-new-tokens", 4, stdin=lines)
    assert code == 0
    assert "nothing was steered yet" in err
    assert "the last answer was not steered" in err
    assert "[[" in out
    assert "joy 0\n" in err
    assert "joy 2\n" in err
    assert "there is no vector x, only joy" in err
    assert "'much' is no number" in err
    assert err.count("/off stops steering") >= 2
    assert len(out.splitlines()) >= 3


def test_chat_sets_the_vector_that_is_named_or_none(run: Run, folder: Path) -> None:
    (folder / "great joy.safetensors").write_bytes((folder / "joy.safetensors").read_bytes())
    code, _, err = run("chat", "model", "great joy.safetensors", stdin="/m great joy 2\n/m great 2 3\n/off\n")
    assert code == 0
    *_, named, unknown, _, off = err.splitlines()
    assert named == "great joy 2"
    assert unknown.startswith("there is no vector great 2, only great joy; /m NUMBER sets")
    assert off == "great joy 0"


def test_chat_goes_on_after_a_strength_that_is_no_number(run: Run) -> None:
    code, out, err = run(
        "chat", "model", "joy.safetensors", "--max-new-tokens", 2, stdin="/m nan\n/m 1e39\nHi\n/m 0\nHi\n"
    )
    assert code == 0
    assert "'nan' is no number" in err
    assert "error: " in err
    assert out.strip()


def test_chat_names_vectors_of_the_same_name_apart(run: Run, folder: Path) -> None:
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "joy.safetensors").write_bytes((folder / "joy.safetensors").read_bytes())
    code, _, err = run("chat", "model", "joy.safetensors", "other/joy.safetensors", stdin="/off\n")
    assert (code, err.splitlines()[-1]) == (0, "joy.safetensors 0, other/joy.safetensors 0")


def test_chat_remembers_and_steers(run: Run, loaded: Any) -> None:
    """Also after a line that says nothing but a slash."""
    model, tokenizer, vector = loaded
    out = run("chat", "model", "joy.safetensors", "-m", 5, "--max-new-tokens", 4, stdin="Hi\n/\nWhy so\n")[1]
    chat, answers = [], []
    for message in ("Hi", "Why so"):
        chat.append({"role": "user", "content": message})
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        kept = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with vector.apply(model, multiplier=5, tokens=generated(kept)):
            output = model.generate(**kept, max_new_tokens=4, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(output[0, kept["input_ids"].shape[1] :], skip_special_tokens=True))
        chat.append({"role": "assistant", "content": answers[-1].strip()})
    assert out.split() == " ".join(answers).split()


def test_show_lists_layers_and_metadata(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    run("train", "model", "pairs.csv", "-o", path)
    code, out, err = run("show", path)
    assert (code, err) == (0, "")
    assert "decoder_block, 32 wide, 3 layers" in out
    assert "model_type" in out
    assert max(map(len, out.splitlines())) <= 80
    SteeringVector.load(path).save_pretrained(tmp_path / "made")
    assert run("show", tmp_path / "made")[1] == out
    SteeringVector.load(path)[0].save(path)
    assert run("show", path)[1].startswith("decoder_block, 32 wide, 1 layer\n")


def test_evaluate_is_evaluate(run: Run, loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    arguments = ("--texts", "texts.txt", "-m", 0, "-m", 1, "--pairs", "pairs.csv", "--layers", 1, "-o", path)
    arguments += ("--read", "last", "--aggregator", "mean")  # the vector doesn't say how it was trained
    code, out, err = run("evaluate", "model", "joy.safetensors", "items.jsonl", *arguments)
    assert (code, err) == (0, "")
    expected = evaluate(*loaded[:2], loaded[2][1], ITEMS, multipliers=[0, 1], texts=TEXTS, training_samples=PAIRS)
    assert out == f"{expected}\n"
    assert Evaluation.from_json(path) == expected


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_variants_and_propensities_are_the_librarys(run: Run, folder: Path, loaded: Any, command: str) -> None:
    otherwise = [(f"Well, {prompt}", *answers) for prompt, *answers in ITEMS]
    names = ("prompt", "matching", "not_matching")
    (folder / "otherwise.jsonl").write_text("\n".join(json.dumps(dict(zip(names, item))) for item in otherwise))
    asked = ("--variant", "well=otherwise.jsonl", "--variant", "rude=Be = rude.", "--propensity", "choice")
    arguments = ("--texts", "texts.txt", "-m", 0, "-m", 1, *asked)
    code, out, err = run(command, "model", "joy.safetensors", "items.jsonl", *arguments)
    assert (code, err) == (0, "")
    variants: Any = {"well": otherwise, "rude": "Be = rude."}
    given: Any = {"multipliers": [0, 1], "texts": TEXTS, "variants": variants, "propensity": choice_propensity()}
    expected = {"evaluate": evaluate, "sweep": sweep}[command](*loaded, ITEMS, **given)
    assert out == f"{expected}\n"


def test_sweep_is_sweep(run: Run, loaded: Any, tmp_path: Path) -> None:
    path, kept = tmp_path / "result.json", tmp_path / "kept.json"
    arguments = ("--texts", "texts.txt", "-m", 0, "-m", 1, "--max-kl", 9, "--resume", kept, "-o", path)
    code, out, err = run("sweep", "model", "joy.safetensors", "items.jsonl", *arguments)
    assert (code, err) == (0, "")
    expected = sweep(*loaded, ITEMS, multipliers=[0, 1], texts=TEXTS, max_kl=9)
    assert out == f"{expected}\n"
    assert Sweep.from_json(path) == expected
    code, _, err = run("sweep", "model", "joy.safetensors", "items.jsonl", "--resume", kept)
    assert code == 1
    assert "holds a sweep with another" in err


@pytest.mark.parametrize(("tokens", "aggregator"), [("mean", "pca"), ("last", "mean"), ("completion", "logistic")])
def test_the_control_with_permuted_labels_is_trained_as_the_vector_was(
    run: Run, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str, aggregator: str
) -> None:
    import steering_vectors.evaluation.controls as controls

    trained = []
    train = controls.train_steering_vector

    def record(*arguments: Any, **options: Any) -> Any:
        trained.append(train(*arguments, **options))
        return trained[-1]

    monkeypatch.setattr(controls, "train_steering_vector", record)
    path, chats = tmp_path / "made.safetensors", tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for pair in PAIRS:
            sides = ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in pair)
            print(json.dumps(dict(zip(("positive", "negative"), sides))), file=file)
    run("train", "model", chats, "-o", path, "--tokens", tokens, "--aggregator", aggregator, "--layers", 1)
    measured = ("evaluate", "model", path, "items.jsonl", "--texts", "texts.txt", "--pairs", chats)
    assert run(*measured)[0] == 0
    made = SteeringVector.load(path).metadata
    assert [(vector.metadata["method"], vector.metadata["read"]) for vector in trained] == [
        (made["method"], made["read"])
    ]
    assert run(*measured, "--read", "last", "--aggregator", "mean")[0] == 0
    assert trained[1].metadata["method"].startswith("mean_aggregator")


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_what_a_vector_does_not_say_of_its_training_is_asked_for(
    run: Run, loaded: Any, tmp_path: Path, command: str
) -> None:
    asked = ("items.jsonl", "--pairs", "pairs.csv")
    code, _, err = run(command, "model", "joy.safetensors", *asked)
    assert code == 2
    assert "the vector doesn't say how it was trained: for the control of --pairs, name --read too" in err
    path = tmp_path / "made.safetensors"
    train_steering_vector(*loaded[:2], PAIRS, layers=1, read_token_index=2).save(path)
    code, _, err = run(command, "model", path, *asked)
    assert code == 2
    assert "the vector was trained with read_token_index=2: name the nearest with --read" in err


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_variant_that_comes_twice_is_refused(run: Run, command: str) -> None:
    twice = ("--variant", "rude=Be rude.", "--variant", "rude=Be very rude.")
    code, out, err = run(command, "model", "joy.safetensors", "items.jsonl", *twice)
    assert (code, out) == (2, "")
    assert "--variant: the name rude comes twice" in err


def test_calibrate_and_diagnose_are_themselves(run: Run, loaded: Any, tmp_path: Path) -> None:
    found = run("calibrate", "model", "joy.safetensors", "--max-kl", 0.1, "--texts", "texts.txt", "-o", "found.json")
    expected = calibrate(*loaded, TEXTS, max_kl=0.1, tokens=generated)
    assert found == (0, f"{expected}\n", "")
    assert json.loads(Path("found.json").read_text())["multiplier"] == pytest.approx(expected.multiplier)
    code, out, err = run("diagnose", "model", "pairs.jsonl", "--layers", "1", "-o", "found.json")
    assert (code, err) == (0, "")
    _, diagnosis = diagnose(*loaded[:2], PAIRS, layers=[1], batch_size=8)
    assert isinstance(diagnosis, Diagnosis)
    assert out == f"{diagnosis}\n"
    assert json.loads(Path("found.json").read_text())["pairs"] == 4


def test_long_work_shows_its_progress_on_a_terminal_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ("model", "joy.safetensors", "items.jsonl", "--texts", "texts.txt")
    commands: dict[str, tuple[object, ...]] = {
        "Calibrating": ("calibrate", "model", "joy.safetensors", "--max-kl", 0.1, "--texts", "texts.txt"),
        "Evaluating": ("evaluate", *measured),
        "Sweeping": ("sweep", *measured),
        "Training": ("diagnose", "model", "pairs.csv"),
    }
    printed = {name: run(*command) for name, command in commands.items()}
    assert {err for _, _, err in printed.values()} == {""}
    monkeypatch.setattr("steering_vectors.cli.measuring.shows_progress", lambda: True)
    for name, command in commands.items():
        code, out, err = run(*command)
        assert (code, out) == printed[name][:2]
        assert name in err
        assert "━" in err  # drawn by rich
        assert "xperimental" not in err


def test_plot_draws_both_results(run: Run, tmp_path: Path) -> None:
    given = ("model", "joy.safetensors", "items.jsonl", "--texts", "texts.txt", "-o", "result.json")
    diagnosed = ("model", "pairs.csv", "-o", "result.json")
    for command in ("evaluate", "sweep", "diagnose"):
        run(command, *(diagnosed if command == "diagnose" else given))
        path = tmp_path / f"{command}.png"
        assert run("plot", "result.json", "-o", path)[0] == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_combine_adds(run: Run, loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "sum.safetensors"
    assert run("combine", "joy.safetensors:2", "joy.safetensors:-0.5", "-o", path)[0] == 0
    directions = SteeringVector.load(path).layer_activations
    for layer, direction in loaded[2].layer_activations.items():
        torch.testing.assert_close(directions[layer], 1.5 * direction)


def test_exports_write_what_the_library_writes(run: Run, loaded: Any, tmp_path: Path) -> None:
    from steering_vectors import ablate_everywhere
    from steering_vectors.interop import from_gguf

    model, _, vector = loaded
    SteeringVector({1: vector.layer_activations[1]}).save("one.safetensors")
    code, out, _ = run("export", "gguf", "one.safetensors", "-m", 2, "-o", tmp_path / "one.gguf")
    assert code == 0
    assert "--control-vector" in out
    torch.testing.assert_close(from_gguf(tmp_path / "one.gguf").layer_activations[1], 2 * vector.layer_activations[1])
    ids = torch.tensor([[5, 6, 7, 8]])
    assert run("export", "weights", "model", "one.safetensors", "-m", 2, "-o", tmp_path / "merged")[0] == 0
    assert run("ablate", "model", "one.safetensors", "-o", tmp_path / "ablated")[0] == 0
    for name, context in {
        "merged": vector[1].apply(model, multiplier=2),
        "ablated": ablate_everywhere(model, vector[1]),
    }.items():
        made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad(), context:
            torch.testing.assert_close(made(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert run("export", "lm-eval", "model", "one.safetensors", "-o", tmp_path / "one.pt")[0] == 0
    assert (tmp_path / "one.pt").is_file()


@pytest.mark.parametrize("command", [["export", "weights"], ["ablate"]], ids=" ".join)
def test_a_model_is_written_whole_or_not_at_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def interrupted(_self: Any, folder: Path) -> None:
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    asked = (*command, "model", "joy.safetensors", *(["--layers", 1] if command == ["ablate"] else []))
    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
        assert run(*asked, "-o", tmp_path / "made") == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "made").mkdir()
    assert run(*asked, "-o", tmp_path / "made")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    code, _, err = run(*asked, "-o", tmp_path / "made")
    assert (code, err.count("\n")) == (1, 1)
    assert "made has files already: name a new folder" in err


def test_an_adapter_prints_what_serves_it(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    SteeringVector({1: torch.ones(tiny.HIDDEN)}).save("one.safetensors")
    code, out, err = run("export", "adapter", "model", "one.safetensors", "-o", tmp_path / "made")
    assert (code, out) == (0, "")
    assert re.search(r"made: adapter made-\w+, rank 0\nvLLM has no adapters that add a constant", err)
    code, out, err = run("export", "adapter", "model", "one.safetensors", "--ablate", "-o", tmp_path / "ablating")
    assert code == 0
    assert "rank" in err
    assert out.startswith("--") or "vLLM" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "model", "none.csv", "-o", "x"], 1, "none.csv"),
        (["train", "model", "pairs.csv"], 2, "Missing option '-o'"),
        (["train", "a", "b", "c", "-o", "x"], 2, "expected [MODEL] PAIRS"),
        (["train", "model", "bad.jsonl", "-o", "x"], 1, "bad.jsonl, line 2: not JSON, column 1"),
        (
            ["train", "model", "bad.csv", "-o", "x"],
            1,
            "bad.csv has the columns good, bad; it needs positive and negative",
        ),
        (["train", "model", "pairs.csv", "-o", "none/x"], 1, "doesn't exist: make it first"),
        (
            ["train", "model", "pairs.csv", "-o", "x", "--tokens", "all"],
            2,
            "'all' is not one of last, mean, completion",
        ),
        (["train", "model", "pairs.csv", "-o", "x", "--layers", "5-2"], 2, "ends before it begins"),
        (["train", "model", "pairs.csv", "-o", "x", "--layers", "all"], 2, "'all' names no layers"),
        (
            ["train", "model", "pairs.csv", "-o", "x", "--layers", "40"],
            1,
            "layer 40 does not exist: the model has 3 layers",
        ),
        (["train", "model", "pairs.csv", "-o", "x", "--dtype", "half_float"], 2, "is no dtype"),
        (["generate", "joy.safetensors"], 2, "expected [MODEL] VECTOR PROMPT..."),
        (["generate", "model", "joy.safetensors", "Hi", "--tokens", "some"], 2, "'some' is not one of generated, all"),
        (["generate", "model", "wide.safetensors", "Hi"], 1, "5 numbers"),
        (["chat", "model", "joy.safetensors", "-m", "1", "-m", "2"], 2, "expected one multiplier"),
        (["show", "pairs.csv"], 1, "error: "),
        (["show", "none.safetensors"], 1, "there is no file none.safetensors"),
        (["ablate", "model", "joy.safetensors", "-o", "pairs.csv"], 1, "pairs.csv is a file: name a folder"),
        (["evaluate", "model", "joy.safetensors", "pairs.csv"], 1, "it needs prompt, matching and not_matching"),
        (["evaluate", "model", "joy.safetensors", "items.jsonl", "-m", "1"], 1, "two different multipliers"),
        (["evaluate", "model", "joy.safetensors", "items.jsonl", "--layers", "2"], 1, "2"),
        (
            ["evaluate", "model", "joy.safetensors", "items.jsonl", "--variant", "x.jsonl"],
            2,
            "'x.jsonl' names no variant: write NAME=FILE or NAME=TEXT",
        ),
        (
            ["evaluate", "model", "joy.safetensors", "items.jsonl", "--variant", "a=pairs.csv"],
            1,
            "it needs prompt, matching and not_matching",
        ),
        (
            ["sweep", "model", "joy.safetensors", "items.jsonl", "--propensity", "letters"],
            2,
            "'letters' is not one of text, choice",
        ),
        (["plot", "pairs.jsonl", "-o", "x.png"], 1, "error: "),
        (["train", "model", "pairs.csv", "-o", "pairs.csv"], 1, "pairs.csv is read by this command"),
        (["evaluate", "model", "joy.safetensors", "items.jsonl", "-o", "./items.jsonl"], 1, "is read by this command"),
        (
            ["sweep", "model", "joy.safetensors", "items.jsonl", "--resume", "x", "-o", "x"],
            1,
            "x is read by this command, which would write over it",
        ),
        (
            ["sweep", "model", "joy.safetensors", "items.jsonl", "--resume", "joy.safetensors", "--texts", "texts.txt"],
            1,
            "joy.safetensors is read by this command",
        ),
        (
            ["sweep", "model", "joy.safetensors", "items.jsonl", "--resume", "bytes", "--texts", "texts.txt"],
            1,
            "bytes is not JSON of a sweep",
        ),
        (["combine", "joy.safetensors:much", "-o", "x"], 2, "has no finite number behind the colon"),
        (["combine", "joy.safetensors:nan", "-o", "x"], 2, "has no finite number behind the colon"),
        (["combine", "joy.safetensors", "joy.safetensors:-1", "-o", "x"], 1, "the sum is zero at all layers"),
        (["combine", "joy.safetensors:0", "-o", "x"], 1, "the sum is zero at all layers"),
        (["combine", "joy.safetensors:2", "-o", "./joy.safetensors"], 1, "is read by this command"),
        (["combine", "joy.safetensors:1", "-o", "model"], 1, "is a folder"),
        (
            ["evaluate", "none", "joy.safetensors", "items.jsonl", "-m", "1", "-m", "nan"],
            2,
            "nan is not a finite number",
        ),
        (["sweep", "none", "joy.safetensors", "items.jsonl", "--max-kl", "inf"], 2, "inf is not a finite number"),
        (["calibrate", "none", "joy.safetensors", "--max-kl", "nan"], 2, "nan is not a finite number"),
        (["generate", "none", "joy.safetensors", "Hi", "-m", "inf"], 2, "inf is not a finite number"),
        (["export", "weights", "none", "joy.safetensors", "-m", "nan", "-o", "x"], 2, "nan is not a finite number"),
        (["wander"], 2, "No such command 'wander'"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    run: Run, folder: Path, arguments: list[str], code: int, message: str
) -> None:
    (folder / "bad.jsonl").write_text('{"positive": "a", "negative": "b"}\nnothing\n')
    (folder / "bad.csv").write_text("good,bad\na,b\n")
    (folder / "bytes").write_bytes(b"\xe9")
    SteeringVector({1: torch.ones(5)}).save(folder / "wide.safetensors")
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert message in " ".join(err.split())
    if code == 1:
        assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not (folder / "x").exists()


def test_debug_shows_where_an_error_arose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(FileNotFoundError):
        main(["--debug", "train", "model", "none.csv", "-o", "x"])


COMMANDS = [
    "train",
    "generate",
    "chat",
    "playground",
    "show",
    "evaluate",
    "sweep",
    "calibrate",
    "diagnose",
    "plot",
    "combine",
    "ablate",
]
EXPORTS = [["export", name] for name in ("gguf", "adapter", "lm-eval", "weights")]


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), *EXPORTS], ids=" ".join)
def test_help_has_two_examples(run: Run, command: list[str]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert out.partition("Examples:")[2].count(f"steering-vectors {' '.join(command)} ") == 2
    assert max(map(len, out.splitlines())) <= 80


def test_help_lists_the_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in [*COMMANDS, "export"]:
        assert f"\n  {command} " in out
    assert "..." not in out.partition("Commands:")[2]  # no summary is cut off


def test_the_help_of_exports_is_whole(run: Run) -> None:
    code, out, _ = run("export", "-h")
    assert code == 0
    for _, name in EXPORTS:
        assert f"\n  {name} " in out
    assert "..." not in out.partition("Commands:")[2]


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version") == (0, f"steering-vectors {__version__}\n", "")


def test_no_help_page_imports_what_takes_long() -> None:
    pages = [[], *([name] for name in COMMANDS), ["export"], *EXPORTS]
    code = (
        "import sys\nfrom steering_vectors.cli import main\n"
        f"for page in {pages}:\n"
        "    try:\n        main([*page, '--help'])\n    except SystemExit as ended:\n        assert not ended.code\n"
        "slow = {'torch', 'transformers', 'numpy', 'gradio', 'matplotlib', 'huggingface_hub', 'safetensors', 'tqdm'}\n"
        "print(*slow & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: ") == len(pages)
    assert done.stdout.splitlines()[-1] == ""


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys\nsys.modules['typer'] = None\nfrom steering_vectors.cli import main\nmain(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'steering-vectors[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "layers"), [(None, None), ("12", [12]), ("10-12", [10, 11, 12]), ("8,-1", [8, -1]), ("1, 3-4", [1, 3, 4])]
)
def test_layers_are_read(text: str | None, layers: list[int] | None) -> None:
    assert layers_of(text) == layers
