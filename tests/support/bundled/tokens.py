"""Byte-level BPE tokenizer of the bundled checkpoint, trained on its own texts.

The prompt of every PLUME input is mostly constant. Its constant sentences are single tokens
here (plain added tokens, as the PLUME tokens are), which shortens a text-only input from about
90 to about 50 tokens: a small model need not spend most of its time on words that never change.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ume_models.embedders.plume_prompt import GENERATION_PROMPT, PREFIX
from ume_models.processing.template import join_text

from .families import FAMILIES
from .tasks import TASKS

HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLUME = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_CONSTANT_PARTS = (
    "system\nYou are a helpful assistant.",
    "Represent the above input text, images, videos, or any combination of the three as "
    "embeddings. First output the thinking process in ",
    " tags and then summarize the entire input in a word or sentence. Finally, use the ",
    " tag to represent the entire input.",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for c in message['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(seed: int, lines: int = 6000) -> list[str]:
    """Captions of all families and the instructions, the texts the merges are learned on."""
    rng = Random(seed)
    texts = []
    for family in FAMILIES.values():
        specs = family.split(held_out=False)
        texts += [family.caption(rng.choice(specs), rng) for _ in range(lines // len(FAMILIES))]
    for task in TASKS:
        texts += [task.query_instruction, task.target_instruction] * 200
    return texts


def train_tokenizer(seed: int, vocab_size: int = 720) -> Tokenizer:
    """Train the BPE merges; added tokens come after the ``vocab_size`` learned ones.

    Args:
        seed: seed of the training texts.
        vocab_size: bytes plus merges; rounded down by what the texts can fill.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=False) for t in (*_TAGS, *_CONSTANT_PARTS, *PLUME)]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token of the vocabulary.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    index = tokenizer.token_to_id(token)
    if index is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return int(index)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.json``."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("tokenizer_config.json", config),
        ("chat_template.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def prompt(instruction: str, text: str, pads: str) -> str:
    """The full prefix of one input: prompt with expanded visual tokens, then ``<think><bot>``.

    Args:
        instruction: task instruction, may be empty.
        text: the input's own text, may be empty.
        pads: ``"<|image_pad|>"`` or ``"<|video_pad|>"`` once per merged visual token.
    """
    words = join_text(instruction, text)
    return (
        f"{HEADER}<|vision_start|>{pads}<|vision_end|>{words}\n<disc_emb>\n{GENERATION_PROMPT}"
        f"<|im_end|>\n<|im_start|>assistant\n{PREFIX}"
    )
