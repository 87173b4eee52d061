"""Tokenizer of a checkpoint, with its chat template and the ids PLUME needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ume_models.backbone.config import read_json
from ume_models.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLUME_TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")
# Where the official training copies the rows of added tokens from, by model family.
TOKEN_SOURCES = {
    "qwen2_vl": ("<|object_ref_end|>", "<|object_ref_start|>"),
    "qwen2_5_vl": ("</tool_call>", "<tool_call>"),
}
OPENING_TOKENS = ("<disc_emb>", "<bot>")


@dataclass(frozen=True)
class TokenIds:
    """Ids resolved by name; they differ between checkpoints."""

    gen_emb: int
    disc_emb: int
    eos: frozenset[int]


def splitting_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides, beside the vocabulary, into which tokens a text falls; JSON-serialisable."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python: its class is its rules
        return {"class": type(tokenizer).__name__}
    rules = json.loads(backend.to_str())
    # Pairs are written as lists or as strings, depending on the version of the library.
    merges = [" ".join(pair) if isinstance(pair, list) else pair
              for pair in rules["model"].get("merges", ())]  # fmt: skip
    kept = {name: rules.get(name) for name in ("normalizer", "pre_tokenizer")}
    return {**kept, "merges": merges}


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a chat template.

    The template may stand in the tokenizer's config, in ``chat_template.json`` (published
    checkpoints) or in ``chat_template.jinja`` (newer transformers).

    Raises:
        CheckpointError: tokenizer files or template are missing; says what to copy from where.
    """
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{directory}: no tokenizer.json or vocab.json; copy the tokenizer files of the "
            "training run next to the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(f"{directory}: the tokenizer does not load ({error})") from error
    if not tokenizer.chat_template:
        template = directory / "chat_template.json"
        jinja = directory / "chat_template.jinja"
        if template.is_file():
            tokenizer.chat_template = read_json(template)["chat_template"]
        elif jinja.is_file():
            tokenizer.chat_template = jinja.read_text(encoding="utf-8")
        else:
            raise CheckpointError(
                f"{directory}: no chat template; copy chat_template.json from the base model "
                "(Qwen/Qwen2-VL-2B-Instruct for PLUME-2B) next to the weights"
            )
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, eos: frozenset[int], source: Path) -> TokenIds:
    """Resolve the PLUME tokens by name.

    Raises:
        CheckpointError: the tokenizer lacks one of them.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in PLUME_TOKENS if t != "<ct>" and t not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{source}: the tokenizer does not know {', '.join(missing)}; use the tokenizer that "
            "was saved with the PLUME checkpoint, not the base model's"
        )
    if not eos and tokenizer.eos_token_id is not None:
        eos = frozenset({int(tokenizer.eos_token_id)})
    return TokenIds(vocabulary["<gen_emb>"], vocabulary["<disc_emb>"], eos)


def new_row_sources(
    tokenizer: PreTrainedTokenizerBase, family: str, first: int, source: Path
) -> list[int]:
    """For every id from ``first`` to the vocabulary's end: the row its embedding is copied from.

    As the official training does when it adds the PLUME tokens.

    Raises:
        CheckpointError: a missing row belongs to no PLUME token.
    """
    closing, opening = (tokenizer.convert_tokens_to_ids(t) for t in TOKEN_SOURCES[family])
    rows = []
    for index in range(first, len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(index)
        copied = opening if token in OPENING_TOKENS else closing
        if token not in PLUME_TOKENS or copied is None or copied >= first:
            raise CheckpointError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens but the embedding {first} "
                f"rows, and {token!r} cannot be added; the tokenizer belongs to another checkpoint"
            )
        rows.append(int(copied))
    return rows
