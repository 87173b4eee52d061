"""Files beside a checkpoint that name what it is and let other libraries open its folder.

The official code does not look at them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ume_models.atomic import write_atomically
from ume_models.backbone.checkpoint import write_json

# Imported by sentence-transformers when it opens the folder.
SENTENCE_MODULE = "ume_models.interfaces.sentence_transformers.EmbedderModule"
SENTENCE_MODULES = "modules.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"

IDENTITY_FILE = "ume.json"


def write_identity(
    target: Path, family: str, profile: str, options: Mapping[str, Any] | None = None
) -> None:
    """Name family, profile and options of a checkpoint, so that it is loaded as what it is."""
    given = {"options": dict(options)} if options else {}
    write_json(target / IDENTITY_FILE, {"family": family, "profile": profile, **given})


def write_library_files(target: Path, sources: Iterable[Path] = ()) -> None:
    """Write ``modules.json`` and ``config_sentence_transformers.json``.

    Args:
        target: the checkpoint's folder.
        sources: folders the checkpoint came from; the first one that has prompts keeps them.
    """
    write_json(
        target / SENTENCE_MODULES,
        [{"idx": 0, "name": "0", "path": "", "type": SENTENCE_MODULE}],
    )
    for source in sources:
        if (source / SENTENCE_CONFIG).is_file():
            write_atomically(target / SENTENCE_CONFIG, (source / SENTENCE_CONFIG).read_bytes())
            return
    write_json(
        target / SENTENCE_CONFIG,
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
