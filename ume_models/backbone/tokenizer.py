"""Tokenizer of a checkpoint, with its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ume_models.backbone.fields import TEXT, field, read_json, real, several, whole
from ume_models.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    from transformers import AutoTokenizer, Qwen2VLConfig

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(
            f"{directory}: no tokenizer.json or vocab.json; copy the tokenizer files of the "
            "training run next to the weights"
        )
    settings = directory / "tokenizer_config.json"
    if settings.is_file() and (content := read_json(settings)).get("model_max_length") is not None:
        field(content, str(settings), "model_max_length", real(1, 1e31))
    try:
        # A configuration of its own, or errors in config.json would look like the tokenizer's.
        tokenizer = AutoTokenizer.from_pretrained(str(directory), config=Qwen2VLConfig())
    except Exception as error:  # transformers raises many types here
        raise CheckpointError(f"{directory}: the tokenizer does not load ({error})") from error
    if not tokenizer.chat_template:
        template = directory / "chat_template.json"
        jinja = directory / "chat_template.jinja"
        if template.is_file():
            content = read_json(template)
            tokenizer.chat_template = field(content, str(template), "chat_template", TEXT)
        elif jinja.is_file():
            tokenizer.chat_template = jinja.read_text(encoding="utf-8")
        else:
            raise CheckpointError(
                f"{directory}: no chat template; copy chat_template.json from the base model "
                "(such as Qwen/Qwen2-VL-2B-Instruct) next to the weights"
            )
    return tokenizer


def end_tokens(tokenizer: PreTrainedTokenizerBase, sources: Sequence[Path]) -> frozenset[int]:
    """Ids that end a generated text: those of ``generation_config.json``, or the tokenizer's.

    Raises:
        CheckpointError: the file is damaged.
    """
    for source in sources:
        path = source / "generation_config.json"
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        if value is not None:
            content = {"eos_token_id": value if isinstance(value, list) else [value]}
            return frozenset(field(content, str(path), "eos_token_id", several(whole(0, 10**7))))
    return frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
