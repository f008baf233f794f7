"""The playground without its page: what it answers, how it colours tokens, and the Python that it writes."""

import contextlib
import io
import re
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector, generated, monitor, prompted
from steering_vectors.cli import main
from steering_vectors.cli.playground.answering import Answers, Asked, Speaker
from steering_vectors.cli.playground.colouring import coloured
from steering_vectors.cli.playground.ranges import Range, calibrated_range, range_up_to
from steering_vectors.cli.playground.script import Source, script
from steering_vectors.evaluation import calibrate
from tests import tiny

VECTORS = {
    name: SteeringVector({layer: torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(layer))})
    for name, layer in {"joy": 0, "calm": 1}.items()
}
SELECTORS = {"generated": generated, "prompt": prompted, "all": lambda _inputs: None}
LENGTH = 6


@pytest.fixture
def speaker() -> Speaker:
    tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
    # As the tokenizers of decoders have it; transformers 4's default has token types, which no decoder takes.
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return Speaker(tiny.build("llama"), tokenizer, VECTORS, most_new_tokens=100)


def last(speaker: Speaker, asked: Asked) -> Answers:
    *_, found = speaker.answers(asked)
    return found


def by_hand(speaker: Speaker, asked: Asked) -> str:
    """The answer of one row alone, steered by the library's ``apply``."""
    model, tokenizer = speaker.model, speaker.tokenizer
    if asked.is_chat:
        chat = [{"role": "user", "content": asked.prompt}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        inputs = dict(tokenizer.apply_chat_template(chat, **options))
    else:
        inputs = dict(tokenizer(asked.prompt, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with contextlib.ExitStack() as stack:
        for name, strength in asked.strengths.items():
            tokens = SELECTORS[asked.tokens](inputs)
            stack.enter_context(VECTORS[name].apply(model, multiplier=strength, tokens=tokens))
        output = model.generate(**inputs, max_new_tokens=asked.max_new_tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def shown(text: str) -> str:
    """A text as the page shows it: without the half of a character at its end."""
    return text.rstrip("\ufffd")


@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("tokens", SELECTORS)
def test_both_answers_are_those_of_the_library(speaker: Speaker, tokens: str, is_chat: bool) -> None:
    asked = Asked("I say", {"joy": 4.0, "calm": -3.0}, is_chat, tokens, LENGTH)
    unsteered, steered = last(speaker, asked).texts
    assert steered == shown(by_hand(speaker, asked))
    assert unsteered == shown(by_hand(speaker, Asked("I say", {}, is_chat, tokens, LENGTH)))
    assert steered != unsteered


def test_at_strength_0_both_answers_are_equal(speaker: Speaker) -> None:
    first, second = last(speaker, Asked("I say", {"joy": 0.0}, max_new_tokens=LENGTH)).texts
    assert first == second != ""


def test_answers_grow(speaker: Speaker) -> None:
    steps = list(speaker.answers(Asked("I say", {"joy": 4.0}, max_new_tokens=LENGTH)))
    assert len(steps) >= LENGTH
    for earlier, later in pairwise(steps):
        assert all(new.startswith(old) for old, new in zip(earlier.texts, later.texts))


def test_each_is_answered_by_its_strength_while_many_ask_at_once(speaker: Speaker) -> None:
    asked = [Asked("I say", {"joy": float(n), "calm": -float(n)}, max_new_tokens=LENGTH) for n in range(8)]
    found: dict[int, Answers] = {}

    def ask(number: int) -> None:
        found[number] = last(speaker, asked[number])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(asked):
        assert found[number].texts == (found[0].texts[0], shown(by_hand(speaker, one)))


def test_an_iterator_that_is_closed_stops_the_model(speaker: Speaker) -> None:
    passes = 0

    def count(*_args: Any) -> None:
        nonlocal passes
        passes += 1

    handle = speaker.model.register_forward_hook(count)
    steps = speaker.answers(Asked("I say", {"joy": 1.0}, max_new_tokens=100))
    next(steps)
    steps.close()
    last(speaker, Asked("I say", {"joy": 1.0}, max_new_tokens=1))  # it waits until the other has ended
    handle.remove()
    assert passes < 60


def test_the_model_is_unsteered_afterwards(speaker: Speaker) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = speaker.model(ids).logits
    last(speaker, Asked("I say", {"joy": 4.0}, max_new_tokens=LENGTH))
    assert torch.equal(speaker.model(ids).logits, before)


def test_answers_are_no_longer_than_the_speaker_allows(speaker: Speaker) -> None:
    speaker.most_new_tokens = 3
    steps = list(speaker.answers(Asked("I say", {"joy": 4.0}, max_new_tokens=90)))
    assert len(steps) == 3 + 1  # the last once more, with its tokens


def test_tokens_are_projected_as_a_monitor_does(speaker: Speaker) -> None:
    asked = Asked("I say", {"joy": 4.0}, max_new_tokens=LENGTH)
    found = last(speaker, asked)
    assert list(found.tokens) == ["joy", "calm"]
    inputs = dict(speaker.tokenizer("I say", return_tensors="pt"))
    inputs = {name: inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    for name, vector in VECTORS.items():
        steering = VECTORS["joy"].apply(speaker.model, multiplier=[0, 4.0], tokens=generated(inputs))
        with steering, monitor(speaker.model, vector) as watched:
            speaker.model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0)
        (layer,) = watched.layers
        for row, along in zip(found.tokens[name], watched.by_sequence()[layer], strict=True):
            assert [value for _, value in row] == pytest.approx(along[: len(row)].tolist(), abs=1e-4)
            assert "".join(text for text, _ in row).startswith("I say")


def test_what_follows_the_end_of_an_answer_is_left_out(speaker: Speaker) -> None:
    unsteered = last(speaker, Asked("I say", {"joy": 4.0}, max_new_tokens=LENGTH))
    ids = speaker.model.generate(torch.tensor([speaker.tokenizer("I say")["input_ids"]]), max_new_tokens=2)
    speaker.model.generation_config.eos_token_id = [int(ids[0, -1])]
    found = last(speaker, Asked("I say", {"joy": 4.0}, max_new_tokens=LENGTH))
    prompt = ids.shape[1] - 2
    assert len(found.tokens["joy"][0]) <= prompt + 2 < len(unsteered.tokens["joy"][0])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(" \n", {}), "write a prompt first"),
        (Asked("word " * 200, {}), r"the prompt has \d+ tokens: at most \d+ leave room"),
        (Asked("I say", {"joy": float("nan")}), "finite"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(speaker: Speaker, asked: Asked, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(speaker.answers(asked))
    assert last(speaker, Asked("I say", {"joy": 1.0}, max_new_tokens=2)).texts


def test_colours_are_red_towards_and_blue_away_on_one_scale() -> None:
    rows = [[("<s>", -900.0), (" a<b>", 2.0)], [("<s>", 900.0), (" c", -4.0), ("&", float("nan"))]]
    first, second = coloured({"joy": rows}, "joy")
    pattern = r'title="([^"]+)" style="background: rgba\((\d+), \d+, \d+, ([\d.]+)\)">([^<]*)<'
    assert re.findall(pattern, first) == [("-900", "49", "0.60", "&lt;s&gt;"), ("+2", "214", "0.30", " a&lt;b&gt;")]
    assert re.findall(pattern, second)[1:] == [("-4", "49", "0.60", " c"), ("+nan", "49", "0.00", "&amp;")]
    assert coloured({}, "joy") == ("", "")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1.47, Range(1.5, 0.1, 0.7)),
        (6.92, Range(7.0, 0.1, 3.5)),
        (0.031, Range(0.031, 0.001, 0.016)),
        (250, Range(250, 10, 120)),
        (1, Range(1, 0.1, 0.5)),
    ],
)
def test_ranges_are_round(limit: float, expected: Range) -> None:
    assert range_up_to(limit) == expected


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_ranges_that_are_none_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        range_up_to(limit)


def test_a_range_ends_at_twice_the_multiplier_that_is_calibrated(speaker: Speaker) -> None:
    texts = ["It rains in the morning.", "The house is old."]
    given = (speaker.model, speaker.tokenizer, VECTORS["joy"], texts)
    found = calibrate(*given, max_kl=0.1, tokens=generated).multiplier
    made = calibrated_range(*given, max_kl=0.1)
    assert 2 * found <= made.limit < 2.2 * found
    assert f"{found:.2g} changes predictions by 0.1 nat" in made.info


def test_a_vector_that_cannot_be_calibrated_is_named_with_the_way_out(speaker: Speaker) -> None:
    with pytest.raises(ValueError, match=r"can't be calibrated: set the sliders' range with --range NUMBER \(no multi"):
        calibrated_range(speaker.model, speaker.tokenizer, VECTORS["joy"], ["It rains in the morning."], max_kl=1e6)


@pytest.mark.parametrize("strengths", [{"joy": 4.0, "calm": -3.0}, {"joy": 4.0, "calm": 0.0}, {"joy": 0.0}])
@pytest.mark.parametrize("is_chat", [False, True])
@pytest.mark.parametrize("tokens", SELECTORS)
def test_the_script_prints_what_the_page_shows(
    speaker: Speaker, tmp_path: Path, strengths: dict[str, float], is_chat: bool, tokens: str
) -> None:
    speaker.model.save_pretrained(tmp_path / "model")
    speaker.tokenizer.save_pretrained(tmp_path / "model")
    paths = {}
    for name, vector in VECTORS.items():
        paths[name] = str(tmp_path / f"{name}.safetensors")
        vector.save(paths[name])
    asked = Asked("I 'say'", strengths, is_chat, tokens, LENGTH)
    layers = None if strengths.get("calm") or not strengths["joy"] else "0"
    written = script(Source(str(tmp_path / "model"), paths, layers), asked)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(written, "script", "exec"), {})
    assert printed.getvalue() == "".join(f"{text}\n" for text in _whole(speaker, asked))
    assert max(map(len, written.splitlines())) < 200


def _whole(speaker: Speaker, asked: Asked) -> list[str]:
    """Both answers as they are decoded, with a half of a character at the end."""
    return [by_hand(speaker, Asked(asked.prompt, {}, asked.is_chat, asked.tokens, LENGTH)), by_hand(speaker, asked)]


def test_scripts_load_what_the_command_names() -> None:
    asked = Asked("Hi", {"2 joys": 1.5, "model": 2.0, "class": 1.0})
    paths = {name: f"user/{number}" for number, name in enumerate(asked.strengths)}
    written = script(Source(None, paths, "10-11", None, "bfloat16", "cuda"), asked)
    assert compile(written, "script", "exec")
    assert "from steering_vectors.demo import load" in written
    assert "model = model.to('cuda', torch.bfloat16)" in written
    assert "vector_2_joys = hub.from_pretrained('user/0')[[10, 11]]" in written
    assert "model_2 = hub" in written
    assert "vector_class = hub" in written
    gguf = script(Source("folder", {}, gguf_file="model.gguf"), Asked("Hi", {}))
    assert gguf.count("from_pretrained('folder', gguf_file='model.gguf')") == 2
    assert "SteeringVector" not in gguf


def test_without_gradio_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from steering_vectors.cli.playground import serving

    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(SystemExit) as ended:
        main(["playground", "model", "joy.safetensors"])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out, captured.err.count("\n")) == (1, "", 1)
    assert "pip install 'steering-vectors[playground]'" in captured.err


def test_help_imports_no_gradio() -> None:
    code = (
        "import sys\nfrom steering_vectors.cli import main\n"
        "try:\n    main(['playground', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{'torch', 'transformers', 'gradio'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
