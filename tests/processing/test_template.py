from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ume_models.embedders.plume_prompt import PlumePrompt, clean_text
from ume_models.errors import CheckpointError, ItemError
from ume_models.processing import ImageConfig, MediaRules, Processor, Rendered
from ume_models.processing.template import join_text
from ume_models.processing.tokens import PromptTokenizer


@pytest.mark.compat
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("image_wide", ("image",)),
        ("two_images", ("image", "image")),
        ("video_8", ("video",)),
        ("text_only", ()),
        ("text_long", ()),
    ],
)
def test_recorded_prompts(
    tokenizer: Any, recorded_cases: dict[str, Any], name: str, layout: Any
) -> None:
    case = recorded_cases[name]
    rendered = PlumePrompt(tokenizer).render(layout, "", case["text"])
    assert str(rendered) == case["rendered_prompt"]


class Spoiled:
    """A tokenizer with another chat template."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.renderings = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        self.renderings += 1
        if self._template is None:
            raise ValueError("no chat template is set")
        return self._tokenizer.apply_chat_template(messages, chat_template=self._template, **kwargs)


def test_the_chat_template_runs_once_per_layout(tokenizer: Any) -> None:
    counting = Spoiled(tokenizer, tokenizer.chat_template)
    template = PlumePrompt(counting)
    for text in ("a", "b", "c"):
        template.render(("image",), "", text)
        template.render((), "", text)
    assert counting.renderings == 2


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "cannot be rendered"),
        ("{{ 1 / 0 }}", "cannot be rendered"),
        ("no text at all", "once each"),
        ("{{ messages[0].content[-1].text }}", "once each"),
        ("<|image_pad|>{{ messages[0].content[-1].text * 2 }}", "once each"),
    ],
)
def test_unusable_chat_template(tokenizer: Any, chat_template: str | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*copy chat_template.json"):
        PlumePrompt(Spoiled(tokenizer, chat_template)).render(("image",), "", "a")


def test_missing_tokens_are_named() -> None:
    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {"<|image_pad|>": 0, "<|video_pad|>": 1}

    with pytest.raises(CheckpointError, match="lacks <disc_emb>, <gen_emb>"):
        Processor(Bare(), PlumePrompt(Bare()), ImageConfig(), MediaRules())


@pytest.mark.parametrize(
    ("instruction", "text", "joined"),
    [("i", "t", "i t"), ("", "t", "t"), ("i", "", "i"), ("i ", " t", "i   t")],
)
def test_join_text(instruction: str, text: str, joined: str) -> None:
    assert join_text(instruction, text) == joined


def test_visual_tokens_are_removed_and_the_text_stripped() -> None:
    assert clean_text("<|image_pad|> a <|video_pad|>b\n") == "a b"


@pytest.mark.parametrize(
    "token",
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"],
)
def test_control_tokens_are_refused(token: str) -> None:
    with pytest.raises(ItemError, match="control token") as error:
        clean_text(f"a {token} b")
    assert token in str(error.value)


def test_a_pad_that_appears_by_removing_others_is_refused() -> None:
    with pytest.raises(ItemError, match="control token"):
        clean_text("<|image_<|image_pad|>pad|>")


def test_plume_tokens_in_the_text_are_allowed() -> None:
    assert clean_text("a <disc_emb> <gen_emb> <think>") == "a <disc_emb> <gen_emb> <think>"


PROMPTS = [
    Rendered("<|im_start|>user\n<|image_pad|>", "", "\n<disc_emb>\nSay it<|im_end|>\n"),
    Rendered("<|im_start|>system\n", "", "<|im_end|>\n"),
    Rendered("<|video_pad|> ", "", ""),
    Rendered("", "", ""),
]


@pytest.mark.compat
@pytest.mark.parametrize("prompt", PROMPTS)
@given(text=st.text(max_size=40) | st.sampled_from(["  ", "\n", "a\n<disc_emb>\n", "<bot>", "▁"]))
def test_ids_are_those_of_the_whole_string(tokenizer: Any, prompt: Rendered, text: str) -> None:
    prompt = replace(prompt, text=text)
    ids = PromptTokenizer(tokenizer).encode([prompt])[prompt]
    assert ids.tolist() == tokenizer(str(prompt))["input_ids"]


def test_constant_parts_are_not_tokenised_again(tokenizer: Any) -> None:
    class Counting:
        characters = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            self.characters += sum(map(len, texts))
            return tokenizer(texts, **kwargs)

    counting = Counting()
    tokens = PromptTokenizer(counting)
    tokens.encode([PROMPTS[0]])
    before = counting.characters
    tokens.encode([replace(PROMPTS[0], text=text) for text in ("abc", "abc", "defg")])
    assert counting.characters - before == len("abc\n") + len("defg\n")


def test_a_tokenizer_with_dependent_parts_gets_whole_prompts(tokenizer: Any) -> None:
    class Dependent:
        """Adds a token in front of every string, as tokenizers with a BOS token do."""

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: Any, **kwargs: Any) -> Any:
            encoded = tokenizer(texts, **kwargs)["input_ids"]
            return {"input_ids": [[0, *ids] for ids in encoded]}

    prompt = replace(PROMPTS[0], text="abc")
    ids = PromptTokenizer(Dependent()).encode([prompt])[prompt]
    assert ids.tolist() == [0, *tokenizer(str(prompt))["input_ids"]]
