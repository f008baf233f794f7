"""Texts and chat messages → token ids: templates as real models have them, on whichever transformers is installed."""

import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizer, PreTrainedTokenizerFast, ProcessorMixin

from steering_vectors._extraction.tokenizing import PromptTokenizer
from tests import tiny

# Each content may be a text or a list of text parts.
_TEXT = tiny.TEXT_OF_CONTENT
CHATML = _TEXT + (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' + text(m['content']) + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
LLAMA_2 = _TEXT + (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = '<<SYS>>\\n' + text(messages[0]['content']).strip() + '\\n<</SYS>>\\n\\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for m in turns -%}{%- set content = text(m['content']) -%}"
    "{%- if loop.index0 == 0 -%}{%- set content = system + content -%}{%- endif -%}"
    "{%- if m['role'] == 'user' -%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{%- else -%}{{ ' ' + content.strip() + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"
)
LLAMA_3 = _TEXT + (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + text(m['content']) | trim + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"
)
GEMMA = _TEXT + (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{ '<start_of_turn>' + role + '\\n' + text(m['content']) | trim + '<end_of_turn>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
DEEPSEEK_R1 = _TEXT + (
    "{{- bos_token -}}"
    "{%- for m in messages if m['role'] == 'system' -%}{{ text(m['content']) }}{%- endfor -%}"
    "{%- for m in messages -%}{%- set content = text(m['content']) -%}"
    "{%- if m['role'] == 'user' -%}{{ '<|User|>' + content }}"
    "{%- elif m['role'] == 'assistant' -%}"
    "{{ '<|Assistant|>' + content.split('</think>')[-1] + eos_token }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\\n' }}{%- endif -%}"
)
MISTRAL = _TEXT + (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = text(messages[0]['content']) + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- set ns = namespace(last_user=-1) -%}"
    "{%- for m in turns -%}{%- if m['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{{- bos_token -}}{%- for m in turns -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('After the optional system message, roles must alternate') }}{%- endif -%}"
    "{%- if m['role'] == 'user' -%}"
    "{{ '[INST] ' + (system if loop.index0 == ns.last_user else '') + text(m['content']) + '[/INST]' }}"
    "{%- else -%}{{ ' ' + text(m['content']) | trim + eos_token }}{%- endif -%}{%- endfor -%}"
)
GLM_4 = _TEXT + (
    "{{- '[gMASK]<sop>' -}}{%- for m in messages -%}{%- set content = text(m['content']) -%}"
    "{%- if m['role'] == 'user' -%}{{ '<|user|>\\n' + content }}"
    "{%- elif m['role'] == 'system' -%}{{ '<|system|>\\n' + content }}"
    "{%- else -%}{%- set thought = '' -%}"
    "{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}"
    "{%- set content = content.split('</think>')[-1].strip() -%}{%- endif -%}"
    "{{ '<|assistant|>\\n<think>' + thought + '</think>' }}"
    "{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '\\n<think></think>' }}{%- endif -%}{%- endif -%}"
)
SMOLLM_3 = _TEXT + (
    "{%- set block = '<think>\\n\\n</think>\\n' if enable_thinking is defined and not enable_thinking else '' -%}"
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' -%}{{ block + text(m['content']).lstrip('\\n') }}{%- else -%}{{ text(m['content']) }}"
    "{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' + block }}{%- endif -%}"
)
MISTRAL_THINKING = MISTRAL.replace("text(m['content']) | trim", "text(m['content']).split('</think>')[-1] | trim")
PLAIN = "{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] + '\\n' }}{%- endfor -%}"

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How was the film?"},
]
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def keep(answer: str) -> str:
    return answer


@dataclass(frozen=True)
class Style:
    """A template, and written by hand what it makes of TALK: the text up to the answer, the answer, its header."""

    template: str
    history: str  # TALK, up to where the assistant's turn begins
    header: str
    generation_prompt: str
    written: Callable[[str], str] = keep  # what stands after the header for an answer that is continued
    system: bool = True
    kwargs: Mapping[str, Any] | None = None


def trimmed(answer: str) -> str:
    return answer.strip()


def left_trimmed(answer: str) -> str:
    """The template trims, but writes a space after the answer: the trailing space can't be told from it."""
    return answer.lstrip()


_CHATML_HISTORY = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nHow was the film?<|im_end|>\n"
_QWEN = {
    "template": tiny.QWEN_3,
    "history": _CHATML_HISTORY,
    "header": "<|im_start|>assistant\n",
    "written": lambda answer: EMPTY_THOUGHT + answer.lstrip("\n"),
}
_GLM = {
    "template": GLM_4,
    "history": "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello<|user|>\nHow was the film?",
    "header": "<|assistant|>",
    "written": lambda answer: f"\n<think></think>\n{answer.strip()}",
}
STYLES: dict[str, Style] = {
    "ChatML": Style(CHATML, _CHATML_HISTORY, "<|im_start|>assistant\n", "<|im_start|>assistant\n"),
    "Llama 2": Style(
        LLAMA_2, "<s>[INST] Hi [/INST] Hello </s><s>[INST] How was the film? [/INST]", " ", "", written=left_trimmed
    ),
    "Llama 3": Style(
        LLAMA_3,
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow was the film?<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        written=trimmed,
    ),
    "Gemma": Style(
        GEMMA,
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nHow was the film?<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<start_of_turn>model\n",
        written=trimmed,
        system=False,
    ),
    "Qwen 3": Style(**_QWEN, generation_prompt="<|im_start|>assistant\n"),
    "Qwen 3 without thinking": Style(
        **_QWEN,
        generation_prompt="<|im_start|>assistant\n" + EMPTY_THOUGHT,
        kwargs={"enable_thinking": False},
    ),
    "GLM 4.5": Style(**_GLM, generation_prompt="<|assistant|>"),
    "GLM 4.5 without thinking": Style(
        **_GLM, generation_prompt="<|assistant|>\n<think></think>", kwargs={"enable_thinking": False}
    ),
    "SmolLM 3": Style(
        SMOLLM_3,
        _CHATML_HISTORY,
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n",
        written=lambda answer: answer.lstrip("\n"),
    ),
    "SmolLM 3 without thinking": Style(
        SMOLLM_3,
        _CHATML_HISTORY.replace("assistant\n", "assistant\n<think>\n\n</think>\n"),
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n",
        written=lambda answer: "<think>\n\n</think>\n" + answer.lstrip("\n"),
        kwargs={"enable_thinking": False},
    ),
    "DeepSeek R1": Style(
        DEEPSEEK_R1,
        "<s><|User|>Hi<|Assistant|>Hello</s><|User|>How was the film?",
        "<|Assistant|>",
        "<|Assistant|><think>\n",
    ),
    "Mistral": Style(MISTRAL, "<s>[INST] Hi[/INST] Hello</s>[INST] How was the film?[/INST]", " ", "", written=trimmed),
}
ANSWERS = {
    "a word": "Great",
    "a letter of the header": "i",
    "a capital letter": "A",
    "the role's name": "assistant",
    "text of ChatML's trailer": "im_end",
    "text of Llama's trailer": "eot_id",
    "a special token": "<|im_end|>",
    "an angle bracket": "<b>Great</b>",
    "the beginning of a thought": "<think>",
    "a slash": "</s",
    "a space before": "  Great",
    "a space after": "Great  ",
    "a line before": "\nGreat",
    "not ASCII": "Größe 你好 🙂",
    "two lines": "One.\nTwo.",
}
SPECIALS = [
    *("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<|User|>",
        "<|Assistant|>",
        "<think>",
        "</think>",
        "<|assistant|>",
        "<|user|>",
    ),
]


class WithoutLengths(PreTrainedTokenizerFast):  # type: ignore[misc]
    """A tokenizer whose offsets have no length, as those of Llama 3 had with tokenizers up to 0.20.0.

    Special tokens kept theirs, and so did pieces of words, as the bytes of one character.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoded = super().__call__(*args, **kwargs)
        if kwargs.get("return_offsets_mapping"):
            spans = encoded["offset_mapping"]
            starts = [start for start, _ in spans]
            special = [token in self.all_special_ids for token in encoded["input_ids"]]
            encoded["offset_mapping"] = [
                (start, end if is_special or starts.count(start) > 1 else start)
                for (start, end), is_special in zip(spans, special, strict=True)
            ]
        return encoded


@cache
def made(
    template: str, *, adds_bos: bool = False, joins: bool = False, kind: type[Any] = PreTrainedTokenizerFast
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of all the templates; with ``joins`` its tokens are longer."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420 if joins else 256 + len(SPECIALS),
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["assistant\nGreat", "\n\nHello Great", "How was the film?", "[/INST] Great"] * 20, trainer
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer: PreTrainedTokenizerFast = kind(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


# What a tokenizer puts before a text, and after it.
ADDED = {
    "nothing": ("", ""),
    "BOS": ("<s>", ""),
    "two tokens": ("[gMASK]<sop>", ""),
    "BOS and EOS": ("<s>", "</s>"),
    "EOS": ("", "</s>"),
    "BOS twice": ("<s><s>", ""),
}


@cache
def adding(name: str, *, has_bos: bool = True, trims: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that adds these special tokens to each text; ``trims`` leaves spaces out of offsets."""
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>"]
    vocabulary = {token: n for n, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    sides = [re.findall(r"<s>|</s>|\[gMASK\]|<sop>", side) for side in ADDED[name]]
    template = processors.TemplateProcessing(
        single=" ".join([*sides[0], "$A", *sides[1]]),
        special_tokens=[(t, vocabulary[t]) for t in {*sides[0], *sides[1]}],
    )
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trims), template])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>" if has_bos else None)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer = copy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def ids_of_chat(tokenizer: Any, messages: Any, **kwargs: Any) -> list[int]:
    """What ``apply_chat_template`` hands to ``generate``, of a tokenizer or of a processor."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return list(ids if isinstance(ids[0], int) else ids[0])


def answered(answer: Any, talk: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    return [*(TALK if talk is None else talk), {"role": "assistant", "content": answer}]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TestTheAssistantsTurn:
    """A chat that ends in an assistant's turn is read as far as its text."""

    @pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
    @pytest.mark.parametrize("name", STYLES)
    def test_text_ends_where_the_answer_ends(self, name: str, answer: str) -> None:
        style = STYLES[name]
        read = PromptTokenizer(made(style.template), style.kwargs)(answered(answer))
        assert read.text == style.history + style.header + style.written(answer)
        assert decode(made(style.template), read.input_ids) == read.text

    @pytest.mark.skipif(
        tiny.ON_TRANSFORMERS_4, reason="transformers 4 looks for the answer, and finds it in the trailer"
    )
    @pytest.mark.parametrize("answer", [*ANSWERS.values(), "", " "], ids=[*ANSWERS, "nothing", "a space"])
    @pytest.mark.parametrize("name", STYLES)
    def test_text_is_that_of_continue_final_message(self, name: str, answer: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        messages = answered(answer)
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=True, **(style.kwargs or {})
        )
        assert PromptTokenizer(tokenizer, style.kwargs)(messages).text == expected

    @pytest.mark.parametrize("joins", [False, True], ids=["bytes", "long tokens"])
    @pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
    @pytest.mark.parametrize("name", STYLES)
    def test_completion_begins_after_the_role_header(self, name: str, answer: str, joins: bool) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template, joins=joins)
        read = PromptTokenizer(tokenizer, style.kwargs)(answered(answer), find_completion=True)
        assert read.completion_start is not None
        spans = tokenizer(read.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # Whether a space alone is the header's or the turn's can't be told.
        beginnings = (
            {len(style.history), len(style.history) + 1} if style.header == " " else {len(style.history + style.header)}
        )
        first_tokens = {next(n for n, (_, end) in enumerate(spans) if end > beginning) for beginning in beginnings}
        assert read.completion_start in first_tokens

    @pytest.mark.parametrize("joins", [False, True], ids=["bytes", "long tokens"])
    @pytest.mark.parametrize("answer", ["Great", "i", "Größe 你好 🙂", "\nGreat", "One.\nTwo."])
    @pytest.mark.parametrize("name", STYLES)
    def test_completion_is_found_by_offsets_without_length(self, name: str, answer: str, joins: bool) -> None:
        style = STYLES[name]
        reads = [
            PromptTokenizer(made(style.template, joins=joins, kind=kind), style.kwargs)
            for kind in (WithoutLengths, PreTrainedTokenizerFast)
        ]
        found, expected = (read(answered(answer), find_completion=True) for read in reads)
        assert found == expected

    @pytest.mark.parametrize("answer", ["Great", " Great", "\n", "é"])
    def test_completion_is_found_by_offsets_without_spaces(self, answer: str) -> None:
        tokenizer = adding("nothing", trims=True)
        read = PromptTokenizer(with_template(tokenizer, tiny.CHATML))(answered(answer), find_completion=True)
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == answer

    @pytest.mark.parametrize("name", STYLES)
    def test_an_empty_answer_has_no_completion_but_its_empty_thought(self, name: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        read = PromptTokenizer(tokenizer, style.kwargs)(answered(""), find_completion=True)
        assert read.completion_start is not None
        assert decode(tokenizer, read.input_ids[read.completion_start :]).strip() == style.written("").strip()

    @pytest.mark.parametrize("answer", ["Great", "i", "A"])
    @pytest.mark.parametrize("name", STYLES)
    def test_a_sole_assistant_turn_is_read_like_others(self, name: str, answer: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        if name in ("Gemma", "Mistral"):
            pytest.skip("the template refuses a chat that begins so")
        read = PromptTokenizer(tokenizer, style.kwargs)(answered(answer, []), find_completion=True)
        assert read.text.removeprefix("<s>").removeprefix("[gMASK]<sop>") == style.header + style.written(answer)
        assert decode(tokenizer, read.input_ids[read.completion_start :]).strip() == style.written(answer).strip()

    @pytest.mark.parametrize("name", STYLES)
    def test_a_system_message_does_not_move_the_completion(self, name: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        if not style.system:
            pytest.skip("the template refuses system messages")
        read = PromptTokenizer(tokenizer, style.kwargs)(answered("Great", [SYSTEM, *TALK]), find_completion=True)
        assert "Be brief." in read.text
        assert read.text.endswith(style.header + style.written("Great"))
        assert decode(tokenizer, read.input_ids[read.completion_start :]).strip() == style.written("Great").strip()

    @pytest.mark.parametrize("name", STYLES)
    def test_text_parts_are_read_like_one_text(self, name: str) -> None:
        style = STYLES[name]
        read = PromptTokenizer(made(style.template), style.kwargs)
        parts = [{"type": "text", "text": "Gre"}, {"type": "text", "text": "at"}]
        talk = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TALK]
        assert read(answered(parts, talk), find_completion=True) == read(answered("Great"), find_completion=True)

    def test_a_token_across_the_headers_end_belongs_to_the_completion(self) -> None:
        tokenizer = made(LLAMA_3, joins=True)
        assert any(token.startswith("ĊĊH") for token in tokenizer.get_vocab())  # the tokenizer joins "\n\nHello"
        read = PromptTokenizer(tokenizer)(answered("Hello Great"), find_completion=True)
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == "\n\nHello Great"

    @settings(deadline=None, max_examples=60)
    @given(answer=st.text(st.characters(exclude_categories=["Cs", "Co"])), question=st.text(max_size=8))
    def test_any_answer_is_the_completion_where_tokens_are_bytes(self, answer: str, question: str) -> None:
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        messages = answered(answer, [{"role": "user", "content": question}])
        read = PromptTokenizer(tokenizer)(messages, find_completion=True)
        assert read.text.endswith(f"<|im_start|>assistant\n{answer}")
        assert read.completion_start is not None
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == answer

    @pytest.mark.parametrize("name", ["Qwen 3", "Qwen 3 without thinking"])
    def test_a_thought_in_the_answer_is_inside_the_completion(self, name: str) -> None:
        style, tokenizer = STYLES[name], made(tiny.QWEN_3)
        thinking = "<think>\nIt was long.\n</think>\n\nGreat"
        read = PromptTokenizer(tokenizer, style.kwargs)(answered(thinking), find_completion=True)
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == thinking

    def test_a_template_that_strips_thoughts_is_read_as_it_writes(self) -> None:
        tokenizer = made(DEEPSEEK_R1)
        read = PromptTokenizer(tokenizer)(answered("<think>It was long.</think>Great"), find_completion=True)
        assert read.text == STYLES["DeepSeek R1"].history + "<|Assistant|>Great"
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == "Great"

    @pytest.mark.parametrize("find_completion", [False, True])
    @pytest.mark.parametrize("thought", ["<think>It was long.</think>", "<think>\nIt was long.\n</think>\n\n"])
    @pytest.mark.parametrize("template", [DEEPSEEK_R1, MISTRAL_THINKING], ids=["DeepSeek R1", "Mistral"])
    def test_a_thought_that_the_template_strips_is_an_error(
        self, template: str, thought: str, find_completion: bool
    ) -> None:
        tokenizer = made(template)
        for said in (
            thought,
            [{"type": "text", "text": thought}],
            [{"type": "text", "text": t} for t in (thought, "")],
        ):
            with pytest.raises(ValueError, match="lacks the text of the last assistant message.*finished thoughts"):
                PromptTokenizer(tokenizer)(answered(said), find_completion=find_completion)
        if not tiny.ON_TRANSFORMERS_4:
            with pytest.raises(ValueError, match="final message does not appear"):
                tokenizer.apply_chat_template(answered(thought), tokenize=False, continue_final_message=True)

    @pytest.mark.parametrize(
        ("template", "thought", "written"),
        [
            (DEEPSEEK_R1, "<think>It was", "<|Assistant|><think>It was"),
            (tiny.QWEN_3, "<think>\nIt was", "<|im_start|>assistant\n<think>\n\n</think>\n\n<think>\nIt was"),
            (tiny.QWEN_3, EMPTY_THOUGHT, f"<|im_start|>assistant\n{EMPTY_THOUGHT}"),
            (tiny.QWEN_3, "<think>\nLong.\n</think>\n\n", "<|im_start|>assistant\n<think>\nLong.\n</think>\n\n"),
            (GLM_4, "<think>Long.</think>", "<|assistant|>\n<think>Long.</think>"),
        ],
        ids=["unfinished", "unfinished beside an empty one", "empty", "kept", "rewritten"],
    )
    def test_a_thought_that_the_template_keeps_is_read(self, template: str, thought: str, written: str) -> None:
        assert PromptTokenizer(made(template))(answered(thought)).text.rstrip().endswith(written.rstrip())

    @pytest.mark.parametrize("answer", ["fine", "assistant"])
    def test_the_role_header_of_a_template_without_generation_prompt_is_no_completion(self, answer: str) -> None:
        tokenizer = tiny.tokenizer(chat_template=PLAIN)
        read = PromptTokenizer(tokenizer)(answered(answer), find_completion=True)
        assert read.text.endswith(f"assistant: {answer}")
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == answer

    def test_two_assistant_turns_in_a_row_leave_only_the_last_as_completion(self) -> None:
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        read = PromptTokenizer(tokenizer)(answered("Great", answered("Well")), find_completion=True)
        assert decode(tokenizer, read.input_ids[read.completion_start :]) == "Great"

    def test_a_template_that_drops_the_answer_is_an_error(self) -> None:
        tokenizer = tiny.tokenizer(
            chat_template="{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
        )
        with pytest.raises(ValueError, match="lacks the text of the last assistant message"):
            PromptTokenizer(tokenizer)(answered("Great"))

    def test_messages_are_not_changed(self) -> None:
        parts = [{"type": "text", "text": "Great"}]
        messages = answered(parts)
        PromptTokenizer(made(tiny.QWEN_3))(messages, find_completion=True)
        assert messages == [*TALK, {"role": "assistant", "content": [{"type": "text", "text": "Great"}]}]


class TestOtherTurns:
    """A chat that ends in another turn is read as far as the header of the answer to come."""

    @pytest.mark.parametrize("name", STYLES)
    def test_the_generation_prompt_is_written(self, name: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        read = PromptTokenizer(tokenizer, style.kwargs)(TALK, find_completion=True)
        assert read.text == style.history + style.generation_prompt
        assert decode(tokenizer, read.input_ids) == read.text
        assert read.completion_start == len(read.input_ids)
        rendered = tokenizer.apply_chat_template(
            TALK, tokenize=False, add_generation_prompt=True, **(style.kwargs or {})
        )
        assert read.text == rendered

    @pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Qwen 3"])
    def test_a_system_message_alone_is_a_prompt(self, name: str) -> None:
        style, tokenizer = STYLES[name], made(STYLES[name].template)
        read = PromptTokenizer(tokenizer)([SYSTEM])
        assert read.text.endswith(style.generation_prompt)
        assert "Be brief." in read.text


TOOLS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\\n' }}{%- if m['content'] -%}{{ m['content'] }}{%- endif -%}"
    "{%- for c in m['tool_calls'] or [] -%}{{ '<call>' + c['function']['name'] + c['function']['arguments'] | tojson }}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"in": 1}}}]}
CALLS = [CALL, {**CALL, "content": None}, {**CALL, "content": ""}, {**CALL, "content": "I look."}]


@pytest.mark.parametrize("call", CALLS, ids=["no content", "None", "empty", "text"])
class TestToolCalls:
    def talk(self, call: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "Warm?"}, call, {"role": "tool", "name": "sky", "content": "22"}]

    def test_in_the_history_are_read_as_the_template_writes_them(self, call: dict[str, Any]) -> None:
        tokenizer = made(TOOLS)
        read = PromptTokenizer(tokenizer)
        assert read(self.talk(call)).input_ids == ids_of_chat(tokenizer, self.talk(call), add_generation_prompt=True)
        answer = read(answered("Yes", self.talk(call)), find_completion=True)
        assert f"{call.get('content') or ''}<call>sky" in answer.text
        assert decode(tokenizer, answer.input_ids[answer.completion_start :]) == "Yes"

    def test_a_last_message_is_read_to_the_end_of_its_text(self, call: dict[str, Any]) -> None:
        read = PromptTokenizer(made(TOOLS))
        if call.get("content"):
            assert read(self.talk(call)[:2]).text.endswith("<|im_start|>assistant\nI look.")
            return
        with pytest.raises(
            ValueError, match="the last message calls a tool and has no text: end the chat with the tool"
        ):
            read(self.talk(call)[:2])


class TestTokenIds:
    """Ids are taken exactly as they are, whatever holds them."""

    IDS = (1, 7, 8, 1, 9)

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize(
        "kind", [list, tuple, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)]
    )
    @pytest.mark.parametrize("holder", [None, dict, BatchEncoding, BatchFeature])
    def test_in_lists_tensors_and_mappings(self, nested: bool, kind: Any, holder: Any) -> None:
        ids = kind([list(self.IDS)] if nested else list(self.IDS))
        prompt = (
            ids
            if holder is None
            else holder({"input_ids": ids, "attention_mask": kind([[1] * 5] if nested else [1] * 5)})
        )
        read = PromptTokenizer(adding("BOS"))(prompt)
        assert (read.input_ids, read.text, read.completion_start) == (list(self.IDS), "", None)
        assert all(type(n) is int for n in read.input_ids)

    @pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
    @pytest.mark.parametrize("return_dict", [True, False])
    def test_are_what_apply_chat_template_returns(self, return_tensors: str | None, return_dict: bool) -> None:
        tokenizer = with_template(adding("BOS"), tiny.CHATML)
        prompt = tokenizer.apply_chat_template(
            TALK, add_generation_prompt=True, return_dict=return_dict, return_tensors=return_tensors
        )
        read = PromptTokenizer(tokenizer)
        assert read(prompt).input_ids == read(TALK).input_ids

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_that_a_mask_shows_is_no_token(self, side: str) -> None:
        tokenizer = tiny.tokenizer(padding_side=side)
        batch = tokenizer(["hi", "there"], padding=True, return_tensors="pt")
        row = {name: values[:1] for name, values in batch.items()}
        assert PromptTokenizer(tokenizer)(row).input_ids == tokenizer("hi")["input_ids"]

    @pytest.mark.parametrize(
        "rows", [[[5, 6], [7]], torch.tensor([[5, 6], [7, 8]]), {"input_ids": [[5], [6]]}], ids=str
    )
    def test_several_rows_are_refused(self, rows: Any) -> None:
        with pytest.raises(ValueError, match="must be one row of token ids, got 2: give each as a prompt of its own"):
            PromptTokenizer(tiny.tokenizer())(rows)

    def test_images_beside_them_are_refused(self) -> None:
        prompt = {"input_ids": [5], "attention_mask": [1], "pixel_values": torch.zeros(1, 3, 2, 2)}
        with pytest.raises(ValueError, match="token ids with pixel_values beside them can't be read: give the chat"):
            PromptTokenizer(tiny.tokenizer())(prompt)

    @pytest.mark.parametrize("mask", [[1], [[1, 1], [1, 1]], "11"], ids=str)
    def test_a_mask_of_another_shape_is_refused(self, mask: Any) -> None:
        with pytest.raises(ValueError, match="one"):
            PromptTokenizer(tiny.tokenizer())({"input_ids": [5, 6], "attention_mask": mask})

    @pytest.mark.parametrize(
        "prompt",
        [torch.tensor([5.0]), torch.tensor([True]), torch.tensor(5), {"input_ids": "hi"}, {"ids": [5]}],
        ids=str,
    )
    def test_other_tensors_and_mappings_are_no_prompts(self, prompt: Any) -> None:
        with pytest.raises(TypeError, match="expected a text, a list of chat messages or token ids, got"):
            PromptTokenizer(tiny.tokenizer())(prompt)

    @pytest.mark.parametrize(
        "prompt", [torch.tensor([], dtype=torch.long), [[]], {"input_ids": [5], "attention_mask": [0]}]
    )
    def test_none_at_all_are_an_empty_prompt(self, prompt: Any) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            PromptTokenizer(tiny.tokenizer())(prompt)


class TestBeginningOfSequence:
    @pytest.mark.parametrize("adds_bos", [False, True])
    @pytest.mark.parametrize("name", STYLES)
    def test_a_chat_has_the_template_s_alone_as_in_transformers(self, name: str, adds_bos: bool) -> None:
        style = STYLES[name]
        tokenizer = made(style.template, adds_bos=adds_bos)
        read = PromptTokenizer(tokenizer, style.kwargs)
        kwargs = {"add_generation_prompt": True, **(style.kwargs or {})}
        assert read(TALK).input_ids == ids_of_chat(tokenizer, TALK, **kwargs)
        answer = read(answered("Great"), find_completion=True)
        assert answer.input_ids == tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        assert decode(tokenizer, answer.input_ids[answer.completion_start :]).strip() == style.written("Great").strip()
        if not tiny.ON_TRANSFORMERS_4:
            continued = ids_of_chat(tokenizer, answered("Great"), continue_final_message=True, **(style.kwargs or {}))
            assert answer.input_ids == continued

    @pytest.mark.parametrize("has_bos", [True, False])
    @pytest.mark.parametrize("begins", ["", "<s>", "[gMASK]<sop>", "</s>"])
    @pytest.mark.parametrize("name", ADDED)
    def test_a_chat_is_tokenized_as_in_transformers_whatever_the_tokenizer_adds(
        self, name: str, begins: str, has_bos: bool
    ) -> None:
        tokenizer = with_template(adding(name, has_bos=has_bos), begins + tiny.CHATML)
        read = PromptTokenizer(tokenizer)
        assert read(TALK).input_ids == ids_of_chat(tokenizer, TALK, add_generation_prompt=True)
        answer = read(answered("Great"), find_completion=True)
        assert decode(tokenizer, answer.input_ids[answer.completion_start :]) == "Great"
        if not tiny.ON_TRANSFORMERS_4:
            assert answer.input_ids == ids_of_chat(tokenizer, answered("Great"), continue_final_message=True)

    @settings(deadline=None, max_examples=60)
    @given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), name=st.sampled_from(list(ADDED)))
    def test_what_the_tokenizer_adds_stands_once_also_where_the_text_begins_with_it(self, text: str, name: str) -> None:
        for tokenizer in (adding(name), adding(name, has_bos=False)):
            read, (before, _) = PromptTokenizer(tokenizer), ADDED[name]
            assert read(text).input_ids == tokenizer(text)["input_ids"]
            assert read(before + text).input_ids == tokenizer(text)["input_ids"]

    def test_a_part_of_what_the_tokenizer_adds_is_the_text_s_own(self) -> None:
        tokenizer = adding("two tokens")
        for text in ("<sop>hi", "[gMASK]hi", "<s>hi"):
            assert PromptTokenizer(tokenizer)(text).input_ids == tokenizer(text)["input_ids"]

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_later_ones_are_the_templates_own(self, adds_bos: bool) -> None:
        read = PromptTokenizer(made(LLAMA_2, adds_bos=adds_bos))(answered("Great"))
        assert [n for n, token in enumerate(read.input_ids) if token == 1] == [0, read.input_ids.index(2) + 1]

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_a_text_that_begins_with_one_gets_no_second(self, adds_bos: bool) -> None:
        tokenizer = tiny.tokenizer(bos=adds_bos)
        assert PromptTokenizer(tokenizer)("<s>hi").input_ids == [1, *tiny.tokenizer()("hi")["input_ids"]]

    def test_a_plain_text_is_tokenized_as_the_tokenizer_does(self) -> None:
        for tokenizer in (tiny.tokenizer(), tiny.tokenizer(bos=True)):
            assert PromptTokenizer(tokenizer)("hi there").input_ids == tokenizer("hi there")["input_ids"]

    def test_a_tokenizer_without_one_is_taken_as_it_is(self) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer)
        tokenizer.chat_template = tiny.CHATML
        read = PromptTokenizer(tokenizer)
        assert read("<s>hi").text == "<s>hi"
        assert decode(tokenizer, read(answered("Great")).input_ids).endswith("Great")


class Characters(PreTrainedTokenizer):  # type: ignore[misc]
    """A tokenizer in plain Python, without offsets: one token a character."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|im_start|>", "<|im_end|>"], **kwargs
        )

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {**{chr(n): n for n in range(self.vocab_size)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return min(ord(token), self.vocab_size - 1)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class CharactersAfterBOS(Characters):
    """The same, which puts BOS before each text."""

    def build_inputs_with_special_tokens(self, ids: list[int], _more: list[int] | None = None) -> list[int]:
        return [self.bos_token_id, *ids]


class TestPlacesFoundWithTheTokenizer:
    """``place_of`` leads from a token of ``tokenizer(text)`` to the same token of the prompt."""

    @settings(deadline=None, max_examples=60)
    @given(text=st.text(max_size=12), written=st.booleans(), name=st.sampled_from(list(ADDED)))
    def test_of_texts(self, text: str, written: bool, name: str) -> None:
        tokenizer, text = adding(name), (ADDED[name][0] if written else "") + "a" + text
        read, ids = PromptTokenizer(tokenizer)(text), tokenizer(text)["input_ids"]
        assert [read.input_ids[read.place_of(n)] for n in range(len(ids))] == ids
        assert [read.place_of(-n) for n in (1, 2)] == [-1, -2]

    @pytest.mark.parametrize("begins", ["", "<s>", "[gMASK]<sop>"])
    @pytest.mark.parametrize("name", ADDED)
    def test_of_chats(self, name: str, begins: str) -> None:
        tokenizer = with_template(adding(name), begins + tiny.CHATML)
        for messages in (TALK, answered("Great")):
            read = PromptTokenizer(tokenizer)(messages)
            place = tokenizer(read.text).char_to_token(read.text.index("film"))
            found = read.place_of(place)
            assert decode(tokenizer, read.input_ids[found : found + 4]) == "film"

    @pytest.mark.parametrize("name", ["BOS", "two tokens"])
    def test_a_special_token_that_a_chat_does_not_get_is_refused(self, name: str) -> None:
        read = PromptTokenizer(with_template(adding(name), tiny.CHATML))(TALK)
        with pytest.raises(ValueError, match=r"token 0 of tokenizer\(text\) is a special token that .* choose another"):
            read.place_of(0)
        assert read.place_of(-1) == -1


class TestSlowTokenizers:
    @pytest.mark.parametrize("template", [tiny.CHATML, "<s>" + tiny.CHATML])
    def test_special_tokens_are_those_of_transformers(self, template: str) -> None:
        tokenizer = CharactersAfterBOS()
        tokenizer.chat_template = template
        read = PromptTokenizer(tokenizer)
        assert read("hi").input_ids == read("<s>hi").input_ids == tokenizer("hi")["input_ids"]
        assert read("hi").input_ids[:-2] == [tokenizer.bos_token_id]
        assert read(TALK).input_ids == ids_of_chat(tokenizer, TALK, add_generation_prompt=True)
        answer = read(answered("Great"), find_completion=True)
        assert answer.completion_start == len(answer.input_ids) - len("Great")

    @pytest.mark.parametrize("answer", ["Great", "i", "a", " spaced "])
    def test_completion_is_found_without_offsets(self, answer: str) -> None:
        tokenizer = Characters()
        tokenizer.chat_template = tiny.CHATML
        assert not tokenizer.is_fast
        read = PromptTokenizer(tokenizer)(answered(answer), find_completion=True)
        assert read.completion_start == len(read.input_ids) - len(answer)

    @pytest.mark.parametrize("answer", ["Great", "i"])
    def test_thoughts_are_inside_the_completion(self, answer: str) -> None:
        tokenizer = Characters()
        tokenizer.chat_template = tiny.QWEN_3
        read = PromptTokenizer(tokenizer, {"enable_thinking": False})(answered(answer), find_completion=True)
        assert read.completion_start == len(read.input_ids) - len(EMPTY_THOUGHT + answer)


class Processor:
    """Stands for a vision-language model's processor: a tokenizer inside, and perhaps a template of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def __call__(self, images: Any = None, text: Any = None) -> Any:
        raise AssertionError("a processor takes images first: texts belong to its tokenizer")

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **kwargs)


class TestProcessors:
    def test_its_own_template_is_used(self) -> None:
        processor = Processor(tiny.tokenizer(chat_template="no such"), CHATML)
        expected = PromptTokenizer(tiny.tokenizer(chat_template=CHATML))
        for messages in (answered("Great"), TALK, answered([{"type": "text", "text": "Great"}])):
            assert PromptTokenizer(processor)(messages, find_completion=True) == expected(
                messages, find_completion=True
            )

    def test_its_tokenizers_template_is_used_where_it_has_none(self) -> None:
        processor = Processor(tiny.tokenizer(chat_template=CHATML), None)
        expected = PromptTokenizer(tiny.tokenizer(chat_template=CHATML))
        assert PromptTokenizer(processor)(answered("Great")) == expected(answered("Great"))

    def test_texts_go_to_its_tokenizer(self) -> None:
        processor = Processor(tiny.tokenizer(bos=True), None)
        assert PromptTokenizer(processor)("hi").input_ids == tiny.tokenizer(bos=True)("hi")["input_ids"]


class RealProcessor(ProcessorMixin):  # type: ignore[misc]
    """A processor of transformers itself, of texts alone."""

    attributes = ("tokenizer",)
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    def __call__(self, *args: Any, text: Any = None, **kwargs: Any) -> Any:
        if tiny.ON_TRANSFORMERS_4:  # the base class can't be called there
            return self.tokenizer(text, **kwargs)
        return super().__call__(*args, text=text, **kwargs)


class TestProcessorsOfTransformers:
    @pytest.mark.parametrize("begins", ["", "<s>", "[gMASK]<sop>"])
    @pytest.mark.parametrize("name", ADDED)
    def test_a_chat_is_tokenized_as_the_processor_does(self, name: str, begins: str) -> None:
        processor = RealProcessor(adding(name), chat_template=begins + tiny.CHATML)
        read = PromptTokenizer(processor)
        question = read(TALK)
        assert question.input_ids == ids_of_chat(processor, TALK, add_generation_prompt=True)
        place = processor.tokenizer(question.text).char_to_token(question.text.index("film"))
        found = question.place_of(place)
        assert decode(processor.tokenizer, question.input_ids[found : found + 4]) == "film"
        answer = read(answered("Great"), find_completion=True)
        completion = decode(processor.tokenizer, answer.input_ids[answer.completion_start :])
        assert completion.removesuffix("</s>") == "Great"
        if not tiny.ON_TRANSFORMERS_4:
            assert answer.input_ids == ids_of_chat(processor, answered("Great"), continue_final_message=True)


class TestTemplateArguments:
    def test_they_are_passed_on(self) -> None:
        tokenizer = tiny.tokenizer(chat_template="{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
        assert PromptTokenizer(tokenizer, {"mood": "Merrily: "})(TALK[:1]).text == "Merrily: Hi"

    @pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message"])
    def test_what_follows_from_the_samples_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"chat_template_kwargs can't hold .*{name}.*sets them from the samples"):
            PromptTokenizer(tiny.tokenizer(chat_template=CHATML), {name: True})


class TestWhatCannotBeRead:
    @pytest.mark.parametrize("kind", ["video", "audio"])
    def test_other_parts_are_refused_by_name(self, kind: str) -> None:
        messages = [{"role": "user", "content": [{"type": kind, "url": "x.png"}, {"type": "text", "text": "What?"}]}]
        with pytest.raises(ValueError, match=f"may hold only text and images, got a part of type {kind}"):
            PromptTokenizer(made(CHATML))(messages)

    @pytest.mark.parametrize("prompt", ["", [], ()])
    def test_an_empty_prompt_is_refused(self, prompt: Any) -> None:
        with pytest.raises(ValueError, match="the prompt is empty"):
            PromptTokenizer(made(CHATML))(prompt)

    def test_a_chat_needs_a_template(self) -> None:
        with pytest.raises(ValueError, match=r"has no chat template.*give texts, or set tokenizer\.chat_template"):
            PromptTokenizer(tiny.tokenizer())(TALK)

    @pytest.mark.parametrize("message", [{"content": "Hi"}, {"role": "user"}])
    def test_a_message_needs_role_and_content(self, message: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="a chat message must have a role and a content, got"):
            PromptTokenizer(made(CHATML))([message])

    @pytest.mark.parametrize("content", [3, ["Hi"], [{"type": "text"}]])
    def test_content_must_be_text_or_parts(self, content: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="content"):
            PromptTokenizer(made(CHATML))([{"role": "user", "content": content}])

    @pytest.mark.parametrize("prompt", [None, 3, b"hi", {"role": "user", "content": "Hi"}, ["hi", "ho"]])
    def test_other_kinds_are_refused(self, prompt: Any) -> None:
        with pytest.raises(TypeError, match="expected a text, a list of chat messages or token ids, got"):
            PromptTokenizer(made(CHATML))(prompt)

    @pytest.mark.parametrize("tokenizer", [None, "gpt2", 3])
    def test_a_tokenizer_is_asked_for(self, tokenizer: Any) -> None:
        with pytest.raises(TypeError, match="tokenizer must be a Hugging Face tokenizer or processor, got"):
            PromptTokenizer(tokenizer)

    def test_a_model_is_no_tokenizer(self) -> None:
        with pytest.raises(TypeError, match="tokenizer must be .*, got GPT2LMHeadModel"):
            PromptTokenizer(tiny.shared("gpt2"))

    def test_what_a_template_refuses_is_a_value_error_with_its_words(self) -> None:
        with pytest.raises(ValueError, match="System role not supported"):
            PromptTokenizer(made(GEMMA))([SYSTEM, *TALK])


class TestTheTokenizer:
    @pytest.mark.parametrize("prompt", ["hi", TALK, answered("Great")], ids=["text", "question", "answer"])
    def test_is_not_changed(self, prompt: Any) -> None:
        tokenizer = tiny.tokenizer(pad=False, padding_side="left", chat_template=CHATML)
        before = (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), dict(vars(tokenizer)))
        PromptTokenizer(tokenizer)(prompt, find_completion=True)
        assert tokenizer.pad_token is None
        assert (
            tokenizer.backend_tokenizer.to_str(),
            dict(tokenizer.special_tokens_map),
            dict(vars(tokenizer)),
        ) == before
