"""Draw the page with gradio, and serve it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it is read when gradio is imported

import gradio as gr

from steering_vectors.cli.playground.answering import Answers, Asked, Speaker
from steering_vectors.cli.playground.colouring import STYLE, coloured
from steering_vectors.cli.playground.ranges import Range
from steering_vectors.cli.playground.script import Source, script

_WAITING = 20  # requests in the queue
_COLUMN, _BUTTON = 260, 90  # pixels: narrower windows have columns below each other, and buttons side by side
_CHAT, _TEXT = "Chat message", "Text to continue"
_TOKENS = [("Generated", "generated"), ("All", "all"), ("Prompt", "prompt")]
_SELECTED = [value for _, value in _TOKENS]
_KEY = (
    '<div class="token-key">Projection at the vector\'s last layer: <b class="towards">towards it</b> '
    '<b class="away">away from it</b></div>'
)
# Browsers have the clipboard only for pages on this machine or behind TLS; the old way does for others.
_COPY = """async (code) => {
    const button = document.querySelector("#copy");
    if (navigator.clipboard) {
        await navigator.clipboard.writeText(code);
    } else {
        const area = document.createElement("textarea");
        area.value = code;
        document.body.append(area);
        area.select();
        document.execCommand("copy");
        area.remove();
    }
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1500);
}"""
_STYLE = f"""{STYLE}
.gradio-container {{ max-width: 72rem !important; margin: 0 auto; }}
#answer, #stop, #copy {{ flex: 1 1 auto; min-width: max-content !important; padding-inline: 0.5rem; }}
#coloured, #coloured .styler {{ background: var(--block-background-fill); }}
"""


class Page:
    """The page, and the server that it is on."""

    def __init__(self, speaker: Speaker, ranges: Mapping[str, Range], source: Source) -> None:
        self._speaker, self._ranges, self._source = speaker, ranges, source
        self._names = list(speaker.vectors)
        with gr.Blocks(title="Steering playground", analytics_enabled=False) as self._blocks:
            gr.Markdown(f"# Steering playground\n{_name_of(source)}, steered by {', '.join(self._names)}")
            asked, message, buttons = self._controls()
            outputs, colour_by, kept = self._answers()
            self._connect(asked, buttons, outputs, colour_by, kept, self._code(), message)
        self._blocks.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)

    def launch(self, host: str, port: int | None) -> str:
        """Start serving, and return the page's address. Raises OSError if the port is taken."""
        fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        _, url, _ = self._blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            theme=gr.themes.Default(**fonts).set(block_info_text_color="*neutral_600"),
            css=_STYLE,
        )
        return str(url)

    def close(self) -> None:
        """Stop serving."""
        self._blocks.close(verbose=False)

    def _controls(self) -> tuple[list[Any], Any, tuple[Any, Any, Any]]:
        """Return what a request is read from, a place for a message, and the buttons that answer, stop and copy."""
        prompt = gr.Textbox(label="Prompt", lines=2, placeholder="What is rain?", elem_id="prompt", autofocus=True)
        with gr.Row():
            kinds = [_CHAT, _TEXT] if self._speaker.can_chat else [_TEXT]
            column: dict[str, Any] = {"min_width": _COLUMN}
            kind = gr.Radio(kinds, value=kinds[0], label="Prompt as", elem_id="kind", **column)
            tokens = gr.Radio(_TOKENS, value="generated", label="Tokens to steer", elem_id="tokens", **column)
            most = self._speaker.most_new_tokens
            length = gr.Slider(
                1, most, min(80, most), step=1, label="Longest answer (tokens)", elem_id="length", **column
            )
        with gr.Row():
            sliders = [self._slider(name, number) for number, name in enumerate(self._names)]
        message = gr.Markdown(visible=False, elem_id="message")
        with gr.Row():
            answer = gr.Button("Answer", variant="primary", elem_id="answer", min_width=_BUTTON)
            stop = gr.Button("Stop", elem_id="stop", min_width=_BUTTON)
            copy = gr.Button("Copy Python", elem_id="copy", min_width=_BUTTON)
        return [prompt, kind, tokens, length, *sliders], message, (answer, stop, copy)

    def _slider(self, name: str, number: int) -> Any:
        found = self._ranges[name]
        start = found.start if number == 0 else 0
        return gr.Slider(
            -found.limit,
            found.limit,
            start,
            step=found.step,
            label=f"Strength of {name}",
            info=found.info or None,
            elem_id=f"strength-{number}",
            min_width=_COLUMN,
        )

    def _answers(self) -> tuple[list[Any], Any, Any]:
        """Return the places of answers and of coloured tokens, the choice of colours, and what is kept for it."""
        with gr.Row():
            texts = [
                gr.Textbox(
                    label=side,
                    lines=6,
                    max_lines=30,
                    interactive=False,
                    buttons=["copy"],
                    elem_id=side.lower(),
                    min_width=_COLUMN,
                )
                for side in ("Unsteered", "Steered")
            ]
        with gr.Group(elem_id="coloured"):
            colour_by = gr.Radio(self._names, value=self._names[0], label="Tokens coloured by", elem_id="colours")
            with gr.Row():
                colours = [self._column_of_tokens(side) for side in ("unsteered", "steered")]
            gr.HTML(_KEY, padding=True)
        return [*texts, *colours], colour_by, gr.State({})

    @staticmethod
    def _column_of_tokens(side: str) -> Any:
        with gr.Column(min_width=_COLUMN):
            return gr.HTML(elem_id=f"{side}-tokens", padding=True, min_height=60)

    def _code(self) -> Any:
        first, _ = self._script(*self._first())
        with gr.Accordion("In Python", open=False):
            return gr.Code(first, language="python", show_label=False, elem_id="code")

    def _first(self) -> list[Any]:
        kind = _CHAT if self._speaker.can_chat else _TEXT
        starts = [self._ranges[name].start if number == 0 else 0 for number, name in enumerate(self._names)]
        return ["What is rain?", kind, "generated", min(80, self._speaker.most_new_tokens), *starts]

    def _connect(
        self,
        asked: list[Any],
        buttons: tuple[Any, Any, Any],
        outputs: list[Any],
        colour_by: Any,
        kept: Any,
        code: Any,
        message: Any,
    ) -> None:
        answer, stop, copy = buttons
        running = gr.on(
            [answer.click, asked[0].submit],
            self._answer,
            inputs=[colour_by, *asked],
            outputs=[*outputs, kept],
            show_progress="minimal",
            api_visibility="private",
            preprocess=False,  # gradio fails for an empty field
        )
        hidden: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        stop.click(None, cancels=[running], **hidden)
        colour_by.change(coloured, inputs=[kept, colour_by], outputs=outputs[2:], **hidden)
        changes = [part.change for part in asked]
        # One at a time, and the last values last: answers to several at once may overtake each other.
        gr.on(changes, self._script, asked, [code, message], preprocess=False, trigger_mode="always_last", **hidden)
        copy.click(None, inputs=code, js=_COPY, **hidden)

    def _answer(self, colour_by: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield "", "", "", "", {}
        try:
            with closing(self._speaker.answers(self._asked(*values))) as steps:
                for step in steps:
                    yield self._shown(step, colour_by)
        except (RuntimeError, ValueError) as error:
            raise gr.Error(str(error), title="No answer", print_exception=False) from None

    def _shown(self, answers: Answers, colour_by: str) -> tuple[Any, ...]:
        return *answers.texts, *coloured(answers.tokens, colour_by), dict(answers.tokens)

    def _script(self, *values: Any) -> tuple[Any, Any]:
        """Return the script and no message; for a field without a number, the script as it is and a message."""
        try:
            return script(self._source, self._asked(*values)), gr.Markdown("", visible=False)
        except ValueError as error:
            return gr.skip(), gr.Markdown(f"⚠ {error}", visible=True)

    def _asked(self, prompt: Any, kind: Any, tokens: Any, length: Any, *strengths: Any) -> Asked:
        """Return a request of what the browser sent, with numbers in the sliders' ranges.

        Raises ValueError for a field that is empty, or that holds what the page doesn't offer.
        """
        if not (isinstance(prompt, str) and tokens in _SELECTED and kind in (_CHAT, _TEXT)):
            raise ValueError("this is nothing that the page asks for: load it again")
        by_name = {
            name: _within(strength, -self._ranges[name].limit, self._ranges[name].limit, f"the strength of {name}")
            for name, strength in zip(self._names, strengths, strict=True)
        }
        most = int(_within(length, 1, self._speaker.most_new_tokens, "the longest answer"))
        return Asked(prompt, by_name, kind == _CHAT, tokens, most)


def _within(value: Any, least: float, most: float, name: str) -> float:
    """Return a number, or the end of the range that it is beyond. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"write a number for {name}")
    return float(min(max(value, least), most))


def _name_of(source: Source) -> str:
    """Return the model's name, of a folder its last part."""
    return "SmolLM2-135M-Instruct" if source.model is None else os.path.basename(source.model.rstrip(os.sep))
