"""The program in a terminal: answers grow, Ctrl-C ends it at any time, and readers may leave."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaModel

from steering_vectors.cli import main
from steering_vectors.evaluation import sweep
from tests.cli.conftest import ITEMS, TEXTS, Run

PROGRAM = "from steering_vectors.cli import main\nmain()"
TEXTS_AND_MULTIPLIERS = ("--texts", "texts.txt", "-m", 0, "-m", 1)


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def lines_drawn(written: str) -> list[str]:
    """The lines that a terminal showed, each as often as the program drew it."""
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "\n", written)
    return [" ".join(line.split()) for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_answers_grow_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    asked = ["generate", "model", "joy.safetensors", "I say", "-m", "0", "-m", "3", "--max-new-tokens", "8"]
    with pytest.raises(SystemExit):
        main(asked)
    shown = lines_drawn(sys.stdout.getvalue())  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit):
        main(asked)
    prompt, *rows = sys.stdout.getvalue().splitlines()  # type: ignore[attr-defined]
    whole = [" ".join(row.split()) for row in rows if row]
    assert prompt == "I say"
    assert len(whole) == 2
    for row in whole:  # its beginnings were shown, one after another
        grown = [line for line in shown if row.startswith(line)]
        assert len(set(grown)) >= 4
        assert grown == sorted(grown, key=len)
        assert grown[-1] == row


def test_chat_ends_its_line_at_the_end_of_the_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("chat", "model", "joy.safetensors")
    assert run(*asked, stdin="/off\n")[2].endswith("\njoy 0\n")
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert run(*asked, stdin="/off\n")[2].endswith("joy 0\n> \n")


def test_chat_streams_each_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TextStreamer

    events: list[str] = []
    put, forward = TextStreamer.put, LlamaModel.forward

    def putting(self: Any, value: Any) -> None:
        events.append("write")
        put(self, value)

    def running(*args: Any, **kwargs: Any) -> Any:
        events.append("run")
        return forward(*args, **kwargs)

    monkeypatch.setattr(TextStreamer, "put", putting)
    monkeypatch.setattr(LlamaModel, "forward", running)
    assert run("chat", "model", "joy.safetensors", "--max-new-tokens", 3, stdin="Hi\n")[0] == 0
    assert events == ["write", *(["run", "write"] * 3)]  # the prompt first, which isn't shown


@pytest.fixture
def interrupt_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[int]]]:
    """Count the model's passes, and send what Ctrl-C sends in the one of this number, as long as it is set."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background may ignore it
    counted = [0]
    forward = LlamaModel.forward

    def at(number: int | None) -> list[int]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] == number:
                signal.raise_signal(signal.SIGINT)
            return forward(*args, **kwargs)

        counted[0] = 0
        monkeypatch.setattr(LlamaModel, "forward", counting)
        return counted

    yield at
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(
    "command",
    [
        ("train", "model", "pairs.csv", "--batch-size", 1, "-o", "{}"),
        ("diagnose", "model", "pairs.csv", "--batch-size", 1, "-o", "{}"),
        ("evaluate", "model", "joy.safetensors", "items.jsonl", *TEXTS_AND_MULTIPLIERS, "-o", "{}"),
        ("sweep", "model", "joy.safetensors", "items.jsonl", *TEXTS_AND_MULTIPLIERS, "-o", "{}"),
        ("calibrate", "model", "joy.safetensors", "--texts", "texts.txt", "--max-kl", 0.1, "-o", "{}"),
    ],
    ids=lambda command: str(command[0]),
)
def test_an_interrupt_in_the_midst_of_the_work_ends_cleanly(
    run: Run, tmp_path: Path, interrupt_at: Callable[[int | None], list[int]], command: tuple[object, ...]
) -> None:
    passes = interrupt_at(2)
    given = [str(word).format(tmp_path / "made") for word in command]
    assert run(*given) == (130, "", "interrupted\n")
    assert passes == [2]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_what_was_written_of_an_answer(
    run: Run, interrupt_at: Callable[[int | None], list[int]]
) -> None:
    interrupt_at(4)
    assert run("generate", "model", "joy.safetensors", "I say") == (130, "I say\n", "interrupted\n")
    interrupt_at(4)
    code, _, err = run("chat", "model", "joy.safetensors", stdin="Hi\n")
    assert (code, err.splitlines()[-1]) == (130, "interrupted")


def test_a_sweep_that_was_interrupted_goes_on(
    run: Run, loaded: Any, tmp_path: Path, interrupt_at: Callable[[int | None], list[int]]
) -> None:
    """It measures what is missing, and no more, and finds what it finds in one go."""
    kept, path = tmp_path / "kept.json", tmp_path / "result.json"
    given = ("sweep", "model", "joy.safetensors", "items.jsonl", *TEXTS_AND_MULTIPLIERS, "--max-kl", 9)
    passes = interrupt_at(None)
    assert run(*given)[0] == 0
    (at_once,) = passes
    interrupt_at(at_once - 3)
    assert run(*given, "--resume", kept, "-o", path) == (130, "", "interrupted\n")
    assert not path.exists()
    assert json.loads(kept.read_text())
    passes = interrupt_at(None)
    code, out, _ = run(*given, "--resume", kept, "-o", path)
    assert code == 0
    assert 0 < passes[0] <= at_once // 2
    assert out == f"{sweep(*loaded, ITEMS, multipliers=[0, 1], texts=TEXTS, max_kl=9)}\n"
    assert path.exists()
    passes = interrupt_at(None)
    assert run(*given, "--resume", kept)[1] == out
    assert passes[0] < at_once // 2


def test_an_interrupt_while_commands_are_imported_is_one() -> None:
    """The first tenth of a second goes by in imports."""
    code = f"""
import sys

class Interrupt:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
{PROGRAM}
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["show", "joy.safetensors"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_ended_is_no_error(folder: Path, arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_result_is_written_also_where_nobody_reads_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

    Path("alone.json").unlink(missing_ok=True)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Closed())
        with pytest.raises(SystemExit) as ended:
            main(["diagnose", "model", "pairs.csv", "-o", "alone.json"])
    assert ended.value.code == 0
    assert json.loads(Path("alone.json").read_text())["pairs"] == 4
