"""The page in a browser shows what the library writes, to each visitor their own.

``make test-playground`` runs this in an environment of its own, with headless Chromium.
"""

import contextlib
import io
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Page, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering_vectors import SteeringVector, generated, prompted
from steering_vectors.cli.playground.answering import Asked
from steering_vectors.cli.playground.page import Page as Drawn
from steering_vectors.cli.playground.ranges import Range
from steering_vectors.cli.playground.script import Source
from tests.playground import vectors
from tests.playground.browser import (
    Server,
    addresses_of,
    chromium,
    expect_answers,
    fill_in,
    opened,
    seconds_of,
    serving,
    written,
)

QUESTION = "What is rain?"
LENGTH = 14

Answer = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("vectors")
    vectors.main(made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(vectors.MODEL, *(folder / f"{name}.safetensors" for name in vectors.IDEAS)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    found = opened(browser, server.url)
    yield found
    found.context.close()


@pytest.fixture(scope="module")
def answer(folder: Path) -> Answer:
    """The library's answer to a prompt, of one row alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(vectors.MODEL), AutoTokenizer.from_pretrained(vectors.MODEL)
    loaded = [SteeringVector.load(folder / f"{name}.safetensors") for name in vectors.IDEAS]

    def answer(strengths: "list[float]", *, length: int = LENGTH, tokens: Any = generated, prompt: str = "") -> str:
        chat = [{"role": "user", "content": QUESTION}]
        inputs = tokenizer(prompt, return_tensors="pt")
        if not prompt:
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with contextlib.ExitStack() as stack:
            for vector, strength in zip(loaded, strengths):
                selection = None if tokens is None else tokens(inputs)
                stack.enter_context(vector.apply(model, multiplier=strength, tokens=selection))
            output = model.generate(**inputs, max_new_tokens=length, do_sample=False)
        return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def test_sliders_move_the_answer_and_at_0_both_are_equal(page: Page, answer: Answer) -> None:
    fill_in(page, QUESTION, [0.7, 0], length=LENGTH)
    page.click("#answer")
    unsteered, steered = answer([]), answer([0.7, 0])
    assert unsteered != steered
    expect_answers(page, unsteered, steered)
    slider = page.locator("#strength-0 input[type=range]")
    slider.focus()
    for _ in range(3):
        slider.press("ArrowLeft")  # each is a step of 0.1
    expect(page.locator("#strength-0 input[type=number]")).to_have_value("0.4")
    page.click("#answer")
    expect_answers(page, unsteered, answer([0.4, 0]))
    fill_in(page, QUESTION, [0, 0], length=LENGTH)
    page.click("#answer")
    expect_answers(page, unsteered, unsteered)


def test_the_sliders_have_calibrated_ranges(page: Page) -> None:
    for number in range(len(vectors.IDEAS)):
        slider = page.locator(f"#strength-{number} input[type=range]")
        text = page.locator(f"#strength-{number}").inner_text()
        found = re.search(r"([\d.]+) changes predictions by 1 nat per token", text)
        assert found
        limit = float(slider.get_attribute("max") or 0)
        assert float(slider.get_attribute("min") or 0) == -limit
        assert limit == pytest.approx(2 * float(found[1]), rel=0.1)


@pytest.mark.parametrize(("name", "tokens"), [("All", None), ("Prompt", prompted)])
def test_the_tokens_that_are_chosen_are_steered(page: Page, answer: Answer, name: str, tokens: Any) -> None:
    fill_in(page, QUESTION, [0.7, 2], length=LENGTH, tokens=name)
    page.click("#answer")
    expect_answers(page, answer([]), answer([0.7, 2], tokens=tokens))


def test_a_text_is_continued(page: Page, answer: Answer) -> None:
    fill_in(page, "Once upon a time", [0.7, 0], length=LENGTH)
    page.locator("#kind label", has_text="Text").click()
    page.press("#prompt textarea", "Shift+Enter")
    prompt = "Once upon a time"
    expect_answers(page, answer([], prompt=prompt), answer([0.7, 0], prompt=prompt))


def test_stop_ends_an_answer_midway_and_the_model_rests(page: Page, server: Server, answer: Answer) -> None:
    fill_in(page, QUESTION, [0.7, 0], length=400)
    page.click("#answer")
    page.wait_for_function("document.querySelector('#steered textarea').value.split(' ').length > 4")
    page.click("#stop")
    page.wait_for_timeout(2000)
    stopped, computed = written(page), seconds_of(server.process)
    page.wait_for_timeout(4000)
    assert written(page) == stopped
    assert seconds_of(server.process) - computed < 1
    whole = answer([], length=400)
    assert whole.startswith(stopped[0])
    assert len(stopped[0]) < len(whole)
    fill_in(page, QUESTION, [0.4, 0], length=LENGTH)
    page.click("#answer")
    expect_answers(page, answer([]), answer([0.4, 0]))


def test_tabs_at_once_get_their_own_answers(browser: Browser, server: Server, answer: Answer) -> None:
    strengths = [[0.7, 0.0], [-0.7, 0.0], [0.0, 3.0]]
    tabs = [opened(browser, server.url) for _ in strengths]
    for tab, at in zip(tabs, strengths):
        fill_in(tab, QUESTION, at, length=LENGTH)
    for tab in tabs:
        tab.click("#answer")
    expected = [answer(at) for at in strengths]
    assert len(set(expected)) == len(expected)
    for tab, steered in zip(tabs, expected):
        expect_answers(tab, answer([]), steered)
        tab.context.close()


def test_a_visitor_who_leaves_frees_the_model(browser: Browser, server: Server) -> None:
    tab = opened(browser, server.url)
    fill_in(tab, QUESTION, [0.7, 0], length=400)
    tab.click("#answer")
    tab.wait_for_function("document.querySelector('#steered textarea').value.length > 0")
    tab.context.close()
    time.sleep(5)
    computed = seconds_of(server.process)
    time.sleep(3)
    assert seconds_of(server.process) - computed < 1


def test_tokens_are_coloured_by_the_vector_that_is_chosen(page: Page, answer: Answer) -> None:
    fill_in(page, QUESTION, [0.7, 0], length=LENGTH)
    page.click("#answer")
    expect_answers(page, answer([]), answer([0.7, 0]))
    tokens = page.locator("#steered-tokens .tokens")
    expect(tokens).to_contain_text(answer([0.7, 0]).rpartition(" ")[0])
    by_first = tokens.inner_html()
    assert "rgba(214, 69, 65, 0.6" in by_first
    page.locator("#colours label", has_text="joy").click()
    page.wait_for_function(
        "before => document.querySelector('#steered-tokens .tokens').innerHTML !== before", arg=by_first
    )
    assert re.sub("<[^>]*>", "", tokens.inner_html()) == re.sub("<[^>]*>", "", by_first)


def test_copied_python_prints_both_answers(page: Page) -> None:
    fill_in(page, QUESTION, [0.7, 0.5], length=LENGTH)
    page.click("#answer")
    code = ""
    for _ in range(20):  # a busy server may not have written yet what was last filled in
        page.click("#copy")
        expect(page.locator("#copy")).to_have_text("Copied")
        expect(page.locator("#copy")).to_have_text("Copy Python")
        code = page.evaluate("navigator.clipboard.readText()")
        if f"max_new_tokens={LENGTH}" in code and "0.7" in code and "0.5" in code:
            break
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "copied", "exec"), {})
    unsteered, steered, *nothing = printed.getvalue().splitlines()
    assert not nothing
    expect_answers(page, unsteered, steered)


def test_markup_in_prompts_and_answers_is_text(page: Page) -> None:
    fill_in(page, "<img src=x onerror=\"document.title = 'broken'\"><b>bold</b>", [0, 0], length=4)
    page.click("#answer")
    expect(page.locator("#steered-tokens .tokens")).to_contain_text("<b>bold</b>")
    assert page.locator("#steered-tokens img, #steered-tokens b").count() == 0
    assert page.title() == "Steering playground"


@pytest.mark.parametrize(
    ("prompt", "message"), [(" ", "write a prompt first"), ("rain " * 9000, "leave room")], ids=["empty", "long"]
)
def test_what_cannot_be_answered_is_said(page: Page, prompt: str, message: str) -> None:
    fill_in(page, prompt, [0.7, 0], length=4)
    page.click("#answer")
    expect(page.locator(".toast-wrap")).to_contain_text(message)


@pytest.mark.parametrize(
    ("field", "name"), [("#strength-0", "the strength of child"), ("#length", "the longest answer")]
)
def test_an_empty_field_is_said_and_nothing_fails(page: Page, answer: Answer, field: str, name: str) -> None:
    statuses: list[int] = []
    page.on("response", lambda response: statuses.append(response.status))
    fill_in(page, QUESTION, [0.7, 0], length=LENGTH)
    page.fill(f"{field} input[type=number]", "")
    expect(page.locator("#message")).to_contain_text(f"write a number for {name}")
    fill_in(page, QUESTION, [0.7, 0], length=LENGTH)
    expect(page.locator("#message")).to_be_hidden()
    page.fill("#strength-1 input[type=number]", "999")  # beyond the slider, until the field is left
    fill_in(page, QUESTION, [0.7, 0], length=LENGTH)
    page.click("#answer")
    expect_answers(page, answer([]), answer([0.7, 0]))
    assert max(statuses) < 400


def test_what_browsers_send_is_checked() -> None:
    speaker: Any = SimpleNamespace(vectors={"joy": None}, can_chat=True, most_new_tokens=50)
    made = Drawn(speaker, {"joy": Range(2.0, 0.1, 1.0)}, Source("model", {"joy": "joy.safetensors"}))
    assert made._asked("Hi", "Chat message", "all", 999, -77) == Asked("Hi", {"joy": -2.0}, True, "all", 50)
    for wrong in (None, "1", math.nan, True, [1]):
        with pytest.raises(ValueError, match="write a number for the strength of joy"):
            made._asked("Hi", "Chat message", "all", 5, wrong)
        with pytest.raises(ValueError, match="write a number for the longest answer"):
            made._asked("Hi", "Chat message", "all", wrong, 1)
    for strange in [(None, "Chat message", "all"), ("Hi", "Song", "all"), ("Hi", "Chat message", ["all"])]:
        with pytest.raises(ValueError, match="load it again"):
            made._asked(*strange, 5, 1)


def test_it_serves_on_loopback_alone_and_asks_for_nothing_elsewhere(browser: Browser, server: Server) -> None:
    assert addresses_of(server.port) == {"0100007F"}
    context = browser.new_context()
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#prompt textarea")
    page.wait_for_timeout(2000)
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert errors == []
    context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_in_both_themes(browser: Browser, server: Server, width: int, theme: str) -> None:
    page = opened(browser, server.url, width=width, theme=theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    too_wide = "element => element.scrollWidth > element.clientWidth"
    for button in ("answer", "stop", "copy"):
        assert not page.locator(f"#{button}").evaluate(too_wide)
    places = [page.locator(f"#{name}").bounding_box() for name in ("unsteered", "steered")]
    assert places[0]
    assert places[1]
    assert (places[0]["y"] == places[1]["y"]) == (width == 1280)  # side by side where there is room
    page.context.close()


def test_a_port_that_is_taken_is_an_error_in_one_line(server: Server, folder: Path, capfd: Any) -> None:
    given = (vectors.MODEL, folder / "child.safetensors", "--range", 1, "--port", server.port)
    with pytest.raises(AssertionError, match="did not start"), serving(*given):
        pass
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_it_serves_ipv6(folder: Path) -> None:
    with serving(vectors.MODEL, folder / "child.safetensors", "--range", 1, "--host", "::1") as server:
        assert server.url == f"http://[::1]:{server.port}/"
        with urlopen(server.url, timeout=30) as answered:
            assert answered.status == 200
        assert addresses_of(server.port) == {"0" * 24 + "01000000"}


def test_an_interrupt_ends_it(folder: Path, capfd: Any) -> None:
    with serving(vectors.MODEL, folder / "child.safetensors", "--range", 1) as server:
        pass
    assert server.process.returncode == 130
    assert capfd.readouterr().err.splitlines() == ["Ctrl-C ends it", "interrupted"]
    assert addresses_of(server.port) == set()
