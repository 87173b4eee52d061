"""The bundled model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from tests.support.bundled import tokens
from ume_models.embedders.plume_prompt import GENERATION_PROMPT, PREFIX


def test_the_training_prompt_is_what_the_chat_template_renders(tmp_path: Path) -> None:
    tokens.save_tokenizer(tokens.train_tokenizer(0), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = "Find me an image that matches the given caption. a red circle above a blue star"
    content = [
        {"type": "image", "image": "unused"},
        {"type": "text", "text": f"{words}\n<disc_emb>\n{GENERATION_PROMPT}"},
    ]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    instruction, text = words.split(". ", 1)
    mine = tokens.prompt(instruction + ".", text, "<|image_pad|>")
    assert mine == rendered + PREFIX


def test_round_trip_and_single_tokens(tmp_path: Path) -> None:
    raw = tokens.train_tokenizer(0)
    tokens.save_tokenizer(raw, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokens.prompt("Zwölf Boxkämpfer:", "a red circle & 日本", "<|image_pad|>" * 4)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    for name in (*tokens.SPECIAL, *tokens.PLUME):
        assert tokenizer.encode(name, add_special_tokens=False) == [
            tokenizer.convert_tokens_to_ids(name)
        ]
    # PLUME's tokens are ordinary added tokens: skipping special tokens keeps them.
    assert tokenizer.decode(tokenizer.encode("<gen_emb>"), skip_special_tokens=True) == "<gen_emb>"
    assert len(tokenizer) == raw.get_vocab_size() < 1000


def test_training_is_deterministic() -> None:
    assert tokens.train_tokenizer(3).to_str() == tokens.train_tokenizer(3).to_str()
