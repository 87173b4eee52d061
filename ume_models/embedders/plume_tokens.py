"""The tokens that PLUME adds to its backbone's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ume_models.backbone.config import BackboneConfig
from ume_models.backbone.tokenizer import end_tokens
from ume_models.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = ("<gen_emb>", "<disc_emb>", "<bot>", "<eot>", "<ct>")
# Where the official training copies the rows of added tokens from, by backbone.
ROW_SOURCES = {
    "qwen2_vl": ("<|object_ref_end|>", "<|object_ref_start|>"),
    "qwen2_5_vl": ("</tool_call>", "<tool_call>"),
}
OPENING_TOKENS = ("<disc_emb>", "<bot>")
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class TokenIds:
    """Ids resolved by name; they differ between checkpoints."""

    gen_emb: int
    disc_emb: int
    eos: frozenset[int]


def token_ids(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Path]) -> TokenIds:
    """Resolve the tokens by name; what ends a sequence is read from ``generation_config.json``.

    Raises:
        CheckpointError: the tokenizer lacks one of them, or the file is damaged.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in TOKENS if token != "<ct>" and token not in vocabulary]
    if missing:
        raise CheckpointError(
            f"{sources[0] if sources else 'this model'}: the tokenizer does not know "
            f"{', '.join(missing)}; use the one that was saved with the PLUME checkpoint, not the "
            "base model's"
        )
    eos = end_tokens(tokenizer, sources)
    return TokenIds(vocabulary["<gen_emb>"], vocabulary["<disc_emb>"], eos)


def resize_vocabulary(
    state: dict[str, torch.Tensor],
    config: BackboneConfig,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
) -> BackboneConfig:
    """Give embedding and head one row per token of the tokenizer, as the official loader does.

    Raises:
        CheckpointError: a missing row belongs to none of the tokens.
    """
    size = len(tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise CheckpointError(
            f"{source}: the tokenizer has {size} tokens but ids up to {largest}; copy its files "
            "from the checkpoint again"
        )
    for key in EMBEDDINGS:
        rows = state[key].shape[0] if key in state else size
        if rows > size:
            state[key] = state[key][:size]
        elif rows < size:
            copied = _new_row_sources(tokenizer, config.family, rows, source)
            state[key] = torch.cat([state[key], state[key][copied]])
            warnings.warn(
                f"{source}: {key} lacks {size - rows} added tokens; their rows were copied as at "
                "the start of the official training, so they are untrained",
                stacklevel=5,
            )
    return replace(config, vocab_size=size)


def _new_row_sources(
    tokenizer: PreTrainedTokenizerBase, family: str, first: int, source: Path
) -> list[int]:
    """For every id from ``first`` to the vocabulary's end: the row its embedding is copied from.

    As the official training does when it adds the PLUME tokens.

    Raises:
        CheckpointError: a missing row belongs to no PLUME token.
    """
    closing, opening = (tokenizer.convert_tokens_to_ids(t) for t in ROW_SOURCES[family])
    rows = []
    for index in range(first, len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(index)
        copied = opening if token in OPENING_TOKENS else closing
        if token not in TOKENS or copied is None or copied >= first:
            raise CheckpointError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens but the embedding {first} "
                f"rows, and {token!r} cannot be added; the tokenizer belongs to another checkpoint"
            )
        rows.append(int(copied))
    return rows
